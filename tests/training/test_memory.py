"""Each way of saving memory leaves the numbers alone and saves what it says, in resident memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support import memory_cases
from tests.support.memory_cases import SIZES, VOCAB


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process of its own, so that nothing but the step is in its memory."""
    folder = tmp_path_factory.mktemp("memory")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.memory_cases", str(folder)],
        capture_output=True,
        text=True,
        env=memory_cases.environment(),
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def megabytes_of_one_model() -> float:
    """Weights of the untied teacher in fp32."""
    hidden, heads, kv, d = (SIZES[k] for k in ("hidden", "heads", "kv", "head_dim"))
    layer = hidden * d * (2 * heads + 2 * kv) + 3 * hidden * (2 * hidden + 16)
    return float(4 * (SIZES["layers"] * layer + 2 * VOCAB * hidden) / 2**20)


@pytest.mark.parametrize("name", [n for n in memory_cases.VARIANTS if "full_vocab" not in n])
def test_the_numbers_are_unchanged(measured: dict[str, Any], name: str) -> None:
    """After two steps; the matrix compares every gradient."""
    plain, other = (measured["variants"][n] for n in ("plain", name))
    assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "share"), [("full recompute", 0.3), ("selective recompute (core_attn, mlp)", 0.1)]
)
def test_recomputing_activations_saves_a_share_of_the_peak(
    measured: dict[str, Any], name: str, share: float
) -> None:
    plain, other = (measured["variants"][n]["peak_mb"] for n in ("plain", name))
    assert other < (1 - share) * plain


def test_packing_leaves_the_padding_out(measured: dict[str, Any]) -> None:
    plain, packed = (measured["variants"][n] for n in ("plain", "packed"))
    assert plain["padding_share"] > 0.1
    assert packed["padding_share"] == 0.0
    assert packed["peak_mb"] < plain["peak_mb"]


@pytest.mark.parametrize(
    ("name", "models"), [("teacher and reference offload", 2.0), ("optimizer.offload", 1.5)]
)
def test_what_is_offloaded_is_away_while_the_step_peaks(
    measured: dict[str, Any], name: str, models: float
) -> None:
    """Two frozen models' layers and embeddings (heads stay); two moments of the tied student."""
    plain, other = (measured["variants"][n] for n in ("plain", name))
    expected = 0.6 * models * megabytes_of_one_model() / (1 if "optimizer" in name else 1.3)
    assert plain["at_rest_mb"] - other["at_rest_mb"] > expected
    assert plain["peak_mb"] - other["peak_mb"] > 0.8 * expected


@pytest.mark.skipif(not memory_cases.LONG, reason="too few tokens to see: make test LONG=1")
def test_hidden_states_beyond_the_budget_leave_the_device(measured: dict[str, Any]) -> None:
    """4 bytes x tokens x width, of teacher and reference."""
    names = ("full_vocab", "full_vocab, hidden_states_budget_mb 0")
    kept, spilled = (measured["variants"][n] for n in names)
    assert spilled["loss"] == pytest.approx(kept["loss"], rel=1e-6)
    states = 2 * 4 * measured["tokens"] * SIZES["hidden"] / 2**20
    assert kept["peak_mb"] - spilled["peak_mb"] > 0.5 * states
