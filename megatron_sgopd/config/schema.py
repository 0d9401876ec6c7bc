"""Every field a recipe may set, with its default and, for the method's, where the default is from.

"pub": published or in official code. "ours": our choice, no public value. docs/method.md has the
evidence. Megatron's own full names where a field is Megatron's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

METHODS = ("sft", "grpo", "opd", "exopd", "sg_opd", "opdvr", "grpd")


@dataclass(frozen=True)
class StudentConfig:
    hf_path: str = "???"  # HF directory or hub name: config.json, tokenizer and weights
    random_init: bool = False  # draw the weights (seeded by `seed`) instead of loading them


@dataclass(frozen=True)
class FrozenConfig:
    hf_path: str | None = None  # teacher: required by the distilling methods;
    # reference: null is the student's initial weights (pub)
    tensor_model_parallel_size: int | None = None  # null: the student's layout, context parallel
    pipeline_model_parallel_size: int | None = None  # too; else its own, on the same ranks
    offload: bool = False  # weights leave the device between uses


@dataclass(frozen=True)
class ModelConfig:
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: FrozenConfig = field(default_factory=FrozenConfig)
    reference: FrozenConfig = field(default_factory=FrozenConfig)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    transformer_impl: Literal["local", "transformer_engine"] = "local"


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None  # model chunks per stage (interleaved)
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    data_parallel_size: int | None = None  # null: world / (TP x PP x CP); 1 when started by hand
    micro_batch_size: int = 1  # rollouts in one forward pass, where micro_batch_tokens is null
    micro_batch_tokens: int | None = None  # pack rollouts without padding up to so many tokens
    use_distributed_optimizer: bool = False  # optimizer state shared out over data parallel ranks
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False  # with use_distributed_optimizer
    grad_reduce_in_fp32: bool = True  # gradients add up over micro-batches and replicas in fp32
    overlap_p2p_comm: bool | None = None  # null: with interleaved stages only
    batch_p2p_comm: bool | None = None  # null: without interleaved stages only
    recompute_granularity: Literal["none", "selective", "full"] = "none"  # of activations
    recompute_method: Literal["uniform", "block"] = "uniform"  # for full
    recompute_num_layers: int = 1  # for full: layers between two checkpoints (of each chunk)
    recompute_modules: list[str] | None = (
        None  # for selective; null is core_attn; also mlp, layernorm
    )
    hidden_states_budget_mb: float | None = None  # of frozen models' hidden states (full_vocab) on
    # the device, per rank and model; what is beyond waits in host memory. null: no limit
    make_vocab_size_divisible_by: int = 128  # times TP; padded rows never enter a softmax
    distributed_timeout_minutes: float = 10.0


@dataclass(frozen=True)
class GateConfig:
    """The sign-consistency gate: open where verifier and teacher pull the same way."""

    verifier_signal: Literal["group_norm", "sign", "mean_only"] = "group_norm"  # a1; secondary
    teacher_signal: Literal["t_minus_s", "t_minus_r"] = "t_minus_s"  # a2; secondary
    lambda_high: float = 1.8  # pub
    lambda_low: float = 1.0  # secondary
    conflict: Literal["plain", "interpolate", "shrink", "verifier_mix"] = "plain"  # ours
    beta: float = 1.0  # weight of `shrink` and `verifier_mix`; secondary
    eps: float | str = "auto"  # tie width on |a2|: a number, or measured by a self-scoring pass
    forbid_sign_flip: bool = False  # ours; `sampled` only
    full_vocab_mode: Literal["row", "candidate"] = "row"  # ours
    on_teacher_rollouts: bool = False  # ours


@dataclass(frozen=True)
class PhasesConfig:
    """Phased teacher sampling: verifier-endorsed teacher rollouts, faded out."""

    enabled: bool = True  # pub
    rho0: float = 0.5  # share of the rollout slots at the start; ours
    hold_frac: float = 0.1  # share of the run at rho0; ours
    end_frac: float = 0.4  # share of the run after which the fraction is 0; ours
    unit: Literal["rollout", "prompt"] = "rollout"  # ours
    attempts: int = 1  # teacher tries per slot; ours
    source: str = "engine"  # or a JSONL of labelled teacher rollouts (tools/label_rollouts.py)
    group_stats: Literal["all", "kept"] = "all"  # ours
    ce_weight: float = 1.0  # ours
    ce_weighting: Literal["none", "dft"] = "none"  # ours


@dataclass(frozen=True)
class DistillConfig:
    method: Literal["sft", "grpo", "opd", "exopd", "sg_opd", "opdvr", "grpd"] = "sg_opd"
    estimator: Literal["sampled", "full_vocab"] = "sampled"
    lambda_uniform: float = 1.25  # `exopd` only; pub
    loss_agg: Literal["seq_mean_token_mean", "token_mean"] = "seq_mean_token_mean"  # pub
    adv_clip: float | None = None  # |A| at most this; `sampled` only; pub (off)
    mask_truncated: bool = False  # pub
    ppo_epochs: int = 1  # pub
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"  # of full_vocab; pub
    jsd_beta: float = 0.5  # jsd: 0 is forward, 1 reverse KL, between them the mixture's share
    top_k: int | None = None  # full_vocab over the teacher's k likeliest tokens and a tail
    chunk_tokens: int | None = None  # tokens projected at once; null: by bytes, at least 256
    gate: GateConfig = field(default_factory=GateConfig)
    phases: PhasesConfig = field(default_factory=PhasesConfig)


@dataclass(frozen=True)
class TeacherServersConfig:
    """The teacher's servers, there while phased teacher sampling asks; null: as the student's."""

    num_engines: int | None = None
    urls: list[str] | None = None  # null: started and shut down by the trainer
    tensor_parallel_size: int | None = None
    devices: list[str] | None = None
    gpu_memory_utilization: float | None = None


@dataclass(frozen=True)
class VllmConfig:
    """vLLM servers of the student (docs/vllm.md); the trainer starts them, or uses those given."""

    num_engines: int = 1  # servers that are started, over all replicas
    nodes: int = 0  # of a Slurm job, set apart for servers (slurm/README.md); 0: the trainer's own
    urls: list[str] | None = None  # servers that are there already; then none is started
    tensor_parallel_size: int = 1  # ranks of one server; may differ from the trainer's
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: model.dtype
    python: str | None = None  # interpreter of the environment that has vLLM; null: this one
    host: str = "127.0.0.1"  # the address a started server binds to
    port: int | None = None  # of the first server, the next ones follow; null: free ones
    api_key_variable: str = "SGOPD_ENGINE_KEY"  # environment variable of the key; unset: a new one
    max_model_len: int | None = None  # null: what the recipe's prompts and completions need
    max_concurrency: int = 256  # requests in flight per replica
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory
    cpu_kvcache_gb: int = 1  # KV cache of a server on CPUs, whole gigabytes
    devices: list[str] | None = None  # CUDA_VISIBLE_DEVICES of each server; null: inherited
    colocated: bool = False  # on the trainer's GPUs: servers sleep while the trainer trains
    weight_transfer: Literal["auto", "gloo", "nccl", "ipc", "file"] = "auto"
    transfer_folder: str | None = None  # for file: seen by both ends; null: /dev/shm
    bucket_mb: float = 256.0  # weights sent at once
    mismatch_kl_bound: float | None = None  # null: by dtype, measured (docs/vllm.md)
    startup_timeout_s: float = 900.0
    request_timeout_s: float = 3600.0  # one completion
    health_timeout_s: float = 120.0  # a started server silent for so long is ended and restarted
    max_restarts: int = 3  # of servers in one recovery, before the run stops with a checkpoint
    teacher: TeacherServersConfig = field(default_factory=TeacherServersConfig)
    allow_untested_version: bool = False
    extra_args: list[str] = field(default_factory=list)  # as vLLM's server takes them


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["embedded", "vllm"] = "embedded"
    vllm: VllmConfig = field(default_factory=VllmConfig)  # read by engine vllm
    max_policy_lag: int = 0  # steps a rollout may be behind; 1 generates while it trains (vllm)
    num_prompts: int = 32  # prompts per step, over all replicas
    n: int = 8  # G, rollouts per prompt; secondary
    temperature: float = 1.0  # pub
    top_p: float = 1.0  # pub; training needs the full support
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 16384  # pub
    stop_token_ids: list[int] | None = None  # null: the student's EOS ids
    tis: Literal["auto", "token", "none"] = "auto"  # token for `sampled` (pub), none for full_vocab
    tis_cap: float = 5.0  # pub
    max_batch_size: int = 512  # sequences decoded at once by the embedded engine, per rank


@dataclass(frozen=True)
class VerifierConfig:
    name: str = "math_verify"  # or the dotted path of a function (completion, answer) -> Verdict
    timeout_s: float = 5.0  # hard wall limit per answer
    num_workers: int = 2  # worker processes per replica
    memory_mb: int = 2048  # address-space limit of a worker


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-5  # pub
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "cosine", "linear"] = "constant"  # pub
    lr_warmup_steps: int = 0  # pub
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-8
    clip_grad: float = 1.0  # global L2 norm; 0 is off
    offload: bool = False  # state and fp32 weights leave the device between updates


@dataclass(frozen=True)
class DataConfig:
    train: str = "???"  # JSONL or Parquet file, or a hub name
    problem_field: str = "problem"
    answer_field: str = "answer"
    solution_field: str = "solution"  # read by `sft` only
    min_difficulty: float | None = None  # keep rows whose `difficulty` is at least this
    shuffle: bool = True
    chat_template: str | None = None  # null: the tokenizer's own; plain: none; or a Jinja template
    chat_template_kwargs: dict[str, bool] = field(default_factory=dict)  # e.g. enable_thinking
    system_prompt: str | None = None
    prompt_suffix: str = ""


@dataclass(frozen=True)
class EvaluationConfig:
    data: str | None = None  # JSONL or Parquet; null: no evaluation
    benchmarks: dict[str, str] = field(default_factory=dict)  # NAME: FILE of several, without data
    problem_field: str | None = None  # null: data.problem_field
    answer_field: str | None = None  # null: data.answer_field
    every: int = 0  # steps; 0: not during training
    at_start: bool = False
    at_end: bool = True
    k: int = 8  # of pass@k
    n: int | None = None  # samples per problem, from k on; null: k
    greedy: bool = True  # a greedy answer beside them
    temperature: float = 1.0
    top_p: float = 1.0  # 1 is off; these three truncate in evaluations alone
    top_k: int | None = None
    min_p: float = 0.0  # 0 is off
    max_problems: int | None = None
    max_new_tokens: int | None = None  # null: rollout.max_new_tokens
    bootstrap_samples: int = 2000
    during_k: int = 2  # samples per problem of the evaluations during training
    during_max_problems: int | None = 50
    during_data: str | None = None  # null: `data`; a dev set, so that the test set is used once


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 50  # steps; 0: only at the end and on request
    keep: int = 2  # newest checkpoints kept
    at_end: bool = True
    save_hf: bool = True  # write the final student as a Hugging Face directory
    save_hf_best: bool = True  # and the best one, where evaluation.every compares them


@dataclass(frozen=True)
class LoggingConfig:
    run_dir: str | None = None  # null: runs/NAME
    rollouts_every: int = 10  # steps between samples of rollouts written to rollouts/
    rollouts_kept: int = 8  # rollouts in each sample
    progress: bool = True


@dataclass(frozen=True)
class Config:
    name: str = "???"
    seed: int = 42
    num_steps: int = 100
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
