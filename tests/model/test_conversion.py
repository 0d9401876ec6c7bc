"""Conversion between Hugging Face and Megatron: no bit changes, little memory, own ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_sgopd.model.families import hf_shapes
from megatron_sgopd.model.hf_location import read_hf_config
from megatron_sgopd.model.hf_reader import iter_safetensors
from megatron_sgopd.model.model_card import Origin, model_card, origin_json
from tests.support import conversion_cases
from tests.support.conversion_cases import FAMILIES, LAYOUTS, to_hf, to_megatron, weights_of
from tests.support.pool import Pool
from tests.support.tiny import make_hf_dir

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversion_cases.make_source(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def checkpoint(pool: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "mcore"
    conversion_cases.run(pool, to_megatron(source, path, 2))
    return path


# -- nothing changes -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("written", LAYOUTS, ids=lambda size: "TP{} PP{}".format(*size))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_is_bit_identical_without_the_source(
    pool: Any, tmp_path: Path, family: str, written: tuple[int, int], tied: bool
) -> None:
    hf = make_hf_dir(tmp_path / "hf", 7, tied=tied, **FAMILIES[family])
    read = LAYOUTS[3 - LAYOUTS.index(written)]  # another layout than the writer's
    out = conversion_cases.round_trip(pool, hf, tmp_path, written, read)
    assert weights_of(out) == weights_of(hf)
    assert len(list(out.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", LAYOUTS, ids=lambda size: "TP{} PP{}".format(*size))
@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_step_the_export_has_the_trainers_logits(
    pool: Any, tmp_path: Path, family: str, size: tuple[int, int], tied: bool
) -> None:
    hf = make_hf_dir(tmp_path / "hf", 7, tied=tied, **FAMILIES[family])
    tp, pp = size
    out, run_dir = tmp_path / "out", tmp_path / "run"
    case = conversion_cases.one_step
    logits = pool(tp * pp).run(case, str(hf), tp, pp, str(run_dir), str(out))
    assert conversion_cases.logit_error(logits, out) < 1e-5
    assert weights_of(out) != weights_of(hf)
    # The run's checkpoint gives the same export, by the tool, on one rank, without the source.
    shutil.rmtree(hf)
    conversion_cases.run(pool, to_hf(run_dir, tmp_path / "again"))
    assert weights_of(tmp_path / "again") == weights_of(out)


def test_a_type_is_kept_or_changed_on_request(pool: Any, tmp_path: Path) -> None:
    hf = make_hf_dir(tmp_path / "hf", 3, dtype=torch.bfloat16, **FAMILIES["qwen2"])
    conversion_cases.run(pool, to_megatron(hf, tmp_path / "kept"))
    conversion_cases.run(pool, to_hf(tmp_path / "kept", tmp_path / "back"))
    assert weights_of(tmp_path / "back") == weights_of(hf)
    conversion_cases.run(pool, to_hf(tmp_path / "kept", tmp_path / "wide", dtype="float32"))
    conversion_cases.run(pool, to_megatron(hf, tmp_path / "wide_mcore", dtype="float32"))
    conversion_cases.run(pool, to_hf(tmp_path / "wide_mcore", tmp_path / "wide_back"))
    conversion_cases.run(pool, to_megatron(tmp_path / "wide", tmp_path / "half", dtype="float16"))
    conversion_cases.run(pool, to_hf(tmp_path / "half", tmp_path / "half_back"))
    narrow = dict(iter_safetensors(tmp_path / "half_back"))
    assert all(torch.equal(narrow[n], w.half()) for n, w in iter_safetensors(hf))
    for folder in ("wide", "wide_back"):
        weights = dict(iter_safetensors(tmp_path / folder))
        assert {w.dtype for w in weights.values()} == {torch.float32}
        assert all(torch.equal(weights[n], w.float()) for n, w in iter_safetensors(hf))
        assert AutoModelForCausalLM.from_pretrained(tmp_path / folder).dtype == torch.float32


def test_several_types_become_the_one_that_is_chosen(pool: Any, tmp_path: Path) -> None:
    hf = make_hf_dir(tmp_path / "hf", 3, **FAMILIES["qwen2"])
    weights = {n: w.half() if "k_proj" in n else w for n, w in iter_safetensors(hf)}
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, hf / "model.safetensors")
    conversion_cases.run(pool, to_megatron(hf, tmp_path / "mcore", dtype="float32"))
    conversion_cases.run(pool, to_hf(tmp_path / "mcore", tmp_path / "out"))
    for name, weight in iter_safetensors(tmp_path / "out"):
        assert weight.dtype == torch.float32 and torch.equal(weight, weights[name].float())


@pytest.mark.parametrize("size", LAYOUTS, ids=lambda size: "TP{} PP{}".format(*size))
def test_megatrons_own_loader_reads_it_under_any_layout(
    pool: Any, source: Path, checkpoint: Path, size: tuple[int, int]
) -> None:
    tp, pp = size
    case = conversion_cases.read_by_megatron
    for read in pool(tp * pp).run(case, str(checkpoint), tp, pp):
        assert read == weights_of(source)


def test_what_travels_with_the_weights(
    pool: Any, source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    conversion_cases.run(pool, to_hf(checkpoint, out))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_text() == (source / name).read_text()
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 3}
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: mine\nlibrary_name: transformers\n")
    # An export is a source again, and keeps where it is from.
    conversion_cases.run(pool, to_megatron(out, tmp_path / "again"))
    conversion_cases.run(pool, to_hf(tmp_path / "again", tmp_path / "out again"))
    assert (tmp_path / "out again" / "README.md").read_text() == card


def test_the_card_names_samples_and_sets() -> None:
    each = {"aime": {"avg_at_k": 0.25}, "hmmt": {"avg_at_k": 0.75}}
    results = {"avg_at_k": 0.5, "ci95": [0.4, 0.6], "pass_at_k": 0.9, "num_samples": 32, "k": 4}
    card = model_card(Origin("mine"), step=9, results=results | {"benchmarks": each})
    rows = [line for line in card.splitlines() if line.startswith("|")][2:]
    assert rows == [
        "| avg@32 | 50.0 % |",
        "| 95 % interval of avg@32 | 40.0 – 60.0 % |",
        "| pass@4 | 90.0 % |",
        "| avg@32 on aime | 25.0 % |",
        "| avg@32 on hmmt | 75.0 % |",
    ]


# -- memory ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lean() -> Iterator[Pool]:
    """A rank whose allocator gives back what is freed: else glibc's heap is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 17))
        pool = Pool(1)
        pool.run(os.getpid)  # starts it
    yield pool
    pool.close()


def test_conversion_holds_a_few_layers_and_not_the_model(lean: Pool, tmp_path: Path) -> None:
    """On one rank, which would hold the whole model."""
    sizes = {"layers": 24, "hidden": 512, "heads": 8, "vocab": 2048}
    hf = make_hf_dir(tmp_path / "hf", 3, tied=True, **sizes)
    shapes = hf_shapes(read_hf_config(hf))
    total = sum(4 * torch.Size(s).numel() for s in shapes.values())
    layer = sum(4 * torch.Size(s).numel() for n, s in shapes.items() if ".layers.0." in n)
    assert total > 20 * layer
    jobs = {
        "to Megatron": to_megatron(hf, tmp_path / "mcore"),
        "to Hugging Face": to_hf(tmp_path / "mcore", tmp_path / "out"),
    }
    for name, job in jobs.items():
        (grown,) = lean.run(conversion_cases.peak_growth, job.to_json())
        print(f"{name}: {grown / MIB:.1f} MiB, layer {layer / MIB:.1f}, all {total / MIB:.1f}")
        assert grown < 4 * layer
    assert weights_of(tmp_path / "out") == weights_of(hf)
    shutil.rmtree(tmp_path)


# -- as a user runs it -----------------------------------------------------------------------------


def test_the_tools_start_their_own_ranks(tmp_path: Path) -> None:
    hf = make_hf_dir(tmp_path / "hf", 3, **FAMILIES["llama"])
    expected = weights_of(hf)

    def call(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    mcore, out = str(tmp_path / "mcore"), str(tmp_path / "out")
    sizes = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    done = call("hf_to_megatron", "--hf", str(hf), "--out", mcore, *sizes)
    assert f"{mcore}: 30 tensors of {hf}, float32" in done.stdout
    assert f"warning: {hf} has no tokenizer" in done.stderr
    shutil.rmtree(hf)
    done = call("megatron_to_hf", "--checkpoint", mcore, "--out", out, "--max-shard-size", "1MB")
    assert f"warning: {mcore}/hf has no tokenizer" in done.stderr
    assert weights_of(Path(out)) == expected
    assert len(list(Path(out).glob("model-*-of-*.safetensors"))) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mcore", "out"]


# -- against NVIDIA's converter --------------------------------------------------------------------


def test_megatron_bridge_makes_the_same_parameters(pool: Any, tmp_path: Path) -> None:
    pytest.importorskip(
        "megatron.bridge", reason="megatron-bridge needs Transformer Engine, which needs a GPU"
    )
    hf = make_hf_dir(tmp_path / "hf", 3, **FAMILIES["qwen3"])
    assert pool(1).run(conversion_cases.differs_from_bridge, str(hf)) == [[]]


def test_an_export_needs_no_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may run from a folder (PYTHONPATH, a container with the code mounted)."""
    monkeypatch.setattr("megatron_sgopd.model.model_card.installed", lambda package: None)
    assert "not installed" in json.loads(origin_json(Origin()))["written_by"]
