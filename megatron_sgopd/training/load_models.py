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

from megatron_sgopd.config.schema import Config, FrozenConfig
from megatron_sgopd.distributed.groups import Groups, inner_groups
from megatron_sgopd.model.families import EMBEDDING, HEAD
from megatron_sgopd.model.gpt import ShardedModel, build_model
from megatron_sgopd.model.hf_location import read_hf_config, resolve_hf_dir
from megatron_sgopd.model.hf_reader import iter_safetensors
from megatron_sgopd.model.weight_stream import init_random_weights, load_hf_weights, load_stream
from megatron_sgopd.training.frozen import Frozen
from megatron_sgopd.training.objective import Objective
from megatron_sgopd.training.student import Student, make_student


@dataclass(frozen=True)
class Vocabulary:
    """Of a run: the student's rows, and how many of them all its models have."""

    rows: int
    shared: int

    @classmethod
    def from_config(cls, config: Config) -> Vocabulary:
        """Reads the config.json of every model that the recipe's objective needs."""
        model, objective = config.model, Objective.from_config(config, eps=0.0)
        needed = [
            model.teacher.hf_path if objective.needs_teacher else None,
            model.reference.hf_path if objective.needs_reference else None,
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
    objective, vocabulary = Objective.from_config(config, eps=0.0), Vocabulary.from_config(config)
    model = load_student(config, groups, vocabulary, trainable=True)
    teacher = load_teacher(config, groups, vocabulary) if objective.needs_teacher else None
    reference = load_reference(config, groups, vocabulary) if objective.needs_reference else None
    return Models(make_student(model, config), teacher, reference, student_dir)


def _rows(path: str) -> int:
    return int(read_hf_config(resolve_hf_dir(path)).vocab_size)


def load_student(
    config: Config, groups: Groups, vocabulary: Vocabulary, *, trainable: bool
) -> ShardedModel:
    path = resolve_hf_dir(config.model.student.hf_path)
    model = build_model(
        read_hf_config(path),
        groups,
        dtype=getattr(torch, config.model.dtype),
        transformer_impl=config.model.transformer_impl,
        trainable=trainable,
        shared_vocab_size=vocabulary.shared,
    )
    if config.model.student.random_init:
        init_random_weights(model, config.seed)
    else:
        load_hf_weights(model, path)
    return model


def load_reference(config: Config, groups: Groups, vocabulary: Vocabulary) -> Frozen:
    """The student's initial weights, or any directory of the same tokenizer."""
    reference = config.model.reference
    layout = _own_layout(reference, groups)
    if reference.hf_path is None:
        model = load_student(config, layout, vocabulary, trainable=False)
    else:
        model = load_frozen(reference.hf_path, config, layout, vocabulary)
    return _frozen(model, reference, config, groups)


def load_teacher(config: Config, groups: Groups, vocabulary: Vocabulary) -> Frozen:
    teacher = config.model.teacher
    model = load_frozen(teacher.hf_path or "", config, _own_layout(teacher, groups), vocabulary)
    return _frozen(model, teacher, config, groups)


def load_frozen(
    hf_path: str, config: Config, groups: Groups, vocabulary: Vocabulary
) -> ShardedModel:
    """A model without gradient, with the student's number of vocabulary rows."""
    path = resolve_hf_dir(hf_path)
    hf_config = read_hf_config(path)
    own_rows, hf_config.vocab_size = hf_config.vocab_size, vocabulary.rows
    model = build_model(
        hf_config,
        groups,
        dtype=getattr(torch, config.model.dtype),
        transformer_impl=config.model.transformer_impl,
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


def _frozen(model: ShardedModel, frozen: FrozenConfig, config: Config, groups: Groups) -> Frozen:
    megabytes = config.parallel.hidden_states_budget_mb
    budget = None if megabytes is None else megabytes * 2**20
    made = Frozen(model, groups, frozen.offload, budget)
    made.offload_weights()
    return made


def _own_layout(frozen: FrozenConfig, groups: Groups) -> Groups:
    return inner_groups(
        groups, frozen.tensor_model_parallel_size, frozen.pipeline_model_parallel_size
    )
