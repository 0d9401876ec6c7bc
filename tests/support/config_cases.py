"""Recipes and overrides that must be refused, with what the words must hold, for config/."""

from __future__ import annotations

GOOD = """\
name: example
model:
  student:
    hf_path: models/student
  teacher:
    hf_path: models/teacher
data:
  train: train.jsonl
rollout:
  num_prompts: 8
"""


# Overrides that no config can take: the override, and what the message must hold.
BAD_NAMES = {
    "distill.gate.lamda_high=1.5": ["'distill.gate.lamda_high'", "'distill.gate.lambda_high'"],
    "distil.method=opd": ["'distil.method'", "'distill.method'"],
    "method=opd": ["'method'", "'distill.method'"],
    "optimizer.learning_rate=1e-4": ["'optimizer.learning_rate'", "nearest"],
    "xyzzy=1": ["'xyzzy'", "sections: ", "distill.gate", "rollout"],
    "distill.gate=1": ["'distill.gate' is a section", "distill.gate.lambda_high"],
    "rollout=8": ["'rollout' is a section", "rollout.num_prompts"],
    "rollout.n.x=8": ["'rollout.n.x'", "'rollout.n'"],
    "logging": ["'logging'", "section.key=value"],
    "=3": ["'=3'", "section.key=value"],
    "rollout n=3": ["'rollout n=3'", "section.key=value"],
    "rollout.n=[1": ["'[1'", "not a YAML value"],
}
BAD_TYPES = {
    "num_steps=ten": ["'num_steps'", "'ten'", "int"],
    "num_steps=1.5": ["'num_steps'", "1.5", "int"],
    "num_steps=true": ["'num_steps'", "True", "int"],
    "num_steps=010": ["'num_steps'", "'010'", "int"],
    "num_steps=1:30": ["'num_steps'", "'1:30'", "int"],
    "num_steps=0x10": ["'num_steps'", "'0x10'", "int"],
    "optimizer.lr=1:30.5": ["'optimizer.lr'", "'1:30.5'", "float"],
    "seed=9223372036854775808": ["'seed'", "9223372036854775808", "at most 9223372036854775807"],
    "name=???": ["'name'", "'???'", "no value"],
    "logging.run_dir=???": ["'logging.run_dir'", "'???'", "no value"],
    "num_steps=null": ["'num_steps'", "None", "int"],
    "num_steps=[1]": ["'num_steps'", "[1]", "int"],
    "optimizer.lr=fast": ["'optimizer.lr'", "'fast'", "float"],
    "optimizer.lr=true": ["'optimizer.lr'", "True", "float"],
    "model.student.random_init=1": ["'model.student.random_init'", "1 (int)", "bool"],
    "model.student.random_init=si": ["'model.student.random_init'", "'si'", "bool"],
    "name=3": ["'name'", "3 (int)", "str", "quote it"],
    "data.prompt_suffix=2.5": ["'data.prompt_suffix'", "2.5", "str", "quote it"],
    "data.prompt_suffix=true": ["'data.prompt_suffix'", "True", "str", "quote it"],
    "name=2026-01-01": ["'name'", "2026", "str", "quote it"],
    "distill.method=sgopd": ["'distill.method'", "'sgopd'", "sg_opd, opdvr, grpd"],
    "distill.estimator=full": ["'distill.estimator'", "'full'", "sampled, full_vocab"],
    "distill.estimator=1": ["'distill.estimator'", "1 (int)", "sampled, full_vocab"],
    "rollout.tis=true": ["'rollout.tis'", "True", "auto, token, none"],
    "model.dtype=fp32": ["'model.dtype'", "'fp32'", "float32, bfloat16"],
    "rollout.stop_token_ids=[a]": ["'rollout.stop_token_ids'", "['a']", "list[int]"],
    "rollout.stop_token_ids=[1, true]": ["'rollout.stop_token_ids'", "[1, True]", "list[int]"],
    "rollout.stop_token_ids=[1.5]": ["'rollout.stop_token_ids'", "[1.5]", "list[int]"],
    "rollout.stop_token_ids=3": ["'rollout.stop_token_ids'", "3 (int)", "list[int]"],
    "data.chat_template_kwargs=yes": ["'data.chat_template_kwargs'", "dict[str, bool]"],
    "data.chat_template_kwargs.enable_thinking=3": ["chat_template_kwargs", "3 (int)", "bool"],
    "data.chat_template_kwargs={enable_thinking: 3}": ["chat_template_kwargs", "3", "dict[str, "],
    "data.prompt_suffix=a: b": ["'data.prompt_suffix'", "{'a': 'b'} (dict)", "allowed: str"],
    "rollout.n={a: 1, a: 2}": ["'a' comes twice"],
    "data.train=${name}": ["'data.train'", "interpolation", "${name}"],
    "parallel.data_parallel_size=two": ["'parallel.data_parallel_size'", "'two'", "int | null"],
    "distill.adv_clip=off": ["'distill.adv_clip'", "False", "float | null"],
    "distill.gate.eps=true": ["'distill.gate.eps'", "True", "float | str"],
}
BAD_RANGES = {
    "num_steps=0": ["num_steps is 0", "at least 1"],
    "rollout.n=-1": ["rollout.n is -1", "at least 1"],
    "verifier.num_workers=0": ["verifier.num_workers is 0", "at least 1"],
    "evaluation.max_problems=0": ["evaluation.max_problems is 0", "at least 1"],
    "optimizer.lr=0": ["optimizer.lr is 0", "above 0"],
    "optimizer.lr=.nan": ["optimizer.lr is nan", "finite"],
    "optimizer.clip_grad=.inf": ["optimizer.clip_grad is inf", "finite"],
    "optimizer.weight_decay=-0.1": ["optimizer.weight_decay is -0.1", "not be negative"],
    "optimizer.min_lr=1": ["optimizer.min_lr 1.0", "optimizer.lr 1e-05"],
    "optimizer.lr_warmup_steps=101": ["lr_warmup_steps is 101", "num_steps 100"],
    "optimizer.adam_beta2=1.0": ["optimizer.adam_beta2 is 1.0", "below 1"],
    "distill.adv_clip=0": ["distill.adv_clip is 0", "above 0", "null is off"],
    "name=a/b": ["name is 'a/b'", "letters"],
    "name=..": ["name is '..'", "letters"],
    "rollout.temperature=0": ["rollout.temperature is 0", "above 0"],
    "rollout.stop_token_ids=[]": ["rollout.stop_token_ids is []", "null"],
    "rollout.stop_token_ids=[3,-1]": ["rollout.stop_token_ids is [3, -1]", "from 0"],
    "evaluation.every=5": ["evaluation.every is 5", "evaluation.during_data", "every=0"],
    "verifier.name=sympy": ["verifier.name is 'sympy'", "'math_verify'", "package.module"],
    "evaluation.temperature=-1": ["evaluation.temperature is -1", "0 (greedy)"],
    "distill.phases.rho0=1.5": ["distill.phases.rho0 is 1.5", "0 to 1"],
    "distill.phases.hold_frac=0.9": ["hold_frac 0.9", "end_frac 0.4", "<="],
    "distill.gate.eps=small": ["distill.gate.eps is 'small'", "'auto'"],
    "distill.gate.eps=-1e-3": ["distill.gate.eps is -0.001", "'auto'"],
    "distill.gate.lambda_high=0": ["lambda_high 0", "above 0"],
    "parallel.pipeline_model_parallel_size=0": ["pipeline_model_parallel_size is 0", "at least 1"],
    "parallel.context_parallel_size=0": ["context_parallel_size is 0", "at least 1"],
    "parallel.micro_batch_tokens=0": ["micro_batch_tokens is 0", "at least 1"],
    "parallel.hidden_states_budget_mb=-1": ["hidden_states_budget_mb is -1", "not be negative"],
    "model.teacher.tensor_model_parallel_size=0": ["model.teacher.tensor", "is 0", "at least 1"],
}
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = f"{PP2} parallel.virtual_pipeline_model_parallel_size=2"
BAD_LAYOUTS = {
    f"{VPP2} parallel.batch_p2p_comm=true": [
        "virtual_pipeline_model_parallel_size is set",
        "wrong losses without an error",
        "overlap_p2p_comm=true with batch_p2p_comm=false",
    ],
    f"{VPP2} parallel.overlap_p2p_comm=false": ["overlap_p2p_comm=true", "null means"],
    "parallel.virtual_pipeline_model_parallel_size=2": ["is 2", "pipeline_model_parallel_size 1"],
    f"{PP2} parallel.virtual_pipeline_model_parallel_size=1": ["is 1", "2 or more"],
    f"{PP2} parallel.overlap_p2p_comm=true": ["overlap_p2p_comm is true", "leave it null"],
    "parallel.sequence_parallel=true": ["sequence_parallel is true", "size 1", "false"],
    "parallel.overlap_param_gather=true": ["use_distributed_optimizer False", "both of them true"],
    "parallel.use_distributed_optimizer=true parallel.overlap_param_gather=true": [
        "overlap_grad_reduce False",
    ],
    "parallel.micro_batch_tokens=18431": ["is 18431", "2048", "16384", "18432"],
    "parallel.recompute_modules=[mlp]": ["recompute_granularity 'none'", "'selective'"],
    "parallel.recompute_granularity=selective parallel.recompute_modules=[layernorm]": [
        "['layernorm']",
        "'local'",
        "core_attn, mlp",
    ],
    "parallel.recompute_granularity=selective parallel.recompute_modules=[]": ["core_attn, mlp"],
    "model.teacher.tensor_model_parallel_size=2": ["model.teacher", "TP 2 x PP 1", "1 ranks"],
    f"{PP2} model.reference.pipeline_model_parallel_size=3": [
        "model.reference",
        "TP 1 x PP 3",
        "2 ranks",
    ],
}
BAD_COMBINATIONS = {
    "model.teacher.hf_path=null": ["'sg_opd'", "model.teacher.hf_path", "null"],
    "distill.method=grpd rollout.n=1": ["'grpd'", "rollout.n is 1", "2 or more"],
    "distill.method=grpo": ["distill.phases.enabled", "'grpo'", "phases.enabled=false"],
    "distill.method=sft distill.phases.enabled=false model.reference.hf_path=m": [
        "model.reference.hf_path",
        "'sft'",
        "null",
    ],
    "distill.method=sft distill.phases.enabled=false rollout.tis=token": [
        "rollout.tis is 'token'",
        "sft",
        "none",
    ],
    "distill.method=exopd distill.lambda_uniform=0": ["lambda_uniform is 0", "above 0"],
    "distill.estimator=full_vocab distill.adv_clip=5": ["distill.adv_clip", "full_vocab", "null"],
    "distill.divergence=jsd": ["distill.divergence is 'jsd'", "sampled", "full_vocab"],
    "distill.top_k=8": ["distill.top_k is 8", "sampled", "full_vocab"],
    "distill.estimator=full_vocab distill.top_k=8": ["distill.top_k is 8", "'sg_opd'", "lambda 1"],
    "distill.method=opd distill.estimator=full_vocab distill.top_k=0": ["distill.top_k is 0"],
    "distill.jsd_beta=1.5": ["distill.jsd_beta is 1.5", "between 0"],
    "distill.estimator=full_vocab distill.gate.full_vocab_mode=candidate "
    "distill.divergence=forward_kl": ["distill.divergence is 'forward_kl'", "candidate", "row"],
    "distill.gate.conflict=interpolate": ["'interpolate'", "lambda_low 1.0", "between 0 and 1"],
    "distill.gate.lambda_low=0.5": ["'plain'", "lambda_low 0.5", "'interpolate'"],
    "distill.estimator=full_vocab distill.gate.forbid_sign_flip=true": [
        "forbid_sign_flip",
        "sampled",
    ],
    "distill.method=opd distill.estimator=full_vocab distill.gate.forbid_sign_flip=true": [
        "forbid_sign_flip",
        "sampled",
    ],
    "distill.gate.full_vocab_mode=candidate": ["'candidate'", "'sampled'", "full_vocab", "row"],
    "distill.method=opd distill.estimator=full_vocab distill.gate.full_vocab_mode=candidate": [
        "'candidate'",
        "'opd'",
        "sg_opd",
        "row",
    ],
    "distill.estimator=full_vocab distill.gate.full_vocab_mode=candidate "
    "distill.gate.conflict=shrink": ["'candidate'", "plain or interpolate"],
    "distill.estimator=full_vocab distill.gate.full_vocab_mode=candidate "
    "distill.gate.teacher_signal=t_minus_r": ["'candidate'", "t_minus_s"],
    "model.transformer_impl=transformer_engine": ["transformer_engine", "[gpu]", "'local'"],
}


# Recipes that are refused, and what the message must hold.
BAD_FILES = {
    "unknown key": (
        GOOD + "  temprature: 5\n",
        ["RECIPE:11: unknown key 'rollout.temprature'", "valid key is 'rollout.temperature'"],
    ),
    "wrong type": (GOOD + "  n: many\n", ["RECIPE:11:", "'rollout.n'", "'many'", "int"]),
    "number as name": (GOOD.replace("example", "17"), ["RECIPE:1:", "'name'", "17", "quote it"]),
    "duplicate key": (GOOD + "  num_prompts: 9\n", ["RECIPE, line 11", "'num_prompts'", "twice"]),
    "duplicate section": (GOOD + "data:\n  shuffle: true\n", ["line 11", "'data'", "twice"]),
    "section set to a value": (GOOD + "optimizer: adam\n", ["RECIPE:11:", "'optimizer'", "lr"]),
    "value set to a section": (GOOD + "  n:\n    per_step: 3\n", ["'rollout.n.per_step'", ":12:"]),
    "number as key": (GOOD + "3: 4\n", ["RECIPE:11:", "unknown key '3'"]),
    "boolean as key": (GOOD + "on: 4\n", ["RECIPE:11:", "unknown key 'on'"]),
    "list as key": (GOOD + "[1, 2]: 4\n", ["RECIPE, line 11: a key must be a word"]),
    "merge key": (GOOD + "  <<: {n: 3}\n", ["RECIPE:11:", "unknown key 'rollout.<<"]),
    "a value in itself": ("&a\n" + GOOD + "logging: *a\n", ["RECIPE:1: not YAML", "recursive"]),
    "a section in itself": (
        GOOD + "logging: &a\n  run_dir: *a\n",
        ["RECIPE:11: not YAML", "recursive"],
    ),
    "tab": (GOOD + "optimizer:\n\tlr: 1e-4\n", ["RECIPE:12: not YAML", "\\t"]),
    "open bracket": (GOOD + "  stop_token_ids: [1, 2\n", ["RECIPE:12: not YAML"]),
    "two documents": (GOOD + "---\nname: b\n", ["RECIPE:11: not YAML"]),
    "a tag": (
        GOOD + "  n: !!python/object:os.system 3\n",
        ["RECIPE:11: not YAML", "python/object"],
    ),
    "a control character": (GOOD + "  n: \x01\n", ["RECIPE", "not YAML"]),
    "list": ("- name: a\n", ["RECIPE holds list", "mapping"]),
    "empty": ("", ["RECIPE holds NoneType", "mapping"]),
    "nothing set": ("num_steps: 3\n", ["data.train, model.student.hf_path, name must be set"]),
    "missing name": (
        GOOD.replace("name: example\n", ""),
        ["RECIPE: name must be set", "key=value"],
    ),
}
