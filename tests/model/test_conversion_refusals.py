"""What the converters refuse, by name: they say what and why, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sgopd.model.families import family_of
from megatron_sgopd.model.hf_reader import iter_safetensors
from tests.support import conversion_cases
from tests.support.conversion_cases import to_hf, to_megatron, weights_of
from tests.support.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
Main = Callable[[list[str]], int]


def tool(name: str) -> Main:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Main = module.main
    return main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversion_cases.make_source(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def checkpoint(pool: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "mcore"
    conversion_cases.run(pool, to_megatron(source, path, 2))
    return path


def refusal(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> str:
    """What a tool says on the way out; it starts no rank."""
    capsys.readouterr()
    assert tool(name)(list(arguments)) == 2
    return capsys.readouterr().err


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {  # changes of config.json, and what is said
    "architecture": ({"model_type": "gpt2"}, "model_type 'gpt2'; supported are 'qwen3'"),
    "mixture of experts": ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
    "another head": (
        {"architectures": ["Qwen3ForSequenceClassification"]},
        "architectures 'Qwen3ForSequenceClassification'; supported for Qwen3 dense",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "sliding window": (
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": None},
        "use_sliding_window True",
    ),
    "sliding layers": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types 'sliding_attention'",
    ),
    "attention bias": ({"attention_bias": True}, "attention_bias True"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "code of its own": ({"auto_map": {"AutoModel": "modeling.X"}}, "auto_map"),
    "both ways": ({"is_causal": False}, "is_causal False"),
    "yarn": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "rope_type 'yarn'",
    ),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        "rope_type 'linear'",
    ),
    "part of the head": (
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        "partial_rotary_factor 0.5",
    ),
    "odd theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}},
        "rope_theta 10000.5",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_config_that_would_be_computed_otherwise_is_refused(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, said = OPTIONS[case]
    hf = shutil.copytree(source, tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | changes))
    error = refusal(capsys, "hf_to_megatron", "--hf", str(hf), "--out", str(tmp_path / "out"))
    assert error.startswith("error: config.json has ") and said in error
    assert not (tmp_path / "out").exists()


def test_a_kind_of_model_that_nobody_knows_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = shutil.copytree(source, tmp_path / "hf")
    (hf / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    error = refusal(capsys, "hf_to_megatron", "--hf", str(hf), "--out", str(tmp_path / "out"))
    assert error.startswith(f"error: {hf}/config.json cannot be read: ") and "`nonsense`" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [("mlp_bias", "mlp_bias True; supported for Llama 3"), ("attention_bias", "attention_bias")],
)
def test_biases_of_llama_are_refused(option: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        family_of(tiny_config(family="llama", **{option: True}))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def spoil(hf: Path, case: str) -> None:
    file = hf / "model.safetensors"
    weights = dict(iter_safetensors(hf))
    if case == "missing":
        del weights[UP]
    elif case == "extra":
        weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(3)
    elif case == "misshapen":
        weights[UP] = weights[UP].T.contiguous()
    elif case == "fp8":
        weights = {n: w.to(torch.float8_e4m3fn) for n, w in weights.items()}
    elif case == "two types":
        weights[NORM] = weights[NORM].to(torch.bfloat16)
    elif case == "a tied head of its own":
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    save_file({n: w.clone() for n, w in weights.items()}, file)
    if case == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif case == "index":
        weight_map = {NORM: "model-00001-of-00002.safetensors"}
        (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif case == "pickled":
        file.unlink()
        torch.save(weights, hf / "pytorch_model.bin")


SPOILT = {
    "missing": f"lacks '{UP}' (1 tensors are missing)",
    "extra": "holds 'model.layers.1.self_attn.q_proj.bias', which this architecture",
    "misshapen": f"'{UP}' has shape (64, 144), config.json says (144, 64)",
    "fp8": "has the type F8_E4M3, of quantised",
    "two types": "holds tensors of several types: BF16 (model.norm.weight), F32 (",
    "a tied head of its own": f"'{HEAD}' is not '{EMBEDDING}'",
    "truncated": "model.safetensors is damaged or cut short",
    "index": "index.json names model-00001-of-00002.safetensors, which is missing",
    "pickled": "holds pickled weights only (pytorch_model.bin), which can run code",
}


@pytest.mark.parametrize("case", SPOILT)
def test_weights_that_do_not_fit_are_refused_by_name(
    case: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = shutil.copytree(source, tmp_path / "hf")
    spoil(hf, case)
    error = refusal(capsys, "hf_to_megatron", "--hf", str(hf), "--out", str(tmp_path / "out"))
    assert SPOILT[case] in error
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_read_where_they_are_allowed_and_run_nothing(
    pool: Any, source: Path, tmp_path: Path
) -> None:
    hf = shutil.copytree(source, tmp_path / "hf")
    spoil(hf, "pickled")
    conversion_cases.run(pool, to_megatron(hf, tmp_path / "mcore", allow_pickle=True))
    conversion_cases.run(pool, to_hf(tmp_path / "mcore", tmp_path / "out"))
    assert weights_of(tmp_path / "out") == weights_of(source)
    torch.save({NORM: Path}, hf / "pytorch_model.bin")  # something to be made, not a tensor
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read as .*run code$"):
        to_megatron(hf, tmp_path / "mcore2", allow_pickle=True).check()


BROKEN = {  # a file of the checkpoint, how many of its bytes are left, what is said
    "metadata.json": (None, "no complete checkpoint: metadata.json is missing"),
    ".metadata": (100, ".metadata is damaged or cut short"),
    "common.pt": (None, "no complete checkpoint: common.pt is missing"),
    "__1_0.distcp": (None, "no complete checkpoint: __1_0.distcp is missing"),
    "__0_0.distcp": (1000, "__0_0.distcp is cut short: it has 1000 bytes of"),
    "hf/config.json": (None, "has no hf/config.json, so it does not say what model it is"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_incomplete_checkpoint_is_refused_by_name(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, said = BROKEN[name]
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    if left is None:
        (broken / name).unlink()
    else:
        (broken / name).write_bytes((broken / name).read_bytes()[:left])
    arguments = ("--checkpoint", str(broken), "--out", str(tmp_path / "out"))
    assert said in refusal(capsys, "megatron_to_hf", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 2, "layer_types": None}, "was written with 3 layers, its config"),
        (
            {"vocab_size": 49},
            "holds 48 rows of 'embedding.word_embeddings.weight', its config.json",
        ),
        ({"intermediate_size": 160}, "holds other weights than its config.json describes"),
        ({"tie_word_embeddings": True}, "holds other weights than its config.json describes"),
    ],
)
def test_a_checkpoint_beside_another_models_config(
    changes: dict[str, Any],
    said: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mixed = shutil.copytree(checkpoint, tmp_path / "mixed")
    config = json.loads((mixed / "hf" / "config.json").read_text())
    (mixed / "hf" / "config.json").write_text(json.dumps(config | changes))
    arguments = ("--checkpoint", str(mixed), "--out", str(tmp_path / "out"))
    assert said in refusal(capsys, "megatron_to_hf", *arguments)


def test_a_run_with_half_written_checkpoints_only(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "run" / "checkpoints" / ".step-00000004.sgopd-tmp"
    arguments = ("--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    assert "is no folder: give a checkpoint or the folder of a run" in refusal(
        capsys, "megatron_to_hf", *arguments
    )
    half.parent.mkdir(parents=True)
    assert "no complete checkpoint (none)" in refusal(capsys, "megatron_to_hf", *arguments)
    shutil.copytree(checkpoint, half)
    assert "(only .step-00000004.sgopd-tmp, which is half-written)" in refusal(
        capsys, "megatron_to_hf", *arguments
    )
    named = ("--checkpoint", str(half), "--out", str(tmp_path / "out"))
    assert "is half-written" in refusal(capsys, "megatron_to_hf", *named)


@pytest.mark.parametrize("name", ["hf_to_megatron", "megatron_to_hf"])
def test_a_folder_that_is_not_ours_is_left_alone(
    name: str, source: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"hf_to_megatron": ("--hf", source), "megatron_to_hf": ("--checkpoint", checkpoint)}
    flag, path = given[name]
    out = tmp_path / "out"
    arguments = (flag, str(path), "--out", str(out))
    out.write_text("a file")
    assert "exists and is no folder: choose another --out" in refusal(capsys, name, *arguments)
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "holds thesis.tex, which is not ours" in refusal(capsys, name, *arguments)
    assert (out / "thesis.tex").exists()
    # A model of somebody else's, all of whose files have names that we write too.
    before = sorted(p.name for p in source.iterdir())
    onto_source = refusal(
        capsys, "megatron_to_hf", "--checkpoint", str(checkpoint), "--out", str(source)
    )
    assert "was not written by this tool (no sgopd.json)" in onto_source
    assert sorted(p.name for p in source.iterdir()) == before


def test_a_runs_checkpoint_is_not_replaced(
    source: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_a_run = shutil.copytree(checkpoint, tmp_path / "step-00000004")
    (of_a_run / "hf" / "recipe.yaml").write_text("name: mine")
    error = refusal(capsys, "hf_to_megatron", "--hf", str(source), "--out", str(of_a_run))
    assert "is a checkpoint of a run: choose another --out" in error


def test_a_link_stays_and_what_it_leads_to_is_replaced(
    pool: Any, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    for _ in range(2):  # the place is made, then replaced
        conversion_cases.run(pool, to_hf(checkpoint, tmp_path / "out"))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]
        assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]
    assert (tmp_path / "out").is_symlink()
    assert weights_of(tmp_path / "disk" / "out")


def test_a_place_where_nothing_can_be_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    said = refusal(capsys, "megatron_to_hf", "--checkpoint", str(checkpoint), "--out", out)
    assert said.startswith("error: ") and "Not a directory" in said and said.count("\n") <= 2
    given = ("--checkpoint", str(checkpoint), "--out", "/proc")
    assert "mounted: give a folder in it" in refusal(capsys, "megatron_to_hf", *given)


def test_a_former_export_is_replaced(pool: Any, checkpoint: Path, tmp_path: Path) -> None:
    for _ in range(2):
        conversion_cases.run(pool, to_hf(checkpoint, tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tensor-model-parallel-size", "3"], "num_attention_heads 4, which tensor_model"),
        (["--pipeline-model-parallel-size", "4"], "num_hidden_layers 3, fewer than the 4"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size is 0"),
        (["--make-vocab-size-divisible-by", "0"], "divisible-by is 0"),
    ],
)
def test_layouts_that_cannot_be(
    arguments: list[str],
    said: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--hf", str(source), "--out", str(tmp_path / "out"))
    assert said in refusal(capsys, "hf_to_megatron", *given, *arguments)
