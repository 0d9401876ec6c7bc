"""Student weights -> rollout engine, and the proof that the engine answers with them.

After each push to a vLLM engine the guard asks it for log-probs of fixed tokens, at the sampling
temperature and through the sampler that makes rollouts, and the trainer scores the same tokens.
The probe's prompts are longer than two blocks of the prefix cache, and the same each time, so that
keys of old weights would show.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.config.engines import PROBE_LENGTH, PROBE_PROMPT
from megatron_sgopd.config.schema import Config
from megatron_sgopd.distributed.groups import alignment, gather_objects, sequence_alignment
from megatron_sgopd.metrics import mismatch_kl
from megatron_sgopd.model.gpt import ShardedModel
from megatron_sgopd.model.weight_stream import iter_hf_weights
from megatron_sgopd.rollouts.vllm_servers.client import VllmClient
from megatron_sgopd.training.frozen import Frozen
from megatron_sgopd.training.objective import Objective
from megatron_sgopd.training.packing import context_columns, micro_batches
from megatron_sgopd.training.student import Student
from megatron_sgopd.types import Completion, Engine, Prompt, Rollout

NUM_PROBES = 2  # sequences
# Healthy pushes measured (docs/vllm.md): float32 up to 7e-12, bfloat16 up to 1.8e-3.
BOUNDS = {"float32": 1e-8, "bfloat16": 1e-2}


class StaleWeights(RuntimeError):
    """An engine does not answer with the weights it was given."""


def push_weights(model: ShardedModel, engine: Engine, policy_version: int) -> None:
    """Gives the engine the model's current weights. Collective over all ranks.

    Raises:
        StaleWeights: the engine does not report the version it was given.
    """
    engine.push_weights(lambda: iter_hf_weights(model), policy_version)
    if engine.policy_version != policy_version:
        raise StaleWeights(
            f"the engine reports policy version {engine.policy_version} after it was given "
            f"{policy_version}: it would answer with stale weights; restart it"
        )


@dataclass
class Guard:
    """Compares engines with the trainer after each push."""

    student: Student
    config: Config
    before: Tensor | None = field(default=None, init=False)  # the trainer's, at the last push

    @property
    def bound(self) -> float:
        vllm = self.config.rollout.vllm
        loosest = "bfloat16" if "bfloat16" in (vllm.dtype, self.config.model.dtype) else "float32"
        return vllm.mismatch_kl_bound or BOUNDS[loosest]

    def check(self, engine: Engine, policy_version: int) -> dict[str, float]:
        """Metrics of the worst engine. Collective over all ranks.

        Raises:
            StaleWeights: an engine beyond the bound, and whose weights it seems to hold; on every
                rank.
        """
        trainer, before = self.trainer_logprobs(), self.before
        self.before = trainer
        worst, problem = 0.0, ""
        for url, answered in engine.probe(self.engine_logprobs):
            mismatch = mismatch_kl(answered, trainer)
            worst = max(worst, mismatch)
            if not mismatch <= self.bound:
                old = float("inf") if before is None else mismatch_kl(answered, before)
                problem = self._problem(url, mismatch, old, policy_version)
        of_all_ranks = gather_objects((worst, problem))
        for _, its_problem in of_all_ranks:
            if its_problem:
                raise StaleWeights(its_problem)
        return {"engine/probe_mismatch_kl": max(mismatch for mismatch, _ in of_all_ranks)}

    def _problem(self, url: str, mismatch: float, old: float, policy_version: int) -> str:
        if old <= self.bound:
            holds = f"it seems to hold the old ones (mismatch_kl with them {old:.3g})"
        else:
            holds = (
                f"it holds neither these nor the old ones (mismatch_kl with them {old:.3g}): a "
                "part of the push is missing, its prefix cache still has keys of other weights, "
                "or it samples at another temperature"
            )
        return (
            f"after the push of policy version {policy_version} the engine at {url} answers with "
            f"mismatch_kl {mismatch:.3g} to the trainer on fixed tokens, the bound is "
            f"{self.bound:.3g}: {holds}. Its rollouts would not be this policy's. Restart the "
            "engine and resume; where the engine is healthy and only less exact (another dtype or "
            "kernel), set rollout.vllm.mismatch_kl_bound"
        )

    def probes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(prompt, completion) of each probe: fixed tokens."""
        model, ids = self.student.model.hf_config, self.student.model.shared_vocab_size
        room = min(model.max_position_embeddings, self.config.rollout.vllm.max_model_len or 0)
        prompt = min(PROBE_PROMPT, room - PROBE_LENGTH)
        draw = random.Random(20260609)
        tokens = [
            [draw.randrange(ids) for _ in range(prompt + PROBE_LENGTH)] for _ in range(NUM_PROBES)
        ]
        return [(tuple(t[:prompt]), tuple(t[prompt:])) for t in tokens]

    def engine_logprobs(self, client: VllmClient) -> Tensor:
        """[NUM_PROBES * PROBE_LENGTH], one request each."""
        temperature = self.config.rollout.temperature
        asked = [
            (prompt + completion[:i], token)
            for prompt, completion in self.probes()
            for i, token in enumerate(completion)
        ]
        with ThreadPoolExecutor(16) as threads:
            answers = threads.map(lambda a: client.next_logprob(a[0], a[1], temperature), asked)
            return torch.tensor(list(answers), dtype=torch.float64)

    def trainer_logprobs(self) -> Tensor:
        """The same by the student as it is, on every rank of the replica. Collective over it."""
        groups = self.student.groups
        rollouts = [_rollout(prompt, completion) for prompt, completion in self.probes()]
        interleaved = groups.config.virtual_pipeline_model_parallel_size is not None
        batches = micro_batches(
            rollouts,
            [1.0] * len(rollouts),
            micro_batch_size=1,
            align=alignment(groups),
            align_sequence=sequence_alignment(groups),
            multiple_of=groups.pp_size if interleaved else 1,
        )
        batches = [b.to(groups.device) for b in batches]
        objective = replace(
            Objective.from_config(self.config.distill, self.config.rollout, eps=0.0),
            estimator="sampled",
            temperature=self.config.rollout.temperature,
        )
        scored = Frozen(self.student.model, groups).score(batches, objective)
        rows = []
        for batch, scores in zip(batches, scored, strict=True):
            whole = torch.zeros(batch.shape, device=groups.device)
            if scores is not None and groups.tp_rank == 0:
                columns = torch.arange(batch.shape[1])
                if groups.cp_size > 1:
                    columns = context_columns(
                        batch.shape[1], batch.cu_seqlens, groups.cp_rank, groups.cp_size
                    )
                logprobs = scores.logprobs
                assert logprobs is not None, "sampled hands over log-probs"
                whole[:, columns.to(whole.device)] = logprobs.view(batch.shape[0], -1)
            dist.all_reduce(whole, group=groups.replica_group)
            rows.append(whole[batch.loss_mask])
        order = sorted(range(len(rows)), key=lambda i: _place(batches[i].input_ids, rollouts))
        return torch.cat([rows[i] for i in order]).double().cpu()


def _rollout(prompt: Sequence[int], completion: Sequence[int]) -> Rollout:
    answer = Completion(tuple(completion), (0.0,) * len(completion), "length", 0, 0)
    return Rollout(Prompt("probe", tuple(prompt), ""), answer, "student", False)


def _place(input_ids: Tensor, rollouts: Sequence[Rollout]) -> int:
    """Tells which probe a micro-batch holds; those that only fill a schedule up come last."""
    row = tuple(input_ids[0].tolist())
    for index, rollout in enumerate(rollouts):
        if row[: len(rollout.prompt.token_ids)] == rollout.prompt.token_ids:
            return index
    return len(rollouts)
