"""Every field that a recipe may set: the models, the layout, the loss, the optimizer, the run.

The text below a field is its entry in docs/recipe_fields.md, which `config/reference.py` writes:
what the field means, then "Restriction:" where a check of `config/` refuses values, and "Source:"
where the default of the method comes from (pub: published or in official code; secondary: one
account of somebody who read the paper's body; ours: our choice, no public value). docs/method.md
has the evidence. Megatron's own full names where a field is Megatron's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_sgopd.config.schema_rollouts import (
    DataConfig,
    EvaluationConfig,
    RolloutConfig,
    TeacherServersConfig,
    VerifierConfig,
    VllmConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EvaluationConfig",
    "FrozenConfig",
    "GateConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PhasesConfig",
    "RolloutConfig",
    "StudentConfig",
    "TeacherServersConfig",
    "VerifierConfig",
    "VllmConfig",
]


@dataclass(frozen=True)
class StudentConfig:
    hf_path: str = "???"
    """Hugging Face directory or hub name of the student: config.json, tokenizer and weights."""
    random_init: bool = False
    """Draws the initial weights, seeded by `seed`, instead of loading them."""


@dataclass(frozen=True)
class FrozenConfig:
    hf_path: str | None = None
    """Hugging Face directory or hub name of this frozen model. For the reference, null is the
    student's initial weights. Restriction: the teacher's must be set for every method but sft and
    grpo; the reference's must be null for sft and grpo, which read no reference. Source: pub."""
    tensor_model_parallel_size: int | None = None
    """Tensor parallel size of this model, on the same ranks as the student. Null for this and for
    pipeline_model_parallel_size is the student's whole layout, context parallelism included; when
    only the other is set, null is 1. Restriction: TP x PP of this model must divide the ranks of
    one replica (TP x PP x CP of `parallel`), and its heads must be divisible by TP."""
    pipeline_model_parallel_size: int | None = None
    """Pipeline parallel size of this model, on the same ranks as the student. Null is as for
    tensor_model_parallel_size. Restriction: TP x PP of this model must divide the ranks of one
    replica, and the model must have at least this many layers."""
    offload: bool = False
    """Moves this model's weights off the device between uses: from a GPU to pinned host memory,
    from CPU memory to a temporary file."""


@dataclass(frozen=True)
class ModelConfig:
    student: StudentConfig = field(default_factory=StudentConfig)
    """The model that is trained."""
    teacher: FrozenConfig = field(default_factory=FrozenConfig)
    """The frozen model that the student learns from."""
    reference: FrozenConfig = field(default_factory=FrozenConfig)
    """The frozen model from which the extrapolation starts; it is loaded only where the method
    reads it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights and activations of all models; logits are converted to fp32 for the
    loss."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Implementation of the transformer layers: Megatron's own in PyTorch (`local`), or NVIDIA
    Transformer Engine. Restriction: transformer_engine must be installed on the machine that runs
    the recipe."""


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    """Number of ranks that share each matrix and the vocabulary (TP). Restriction: the numbers of
    attention heads and of key-value heads of each model with this layout must be divisible by
    it."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages (PP). Restriction: a model must have at least as many layers as
    stages times chunks per stage."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Number of model chunks on each stage of an interleaved pipeline schedule. Null is the plain
    schedule, without interleaving. Restriction: at least 2, with pipeline_model_parallel_size at
    least 2; overlap_p2p_comm must not be false and batch_p2p_comm must not be true, because
    megatron-core 0.16 then computes wrong losses."""
    context_parallel_size: int = 1
    """Number of ranks that share each sequence (CP)."""
    sequence_parallel: bool = False
    """Splits norms and residuals along the sequence over the tensor parallel ranks. Restriction:
    true needs tensor_model_parallel_size above 1."""
    data_parallel_size: int | None = None
    """Number of replicas (DP). Null is the number of processes divided by TP x PP x CP, and 1
    where `sgopd train` starts the processes itself. Restriction: TP x PP x CP x DP must be the
    number of processes."""
    micro_batch_size: int = 1
    """Rollouts in one forward pass, padded to the same length; read where micro_batch_tokens is
    null."""
    micro_batch_tokens: int | None = None
    """Packs rollouts without padding into micro-batches of at most this many tokens. Null pads
    micro_batch_size rollouts instead. Restriction: at least rollout.max_prompt_tokens +
    rollout.max_new_tokens, except with method sft."""
    use_distributed_optimizer: bool = False
    """Shards the optimizer state over the data parallel and context parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlaps the gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlaps the gathering of updated weights with the next forward pass; here the gather is
    waited for after each step, so it gains nothing. Restriction: true needs
    use_distributed_optimizer and overlap_grad_reduce."""
    grad_reduce_in_fp32: bool = True
    """Accumulates gradients over micro-batches and replicas in fp32; false uses the type of the
    weights."""
    overlap_p2p_comm: bool | None = None
    """Overlaps the messages between pipeline stages with computation. Null is true with
    interleaved stages and false without. Restriction: true needs interleaved stages, which in turn
    do not take false."""
    batch_p2p_comm: bool | None = None
    """Sends the messages between pipeline stages in batches. Null is false with interleaved stages
    and true without. Restriction: interleaved stages do not take true."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Which activations are recomputed in the backward pass: none, those of recompute_modules
    (`selective`), or those of whole layers (`full`)."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """How recompute_granularity `full` groups layers, as in Megatron: `uniform` divides all layers
    of a chunk into groups of recompute_num_layers, `block` recomputes the first
    recompute_num_layers layers of a chunk one by one."""
    recompute_num_layers: int = 1
    """Layers in one group of recompute_method. Restriction: with granularity `full` and method
    `uniform` it must divide the number of layers of each chunk of the student."""
    recompute_modules: list[str] | None = None
    """Modules whose activations recompute_granularity `selective` recomputes. Null is
    [core_attn]. Restriction: one or more of core_attn and mlp (layernorm too with
    transformer_engine), and only with granularity `selective`."""
    hidden_states_budget_mb: float | None = None
    """Megabytes of hidden states of frozen models (estimator full_vocab) that stay on the device,
    per rank and model; the rest waits in host memory. Null is no limit."""
    make_vocab_size_divisible_by: int = 128
    """Pads the vocabulary to a multiple of this number times TP; the padding never enters a
    softmax."""
    distributed_timeout_minutes: float = 10.0
    """Minutes after which a collective operation fails because another rank did not take part."""


@dataclass(frozen=True)
class GateConfig:
    """The sign-consistency gate: open for tokens where verifier and teacher agree in sign."""

    verifier_signal: Literal["group_norm", "sign", "mean_only"] = "group_norm"
    """How the verdicts c of a prompt's rollouts become a1: (c - mean) / (std + 1e-6), 2c - 1, or
    c - mean. Source: secondary."""
    teacher_signal: Literal["t_minus_s", "t_minus_r"] = "t_minus_s"
    """What the gate reads as a2: the log-probability of the sampled token under the teacher minus
    that under the student, or minus that under the reference. Restriction: t_minus_s with
    full_vocab_mode candidate. Source: secondary."""
    lambda_high: float = 1.8
    """Extrapolation factor of a token whose gate is open. Restriction: above 0 with method sg_opd.
    Source: pub."""
    lambda_low: float = 1.0
    """Extrapolation factor of a token whose gate is closed. Restriction: with method sg_opd and
    conflict interpolate between 0 and 1 (both excluded), with method sg_opd and every other value
    of conflict 1. Source: secondary."""
    conflict: Literal["plain", "interpolate", "shrink", "verifier_mix"] = "plain"
    """What happens to a token whose gate is closed: plain on-policy distillation, an extrapolation
    factor lambda_low below 1, a weight of beta, or beta * a1 added to the advantage. Restriction:
    plain or interpolate with full_vocab_mode candidate; interpolate needs lambda_low between 0 and
    1. Source: ours."""
    beta: float = 1.0
    """Weight that conflict `shrink` and `verifier_mix` use. Source: secondary."""
    eps: float | str = "auto"
    """Tie width: the gate stays closed where |a2| is at most this. `auto` measures it at the start
    of the run, from the rounding differences of the student scored as its own teacher.
    Restriction: `auto` or a number of at least 0. Source: ours."""
    forbid_sign_flip: bool = False
    """Uses plain on-policy distillation for tokens where the extrapolation would reverse the sign
    of the update. Restriction: true needs estimator sampled. Source: ours."""
    full_vocab_mode: Literal["row", "candidate"] = "row"
    """What the gate decides with estimator full_vocab: one factor for the whole vocabulary row of
    a token, by the sampled token, or one for each vocabulary entry. Restriction: candidate needs
    method sg_opd, estimator full_vocab, teacher_signal t_minus_s and conflict plain or
    interpolate. Source: ours."""
    on_teacher_rollouts: bool = False
    """Imitates only those tokens of the teacher's rollouts whose gate is open, with a1 taken as
    +1. Source: ours."""


@dataclass(frozen=True)
class PhasesConfig:
    """Phased teacher sampling: verifier-endorsed teacher rollouts, faded out."""

    enabled: bool = True
    """Replaces part of the batch by teacher rollouts at the start of the run. Restriction: false
    with sft and grpo, which have no teacher. Source: pub."""
    rho0: float = 0.5
    """Share of the rollout slots that ask the teacher at the start. Restriction: from 0 to 1.
    Source: ours."""
    hold_frac: float = 0.1
    """Share of the run's steps during which the teacher's share stays at rho0. Restriction: 0 <=
    hold_frac <= end_frac <= 1. Source: ours."""
    end_frac: float = 0.4
    """Share of the run's steps after which the teacher's share is 0; between hold_frac and end_frac
    it decreases along a cosine. Restriction: 0 <= hold_frac <= end_frac <= 1. Source: ours."""
    unit: Literal["rollout", "prompt"] = "rollout"
    """Whether single rollout slots or all slots of a prompt are drawn for the teacher.
    Source: ours."""
    attempts: int = 1
    """How many times the teacher is asked for a slot until the verifier accepts an answer.
    Source: ours."""
    source: str = "engine"
    """Where teacher rollouts come from: `engine` samples the teacher; a path names a JSONL file of
    labelled teacher rollouts, as tools/label_rollouts.py writes it. Source: ours."""
    group_stats: Literal["all", "kept"] = "all"
    """Whether a1 of a prompt is computed over all student rollouts or only over those that no
    teacher rollout replaced. Source: ours."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy on the tokens of teacher rollouts. Source: ours."""
    ce_weighting: Literal["none", "dft"] = "none"
    """Weights each token of that cross-entropy further: not at all, or by the student's own
    probability of it (`dft`, arXiv 2508.05629). Source: ours."""


@dataclass(frozen=True)
class DistillConfig:
    method: Literal["sft", "grpo", "opd", "exopd", "sg_opd", "opdvr", "grpd"] = "sg_opd"
    """Training method; docs/method.md has the table. Restriction: all but sft and grpo need a
    teacher; grpo and grpd need rollout.n of at least 2."""
    estimator: Literal["sampled", "full_vocab"] = "sampled"
    """Whether the divergence from the teacher is estimated from the sampled token or computed over
    the whole vocabulary."""
    lambda_uniform: float = 1.25
    """Extrapolation factor of every token with method exopd. Restriction: above 0 with exopd.
    Source: pub."""
    loss_agg: Literal["seq_mean_token_mean", "token_mean"] = "seq_mean_token_mean"
    """How token losses are averaged over the batch: mean over each rollout's tokens and then over
    rollouts, or one mean over all tokens. Source: pub."""
    adv_clip: float | None = None
    """Limits the absolute value of the sampled advantage to this; null is off. Restriction: null
    with estimator full_vocab. Source: pub."""
    mask_truncated: bool = False
    """Leaves out of the loss the rollouts that reached rollout.max_new_tokens. Source: pub."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """Divergence that estimator full_vocab minimises. Restriction: reverse_kl with estimator
    sampled, and with method sg_opd and full_vocab_mode candidate. Source: pub."""
    jsd_beta: float = 0.5
    """Share of the teacher in the mixture of divergence jsd; 0 is forward KL and 1 is reverse KL.
    Restriction: from 0 to 1."""
    top_k: int | None = None
    """Compares only the teacher's k likeliest tokens and one outcome for all others. Null is the
    whole vocabulary. Restriction: estimator full_vocab, and a method that does not read the
    reference (lambda 1)."""
    chunk_tokens: int | None = None
    """Number of tokens whose logits are computed at once. Null chooses it by memory: at least 256
    tokens."""
    gate: GateConfig = field(default_factory=GateConfig)
    """The sign-consistency gate: open for tokens where verifier and teacher agree in sign."""
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    """Phased teacher sampling: at the start of a run part of the batch is teacher rollouts that
    the verifier accepts, and their share decreases to 0."""


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-5
    """Learning rate after the warm-up. Source: pub."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay. Restriction: at most lr."""
    lr_decay_style: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate from the end of the warm-up to num_steps. Source: pub."""
    lr_warmup_steps: int = 0
    """Steps in which the learning rate increases linearly to lr. Restriction: at most num_steps.
    Source: pub."""
    weight_decay: float = 0.0
    """Decoupled weight decay of Adam; norm weights have none."""
    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment. Restriction: from 0 to below 1."""
    adam_beta2: float = 0.98
    """Decay rate of Adam's second moment. Restriction: from 0 to below 1."""
    adam_eps: float = 1e-8
    """Constant that Adam adds to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient; larger ones are scaled down to it, and 0 is off."""
    offload: bool = False
    """Moves the optimizer state and the fp32 weights off the device between updates."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; with 0 there is one only at the end or on a request to stop."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    at_end: bool = True
    """Writes a checkpoint after the last step; a run that is stopped writes one in any case."""
    save_hf: bool = True
    """Writes the final student as a Hugging Face directory, RUN_DIR/hf."""
    save_hf_best: bool = True
    """Writes the student with the best evaluation during training as RUN_DIR/hf_best; read where
    evaluation.every is above 0."""


@dataclass(frozen=True)
class LoggingConfig:
    run_dir: str | None = None
    """The run folder (docs/run_folder.md). Null is runs/NAME."""
    rollouts_every: int = 10
    """Steps between samples of rollouts written to RUN_DIR/rollouts, beside the one of the first
    step; 0 writes none."""
    rollouts_kept: int = 8
    """Number of rollouts in each sample."""
    progress: bool = True
    """Shows progress bars."""


@dataclass(frozen=True)
class Config:
    name: str = "???"
    """Name of the run; it names the run folder. Restriction: letters, digits and . _ + - only."""
    seed: int = 42
    """Seed of the prompt order, the sampling, the teacher slots and random initial weights."""
    num_steps: int = 100
    """Number of optimizer steps."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The student and the two frozen models, and how they are computed."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The layout on the ranks, micro-batches and recomputation (docs/layouts.md)."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """The method and its loss (docs/method.md)."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The answers that each step trains on, and the engine that makes them."""
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    """The program that labels each answer right or wrong."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam and its learning rate."""
    data: DataConfig = field(default_factory=DataConfig)
    """The training problems and how they become prompts."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The evaluations before, during and after training (docs/evaluation.md)."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved of the student, and when."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """The run folder and what is written there of each step."""
