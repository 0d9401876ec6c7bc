"""Recipes: what is refused and in which words, YAML's traps, and what resolving fills in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_sgopd.config.checks import problems, resolve
from megatron_sgopd.config.engines import servers_of
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.load import diff, flatten, load_config, to_yaml
from megatron_sgopd.config.schema import Config
from tests.support.config_cases import (
    BAD_COMBINATIONS,
    BAD_FILES,
    BAD_LAYOUTS,
    BAD_NAMES,
    BAD_RANGES,
    BAD_TYPES,
    GOOD,
)

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def load(folder: Path, text: str = GOOD, *overrides: str) -> Config:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(folder: Path, text: str = GOOD, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(load(folder, text, *overrides))
    message = str(caught.value)
    assert "\n" not in message, "one line"
    return message.replace(str(folder / "recipe.yaml"), "RECIPE")


@pytest.mark.parametrize("override", [*BAD_NAMES, *BAD_TYPES])
def test_a_wrong_name_or_type_is_refused_with_what_is_allowed(tmp_path: Path, override: str):
    message = refusal(tmp_path, GOOD, override)
    assert message.startswith(f"override {override!r}")
    for part in (BAD_NAMES | BAD_TYPES)[override]:
        assert part in message


@pytest.mark.parametrize("overrides", [*BAD_RANGES, *BAD_COMBINATIONS, *BAD_LAYOUTS])
def test_a_value_that_cannot_be_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(tmp_path, GOOD, *overrides.split())
    for part in (BAD_RANGES | BAD_COMBINATIONS | BAD_LAYOUTS)[overrides]:
        assert part in message


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, case: str):
    text, parts = BAD_FILES[case]
    message = refusal(tmp_path, text)
    for part in parts:
        assert part in message


def test_a_recipe_that_is_not_there_or_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        ConfigError, match=r"sg_opf\.yaml does not exist; did you mean recipes/demo"
    ):
        load_config("recipes/sg_opf.yaml")
    with pytest.raises(ConfigError, match=r"recipe qqqqq does not exist$"):
        load_config("qqqqq")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E-05", 1e-5),
        ("2e+3", 2000.0),
        (".5e-3", 5e-4),
        ("1_0.5", 10.5),
        ("1", 1.0),
    ],
)
def test_a_float_may_be_written_in_any_usual_way(tmp_path: Path, text: str, value: float):
    in_file = load(tmp_path, GOOD + f"optimizer:\n  lr: {text}\n").optimizer.lr
    assert (in_file, type(in_file)) == (value, float)
    assert load(tmp_path, GOOD, f"optimizer.lr={text}").optimizer.lr == value


def test_strings_that_look_like_something_else_stay_strings(tmp_path: Path):
    config = load(tmp_path, GOOD.replace("example", '"1e-5"'), "data.prompt_suffix='on'")
    assert (config.name, config.data.prompt_suffix) == ("1e-5", "on")
    assert load(tmp_path, GOOD, "data.prompt_suffix=a=b").data.prompt_suffix == "a=b"


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0.0), ("2", 2.0), ("0.5", 0.5), ("auto", "auto")]
)
def test_a_tie_width_is_a_number_of_any_kind_or_auto(tmp_path: Path, text: str, value: object):
    eps = resolve(load(tmp_path, GOOD, f"distill.gate.eps={text}")).distill.gate.eps
    assert (eps, type(eps)) == (value, type(value))


def test_overrides_are_applied_in_order_over_the_recipe(tmp_path: Path):
    config = load(tmp_path, GOOD, "rollout.num_prompts=16", "rollout.num_prompts=24", "seed=7")
    assert (config.rollout.num_prompts, config.seed, config.num_steps) == (24, 7, 100)
    assert config.rollout == replace(Config().rollout, num_prompts=24), "the rest are defaults"


def test_values_of_every_kind_arrive(tmp_path: Path):
    config = load(
        tmp_path,
        GOOD + "  stop_token_ids: [1, 2]\nlogging: {}\n",
        "data.chat_template_kwargs={enable_thinking: false}",
        "distill.gate.eps=0.01",
        "distill.adv_clip=null",
        "model.student.random_init=true",
        "data={}",
        "optimizer.lr=1",
    )
    assert config.rollout.stop_token_ids == [1, 2]
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert (config.distill.gate.eps, config.distill.adv_clip) == (0.01, None)
    assert config.model.student.random_init is True
    assert config.logging == Config().logging
    assert config.data.train == "train.jsonl", "an empty section sets nothing"
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (1.0, float)
    one_key = load(tmp_path, GOOD, "data.chat_template_kwargs.enable_thinking=true")
    assert one_key.data.chat_template_kwargs == {"enable_thinking": True}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_every_recipe_resolves_and_comes_back_from_yaml(path: Path, tmp_path: Path):
    config = load_config(path)
    assert list(problems(config)) == []
    resolved = resolve(config)
    assert resolve(resolved) == resolved
    assert load(tmp_path, to_yaml(resolved)) == resolved
    assert load(tmp_path, to_yaml(config)) == config
    assert diff(resolved, config).keys() <= {
        "parallel.data_parallel_size",
        "rollout.tis",
        "rollout.vllm.dtype",
        "rollout.vllm.max_model_len",
        "evaluation.max_new_tokens",
        "logging.run_dir",
    }


def test_there_are_recipes():
    assert len(RECIPES) >= 6


def test_yaml_of_odd_values_comes_back(tmp_path: Path):
    config = load(tmp_path)
    odd = replace(
        config,
        name="1e5",
        optimizer=replace(config.optimizer, lr=1e-5, adam_eps=1e-08, min_lr=0.0),
        rollout=replace(config.rollout, stop_token_ids=[151645]),
        data=replace(
            config.data,
            prompt_suffix="\nPut it in \\boxed{}: 'x' # \u03bb",
            system_prompt="null",
            chat_template="{{ messages }}{% if a %}\n{% endif %}",
            chat_template_kwargs={"enable_thinking": False},
        ),
    )
    assert load(tmp_path, to_yaml(odd)) == odd
    assert yaml.safe_load(to_yaml(odd))["name"] == "1e5"


def test_flatten_and_diff_name_keys_by_their_dots(tmp_path: Path):
    a = load(tmp_path)
    b = load(tmp_path, GOOD, "distill.gate.lambda_high=1.5", "seed=1", "rollout.tis=none")
    assert flatten(a)["distill.gate.lambda_high"] == 1.8
    assert flatten(a)["data.chat_template_kwargs"] == {}
    assert diff(a, b) == {
        "distill.gate.lambda_high": (1.8, 1.5),
        "rollout.tis": ("auto", "none"),
        "seed": (42, 1),
    }
    assert diff(a, a) == {}
    c = load(tmp_path, GOOD, "data.chat_template_kwargs.enable_thinking=true")
    assert diff(a, c) == {"data.chat_template_kwargs": ({}, {"enable_thinking": True})}


def test_the_order_of_the_keys_does_not_count(tmp_path: Path):
    reordered = load(tmp_path, "rollout: {num_prompts: 8}\n" + GOOD.split("rollout:")[0])
    assert to_yaml(load(tmp_path)) == to_yaml(reordered)


# -- resolve ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "tis", "resolved"),
    [
        ("sampled", "auto", "token"),
        ("full_vocab", "auto", "none"),
        ("sampled", "none", "none"),
        ("full_vocab", "token", "token"),
    ],
)
def test_tis_auto_follows_the_estimator(tmp_path: Path, estimator: str, tis: str, resolved: str):
    config = load(tmp_path, GOOD, f"distill.estimator={estimator}", f"rollout.tis={tis}")
    assert resolve(config).rollout.tis == resolved


@pytest.mark.parametrize(
    ("tp", "dp", "world", "resolved"),
    [(1, "null", None, 1), (2, "null", None, 1), (2, "null", 8, 4), (1, 4, None, 4), (2, 4, 8, 4)],
)
def test_data_parallelism_fills_the_world(
    tmp_path: Path, tp: int, dp: object, world: int | None, resolved: int
):
    layout = (f"parallel.tensor_model_parallel_size={tp}", f"parallel.data_parallel_size={dp}")
    config = resolve(load(tmp_path, GOOD, *layout), world)
    assert config.parallel.data_parallel_size == resolved


@pytest.mark.parametrize(("dp", "world"), [("null", 3), ("null", 1), (2, 2), (2, 8)])
def test_a_world_that_the_layout_does_not_fill_is_refused(tmp_path: Path, dp: object, world: int):
    config = load(
        tmp_path, GOOD, "parallel.tensor_model_parallel_size=2", f"parallel.data_parallel_size={dp}"
    )
    with pytest.raises(
        ConfigError, match=rf"^{world} processes cannot be TP 2 x PP 1 x CP 1 x DP \d"
    ):
        resolve(config, world)


@pytest.mark.parametrize(
    ("method", "estimator", "tis"),
    [("grpo", "full_vocab", "token"), ("sft", "sampled", "none"), ("sft", "full_vocab", "none")],
)
def test_tis_of_methods_without_a_teacher(tmp_path: Path, method: str, estimator: str, tis: str):
    overrides = (f"distill.method={method}", f"distill.estimator={estimator}")
    config = load(tmp_path, GOOD, *overrides, "distill.phases.enabled=false")
    assert resolve(config).rollout.tis == tis


@pytest.mark.parametrize(("given", "resolved"), [("null", 40), ("9", 9)])
def test_an_evaluation_may_answer_as_long_as_a_rollout(tmp_path: Path, given: str, resolved: int):
    overrides = ("rollout.max_new_tokens=40", f"evaluation.max_new_tokens={given}")
    assert resolve(load(tmp_path, GOOD, *overrides)).evaluation.max_new_tokens == resolved


@pytest.mark.parametrize("signal", ["group_norm", "mean_only", "sign"])
def test_a_gate_works_without_groups(tmp_path: Path, signal: str):
    overrides = ("rollout.n=1", f"distill.gate.verifier_signal={signal}")
    assert list(problems(load(tmp_path, GOOD, *overrides))) == []


def test_prompts_are_shared_equally(tmp_path: Path):
    config = load(tmp_path, GOOD, "rollout.num_prompts=10")
    assert resolve(config, 5).rollout.num_prompts == 10
    with pytest.raises(
        ConfigError,
        match=r"rollout\.num_prompts is 10, which 4 .*data_parallel_size.* multiple of 4",
    ):
        resolve(config, 4)


def test_the_run_directory_is_named_after_the_run(tmp_path: Path):
    assert resolve(load(tmp_path)).logging.run_dir == "runs/example"
    assert resolve(load(tmp_path, GOOD, "logging.run_dir=here")).logging.run_dir == "here"


@pytest.mark.parametrize("role", ["student", "teacher", "reference"])
@pytest.mark.parametrize(
    ("heads", "key_value_heads", "blamed"),
    [(8, 4, None), (8, 2, "num_key_value_heads 2"), (6, 4, "num_attention_heads 6")],
)
def test_heads_are_shared_by_the_tensor_parallel_ranks(
    tmp_path: Path, role: str, heads: int, key_value_heads: int, blamed: str | None
):
    model = tmp_path / "model"
    model.mkdir()
    shape = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    (model / "config.json").write_text(json.dumps(shape))
    config = load(
        tmp_path, GOOD, f"model.{role}.hf_path={model}", "parallel.tensor_model_parallel_size=4"
    )
    if blamed is None:
        assert resolve(config).parallel.tensor_model_parallel_size == 4
        return
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    for part in ("parallel.tensor_model_parallel_size is 4", role, str(model), blamed):
        assert part in str(caught.value)


@pytest.mark.parametrize(("role", "layers"), [("student", 3), ("teacher", 2), ("reference", 3)])
def test_a_model_has_a_layer_for_every_pipeline_stage(
    tmp_path: Path, role: str, layers: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    interleaved = [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    ]
    config = load(tmp_path, GOOD, f"model.{role}.hf_path={tmp_path}", *interleaved)
    with pytest.raises(
        ConfigError, match=rf"4 pipeline stages.*{role}.*num_hidden_layers {layers}"
    ):
        resolve(config)
    own = [f"model.{role}.pipeline_model_parallel_size=2"] if role != "student" else []
    if own:  # its own layout asks for fewer
        resolve(load(tmp_path, GOOD, f"model.{role}.hf_path={tmp_path}", *interleaved, *own))


def test_a_model_config_that_is_not_json_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model\.teacher\.hf_path: .*config\.json is not JSON"):
        resolve(load(tmp_path, GOOD, f"model.teacher.hf_path={tmp_path}"))


BAD_ENGINES = [
    (["rollout.max_policy_lag=1"], "max_policy_lag is 1 with rollout.engine 'embedded'"),
    (["rollout.engine=vllm", "rollout.max_policy_lag=2"], "0 \\(on-policy\\) or 1"),
    (
        ["rollout.engine=vllm", "rollout.max_policy_lag=1", "rollout.vllm.colocated=true"],
        "engines sleep while the trainer trains",
    ),
    (
        ["rollout.engine=vllm", "rollout.max_policy_lag=1", "rollout.tis=none"],
        "need importance sampling",
    ),
    (["rollout.engine=vllm", "rollout.vllm.urls=['localhost:8000']"], "http://HOST:PORT is wanted"),
    (["rollout.engine=vllm", "rollout.vllm.urls=[]"], "name servers, or set null"),
    (["rollout.engine=vllm", "rollout.vllm.port=70000"], "1 to 65535"),
    (["rollout.engine=vllm", "rollout.vllm.devices=['0']", "rollout.vllm.num_engines=2"], "1 entr"),
    (["rollout.engine=vllm", "rollout.vllm.gpu_memory_utilization=1.5"], "a share above 0"),
    (["rollout.engine=vllm", "rollout.vllm.max_model_len=10"], "at least that many, or null"),
    (["rollout.engine=vllm", "rollout.vllm.transfer_folder=/tmp"], "'file' alone"),
    (["rollout.engine=vllm", "rollout.vllm.teacher.urls=['a:1']"], "vllm.teacher.urls has 'a:1'"),
    (
        [
            "rollout.engine=vllm",
            "rollout.vllm.urls=['http://a:1']",
            "rollout.vllm.teacher.urls=['http://a:1']",
        ],
        "http://a:1 is in rollout.vllm.urls and in rollout.vllm.teacher.urls",
    ),
    (
        ["rollout.engine=vllm", "rollout.vllm.teacher.devices=['0','1']"],
        "have 2 entries of devices and num_engines is 1",
    ),
    (
        ["rollout.engine=vllm", "rollout.vllm.colocated=true"],
        "add up to 1.80; at most 0.95",
    ),
    (
        ["rollout.engine=vllm", "rollout.vllm.colocated=true", "rollout.vllm.weight_transfer=nccl"],
        "one rank of a group on a GPU",
    ),
    (["rollout.vllm.num_engines=0"], "must be at least 1"),
    (["rollout.vllm.bucket_mb=0"], "must be above 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_ENGINES, ids=lambda v: str(v)[:60])
def test_what_an_engine_cannot_do_is_refused(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(load(tmp_path, GOOD, *settings))


def test_a_policy_lag_brings_importance_sampling(tmp_path: Path) -> None:
    settings = ["rollout.engine=vllm", "distill.estimator=full_vocab"]
    assert resolve(load(tmp_path, GOOD, *settings)).rollout.tis == "none"
    behind = resolve(load(tmp_path, GOOD, *settings, "rollout.max_policy_lag=1"))
    assert behind.rollout.tis == "token"


def test_the_teachers_servers_are_the_students_but_for_what_is_said(tmp_path: Path) -> None:
    settings = ["rollout.engine=vllm", "rollout.vllm.tensor_parallel_size=2"]
    settings += ["rollout.vllm.teacher.gpu_memory_utilization=0.3", "rollout.vllm.port=9000"]
    vllm = resolve(load(tmp_path, GOOD, *settings)).rollout.vllm
    assert servers_of(vllm, "student") is vllm
    teacher = servers_of(vllm, "teacher")
    assert (teacher.tensor_parallel_size, teacher.gpu_memory_utilization) == (2, 0.3)
    assert teacher.port is None  # the student's server has that one
    given = replace(vllm, urls=["http://a:1", "http://b:1"], num_engines=2)
    assert (servers_of(given, "teacher").urls, servers_of(given, "teacher").num_engines) == (
        None,
        1,
    )
