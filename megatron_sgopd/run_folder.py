"""A run's directory: the resolved recipe goes into it, and another run's is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_sgopd.config.load import diff, load_config, to_yaml
from megatron_sgopd.config.schema import Config
from megatron_sgopd.distributed.groups import Groups

# What may change between a run and its resumption without making it another run.
RESUMABLE = (
    "num_steps",
    "logging.",
    "checkpoint.",
    "evaluation.",
    "verifier.",
    "rollout.vllm.",  # where servers are and how they are reached
    "parallel.distrib",
    # Another way to the same sums: what somebody changes who ran out of memory.
    "parallel.micro_batch",
    "parallel.recompute",
    "parallel.hidden_states",
    "model.teacher.offload",
    "model.reference.offload",
    "optimizer.offload",
)


def prepare_run_dir(config: Config, run_dir: Path, groups: Groups, *, resuming: bool) -> None:
    """Writes the resolved recipe; refuses a folder that holds another run."""
    if groups.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        written = run_dir / "config.yaml"
        if resuming and written.exists():
            _check_same_run(config, load_config(written, []), run_dir)
        (run_dir / "STOP").unlink(missing_ok=True)
        shutil.rmtree(run_dir / "errors", ignore_errors=True)
        written.write_text(to_yaml(config), encoding="utf-8")
    dist.barrier()


def _check_same_run(config: Config, before: Config, run_dir: Path) -> None:
    changed = {
        key: values
        for key, values in diff(before, config).items()
        if not key.startswith(RESUMABLE)
        and not (key == "distill.gate.eps" and config.distill.gate.eps == "auto")
    }
    if changed:
        listed = "; ".join(f"{k} was {a!r}, now {b!r}" for k, (a, b) in sorted(changed.items()))
        raise ValueError(
            f"{run_dir} holds checkpoints of a run with other settings ({listed}): set them back "
            "to resume it, or choose another name or logging.run_dir"
        )
