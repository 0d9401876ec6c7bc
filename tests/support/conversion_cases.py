"""Conversions on ranks, and what they must leave unchanged.

`python -m tests.support.conversion_cases` measures the matrix and prints the table of the log.
"""

from __future__ import annotations

import gc
import itertools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sgopd.distributed.groups import shutdown
from megatron_sgopd.metrics import Clock
from megatron_sgopd.model import conversion_ranks
from megatron_sgopd.model.conversion_job import ToHf, ToMegatron, job_of_json
from megatron_sgopd.model.families import hf_shapes
from megatron_sgopd.model.gpt import ShardedModel
from megatron_sgopd.model.hf_location import read_hf_config
from megatron_sgopd.model.hf_reader import StoredWeights, iter_safetensors
from megatron_sgopd.model.hf_writer import write_hf_dir
from megatron_sgopd.model.weight_stream import iter_hf_weights, join_parts, source_of
from megatron_sgopd.training.checkpoint import Companions, TrainState, save_checkpoint
from megatron_sgopd.training.step import train_step
from tests.support import step_cases
from tests.support.layouts import layout
from tests.support.memory_cases import status_mb
from tests.support.model_cases import Digest, build, digests, gather_last
from tests.support.pool import Pool
from tests.support.step_cases import StepCase
from tests.support.tiny import make_hf_dir

VOCABULARY_OF_ROLLOUTS = 37  # at most that of any model here
FAMILIES: dict[str, dict[str, Any]] = {
    # Three layers, which two stages cannot share equally; a vocabulary that TP 2 pads.
    "qwen3": {"layers": 3, "vocab": 37},
    "qwen2": {"family": "qwen2", "layers": 3, "vocab": 37},
    "llama": {"family": "llama", "layers": 3, "vocab": 331, "head_dim": 96},
}
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))  # (TP, PP)


def make_source(path: Path) -> Path:
    """A directory with everything that travels with the weights."""
    make_hf_dir(path, 3, **FAMILIES["qwen3"])
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "generation_config.json").write_text('{"eos_token_id": 3}')
    (path / "LICENSE").write_text("as you like")
    (path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# Of its author")
    return path


def to_megatron(hf: Path, out: Path, tp: int = 1, pp: int = 1, **more: Any) -> ToMegatron:
    settings = {"dtype": "keep", "divisible_by": 8, "name": str(hf), **more}
    return ToMegatron(
        out=str(out), tensor_parallel=tp, pipeline_parallel=pp, hf=str(hf), **settings
    )


def to_hf(checkpoint: Path, out: Path, tp: int = 1, pp: int = 1, **more: Any) -> ToHf:
    settings = {"dtype": "keep", **more}
    return ToHf(
        out=str(out),
        tensor_parallel=tp,
        pipeline_parallel=pp,
        checkpoint=str(checkpoint),
        **settings,
    )


def convert(job: str) -> None:
    """On a rank, as the tools' own ranks do."""
    gc.collect()
    try:
        conversion_ranks.convert(job_of_json(job))
    finally:
        shutdown()


def run(pool: Any, job: ToMegatron | ToHf) -> None:
    """As a tool does: checked first."""
    job.check()
    pool(job.num_ranks).run(convert, job.to_json())


def weights_of(path: Path) -> list[Digest]:
    return sorted(digests(iter_safetensors(path)))


def round_trip(
    pool: Any, hf: Path, folder: Path, written: tuple[int, int], read: tuple[int, int]
) -> Path:
    """The export of a conversion, after the source is gone."""
    source, checkpoint, out = folder / "source", folder / "checkpoint", folder / "out"
    shutil.copytree(hf, source)
    run(pool, to_megatron(source, checkpoint, *written))
    shutil.rmtree(source)
    run(pool, to_hf(checkpoint, out, *read, max_shard_bytes=60_000))
    return out


def read_by_megatron(checkpoint: str, tp: int, pp: int) -> list[Digest]:
    """A converted checkpoint through Megatron's own loader, into a real model of this layout."""
    parallel = {"pipeline_model_parallel_size": pp, "make_vocab_size_divisible_by": 4}
    with layout(tp, **parallel) as groups:
        model = build(f"{checkpoint}/hf", groups)
        sharded = {f"model{i}": c.sharded_state_dict() for i, c in enumerate(model.chunks)}
        loaded = dist_checkpointing.load(sharded, checkpoint)
        for i, chunk in enumerate(model.chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
        return sorted(digests(iter_hf_weights(model)))


# -- a step ----------------------------------------------------------------------------------------


def one_step(path: str, tp: int, pp: int, run_dir: str, out: str) -> Tensor | None:
    """After an optimizer step of the real trainer: an export to `out` and a checkpoint of a run.

    The student's logits [R, L, vocabulary] on the last stage's ranks.
    """
    parallel = {"pipeline_model_parallel_size": pp, "make_vocab_size_divisible_by": 8}
    case = StepCase(
        path, path, path, VOCABULARY_OF_ROLLOUTS, tp=tp, parallel=tuple(parallel.items())
    )
    case = replace(case, method="sft")
    with step_cases.groups_of(case) as groups:
        parts = step_cases.assemble_parts(case, groups)
        train_step(
            parts.student,
            parts.teacher,
            parts.reference,
            step_cases.draw_any_rollouts(case),
            parts.objective,
            parts.config.distill,
            Clock(),
        )
        model = parts.student.model
        shapes, stream = hf_shapes(model.hf_config), iter_hf_weights(model)
        first = groups.rank == 0
        write_hf_dir(Path(out), Path(path), stream, shapes, torch.float32, writes=first)
        state = TrainState(step=1, world_size=groups.world_size)
        save_checkpoint(Path(run_dir), parts.student, state, 1, Companions(Path(path), {}))
        with torch.no_grad():
            return _logits(model, inputs())


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCABULARY_OF_ROLLOUTS, (2, 24), generator=generator)


def _logits(model: ShardedModel, ids: Tensor) -> Tensor | None:
    """Stage by stage; one chunk each."""
    groups, (chunk,) = model.groups, model.chunks
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    here, group = groups.pp_rank, groups.pp_group
    if here > 0:
        hidden = torch.empty(ids.shape[1], ids.shape[0], model.hf_config.hidden_size)
        dist.recv(hidden, dist.get_global_rank(group, here - 1), group)
        chunk.set_input_tensor(hidden)
    output = chunk(ids, positions, None)
    if not groups.is_last_stage:
        dist.send(output.contiguous(), dist.get_global_rank(group, here + 1), group)
        return None
    return gather_last(output, groups)[..., : model.true_vocab_size]


def logit_error(logits: list[Tensor | None], out: Path) -> float:
    """Largest |difference| of the trainer's logits from transformers' on the export."""
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        expected = model(inputs()).logits
    return max(float((x - expected).abs().max()) for x in logits if x is not None)


# -- memory ----------------------------------------------------------------------------------------


def peak_growth(job: str) -> float:
    """Bytes by which this rank's peak of resident memory grew in a conversion."""
    convert(job)  # what is allocated once
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status_mb("VmRSS")
    convert(job)
    return (status_mb("VmHWM") - before) * 2**20


# -- NVIDIA's converter ----------------------------------------------------------------------------


def differs_from_bridge(path: str) -> list[str]:
    """Parameters of megatron-bridge's model which are not what we make of the same directory."""
    from megatron.bridge import AutoBridge

    stored = StoredWeights(Path(path))
    hf_config = read_hf_config(Path(path))
    provider = AutoBridge.from_hf_pretrained(path).to_megatron_provider(load_weights=True)
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    odd = []
    for name, parameter in model.named_parameters():
        source = source_of(name.removeprefix("module."), tied=hf_config.tie_word_embeddings)
        parts = [stored.get(part) for part in source.names]
        ours = join_parts(parts, source, parameter.shape[0], hf_config)
        if not torch.equal(parameter.cpu(), ours.to(parameter.dtype)):
            odd.append(name)
    return odd


# -- the table -------------------------------------------------------------------------------------


def measure(pool: Any, folder: Path, name: str, tied: bool, size: tuple[int, int]) -> list[Any]:
    """[every weight identical after the round trip, largest difference of logits after a step]"""
    hf = make_hf_dir(folder / "hf", 7, tied=tied, **FAMILIES[name])
    tp, pp = size
    out = round_trip(pool, hf, folder, size, LAYOUTS[3 - LAYOUTS.index(size)])
    identical = weights_of(out) == weights_of(hf)
    run_dir, export = folder / "run", folder / "export"
    logits = pool(tp * pp).run(one_step, str(hf), tp, pp, str(run_dir), str(export))
    return [identical, logit_error(logits, export)]


def main() -> None:
    pools: dict[int, Pool] = {}

    def pool(size: int) -> Pool:
        return pools.setdefault(size, Pool(size))

    print("| family | TP | PP | tied | bit-identical | worst logit difference after a step |")
    print("|---|---|---|---|---|---|")
    for name, size, tied in itertools.product(FAMILIES, LAYOUTS, (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            identical, error = measure(pool, Path(folder), name, tied, size)
        cells = [name, *map(str, size), "yes" if tied else "no", "yes" if identical else "NO"]
        print(f"| {' | '.join(cells)} | {error:.1e} |", flush=True)
    for each in pools.values():
        each.close()


if __name__ == "__main__":
    main()
