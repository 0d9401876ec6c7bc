"""Hugging Face weights into Megatron's shards and back, and Hugging Face directories on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sgopd.model.families import hf_shapes
from megatron_sgopd.model.hf_location import INDEX, read_hf_config, resolve_hf_dir, weight_files
from megatron_sgopd.model.hf_reader import StoredWeights, iter_safetensors
from megatron_sgopd.model.hf_writer import write_hf_dir
from megatron_sgopd.model.weight_stream import source_of
from tests.support import model_cases
from tests.support.model_cases import digests
from tests.support.tiny import make_hf_dir

MODELS: dict[str, dict[str, Any]] = {
    "untied": {"vocab": 37, "tied": False},
    "tied": {"vocab": 51, "tied": True, "layers": 1},
    "bf16": {"vocab": 37, "heads": 6, "kv": 2, "dtype": torch.bfloat16},
    "Qwen2.5": {"family": "qwen2", "vocab": 37},
    "Llama 3": {"family": "llama", "vocab": 331, "layers": 3, "head_dim": 96},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {
        name: make_hf_dir(folder / name, seed, **sizes)
        for seed, (name, sizes) in enumerate(MODELS.items(), 31)
    }


def dtype_of(name: str) -> torch.dtype:
    return MODELS[name].get("dtype", torch.float32)


# -- to Megatron and back --------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_round_trip_is_bit_identical_on_every_rank(
    name: str, tp: int, pool: Any, paths: dict[str, Path], tmp_path: Path
) -> None:
    expected = sorted(digests(iter_safetensors(paths[name])))
    out = tmp_path / "out"
    streams = pool(2).run(model_cases.round_trip, str(paths[name]), tp, dtype_of(name), str(out))
    for stream in streams:
        assert sorted(stream) == expected  # equal lists: every name exactly once
        assert stream == streams[0]  # in one order on all ranks
    assert sorted(digests(iter_safetensors(out))) == expected


LAYOUTS: dict[str, tuple[int, int, dict[str, int], tuple[int, int] | None]] = {
    # name -> (ranks, TP, layout, a frozen model's own (TP, PP))
    "PP2": (2, 1, {"pipeline_model_parallel_size": 2}, None),
    "PP2 VPP2": (
        2,
        1,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        None,
    ),
    "CP2": (2, 1, {"context_parallel_size": 2}, None),
    "TP2 PP2": (4, 2, {"pipeline_model_parallel_size": 2}, None),
    "TP2, its own TP1": (2, 2, {}, (1, 1)),
    "PP2, its own TP2": (2, 1, {"pipeline_model_parallel_size": 2}, (2, 1)),
    "TP2 PP2, its own PP4": (4, 2, {"pipeline_model_parallel_size": 2}, (1, 4)),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_round_trip_is_bit_identical_in_every_layout(
    name: str, tied: bool, pool: Any, tmp_path: Path
) -> None:
    """Five layers, which neither two nor four stages can share equally."""
    world, tp, parallel, own = LAYOUTS[name]
    path = make_hf_dir(tmp_path / "hf", 5, layers=5, vocab=37, tied=tied)
    expected = sorted(digests(iter_safetensors(path)))
    streams = pool(world).run(
        model_cases.round_trip, str(path), tp, torch.float32, None, parallel, own
    )
    for stream in streams:
        assert sorted(stream) == expected
        assert stream == streams[0]
    if own is None:
        one = pool(1).run(model_cases.random_weights, str(path), 1, 3)[0]
        for stream in pool(world).run(model_cases.random_weights, str(path), tp, 3, parallel):
            assert sorted(stream) == sorted(one)


def test_fp32_weights_are_rounded_once_into_bf16(pool: Any, paths: dict[str, Path]) -> None:
    rounded = ((n, t.to(torch.bfloat16)) for n, t in iter_safetensors(paths["untied"]))
    expected = sorted(digests(rounded))
    for stream in pool(2).run(model_cases.round_trip, str(paths["untied"]), 2, torch.bfloat16):
        assert sorted(stream) == expected


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_padded_vocabulary_rows_are_zero(name: str, pool: Any, paths: dict[str, Path]) -> None:
    assert pool(2).run(model_cases.padded_rows, str(paths[name]), 2) == [0.0, 0.0]


@pytest.mark.parametrize("name", MODELS)
def test_the_expected_shapes_are_those_of_transformers(name: str, paths: dict[str, Path]) -> None:
    config = read_hf_config(paths[name])
    model = AutoModelForCausalLM.from_config(config)
    assert hf_shapes(config) == {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.router.weight", "rotary.inv_freq"])
def test_an_unknown_megatron_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"no Hugging Face name is known for Megatron's '{name}'"):
        source_of(name)


Q1 = "model.layers.1.self_attn.q_proj.weight"
UP0 = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (f"missing {Q1}", f"the test lacks '{Q1}' (1 tensors are missing)"),
        ("missing lm_head.weight", "the test lacks 'lm_head.weight'"),
        ("missing model.norm.weight", "the test lacks 'model.norm.weight'"),
        ("unknown model.layers.2.mlp.up_proj.weight", "the test holds 'model.layers.2.mlp.up"),
        (f"unknown {Q1}.scale", f"the test holds '{Q1}.scale', which this architecture"),
        (f"twice {UP0}", f"the test holds '{UP0}' twice"),
        ("twice model.norm.weight", "the test holds 'model.norm.weight' twice"),
        (f"transposed {UP0}", f"'{UP0}' has shape (64, 144), config.json says (144, 64)"),
        ("short model.embed_tokens.weight", "has shape (36, 64), config.json says (37, 64)"),
        ("long lm_head.weight", "'lm_head.weight' has shape (38, 64)"),
    ],
)
def test_a_spoilt_stream_is_refused_by_name(
    case: str, message: str, pool: Any, paths: dict[str, Path]
) -> None:
    for error in pool(2).run(model_cases.load_error, str(paths["untied"]), 2, case):
        assert message in error


def test_a_tied_head_that_was_stored_again_is_passed_over(
    pool: Any, paths: dict[str, Path], tmp_path: Path
) -> None:
    spare = shutil.copytree(paths["tied"], tmp_path / "spare")
    weights = dict(iter_safetensors(paths["tied"]))
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | head, spare / "model.safetensors")
    expected = sorted(digests(weights.items()))
    for stream in pool(2).run(model_cases.round_trip, str(spare), 2, torch.float32):
        assert sorted(stream) == expected


def test_random_weights_do_not_depend_on_the_layout(pool: Any, paths: dict[str, Path]) -> None:
    for name in ("tied", "untied"):
        one, other = (
            pool(2).run(model_cases.random_weights, str(paths[name]), tp, 3)[0] for tp in (1, 2)
        )
        assert one == other
        drawn_again = pool(2).run(model_cases.random_weights, str(paths[name]), 1, 4)[0]
        changed = {a[0] for a, b in zip(one, drawn_again, strict=True) if a != b}
        assert changed == {n for n, *_ in one if "norm" not in n}
        assert len({digest for n, *_, digest in one if "norm" not in n}) == len(changed)


def test_random_weights_have_the_configs_spread(pool: Any, paths: dict[str, Path]) -> None:
    scale = read_hf_config(paths["untied"]).initializer_range
    (spread, _) = pool(2).run(model_cases.random_spread, str(paths["untied"]))
    for name, (mean, std) in spread.items():
        if "norm" in name:
            assert (mean, std) == (1.0, 0.0)
        else:
            assert abs(mean) < 0.1 * scale
            assert std == pytest.approx(scale, rel=0.1)


# -- directories on disk ---------------------------------------------------------------------------


def logits(path: Path) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def write(out: Path, source: Path, stream: Any = None, **options: Any) -> None:
    """Writes `out` from the weights of `source`, or from a stream in their place."""
    shapes, stored = hf_shapes(read_hf_config(source)), StoredWeights(source)
    write_hf_dir(out, source, stored if stream is None else stream, shapes, stored.dtype, **options)


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("name", MODELS)
def test_a_written_directory_opens_in_transformers(
    name: str, shard_bytes: int, paths: dict[str, Path], tmp_path: Path
) -> None:
    source, out = paths[name], tmp_path / "out"
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    write(out, source, max_shard_bytes=shard_bytes)
    assert torch.equal(logits(out), logits(source))
    assert sorted(digests(iter_safetensors(out))) == sorted(digests(iter_safetensors(source)))
    files = weight_files(out)
    assert (len(files) > 2) == (shard_bytes == 40_000)
    if shard_bytes == 40_000:
        largest = max(t.numel() * t.element_size() for _, t in iter_safetensors(source))
        assert max(f.stat().st_size for f in files) < max(shard_bytes, largest) + 4000
        total = json.loads((out / INDEX).read_text())["metadata"]["total_size"]
        assert total == sum(t.numel() * t.element_size() for _, t in iter_safetensors(source))
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 3}'
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def failing(source: Path, after: int = 3) -> Iterator[tuple[str, Tensor]]:
    for i, pair in enumerate(iter_safetensors(source)):
        if i == after:
            raise RuntimeError("the disk is full")
        yield pair


def test_writing_is_whole_or_not_at_all(paths: dict[str, Path], tmp_path: Path) -> None:
    source, out = paths["untied"], tmp_path / "out"

    with pytest.raises(RuntimeError, match="the disk is full"):
        write(out, source, failing(source))
    assert not out.exists()
    (begun,) = tmp_path.iterdir()
    (begun / "left_over").touch()  # of the killed attempt
    write(out, source)
    before = sorted(digests(iter_safetensors(out)))
    assert not (out / "left_over").exists()
    with pytest.raises(RuntimeError, match="the disk is full"):
        write(out, source, failing(source))
    assert sorted(digests(iter_safetensors(out))) == before
    assert read_hf_config(out).tie_word_embeddings is False


def test_a_new_write_replaces_the_old_folder(paths: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("untied", "tied"):
        source = paths[name]
        write(out, source, max_shard_bytes=40_000 if name == "untied" else 10**9)
        assert sorted(digests(iter_safetensors(out))) == sorted(digests(iter_safetensors(source)))
    assert [f.name for f in out.glob("model*")] == ["model.safetensors"]


def test_a_rank_that_does_not_write_still_reads_the_stream(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    source, seen = paths["tied"], []
    stream = ((seen.append(n), (n, t))[1] for n, t in iter_safetensors(source))
    write(tmp_path / "out", source, stream, writes=False)
    assert len(seen) == len(hf_shapes(read_hf_config(source)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing model.norm.weight", "'model.norm.weight' did not come to be written (1 missing)"),
        ("twice model.norm.weight", "'model.norm.weight' of shape (64,) came to be written"),
        ("short lm_head.weight", "(36, 64) came to be written; (37, 64) was announced"),
        ("unknown lm_head.bias", "'lm_head.bias' of shape (2,) came to be written; none was"),
    ],
)
def test_only_what_was_announced_is_written(
    case: str, message: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    source = paths["untied"]
    with pytest.raises(ValueError) as refused:
        write(tmp_path / "out", source, model_cases.spoilt(iter_safetensors(source), case))
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_config_json_stays_as_it_was_but_for_the_type(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    """transformers loads weights in the type it names, and its older versions read older keys."""
    source = shutil.copytree(paths["untied"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "torch_dtype": "bfloat16", "of_its_author": 1}
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    write(tmp_path / "out", source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"torch_dtype": "float32"}
    assert read_hf_config(tmp_path / "out").dtype == torch.float32


def test_a_write_that_is_killed_between_its_two_renames_loses_nothing(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename, killed = tmp_path / "out", Path.rename, []

    def kills(self: Path, target: Path) -> Any:
        if target == out and not killed:
            killed.append(self)
            raise KeyboardInterrupt
        return rename(self, target)

    write(out, paths["untied"])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kills)
        with pytest.raises(KeyboardInterrupt):
            write(out, paths["tied"])
    assert not out.exists()
    with pytest.raises(RuntimeError):  # the next write, which fails, has brought the old one back
        write(out, paths["tied"], failing(paths["tied"]))
    before = sorted(digests(iter_safetensors(paths["untied"])))
    assert sorted(digests(iter_safetensors(out))) == before
    write(out, paths["tied"])
    expected = sorted(digests(iter_safetensors(paths["tied"])))
    assert sorted(digests(iter_safetensors(out))) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def sharded(paths: dict[str, Path], tmp_path: Path) -> Path:
    write(tmp_path / "sharded", paths["untied"], max_shard_bytes=40_000)
    return tmp_path / "sharded"


@pytest.mark.parametrize("length", [0, 4, 200, -1])
def test_a_truncated_file_is_named(sharded: Path, length: int) -> None:
    file = weight_files(sharded)[1]
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged or cut short"):
        list(iter_safetensors(sharded))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    weight_files(sharded)[2].unlink()
    with pytest.raises(ValueError, match=r"index\.json names model-00003-of.*, which is missing"):
        weight_files(sharded)


def test_an_index_that_leads_out_of_its_folder_is_refused(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"w": "../other/model.safetensors"}}')
    with pytest.raises(ValueError, match=r"names \.\./other/.*, which is not a file of its folder"):
        weight_files(sharded)


@pytest.mark.parametrize("index", ["{", '{"metadata": {}}', "[]"])
def test_a_broken_index_is_named(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    with pytest.raises(ValueError, match=r"index\.json is not an index of safetensors files"):
        weight_files(sharded)


def test_a_name_in_two_shards(sharded: Path) -> None:
    first, second = weight_files(sharded)[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is in .*sharded twice"):
        list(iter_safetensors(sharded))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickled_weights_are_not_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(ValueError, match=rf"pickled weights only \({name}\).*safetensors"):
        list(iter_safetensors(tmp_path))


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no weights: model\.safetensors"):
        weight_files(tmp_path)


def test_directories_are_resolved(paths: dict[str, Path], tmp_path: Path) -> None:
    assert resolve_hf_dir(str(paths["tied"])) == paths["tied"]
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_hf_dir(str(tmp_path))
    with pytest.raises(ValueError, match=r"does not exist: give a Hugging Face model directory"):
        resolve_hf_dir(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "no_such_model"}'])
def test_a_broken_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        read_hf_config(tmp_path)
