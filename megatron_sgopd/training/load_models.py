"""The models of a recipe with their weights: student, teacher, reference, each under its layout.

Their vocabularies may be padded to different numbers of rows. A frozen model gets as many as the
student has, so that their shards face each other; rows that one of the models lacks are padding,
and enter no softmax (`ShardedModel.shared_vocab_size`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sgopd.config.checks import needs_reference, needs_teacher
from megatron_sgopd.config.schema import Config, DistillConfig, FrozenConfig, ModelConfig
from megatron_sgopd.distributed.groups import Groups, inner_groups
from megatron_sgopd.model.families import EMBEDDING, HEAD
from megatron_sgopd.model.gpt import ShardedModel, build_model
from megatron_sgopd.model.hf_location import read_hf_config, resolve_hf_dir
from megatron_sgopd.model.hf_reader import iter_safetensors
from megatron_sgopd.model.weight_stream import init_random_weights, load_hf_weights, load_stream
from megatron_sgopd.training.frozen import Frozen
from megatron_sgopd.training.student import Student, make_student


@dataclass(frozen=True)
class Vocabulary:
    """The student's vocabulary rows, and how many of them all models of the run have."""

    rows: int
    shared: int

    @classmethod
    def from_config(cls, model: ModelConfig, distill: DistillConfig) -> Vocabulary:
        """Reads the config.json of every model that the method needs."""
        needed = [
            model.teacher.hf_path if needs_teacher(distill) else None,
            model.reference.hf_path if needs_reference(distill) else None,
        ]
        rows = _rows(model.student.hf_path)
        return cls(rows, min([rows, *(_rows(path) for path in needed if path is not None)]))


@dataclass(frozen=True)
class Models:
    """The models of a run on this rank; `student_dir` has the student's config and tokenizer."""

    student: Student
    teacher: Frozen | None
    reference: Frozen | None
    student_dir: Path


def load_models(config: Config, groups: Groups, student_dir: Path) -> Models:
    """Loads the student to be trained and the frozen models that the objective needs. Collective.

    Raises:
        ValueError: weights that are missing, damaged or of other shapes.
    """
    recipe, distill, seed = config.model, config.distill, config.seed
    vocabulary = Vocabulary.from_config(recipe, distill)
    model = load_student(recipe, groups, vocabulary, trainable=True, seed=seed)
    teacher = reference = None
    if needs_teacher(distill):
        teacher = load_teacher(recipe, groups, vocabulary)
    if needs_reference(distill):
        reference = load_reference(recipe, groups, vocabulary, seed=seed)
    student = make_student(model, config.optimizer, config.num_steps)
    return Models(student, teacher, reference, student_dir)


def _rows(path: str) -> int:
    return int(read_hf_config(resolve_hf_dir(path)).vocab_size)


def load_student(
    recipe: ModelConfig, groups: Groups, vocabulary: Vocabulary, *, trainable: bool, seed: int
) -> ShardedModel:
    """Loads the student's weights, or draws them where the recipe says so. Collective."""
    path = resolve_hf_dir(recipe.student.hf_path)
    model = build_model(
        read_hf_config(path),
        groups,
        dtype=getattr(torch, recipe.dtype),
        transformer_impl=recipe.transformer_impl,
        trainable=trainable,
        shared_vocab_size=vocabulary.shared,
    )
    if recipe.student.random_init:
        init_random_weights(model, seed)
    else:
        load_hf_weights(model, path)
    return model


def load_reference(
    recipe: ModelConfig, groups: Groups, vocabulary: Vocabulary, *, seed: int
) -> Frozen:
    """Loads the student's initial weights, or any directory of the same tokenizer. Collective."""
    reference = recipe.reference
    layout = _own_layout(reference, groups)
    if reference.hf_path is None:
        model = load_student(recipe, layout, vocabulary, trainable=False, seed=seed)
    else:
        model = load_frozen(reference.hf_path, recipe, layout, vocabulary)
    return _frozen(model, reference, groups)


def load_teacher(recipe: ModelConfig, groups: Groups, vocabulary: Vocabulary) -> Frozen:
    """Loads the teacher under its own layout, or the student's. Collective."""
    teacher = recipe.teacher
    model = load_frozen(teacher.hf_path or "", recipe, _own_layout(teacher, groups), vocabulary)
    return _frozen(model, teacher, groups)


def load_frozen(
    hf_path: str, recipe: ModelConfig, groups: Groups, vocabulary: Vocabulary
) -> ShardedModel:
    """Loads a model without gradient, with the student's number of vocabulary rows."""
    path = resolve_hf_dir(hf_path)
    hf_config = read_hf_config(path)
    own_rows, hf_config.vocab_size = hf_config.vocab_size, vocabulary.rows
    model = build_model(
        hf_config,
        groups,
        dtype=getattr(torch, recipe.dtype),
        transformer_impl=recipe.transformer_impl,
        trainable=False,
        shared_vocab_size=vocabulary.shared,
    )
    if own_rows == vocabulary.rows:
        load_hf_weights(model, path)
    else:
        load_stream(model, _with_rows(path, own_rows, vocabulary.rows), source=str(path))
    return model


def _with_rows(path: Path, own_rows: int, rows: int) -> Iterator[tuple[str, Tensor]]:
    """A directory's weights, the vocabulary cut or padded with zeros to `rows`."""
    for name, tensor in iter_safetensors(path):
        if name not in (EMBEDDING, HEAD):
            yield name, tensor
        elif tensor.shape[0] != own_rows:
            raise ValueError(
                f"{path}: {name!r} has {tensor.shape[0]} rows, config.json says vocab_size "
                f"{own_rows}"
            )
        else:
            padding = tensor.new_zeros(max(0, rows - own_rows), *tensor.shape[1:])
            yield name, torch.cat([tensor[:rows], padding])


def _frozen(model: ShardedModel, frozen: FrozenConfig, groups: Groups) -> Frozen:
    megabytes = groups.config.hidden_states_budget_mb
    budget = None if megabytes is None else megabytes * 2**20
    made = Frozen(model, groups, frozen.offload, budget)
    made.offload_weights()
    return made


def _own_layout(frozen: FrozenConfig, groups: Groups) -> Groups:
    return inner_groups(
        groups, frozen.tensor_model_parallel_size, frozen.pipeline_model_parallel_size
    )
