"""Every field that a recipe may set of problems, rollouts, engines, verifier and evaluations.

`schema` says what the text below a field is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TeacherServersConfig:
    """The teacher's servers, there while phased teacher sampling asks; null: as the student's."""

    num_engines: int | None = None
    """Number of servers of the teacher. Null is the student's number, and 1 where the student's
    servers are named by urls. Restriction: one entry of devices for each server, and a multiple of
    rollout.vllm.nodes."""
    urls: list[str] | None = None
    """Addresses of running servers of the teacher, started with `sgopd serve --teacher`. With null
    the trainer starts and ends them. Restriction: http://HOST:PORT each, not empty, and none that
    is also in rollout.vllm.urls."""
    tensor_parallel_size: int | None = None
    """Tensor parallel size of each server. Null is the student's."""
    devices: list[str] | None = None
    """CUDA_VISIBLE_DEVICES of each server. Null is the student's. Restriction: one entry for each
    server."""
    gpu_memory_utilization: float | None = None
    """Share of a GPU's memory that each server takes. Null is the student's. Restriction: where
    both models' servers share devices, the two shares add up to at most 0.95."""


@dataclass(frozen=True)
class VllmConfig:
    """vLLM servers of the student (docs/vllm.md); the trainer starts them, or uses those given."""

    num_engines: int = 1
    """Number of servers that are started, over all replicas. Restriction: a multiple of nodes."""
    nodes: int = 0
    """Number of nodes of a Slurm job that only run servers (slurm/README.md); 0 starts the servers
    on the trainer's nodes. Restriction: 0 with colocated."""
    urls: list[str] | None = None
    """Addresses of running servers, started with `sgopd serve`; with null the trainer starts its
    own. Restriction: http://HOST:PORT each, not empty, and null with colocated."""
    tensor_parallel_size: int = 1
    """Tensor parallel size of each server; it may differ from the trainer's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the servers' weights; auto is model.dtype."""
    python: str | None = None
    """Interpreter of the environment in which vLLM is installed; null is the trainer's own."""
    host: str = "127.0.0.1"
    """Address that a started server binds to."""
    port: int | None = None
    """Port of the first started server; the others take the next ones. Null takes free ports.
    Restriction: from 1 to 65535."""
    api_key_variable: str = "SGOPD_ENGINE_KEY"
    """Environment variable with the key that trainer and servers share; where it is not set, a run
    makes a new key."""
    max_model_len: int | None = None
    """Longest sequence of a server, in tokens. Null is what the recipe's prompts and completions
    need. Restriction: at least rollout.max_prompt_tokens + rollout.max_new_tokens."""
    max_concurrency: int = 256
    """Largest number of requests that a replica has in flight."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that a server takes. Restriction: above 0 and at most 1; where the
    teacher's servers share the devices, the two shares add up to at most 0.95."""
    cpu_kvcache_gb: int = 1
    """Gigabytes of KV cache of a server on CPUs."""
    devices: list[str] | None = None
    """CUDA_VISIBLE_DEVICES of each server, such as ['4,5']. Null inherits the trainer's; on GPUs a
    run without colocated that starts servers must name them. Restriction: one entry for each
    server."""
    colocated: bool = False
    """Starts the servers on the trainer's GPUs, where they give up their memory while the trainer
    trains. Restriction: true does not go with nodes, urls, weight_transfer nccl or
    rollout.max_policy_lag 1."""
    weight_transfer: Literal["auto", "gloo", "nccl", "ipc", "file"] = "auto"
    """How new weights reach the servers; auto is gloo from CPUs, ipc with colocated, and otherwise
    nccl. Restriction: not nccl with colocated."""
    transfer_folder: str | None = None
    """Folder that trainer and servers both see, for weight_transfer file; null is /dev/shm.
    Restriction: null with every other weight_transfer."""
    bucket_mb: float = 256.0
    """Megabytes of weights that are sent at once."""
    mismatch_kl_bound: float | None = None
    """Largest mismatch between trainer and server on fixed tokens after each push of weights; above
    it the run stops with a checkpoint. Null is 1e-8 in float32 and 1e-2 in bfloat16
    (docs/vllm.md)."""
    startup_timeout_s: float = 900.0
    """Seconds that a server may take to start, or an address of urls to answer again."""
    request_timeout_s: float = 3600.0
    """Seconds that one completion may take."""
    health_timeout_s: float = 120.0
    """Seconds without an answer after which a started server is ended and started again."""
    max_restarts: int = 3
    """Restarts in one recovery, after which the run stops with a checkpoint."""
    teacher: TeacherServersConfig = field(default_factory=TeacherServersConfig)
    """The teacher's servers, which exist while phased teacher sampling asks them."""
    allow_untested_version: bool = False
    """Accepts a version of vLLM that this project was not tested with."""
    extra_args: list[str] = field(default_factory=list)
    """More options for the command line of vLLM's server."""


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["embedded", "vllm"] = "embedded"
    """What generates: an engine inside the trainer's ranks, or vLLM servers. Restriction: with
    method sft, vllm needs an evaluation, since nothing else is generated."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """The student's vLLM servers; read where rollout.engine is vllm (docs/vllm.md)."""
    max_policy_lag: int = 0
    """Steps that the policy of a rollout may be behind: 0 is on-policy, 1 generates the next step's
    rollouts while a step trains. Restriction: 0 or 1; 1 needs engine vllm, servers that are not
    colocated, and tis other than none."""
    num_prompts: int = 32
    """Prompts of each step, over all replicas. Restriction: a multiple of the data parallel
    size."""
    n: int = 8
    """Rollouts of each prompt (G). Restriction: at least 2 with methods grpo and grpd.
    Source: secondary."""
    temperature: float = 1.0
    """Sampling temperature; all log-probabilities are computed at it. Restriction: above 0.
    Source: pub."""
    max_prompt_tokens: int = 2048
    """Longest prompt in tokens; longer training prompts are left out."""
    max_new_tokens: int = 16384
    """Longest completion in tokens; one that reaches this counts as wrong. Source: pub."""
    stop_token_ids: list[int] | None = None
    """Token ids that end a completion. Null is the EOS ids of the student's tokenizer and
    configuration files. Restriction: not empty, and no negative id."""
    tis: Literal["auto", "token", "none"] = "auto"
    """Truncated importance sampling between engine and trainer, for each token. auto is token with
    estimator sampled, with grpo and with max_policy_lag 1, and none with other full_vocab runs and
    sft. Restriction: not token with sft; not none with max_policy_lag 1. Source: pub."""
    tis_cap: float = 5.0
    """Largest importance weight. Source: pub."""
    max_batch_size: int = 512
    """Sequences that the embedded engine decodes at once, per rank."""


@dataclass(frozen=True)
class VerifierConfig:
    name: str = "math_verify"
    """The verifier: math_verify, or the dotted path of a function (completion, answer) that returns
    a Verdict. Restriction: math_verify or a path with a dot, package.module.function."""
    timeout_s: float = 5.0
    """Seconds of wall-clock time for one answer; one that takes longer counts as wrong.
    Restriction: at least 0.01, checked when the verifier starts."""
    num_workers: int = 2
    """Worker processes of each replica."""
    memory_mb: int = 2048
    """Megabytes of memory that a worker may use for an answer; one that needs more counts as
    wrong. Restriction: at least 64, checked when the verifier starts."""


@dataclass(frozen=True)
class DataConfig:
    train: str = "???"
    """Training problems: a JSONL or Parquet file, or the hub name of a data set."""
    problem_field: str = "problem"
    """Column of the problem's text."""
    answer_field: str = "answer"
    """Column of the expected answer."""
    solution_field: str = "solution"
    """Column of the worked solution; only method sft reads it."""
    min_difficulty: float | None = None
    """Keeps only rows whose column `difficulty` is at least this. Null keeps all rows."""
    shuffle: bool = True
    """Draws the problems of each epoch in a new order; false keeps the order of the file."""
    chat_template: str | None = None
    """Template of a prompt: null is the tokenizer's own, `plain` is the text as it is, anything
    else is a Jinja template. Restriction: null needs a tokenizer with a template."""
    chat_template_kwargs: dict[str, bool] = field(default_factory=dict)
    """Arguments of the template, such as enable_thinking. Restriction: not add_generation_prompt,
    chat_template or tokenize, which are fixed."""
    system_prompt: str | None = None
    """System message before each problem; null is none."""
    prompt_suffix: str = ""
    """Text after each problem, in the same message."""


@dataclass(frozen=True)
class EvaluationConfig:
    data: str | None = None
    """Problems of the full evaluation: a JSONL or Parquet file, or a hub name. Null is none, or
    those of benchmarks. Restriction: null where benchmarks are named."""
    benchmarks: dict[str, str] = field(default_factory=dict)
    """Several problem sets as NAME: FILE, instead of data. Restriction: a name has letters, digits
    and . _ + - only and begins with a letter or a digit."""
    problem_field: str | None = None
    """Column of the problem's text; null is data.problem_field."""
    answer_field: str | None = None
    """Column of the expected answer; null is data.answer_field."""
    every: int = 0
    """Steps between evaluations during training; 0 is none. Restriction: above 0 needs during_data,
    data or benchmarks."""
    at_start: bool = False
    """Makes the full evaluation before the first step too."""
    at_end: bool = True
    """Makes the full evaluation after the last step."""
    k: int = 8
    """The k of pass@k. Restriction: at most n."""
    n: int | None = None
    """Samples of each problem in a full evaluation; null is k. Restriction: at least k."""
    greedy: bool = True
    """Makes a greedy answer beside the samples in full evaluations."""
    temperature: float = 1.0
    """Sampling temperature of evaluations. Restriction: at least 0, which is greedy."""
    top_p: float = 1.0
    """Nucleus sampling threshold of evaluations; 1 is off. Restriction: above 0 and at most 1."""
    top_k: int | None = None
    """Samples only from the k likeliest tokens in evaluations; null is off."""
    min_p: float = 0.0
    """Samples only from tokens with at least this share of the likeliest token's probability, in
    evaluations; 0 is off. Restriction: from 0 to below 1."""
    max_problems: int | None = None
    """Number of problems of each set that a full evaluation takes; null is all."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; null is rollout.max_new_tokens."""
    bootstrap_samples: int = 2000
    """Bootstrap samples of the confidence intervals."""
    during_k: int = 2
    """Samples of each problem in an evaluation during training."""
    during_max_problems: int | None = 50
    """Number of problems that an evaluation during training takes; null is all."""
    during_data: str | None = None
    """Problems of the evaluations during training, so that the test set is used once; null is the
    set or the sets of the full evaluation."""
