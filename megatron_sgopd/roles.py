"""The models of a recipe with their weights: student, teacher, reference, each under its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_sgopd.config.schema import Config, FrozenConfig
from megatron_sgopd.frozen import Frozen
from megatron_sgopd.hf_files import read_hf_config, resolve_hf_dir
from megatron_sgopd.hf_weights import init_random_weights, load_hf_weights
from megatron_sgopd.model import ShardedModel, build_model
from megatron_sgopd.parallel import Groups, inner_groups
from megatron_sgopd.prompts import load_tokenizer


def _build(path: Path, config: Config, groups: Groups, *, trainable: bool) -> ShardedModel:
    return build_model(
        read_hf_config(path),
        groups,
        dtype=getattr(torch, config.model.dtype),
        transformer_impl=config.model.transformer_impl,
        trainable=trainable,
    )


def load_student(config: Config, groups: Groups, *, trainable: bool) -> ShardedModel:
    path = resolve_hf_dir(config.model.student.hf_path)
    model = _build(path, config, groups, trainable=trainable)
    if config.model.student.random_init:
        init_random_weights(model, config.seed)
    else:
        load_hf_weights(model, path)
    return model


def _frozen(model: ShardedModel, frozen: FrozenConfig, config: Config, groups: Groups) -> Frozen:
    megabytes = config.parallel.hidden_states_budget_mb
    budget = None if megabytes is None else megabytes * 2**20
    made = Frozen(model, groups, frozen.offload, budget)
    made.park()
    return made


def _own_layout(frozen: FrozenConfig, groups: Groups) -> Groups:
    return inner_groups(
        groups, frozen.tensor_model_parallel_size, frozen.pipeline_model_parallel_size
    )


def load_reference(config: Config, groups: Groups) -> Frozen:
    """The student's initial weights, or any directory of the same vocabulary."""
    reference = config.model.reference
    layout = _own_layout(reference, groups)
    if reference.hf_path is None:
        return _frozen(load_student(config, layout, trainable=False), reference, config, groups)
    path = resolve_hf_dir(reference.hf_path)
    model = _build(path, config, layout, trainable=False)
    load_hf_weights(model, path)
    return _frozen(model, reference, config, groups)


def load_teacher(config: Config, groups: Groups, student_config: Any) -> Frozen:
    teacher = config.model.teacher
    path = resolve_hf_dir(teacher.hf_path or "")
    teacher_config = read_hf_config(path)
    if teacher_config.vocab_size != student_config.vocab_size:
        raise ValueError(
            f"the teacher's vocabulary has {teacher_config.vocab_size} rows and the student's "
            f"{student_config.vocab_size}: both must share one tokenizer and one vocab_size"
        )
    ours, theirs = (
        load_tokenizer(p).get_vocab() for p in (resolve_hf_dir(config.model.student.hf_path), path)
    )
    if ours != theirs:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))[0]
        raise ValueError(
            f"student and teacher have different tokenizers (for example {odd[0]!r}): token "
            "log-probs cannot be compared; use a teacher of the student's tokenizer"
        )
    model = _build(path, config, _own_layout(teacher, groups), trainable=False)
    load_hf_weights(model, path)
    return _frozen(model, teacher, config, groups)
