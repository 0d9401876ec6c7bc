"""The time of a step by phase: floating-point operations, bytes moved, and stated efficiencies."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgopd.config.engines import servers_of
from megatron_sgopd.preflight.plan.architecture import Architecture
from megatron_sgopd.preflight.plan.engines import EnginePlan
from megatron_sgopd.preflight.plan.hardware import Assumptions, Gpu
from megatron_sgopd.preflight.plan.job import Job
from megatron_sgopd.preflight.plan.memory import ELEMENT_BYTES, RankMemory

BACKWARD = 2.0  # times a forward pass
MASTER_AND_MOMENTS_TRAFFIC = 28  # bytes of an update per parameter: fp32 state read and written


@dataclass(frozen=True)
class Duration:
    """Seconds of the phases of one step; `step_seconds` counts what overlaps once."""

    phases: dict[str, float]
    step_seconds: float
    tokens: float  # of the step, prompts included, at the mean lengths
    decode_tokens_per_second: float  # of one engine

    @property
    def tokens_per_second_and_gpu(self) -> float:
        return self.tokens / self.step_seconds


def forward_flops(model: Architecture, tokens: float, mean_length: float) -> float:
    """Counts two a parameter and token, and causal attention, 2 L a d a token and layer."""
    dense = model.num_layers * model.active_layer_parameters()
    attention = model.num_layers * model.heads * model.head_dim * mean_length
    return 2.0 * tokens * (dense + attention)


def head_flops(model: Architecture, tokens: float) -> float:
    """Counts one product with the LM head: forward, or either half of backward."""
    return 2.0 * tokens * model.vocab * model.hidden


def duration_of(
    job: Job,
    models: dict[str, Architecture],
    gpu: Gpu,
    assumed: Assumptions,
    ranks: list[RankMemory],
    engines: list[EnginePlan],
) -> Duration:
    return _Clock(job, models, gpu, assumed, ranks, engines).duration()


@dataclass(frozen=True)
class _Clock:
    job: Job
    models: dict[str, Architecture]
    gpu: Gpu
    assumed: Assumptions
    ranks: list[RankMemory]
    engines: list[EnginePlan]

    @property
    def element(self) -> int:
        return ELEMENT_BYTES[self.job.config.model.dtype]

    @property
    def length(self) -> float:
        return self.assumed.mean_prompt_tokens + self.assumed.mean_completion_tokens

    @property
    def rollouts(self) -> int:
        return self.job.rollouts_per_replica * self.job.replicas

    @property
    def tokens(self) -> float:
        return self.rollouts * self.length

    @property
    def loss_tokens(self) -> float:
        """Counts those that meet a head: prompts are not trained on."""
        return self.rollouts * self.assumed.mean_completion_tokens

    @property
    def full_vocab(self) -> bool:
        return self.job.config.distill.estimator == "full_vocab"

    def duration(self) -> Duration:
        decode = self._decode_tokens_per_second()
        phases = {"generate": self._generate(decode), "label": self._label()}
        for role in self.job.roles():
            phases[role] = self._score(role)
        phases["train"] = self._train()
        phases["push_weights"] = self._push()
        made = phases["generate"] + phases["label"]
        used = sum(phases.values()) - made - phases["push_weights"]
        behind = self.job.config.rollout.max_policy_lag > 0
        step = (max(made, used) if behind else made + used) + phases["push_weights"]
        return Duration(phases, step, self.tokens, decode)

    # -- generate ---------------------------------------------------------------------------------

    def _engine(self) -> tuple[int, int, int]:
        """(engines, GPUs of one, sequences at once in one)."""
        if not self.engines:
            share = -(-self.job.rollouts_per_replica // self.job.replica_ranks)
            return self.job.trainer_gpus, 1, min(self.job.config.rollout.max_batch_size, share)
        plan = self.engines[0]
        # At the mean length more fit than of the longest.
        fit = int(max(0, plan.cache_bytes) // (plan.cache_bytes_per_token * max(1.0, self.length)))
        return plan.num_engines, plan.tensor_parallel, max(1, min(plan.sequences_asked, fit))

    def _decode_step(self, sequences: int, context: float) -> float:
        """Weights and caches are read, or products computed; and what a step costs anyway."""
        model, gpu, a = self.models["student"], self.gpu, self.assumed
        _, tp, _ = self._engine()
        cache = 2 * model.num_layers * model.kv_heads * model.head_dim * self.element
        active = model.num_layers * model.active_layer_parameters() + model.vocab * model.hidden
        read = (active * self.element + sequences * context * cache) / tp
        memory = read / (gpu.memory_bytes_per_s * a.decode_bandwidth_share)
        flops = (forward_flops(model, sequences, context) + head_flops(model, sequences)) / tp
        return max(memory, flops / (gpu.flops_per_s * a.score_mfu)) + a.decode_step_overhead_s

    def _decode_tokens_per_second(self) -> float:
        _, _, sequences = self._engine()
        return sequences / self._decode_step(sequences, self.length / 2)

    def _generate(self, decode_per_second: float) -> float:
        """All tokens at the engines' rate, but at least the longest answer alone at the end."""
        config, a = self.job.config, self.assumed
        if config.distill.method == "sft":
            return 0.0
        engines, tp, _ = self._engine()
        throughput = self.rollouts * a.mean_completion_tokens / engines / decode_per_second
        tail = config.rollout.max_new_tokens * self._decode_step(1, self.job.longest / 2)
        prompts = config.rollout.num_prompts * a.mean_prompt_tokens  # of a group, once
        flops = forward_flops(self.models["student"], prompts, a.mean_prompt_tokens)
        prefill = flops / (engines * tp * self.gpu.flops_per_s * a.score_mfu)
        return prefill + max(throughput, tail)

    def _label(self) -> float:
        """The last answers, after generation: others are labelled while it goes on."""
        if self.job.config.distill.method == "sft":
            return 0.0
        workers = self.job.config.verifier.num_workers
        at_the_end = min(self.job.rollouts_per_replica, self.job.config.rollout.n * workers)
        return at_the_end / workers * self.assumed.verify_s

    # -- score and train --------------------------------------------------------------------------

    def _bubble(self, pp: int, vpp: int) -> float:
        """Time over that of a full pipeline."""
        p = self.job.config.parallel
        if p.micro_batch_tokens is not None:
            tokens = self.job.rollouts_per_replica * self.length
            batches = max(1.0, tokens / p.micro_batch_tokens)
        else:
            batches = max(1.0, self.job.rollouts_per_replica / p.micro_batch_size)
        return 1.0 + (pp - 1) / (batches * vpp)

    def _score(self, role: str) -> float:
        model, layout = self.models[role], self.job.layout_of(role)
        flops = forward_flops(model, self.tokens, self.length)
        if not self.full_vocab:  # whose hidden states the student's loss projects
            flops += head_flops(model, self.loss_tokens)
        seconds = flops / (self.job.trainer_gpus * self.gpu.flops_per_s * self.assumed.score_mfu)
        seconds *= self._bubble(layout.pp, layout.vpp)
        if getattr(self.job.config.model, role).offload:
            weights = layout.stage_parameters(model, 0) * self.element
            seconds += 2 * weights / self.assumed.host_bytes_per_s
        return seconds

    def _recomputed(self) -> float:
        """Forward passes of the layers that backward repeats."""
        p = self.job.config.parallel
        if p.recompute_granularity == "none":
            return 0.0
        if p.recompute_granularity == "full":
            layers = max(self.job.layout_of("student").chunk_layers(self.models["student"])[0])
            block = p.recompute_method == "block"
            return min(1.0, p.recompute_num_layers / layers) if block else 1.0
        model = self.models["student"]
        whole = forward_flops(model, 1.0, self.length)
        mlp = 2.0 * model.num_layers * 3 * model.ffn * model.hidden
        attention = 2.0 * model.num_layers * model.heads * model.head_dim * self.length
        shares = {"mlp": mlp / whole, "core_attn": attention / whole}
        return sum(shares.get(name, 0.0) for name in p.recompute_modules or ["core_attn"])

    def _train(self) -> float:
        model, layout = self.models["student"], self.job.layout_of("student")
        layers = forward_flops(model, self.tokens, self.length)
        flops = layers * (1 + BACKWARD + self._recomputed()) + self._loss_flops()
        seconds = flops / (self.job.trainer_gpus * self.gpu.flops_per_s * self.assumed.train_mfu)
        seconds *= self._bubble(layout.pp, layout.vpp)
        return seconds + self._reduce_gradients() + self._update()

    def _loss_flops(self) -> float:
        """The head products of the loss, everything forward once more for some methods."""
        roles = self.job.roles() if self.full_vocab else ()
        once = sum(head_flops(self.models[r], self.loss_tokens) for r in ("student", *roles))
        backward = BACKWARD * head_flops(self.models["student"], self.loss_tokens)
        return once * (1 if self.job.is_token_local else 2) + backward

    def _reduce_gradients(self) -> float:
        """Once a step: a reduction and, with a distributed optimizer, the new weights back."""
        size = self.job.replicas * self.job.layout_of("student").cp
        if size == 1:
            return 0.0
        fullest = self.ranks[0]
        inside = self.job.trainer_gpus <= self.job.cluster.gpus_per_node
        speed = self.gpu.link_bytes_per_s if inside else self.assumed.network_bytes_per_s
        moved = (fullest.resident["gradients"] + fullest.resident["weights"]) * (size - 1) / size
        return moved / (speed * self.assumed.network_share)

    def _update(self) -> float:
        config, shards = self.job.config, 1
        if config.parallel.use_distributed_optimizer:
            shards = self.job.replicas * self.job.layout_of("student").cp
        elements = max(rank.parameters for rank in self.ranks) / shards
        seconds = elements * MASTER_AND_MOMENTS_TRAFFIC / self.gpu.memory_bytes_per_s
        if config.optimizer.offload:
            state = elements * (8 if self.element == 4 else 12)
            seconds += 2 * state / self.assumed.host_bytes_per_s
        return seconds

    # -- push -------------------------------------------------------------------------------------

    def _push(self) -> float:
        """Each first rank gathers the model once and sends it to its own engines, one by one."""
        config, a = self.job.config, self.assumed
        if config.distill.method == "sft":
            return 0.0
        size = self.models["student"].num_parameters() * self.element
        inside = self.job.replica_ranks <= self.job.cluster.gpus_per_node
        network = a.network_bytes_per_s * a.network_share
        link = self.gpu.link_bytes_per_s * a.network_share
        seconds = size / (link if inside else network)
        if not self.engines:
            return seconds
        vllm = servers_of(config.rollout.vllm, "student")
        of_one = -(-self.engines[0].num_engines // self.job.replicas)
        buckets = -(-size // int(vllm.bucket_mb * 2**20))
        speed = link if vllm.colocated else network
        return seconds + of_one * (size / speed + buckets * a.push_bucket_s)
