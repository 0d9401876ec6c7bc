"""The embedded engine on tiny random Qwen3 models, against transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PhiConfig

from megatron_sgopd.model.hf_location import read_hf_config
from megatron_sgopd.model.hf_reader import iter_safetensors
from megatron_sgopd.rollouts import embedded_decoder as decoder
from megatron_sgopd.rollouts import embedded_engine
from megatron_sgopd.rollouts.embedded_engine import EmbeddedEngine
from megatron_sgopd.rollouts.embedded_sampling import TokenSampler
from megatron_sgopd.types import Completion, Request
from tests.support import model_cases
from tests.support.model_cases import make_engine
from tests.support.tiny import make_hf_dir

# name -> sizes; the vocabularies are odd on purpose
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"vocab": 37, "tied": False},
    "tied": {"vocab": 53, "tied": True, "layers": 1, "kv": 1},
    "qwen2": {"vocab": 41, "family": "qwen2", "kv": 4},
    "llama": {"vocab": 43, "family": "llama"},
}
LOGPROB_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    return {
        name: make_hf_dir(folder / name, seed, **sizes)
        for seed, (name, sizes) in enumerate(MODELS.items(), 5)
    }


@pytest.fixture(scope="module")
def engines(paths: dict[str, Path]) -> dict[str, EmbeddedEngine]:
    return {name: make_engine(str(path)) for name, path in paths.items()}


@pytest.fixture(scope="module")
def references(paths: dict[str, Path]) -> dict[str, Any]:
    return {
        name: AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        ).eval()
        for name, path in paths.items()
    }


def requests_of(count: int, vocab: int = 37, seed: int = 0, **options: Any) -> list[Request]:
    """Prompts of 1 to 4 tokens, several of each length."""
    rng = random.Random(seed)
    return [
        Request(
            prompt_token_ids=tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 4))),
            seed=1000 + i,
            **{"max_new_tokens": 10, **options},
        )
        for i in range(count)
    ]


def assert_same(got: list[Completion], expected: list[Completion]) -> None:
    """Ids, reasons, versions and seeds are equal, log-probs to the last digits."""
    assert [replace(c, logprobs=()) for c in got] == [replace(c, logprobs=()) for c in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=LOGPROB_TOLERANCE)


def teacher_forced(model: Any, request: Request, ids: tuple[int, ...]) -> Tensor:
    """log-softmax of every position that predicts one of `ids`, unscaled, [len(ids), V]."""
    whole = torch.tensor([request.prompt_token_ids + ids])
    with torch.no_grad():
        logits = model(whole).logits[0, len(request.prompt_token_ids) - 1 : -1]
    return logits


# -- against transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers(
    name: str, engines: dict[str, EmbeddedEngine], references: dict[str, Any]
) -> None:
    stop = 7
    requests = requests_of(8, temperature=0.0, stop_token_ids=(stop,), max_new_tokens=14)
    completions = engines[name].generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        expected = references[name].generate(
            torch.tensor([request.prompt_token_ids]),
            attention_mask=torch.ones(1, len(request.prompt_token_ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=stop,
            pad_token_id=0,
        )[0, len(request.prompt_token_ids) :]
        assert list(completion.token_ids) == expected.tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_equal_a_teacher_forced_forward(
    name: str,
    temperature: float,
    engines: dict[str, EmbeddedEngine],
    references: dict[str, Any],
) -> None:
    requests = requests_of(8, temperature=temperature)
    for request, completion in zip(requests, engines[name].generate(requests), strict=True):
        logits = teacher_forced(references[name], request, completion.token_ids)
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=LOGPROB_TOLERANCE)
        assert len(completion.token_ids) == 10


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(
    temperature: float, engines: dict[str, EmbeddedEngine], references: dict[str, Any]
) -> None:
    """Chi-square over 6000 seeds; 100 is far beyond the 99.99 % point of 36 degrees of freedom."""
    count = 6000
    request = Request((3, 1, 4), seed=0, max_new_tokens=1, temperature=temperature)
    completions = engines["untied"].generate([replace(request, seed=s) for s in range(count)])
    seen = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=37)
    logits = teacher_forced(references["untied"], request, (0,))[0]
    expected = count * (logits.double() / temperature).softmax(-1)
    chi_square = ((seen - expected) ** 2 / expected)[expected >= 3].sum().item()
    assert chi_square < 80
    other = count * (logits.double() / (1.6 * temperature)).softmax(-1)
    assert ((seen - other) ** 2 / other)[other >= 3].sum() > 200  # the test has power


# -- the same answers, however they are asked ------------------------------------------------------


MIXED = [
    replace(
        request,
        max_new_tokens=(14, 3, 7, 0)[i % 4],
        temperature=(1.0, 0.0, 0.7)[i % 3],
        stop_token_ids=((), (5, 11, 20, 30), (2,))[i % 3],
    )
    for i, request in enumerate(requests_of(18, seed=3))
]


def test_alone_batched_and_reordered_are_the_same(engines: dict[str, EmbeddedEngine]) -> None:
    together = engines["untied"].generate(MIXED)
    assert {c.finish_reason for c in together} == {"stop", "length"}
    assert_same([engines["untied"].generate([r])[0] for r in MIXED], together)
    assert_same(engines["untied"].generate(MIXED[::-1]), together[::-1])


@pytest.mark.parametrize("max_batch_size", [1, 4])
def test_small_batches_are_the_same(
    max_batch_size: int, paths: dict[str, Path], engines: dict[str, EmbeddedEngine]
) -> None:
    small = make_engine(str(paths["untied"]), max_batch_size=max_batch_size)
    assert_same(small.generate(MIXED), engines["untied"].generate(MIXED))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.01])
def test_compaction_does_not_change_answers(
    share: float,
    padded: bool,
    engines: dict[str, EmbeddedEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = [
        replace(
            r,
            prompt_token_ids=(i % 37, *([4] * (1 + padded * (i % 3)))),
            max_new_tokens=1 + i,
            stop_token_ids=(8,),
        )
        for i, r in enumerate(requests_of(16))
    ]
    expected = [engines["untied"].generate([r])[0] for r in requests]
    monkeypatch.setattr(embedded_engine, "COMPACT_BELOW", share)
    assert_same(engines["untied"].generate(requests), expected)


def test_copies_of_a_prompt_share_its_pass(engines: dict[str, EmbeddedEngine]) -> None:
    requests = [
        replace(r, prompt_token_ids=MIXED[i % 5].prompt_token_ids) for i, r in enumerate(MIXED)
    ]
    together = engines["untied"].generate(requests)
    assert_same(together, [engines["untied"].generate([r])[0] for r in requests])
    assert len({c.token_ids for c in together}) > 5  # seeds differ


def test_a_cache_grows(engines: dict[str, EmbeddedEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engines["untied"].generate(MIXED)
    monkeypatch.setattr(decoder, "ROOM", 2)
    assert_same(engines["untied"].generate(MIXED), expected)


def test_other_architectures_are_decoded_by_transformers(tmp_path: Path) -> None:
    """An evaluation takes any model; this one is not among the families that are trained."""
    config = PhiConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    engine = make_engine(str(tmp_path))
    assert isinstance(engine._decoder, decoder.TransformersDecoder)
    requests = [replace(r, temperature=0.0) for r in (*MIXED, *MIXED[:7])]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        if completion.token_ids:
            predicted = teacher_forced(model, request, completion.token_ids).argmax(-1)
            assert predicted.tolist() == list(completion.token_ids)


def test_padding_is_never_seen(
    engines: dict[str, EmbeddedEngine], references: dict[str, Any]
) -> None:
    """A prompt of 1 token behind 199 columns of padding, and one of 200 without."""
    rng = random.Random(4)
    requests = [
        Request(tuple(rng.randrange(37) for _ in range(n)), seed=n, max_new_tokens=4)
        for n in (1, 200, 67)
    ]
    for request, completion in zip(requests, engines["untied"].generate(requests), strict=True):
        logits = teacher_forced(references["untied"], request, completion.token_ids)
        ids = torch.tensor(completion.token_ids)[:, None]
        expected = logits.log_softmax(-1).gather(-1, ids)[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize(
    ("full", "max_batch_size", "ends"),
    [
        (1, 9, [2, 5, 6, 10]),  # a batch for each length
        (3, 9, [5, 10]),  # too few are padded together with their neighbours
        (4, 9, [5, 10]),
        (9, 9, [9, 10]),
        (1, 2, [2, 4, 5, 6, 8, 10]),  # never more than fit
        (9, 3, [3, 6, 9, 10]),
    ],
)
def test_batches_end_where_lengths_change(
    full: int,
    max_batch_size: int,
    ends: list[int],
    paths: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded_engine, "FULL_ON_CPU", full)
    engine = make_engine(str(paths["tied"]), max_batch_size=max_batch_size)
    lengths = [1, 3, 2, 1, 2, 4, 4, 2, 4, 4]
    done: list[int] = []
    engine.generate(
        [Request((5,) * n, seed=n, max_new_tokens=1) for n in lengths],
        lambda count, total: done.append(count),
    )
    assert done == ends


def test_seeds_make_the_answer(engines: dict[str, EmbeddedEngine]) -> None:
    request = Request((1, 2, 3), seed=7, max_new_tokens=10)
    first, again, other = engines["untied"].generate([request, request, replace(request, seed=8)])
    assert_same([again], [first])
    assert first.token_ids != other.token_ids
    assert (first.seed, other.seed) == (7, 8)
    torch.manual_seed(99)  # the global generator plays no part
    assert_same(engines["untied"].generate([request]), [first])


def test_a_longer_limit_continues_the_same_answer(engines: dict[str, EmbeddedEngine]) -> None:
    request = Request((9, 9), seed=3, max_new_tokens=6)
    (short,) = engines["untied"].generate([request])
    (long,) = engines["untied"].generate([replace(request, max_new_tokens=18)])
    assert long.token_ids[:6] == short.token_ids


def test_a_replica_of_two_ranks_gives_the_answers_of_one(
    pool: Any, paths: dict[str, Path], engines: dict[str, EmbeddedEngine]
) -> None:
    first, second = pool(2).run(model_cases.answers, str(paths["untied"]), MIXED)
    assert_same(first, engines["untied"].generate(MIXED))
    assert second == []
    first, second = pool(2).run(model_cases.answers, str(paths["untied"]), MIXED[:1])
    assert_same(first, engines["untied"].generate(MIXED[:1]))  # a rank without work


# -- where an answer ends --------------------------------------------------------------------------


def test_stop_ids_end_the_answer_and_stay_in_it(engines: dict[str, EmbeddedEngine]) -> None:
    """What is sampled does not depend on the stop ids, so the free answer tells where to stop."""
    free = engines["untied"].generate(requests_of(10))
    for stops in [(free[0].token_ids[4],), (3, 5, free[1].token_ids[0], 21), (36, 0)]:
        cut = engines["untied"].generate(requests_of(10, stop_token_ids=stops))
        for whole, got in zip(free, cut, strict=True):
            places = [i for i, t in enumerate(whole.token_ids) if t in stops]
            end = places[0] + 1 if places else 10
            assert got.token_ids == whole.token_ids[:end]
            assert len(got.logprobs) == end
            assert got.finish_reason == ("stop" if places else "length")


def test_a_stop_id_at_the_limit_is_a_stop(engines: dict[str, EmbeddedEngine]) -> None:
    request = Request((4, 4), seed=1, max_new_tokens=5)
    (free,) = engines["untied"].generate([request])
    last = free.token_ids[4]
    assert last not in free.token_ids[:4], "pick another seed"
    (stopped,) = engines["untied"].generate([replace(request, stop_token_ids=(last,))])
    assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")
    assert stopped.token_ids == free.token_ids


@pytest.mark.parametrize("limits", [[0], [0, 0, 0], [3, 0, 7, 1, 0]])
def test_every_request_has_its_own_limit(
    limits: list[int], engines: dict[str, EmbeddedEngine]
) -> None:
    requests = [Request((i, 2), seed=i, max_new_tokens=n) for i, n in enumerate(limits)]
    completions = engines["untied"].generate(requests)
    assert [len(c.token_ids) for c in completions] == limits
    assert [len(c.logprobs) for c in completions] == limits
    assert {c.finish_reason for c in completions} == {"length"}


def test_no_requests_and_progress(engines: dict[str, EmbeddedEngine]) -> None:
    calls: list[tuple[int, int]] = []
    assert engines["untied"].generate([], lambda *c: calls.append(c)) == []
    assert calls == []
    requests = [Request((1,) * n, seed=0, max_new_tokens=1) for n in (2, 1, 2)]
    engines["untied"].generate(requests, lambda *c: calls.append(c))
    assert calls == [(3, 3)]


# -- errors ----------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_answered(engines: dict[str, EmbeddedEngine]) -> None:
    engine, room = engines["untied"], 256
    with pytest.raises(ValueError, match="empty prompt"):
        engine.generate([Request((1,), 0, 1), Request((), 0, 1)])
    with pytest.raises(ValueError, match=r"250 tokens and 7 new ones exceed the model's 256"):
        engine.generate([Request((1,) * 250, 0, 7)])
    (fits,) = engine.generate([Request((1,) * (room - 2), 0, 2)])
    assert len(fits.token_ids) == 2
    with pytest.raises(ValueError, match=r"token id 37, the model's vocabulary 37 rows"):
        engine.generate([Request((1, 37, 2), 0, 1)])
    engine.generate([Request((36,), 0, 1)])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing model.layers.1.mlp.up_proj.weight", "did not come (1 are missing)"),
        ("unknown model.layers.9.mlp.up_proj.weight", "the engine's model has no weight"),
        ("twice model.norm.weight", "came twice"),
        ("short lm_head.weight", "has shape (36, 64), the engine's model has (37, 64)"),
        ("transposed model.layers.0.mlp.up_proj.weight", "has shape (64, 144)"),
    ],
)
def test_a_spoilt_stream_is_refused_by_name(
    case: str, message: str, paths: dict[str, Path]
) -> None:
    engine = make_engine(str(paths["untied"]))
    stream = model_cases.spoilt(iter_safetensors(paths["untied"]), case)
    with pytest.raises(ValueError, match="must not be used") as error:
        engine.push_weights(lambda: stream, 2)
    assert message in str(error.value)
    assert case.split()[1] in str(error.value)
    assert engine.policy_version == 1
    assert next(stream, None) is None  # read to its end: the stream is collective


def test_a_tied_head_may_come_a_second_time(paths: dict[str, Path]) -> None:
    head = torch.zeros(53, 64)

    def stream(*extra: tuple[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from iter_safetensors(paths["tied"])
        yield from extra

    request = Request((1, 2), seed=5, max_new_tokens=8)
    engine = make_engine(str(paths["tied"]))
    (expected,) = engine.generate([request])
    engine.push_weights(lambda: stream(("lm_head.weight", head)), 1)
    assert_same(engine.generate([request]), [expected])  # the embedding is the head
    with pytest.raises(ValueError, match=r"'lm_head.weight' has shape \(52, 64\)"):
        engine.push_weights(lambda: stream(("lm_head.weight", head[1:])), 2)
    with pytest.raises(ValueError, match=r"'lm_head.weight' came twice"):
        engine.push_weights(lambda: stream(*[("lm_head.weight", head)] * 2), 2)


def test_the_policy_version_is_that_of_the_weights(paths: dict[str, Path]) -> None:
    engine = EmbeddedEngine(read_hf_config(paths["untied"]), group=None, device=torch.device("cpu"))
    assert engine.policy_version == -1
    request = Request((1, 2), seed=5, max_new_tokens=8, temperature=0.0)
    engine.push_weights(lambda: iter_safetensors(paths["untied"]), 3)
    (before,) = engine.generate([request])
    engine.push_weights(lambda: negated_head(paths["untied"]), 4)
    (after,) = engine.generate([request])
    assert (before.policy_version, after.policy_version) == (3, 4)
    assert before.token_ids[0] != after.token_ids[0]  # the new weights answer


def negated_head(path: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in iter_safetensors(path):
        yield name, -tensor if name == "lm_head.weight" else tensor


def test_weights_are_cast_to_the_engines_type(paths: dict[str, Path]) -> None:
    engine = make_engine(str(paths["untied"]), dtype=torch.bfloat16)
    (completion,) = engine.generate([Request((1, 2), seed=5, max_new_tokens=8)])
    assert len(completion.logprobs) == 8
    assert all(-20 < x < 0 for x in completion.logprobs)
    # The rotary frequencies are no weights: rounded, they would turn far positions by radians.
    model = AutoModelForCausalLM.from_pretrained(paths["untied"], dtype=torch.bfloat16).model
    mine = engine._decoder
    assert torch.equal(mine._inverse_frequencies, model.rotary_emb.inv_freq)
    assert {p.dtype for p in mine.parameters.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("cut", "kept"),
    [  # of shares 0.4, 0.3, 0.2, 0.1, in another order
        ({"top_k": 2}, [0.4, 0.3]),
        ({"top_p": 0.65}, [0.4, 0.3]),
        ({"top_p": 0.01}, [0.4]),
        ({"min_p": 0.45}, [0.4, 0.3, 0.2]),
        ({"top_k": 3, "top_p": 0.75}, [0.4, 0.3]),  # of 4/9, 3/9, 2/9: the third comes after 7/9
        ({"min_p": 0.6, "top_p": 0.5}, [0.4]),  # of 4/7 and 3/7
        ({}, [0.4, 0.3, 0.2, 0.1]),  # beside one that is cut
    ],
)
def test_truncated_sampling_keeps_what_it_should(cut: dict[str, Any], kept: list[float]) -> None:
    shares = torch.tensor([0.2, 0.4, 0.1, 0.3])
    requests = [
        Request((1,), seed=i, max_new_tokens=1, **(cut if i % 2 else {"top_k": 1}))
        for i in range(400)
    ]
    sampler = TokenSampler(requests, torch.device("cpu"))
    tokens = sampler.step(shares.log().repeat(400, 1))
    assert set(tokens[::2].tolist()) == {1}, "a request's own settings"
    ids = tokens[1::2]
    assert set(ids.tolist()) == {shares.tolist().index(pytest.approx(k)) for k in kept}
    expected = (shares[ids] / sum(kept)).log()
    assert sampler.logprobs[0][1::2].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
