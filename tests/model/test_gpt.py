"""Megatron's GPT from a Hugging Face config, against transformers on the same weights (fp32)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import model_cases
from tests.support.tiny import make_hf_dir

TOLERANCE = 1e-5  # max|d| / max|ref|
RAGGED = (9, 1, 16, 5)

# name -> sizes; `options` has other values of everything that the function reads
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"vocab": 37, "tied": False},
    "tied": {"vocab": 37, "tied": True},
    "deep": {"vocab": 101, "layers": 3, "hidden": 96, "heads": 6, "kv": 6, "head_dim": 16},
    "grouped": {"vocab": 64, "layers": 1, "heads": 8, "kv": 2, "head_dim": 64, "tied": True},
    "options": {
        "vocab": 37,
        "rms_norm_eps": 3e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50},
    },
    "Qwen2.5": {"family": "qwen2", "vocab": 37, "layers": 3},
    "Qwen2.5, tied": {"family": "qwen2", "vocab": 37, "heads": 8, "tied": True},
    "Llama 3": {"family": "llama", "vocab": 37},
    "Llama 3, odd": {"family": "llama", "vocab": 331, "layers": 3, "head_dim": 96, "tied": True},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: str(make_hf_dir(folder / name, seed, **sizes))
        for seed, (name, sizes) in enumerate(MODELS.items(), 21)
    }


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_hidden_states_equal_transformers(
    name: str, tp: int, pool: Any, paths: dict[str, str]
) -> None:
    for got in pool(2).run(model_cases.compare_with_transformers, paths[name], tp, RAGGED):
        assert got.logits_error < TOLERANCE
        assert got.hand_over_error < TOLERANCE


def test_one_sequence_and_one_token(pool: Any, paths: dict[str, str]) -> None:
    for lengths in [(12,), (1,)]:
        for got in pool(2).run(model_cases.compare_with_transformers, paths["tied"], 2, lengths):
            assert got.logits_error < TOLERANCE


@pytest.mark.parametrize(
    ("tp", "divisible_by", "rows"),
    [(1, 128, 128), (2, 128, 256), (1, 1, 37), (2, 1, 38), (2, 4, 40)],
)
def test_the_vocabulary_is_padded_to_a_multiple(
    tp: int, divisible_by: int, rows: int, pool: Any, paths: dict[str, str]
) -> None:
    for got in pool(2).run(
        model_cases.compare_with_transformers, paths["untied"], tp, RAGGED, divisible_by
    ):
        assert got.vocabulary == (rows, rows // tp)
        assert got.padding == rows - 37
        assert got.logits_error < TOLERANCE


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_every_cut_weight_is_marked_for_the_gradient_norm(
    name: str, tp: int, pool: Any, paths: dict[str, str]
) -> None:
    """Without the mark Megatron's norm counts a weight on the first TP rank alone."""
    for marks in pool(2).run(model_cases.tensor_parallel_marks, paths[name], tp):
        linear = [n for n in marks if "layernorm" not in n]
        assert len(linear) == 2 * 4 + (1 if name == "tied" else 2)
        for parameter, (marked, dim, cut) in marks.items():
            assert marked == (parameter in linear), parameter
            if marked:
                assert dim == cut, parameter


def test_trainable_and_frozen(pool: Any, paths: dict[str, str]) -> None:
    for modes in pool(2).run(model_cases.built_modes, paths["tied"]):
        assert modes[True] == (True, {True}, {torch.bfloat16})
        assert modes[False] == (False, {False}, {torch.bfloat16})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types 'sliding_attention'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000}}, "rope_type 'yarn'"),
        (
            {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, "rope_theta 0.5"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(
    changes: dict[str, Any], named: str, pool: Any, paths: dict[str, str]
) -> None:
    for message in pool(2).run(model_cases.refusal, paths["untied"], 1, changes):
        assert f"config.json has {named}" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, "num_attention_heads 3"),
        ({"num_key_value_heads": 1}, "num_key_value_heads 1"),
        ({"intermediate_size": 145}, "intermediate_size 145"),
    ],
)
def test_a_size_that_tensor_parallelism_cannot_cut(
    changes: dict[str, Any], named: str, pool: Any, paths: dict[str, str]
) -> None:
    assert pool(2).run(model_cases.refusal, paths["untied"], 1, changes) == [None, None]
    for message in pool(2).run(model_cases.refusal, paths["untied"], 2, changes):
        assert f"config.json has {named}" in message
        assert "tensor_model_parallel_size 2" in message


def test_transformer_engine_is_refused_where_it_is_missing(
    pool: Any, paths: dict[str, str]
) -> None:
    for message in pool(2).run(model_cases.refusal_without_te, paths["untied"]):
        assert "model.transformer_impl is 'transformer_engine', which is not installed" in message
