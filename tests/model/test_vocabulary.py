"""Models of one tokenizer whose embeddings are padded to different numbers of rows.

What is expected is the same step with every model cut to the rows that all of them have.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sgopd.model.hf_location import read_hf_config
from megatron_sgopd.rollouts.vllm_servers.client import VllmClient
from megatron_sgopd.types import Request
from tests.support import model_cases, step_cases
from tests.support.step_cases import StepCase
from tests.support.tiny import make_hf_dir

SHARED, PADDED = 37, 45
ROLES = ("student", "teacher", "reference")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """role -> rows -> directory; padding rows are louder than the others, so that they would show.

    The student's head is tied, the teacher's is not.
    """
    root, made = tmp_path_factory.mktemp("models"), {}
    for seed, role in enumerate(ROLES):
        sizes = {"hidden": 96, "layers": 3} if role == "teacher" else {"tied": role == "student"}
        path = make_hf_dir(root / f"{role}-{PADDED}", seed, vocab=PADDED, **sizes)
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[SHARED:] = torch.randn_like(layer.weight[SHARED:])
        model.save_pretrained(path)
        cut = root / f"{role}-{SHARED}"
        model.resize_token_embeddings(SHARED)
        model.save_pretrained(cut)
        assert read_hf_config(cut).vocab_size == SHARED
        made[role] = {PADDED: str(path), SHARED: str(cut)}
    return made


def case_of(folders: dict[str, dict[int, str]], padded: set[str], **fields: Any) -> StepCase:
    paths = {role: folders[role][PADDED if role in padded else SHARED] for role in ROLES}
    return StepCase(**paths, vocab=SHARED, **fields)


@pytest.mark.parametrize("estimator", ["sampled", "full_vocab"])
@pytest.mark.parametrize(
    ("tp", "own_layout"), [(1, False), (2, False), (2, True)], ids=["TP1", "TP2", "teacher TP1"]
)
@pytest.mark.parametrize(
    "padded", [{"teacher"}, {"student", "reference"}], ids=["teacher", "student"]
)
def test_rows_beyond_the_shared_ones_do_not_count(
    pool: Any,
    folders: dict[str, dict[int, str]],
    padded: set[str],
    tp: int,
    own_layout: bool,
    estimator: str,
) -> None:
    frozen = (("tensor_model_parallel_size", 1),) if own_layout else ()
    case = case_of(folders, set(), tp=tp, estimator=estimator, frozen=frozen)
    for loss, errors, beyond in pool(tp).run(
        step_cases.padding_errors, case, case_of(folders, padded), SHARED
    ):
        assert loss < 1e-6
        assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)
        assert beyond == 0.0


def test_the_tie_width_is_measured_over_the_same_rows(
    pool: Any, folders: dict[str, dict[int, str]]
) -> None:
    case = case_of(folders, {"student"}, tp=2, frozen=(("tensor_model_parallel_size", 1),))
    for width in pool(2).run(step_cases.tie_width, case):
        assert 0 < width < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_embedded_engine_samples_as_the_cut_model_does(
    folders: dict[str, dict[int, str]], temperature: float
) -> None:
    padded, cut = (folders["student"][rows] for rows in (PADDED, SHARED))
    requests = [Request((i % 37,), i, 16, temperature) for i in range(24)]
    whole = model_cases.make_engine(padded).generate(requests)
    assert max(max(c.token_ids) for c in whole) >= SHARED, "the padding would be sampled"
    engine = model_cases.make_engine(padded, shared_vocab_size=SHARED)
    expected = model_cases.make_engine(cut).generate(requests)
    for got, wanted in zip(engine.generate(requests), expected, strict=True):
        assert got.token_ids == wanted.token_ids
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-6)


def test_a_vllm_server_is_asked_never_to_sample_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[dict[str, Any]] = []

    def call(self: VllmClient, method: str, path: str, body: Any = None) -> Any:
        bodies.append(body)
        entry = {"token_id": 3, "logprob": -0.5}
        return {"choices": [{"logprobs": {"content": [entry | {"top_logprobs": [entry]}]}}]}

    monkeypatch.setattr(VllmClient, "_call", call)
    for ids, bias in ((range(37, 40), {"37": -100.0, "38": -100.0, "39": -100.0}), ((), None)):
        client = VllmClient("http://127.0.0.1:9", "key", never_sampled=ids)
        assert client.next_logprob([1], 3, 1.0) == -0.5
        client.close()
        assert bodies[-1]["sampling_params"].get("logit_bias") == bias


def test_a_vocabulary_that_is_not_what_its_config_says_is_refused(
    pool: Any, folders: dict[str, dict[int, str]], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in Path(folders["teacher"][PADDED]).iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    config = (wrong / "config.json").read_text()
    (wrong / "config.json").write_text(config.replace(f'size": {PADDED}', f'size": {PADDED + 2}'))
    case = replace(case_of(folders, set()), teacher=str(wrong))
    for error in pool(1).run(step_cases.load_error, case):
        assert f"has {PADDED} rows, config.json says vocab_size {PADDED + 2}" in error
