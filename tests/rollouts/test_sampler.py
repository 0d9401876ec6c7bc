"""Mixing teacher rollouts in, group statistics and seeds, with an engine that answers by script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from megatron_sgopd.config.schema import Config, DistillConfig, PhasesConfig, RolloutConfig
from megatron_sgopd.rollouts.batch import (
    batch_metrics,
    generate_groups,
    mix_teacher_rollouts,
    solutions_as_rollouts,
    with_advantages,
)
from megatron_sgopd.rollouts.sampler import Sampler, request_seed
from megatron_sgopd.types import Completion, Prompt, Request, Rollout
from megatron_sgopd.verifier import Verdict


@dataclass
class ScriptedEngine:
    """A fake engine: answers token 1 (right) or 0 (wrong) by a rule on the request."""

    right: Sequence[bool]
    finish: str = "stop"
    policy_version: int = 7
    asked: list[Request] = field(default_factory=list)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        start = len(self.asked)
        self.asked += requests
        completions = [
            Completion(
                (int(self.right[(start + i) % len(self.right)]),),
                (-0.5,),
                self.finish,  # type: ignore[arg-type]
                self.policy_version,
                r.seed,
            )
            for i, r in enumerate(requests)
        ]
        yield from reversed(list(enumerate(completions)))  # as they finish, in any order


class ScriptedVerifier:
    """A fake verifier: "1" is right."""

    def verify_iter(self, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[int, Verdict]]:
        for index, (text, _) in enumerate(pairs):
            yield index, Verdict(text == "1", text, "scripted")


class AloneGroups:
    """A fake of the process groups of one rank."""

    is_replica_first_rank = True
    replica_group = None
    dp_rank = 0
    dp_size = 1


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sgopd.rollouts.sampler.broadcast_object", lambda obj, groups: obj)


def sampler(n: int = 2, **phases: object) -> Sampler:
    config = Config(
        name="t",
        rollout=RolloutConfig(n=n, num_prompts=4, max_new_tokens=5),
        distill=DistillConfig(phases=PhasesConfig(**phases)),  # type: ignore[arg-type]
    )
    return Sampler(
        config,
        AloneGroups(),  # type: ignore[arg-type]
        ScriptedVerifier(),  # type: ignore[arg-type]
        lambda ids: "".join(map(str, ids)),
        (9,),
    )


PROMPTS = [Prompt(f"p{i}", (1, 2), "1") for i in range(4)]


def student_groups(s: Sampler, right: Sequence[bool]) -> list[list[Rollout]]:
    return generate_groups(s, ScriptedEngine(right), PROMPTS, step=3, first_prompt=0)


def test_groups_are_labelled_and_carry_a1() -> None:
    groups = student_groups(sampler(), [True, False, True, True, False, False, False, True])
    assert [[r.is_correct for r in g] for g in groups] == [
        [True, False],
        [True, True],
        [False, False],
        [False, True],
    ]
    advantages = [[round(r.verifier_advantage, 3) for r in g] for g in groups]
    assert advantages == [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [-1.0, 1.0]]
    assert all(r.completion.policy_version == 7 for g in groups for r in g)


def test_truncated_answer_is_wrong_whatever_it_says() -> None:
    engine = ScriptedEngine([True], finish="length")
    groups = generate_groups(sampler(), engine, PROMPTS, step=0, first_prompt=0)
    assert not any(r.is_correct for g in groups for r in g)


def test_requests_are_seeded_by_place_not_by_layout() -> None:
    s, whole, half = sampler(), ScriptedEngine([True]), ScriptedEngine([True])
    generate_groups(s, whole, PROMPTS, step=3, first_prompt=0)
    generate_groups(s, half, PROMPTS[2:], step=3, first_prompt=2)
    assert [r.seed for r in whole.asked[4:]] == [r.seed for r in half.asked]
    assert len({r.seed for r in whole.asked}) == 8
    later = ScriptedEngine([True])
    generate_groups(s, later, PROMPTS, step=4, first_prompt=0)
    assert not {r.seed for r in later.asked} & {r.seed for r in whole.asked}
    assert all(r.stop_token_ids == (9,) and r.max_new_tokens == 5 for r in whole.asked)


def test_only_endorsed_teacher_rollouts_displace() -> None:
    s = sampler()
    groups = student_groups(s, [False])
    batch = mix_teacher_rollouts(
        s, ScriptedEngine([True, False, True]), groups, [0, 3, 6], step=3, first_prompt=0
    )
    sources = [[r.source for r in g] for g in batch.groups]
    assert sources == [
        ["teacher", "student"],
        ["student", "student"],  # slot 3: the teacher was wrong, the student's stays
        ["student", "student"],
        ["teacher", "student"],
    ]
    assert batch.groups[1][1] is groups[1][1]
    assert batch.requested == 3
    assert batch.endorsed == {"none": (2, 3)}
    means = {k: (float(t), float(n)) for k, (t, n) in batch_metrics(batch, 7).items()}
    assert means["phases/requested_fraction"] == (3, 8)
    assert means["phases/realised_fraction"] == (2, 8)
    assert means["phases/endorsement_rate"] == (2, 3)
    assert means["phases/endorsement_rate_student_none"] == (2, 3)
    assert means["rollout/accuracy"] == (0, 8)


def test_truncated_teacher_rollout_is_not_used() -> None:
    s = sampler()
    groups = student_groups(s, [False])
    engine = ScriptedEngine([True], finish="length")
    batch = mix_teacher_rollouts(s, engine, groups, [0, 1], step=3, first_prompt=0)
    assert batch.groups == groups


def test_displaced_rollouts_stay_in_the_group_statistics() -> None:
    s = sampler()
    groups = student_groups(s, [True, False] * 4)
    batch = mix_teacher_rollouts(s, ScriptedEngine([True]), groups, [0, 2], step=3, first_prompt=0)
    # Slot 0 was the right one of its group; the wrong one left keeps its a1 of -1.
    assert batch.groups[0][1].verifier_advantage == pytest.approx(-1.0, abs=1e-4)
    assert float(batch_metrics(batch, 7)["gate/mixed_groups"][0]) == 4
    assert float(batch_metrics(batch, 7)["rollout/accuracy"][0]) == 4


def test_group_stats_kept_looks_at_what_is_left() -> None:
    s = sampler(n=3, group_stats="kept")
    groups = student_groups(s, [True, False, False] * 4)
    batch = mix_teacher_rollouts(s, ScriptedEngine([True]), groups, [0, 3], step=3, first_prompt=0)
    left = [r.verifier_advantage for r in batch.groups[0] if r.source == "student"]
    assert left == [0.0, 0.0]  # all wrong now: a uniform group
    assert batch.groups[2][0].verifier_advantage > 1.0


def test_one_kept_of_a_larger_group_is_not_configured_g_of_one() -> None:
    config = sampler(n=2).config
    teacher = Rollout(PROMPTS[0], Completion((1,), (0.0,), "stop", 0, 0), "teacher", True)
    student = replace(teacher, source="student")
    assert with_advantages([teacher, student], config)[1].verifier_advantage == 0.0
    alone = replace(config, rollout=replace(config.rollout, n=1))
    assert with_advantages([student], alone)[0].verifier_advantage == 1.0


def test_attempts_ask_again_only_where_needed() -> None:
    s = sampler(attempts=3)
    groups = student_groups(s, [False])
    engine = ScriptedEngine([True, False, False, True])  # slot 0; slot 1 fails, fails, passes
    batch = mix_teacher_rollouts(s, engine, groups, [0, 1], step=3, first_prompt=0)
    assert len(engine.asked) == 4
    assert len({r.seed for r in engine.asked}) == 4
    assert [r.source for r in batch.groups[0]] == ["teacher", "teacher"]


def test_slots_of_other_replicas_are_left_to_them() -> None:
    s = sampler()
    groups = student_groups(s, [False])[:2]
    engine = ScriptedEngine([True])
    batch = mix_teacher_rollouts(s, engine, groups, [0, 5, 7, 9], step=3, first_prompt=2)
    assert batch.requested == 2  # this replica holds slots 4 to 7
    assert [r.source for g in batch.groups for r in g] == ["student", "teacher"] * 2


def test_solutions_become_rollouts() -> None:
    prompt = Prompt("p", (1, 2), "1", solution_token_ids=(3, 4, 9))
    (rollout,) = solutions_as_rollouts([prompt])
    assert rollout.source == "dataset"
    assert rollout.completion.token_ids == (3, 4, 9)
    with pytest.raises(ValueError, match=r"'p0' has no worked solution.*data.solution_field"):
        solutions_as_rollouts(PROMPTS)


def test_seeds_are_stable_across_machines() -> None:
    # A change here breaks the replay of every earlier run.
    assert request_seed(42, 0, 0) == 2266236876627294929
    assert request_seed(42, 0, 0) != request_seed(42, 0, 1)
    assert 0 <= request_seed("x") < 2**62
