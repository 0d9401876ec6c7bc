"""The Triton kernels of the loss: their numbers, their machine code, and when they are taken."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgopd.vocab_parallel import backend, distillation_loss
from tests.support.triton_cases import EXCLUDED, KINDS, LOSSES, Case

ROOT = Path(__file__).resolve().parents[2]
# The gradient is rounded to the logits' type, which the interpreter does towards 0.
GRADIENT = {"float32": 5e-7, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def in_a_process(*arguments: str, **variables: str) -> Any:
    """What tests.support.triton_cases prints."""
    command = [sys.executable, "-m", "tests.support.triton_cases", *arguments]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment = {**inherited, **variables}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return in_a_process("interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("triton"))
    return in_a_process("compile", folder, TRITON_CACHE_DIR=folder)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_losses_and_gradients_are_those_of_float64(interpreted: Any, case: Case) -> None:
    errors = interpreted["losses"][str(case)]
    assert errors["losses"] < 3e-7
    assert errors["gradient"] < GRADIENT[case.dtype]
    assert errors["logprobs"] < 2e-6
    assert errors["entropy"] < 2e-6
    assert errors["elsewhere"] == 0.0


@pytest.mark.parametrize("which", EXCLUDED)
@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_those_of_plain_pytorch(interpreted: Any, kind: str, which: str) -> None:
    columns = interpreted["columns"][f"{kind}, {which}"]
    for plain, ours in zip(columns["torch"], columns["triton"], strict=True):
        if math.isfinite(plain):
            assert ours == pytest.approx(plain, rel=1e-6, abs=1e-6)
        else:
            assert ours == plain or (math.isnan(ours) and math.isnan(plain))


def test_rows_are_read_and_written_where_they_lie(interpreted: Any) -> None:
    assert interpreted["places"] == dict.fromkeys(interpreted["places"], 0.0)
    assert len(interpreted["places"]) == 5


def test_a_narrower_gradient_goes_into_the_memory_of_the_logits(interpreted: Any) -> None:
    assert interpreted["narrow"] < GRADIENT["bfloat16"]


@pytest.mark.parametrize("in_main_grad", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-7), ("bfloat16", 1.5e-2)])
def test_gradients_of_hidden_states(
    interpreted: Any, dtype: str, bound: float, in_main_grad: bool
) -> None:
    errors = interpreted["hidden"][f"{dtype}, {in_main_grad}"]
    assert errors["triton"] < bound
    # Its gradient is rounded once more on the way to bf16, and by the interpreter towards 0.
    assert errors["triton"] < 1.5 * errors["torch"] + 5e-7


@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_the_whole_rows_gradient(interpreted: Any, kind: str) -> None:
    errors = interpreted["halves"][kind]
    assert max(errors.values()) < 5e-7
    assert sorted(errors) == ["200", "300"]  # with 300 the second rank holds padding only


def test_an_infinite_divergence_is_refused_by_name(interpreted: Any) -> None:
    assert interpreted["refusal"].startswith("1 of 3 tokens have an infinite reverse KL")


def test_an_infinite_divergence_without_weight_is_no_nan(interpreted: Any) -> None:
    assert max(interpreted["unweighted"].values()) < 5e-7


def test_no_token_needs_no_launch(interpreted: Any) -> None:
    assert interpreted["empty"] == [16, 0]


def test_kernels_compile_to_wide_reads_without_spilling(compiled: Any) -> None:
    assert len(compiled) == 8
    for name, used in compiled.items():
        assert used["spilled"] == 0, name
        assert used["registers"] <= 96, name  # two programs of 256 threads have place at least
        assert used["wide_reads"] > 0, name
        assert used["narrow_reads"] <= 3, name  # one model's sampled token each


def test_the_gpu_bench_says_that_there_is_no_gpu() -> None:
    variables = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "tools/gpu_bench.sh")]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.returncode == 2
    assert re.fullmatch(r"gpu_bench: .* sees no GPU here; .*\n", result.stderr)


# -- when they are taken ---------------------------------------------------------------------------


def loss(name: str, **options: Any) -> torch.Tensor:
    rows = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    return distillation_loss(
        rows[0],
        rows[1],
        tokens=torch.tensor([1, 2, 3]),
        mask=torch.ones(3),
        vocab_size=11,
        coefficients=lambda s: (torch.ones(3), torch.ones(3), torch.zeros(3)),
        lambdas=(1.0,),
        backend=name,
        **{"estimator": "full_vocab", **options},
    ).loss


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"divergence": "jsd"}, "Jensen-Shannon"),
        ({"top_k": 2}, "top k"),
    ],
)
def test_objectives_without_kernels_are_refused_by_name(options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"'triton' has no kernels for the .*{named}"):
        loss("triton", **options)
    assert loss("auto", **options).isfinite()


def test_logits_on_a_cpu_are_refused_by_name_and_left_to_pytorch() -> None:
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs, and the logits are on cpu"):
        loss("triton")
    assert loss("auto") == loss("torch")


def test_a_triton_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("megatron_sgopd.vocab_parallel.triton_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    backend._import.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"'triton' cannot be imported \(.*triton.*\)"):
            loss("triton")
        assert loss("auto") == loss("torch")
    finally:
        backend._import.cache_clear()


def test_importing_the_package_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import megatron_sgopd.vocab_parallel as v; "
        "assert not [n for n in sys.modules if n.startswith(v.__name__ + '.triton_')]"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
