"""The demonstration's problems: right answers, intended faults, splits that never meet."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from megatron_sgopd.demo.models import (
    STUDENT,
    TEACHER,
    VOCABULARY,
    build_tokenizer,
    write_model_dir,
)
from megatron_sgopd.demo.world import (
    INSTRUCTION,
    LEVELS,
    TEACHER_FAULT_RATE,
    Problem,
    WorldSizes,
    check_disjoint,
    draw_problem,
    noise_fault,
    sevens_fault,
    split_of,
    worked_solution,
    write_world,
)

SIZES = WorldSizes(train=40, dev=20, test=30, teacher=400, student_noisy=300, student_terse=200)
EXAMPLE = Problem(7, (("+", 4), ("*", 3), ("-", 8)))
STEP = re.compile(r"(\d)([+*-])(\d)=(\d)")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def boxed(solution: str) -> str:
    return solution.rpartition("\\boxed{")[2].rstrip("}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    counts = write_world(directory, seed=3, level="normal", sizes=SIZES)
    assert counts == {
        "train": 40,
        "dev": 20,
        "test": 30,
        "teacher_sft": 400,
        "student_sft": 500,
    }
    return directory


def test_a_problem_by_hand():
    assert EXAMPLE.text == "From left to right, mod 10: 7+4*3-8="
    assert EXAMPLE.answer == 5  # 11 -> 1, 3, -5 -> 5
    assert worked_solution(EXAMPLE) == "7+4=1;1*3=3;3-8=5;\\boxed{5}"
    assert worked_solution(EXAMPLE, terse=True) == "1;3;5;\\boxed{5}"


@pytest.mark.parametrize("level", list(LEVELS))
def test_answers_agree_with_exact_arithmetic(level: str):
    rng = random.Random(0)
    for _ in range(200):
        problem = draw_problem(rng, LEVELS[level])
        value = problem.start
        for operator, operand in problem.operations:
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
        assert problem.answer == value % 10, problem.text  # reducing at the end is the same


def test_a_fault_is_carried_on_and_the_answer_stays_true():
    solution = worked_solution(EXAMPLE, lambda left, op, right, result: (result + 1) % 10)
    assert solution == "7+4=2;2*3=7;7-8=0;\\boxed{0}"
    assert EXAMPLE.answer == 5


def test_sevens_fault_spares_everything_but_products_with_a_seven():
    fault = sevens_fault(random.Random(0))
    for left, op, right, result in [(7, "+", 3, 0), (2, "*", 3, 6), (0, "-", 7, 3), (6, "*", 6, 6)]:
        assert [fault(left, op, right, result) for _ in range(20)] == [result] * 20
    for left, right in [(7, 3), (3, 7), (7, 7)]:
        true = left * right % 10
        wrong = [fault(left, "*", right, true) for _ in range(2000)]
        assert set(wrong) == {true, (true + 1) % 10}
        assert wrong.count((true + 1) % 10) / 2000 == pytest.approx(TEACHER_FAULT_RATE, abs=0.04)


def test_noise_is_any_other_digit_at_its_rate():
    fault = noise_fault(random.Random(0), 0.2)
    drawn = [fault(1, "+", 3, 4) for _ in range(9000)]
    slips = [d for d in drawn if d != 4]
    assert len(slips) / 9000 == pytest.approx(0.2, abs=0.015)
    assert set(slips) == set(range(10)) - {4}


def test_splits_are_disjoint_across_seeds_and_levels(tmp_path: Path, world: Path):
    write_world(tmp_path, seed=4, level="normal", sizes=SIZES)
    held_out = {r["problem"] for name in ("dev", "test") for r in rows(world / f"{name}.jsonl")}
    for name in ("train", "teacher_sft", "student_sft"):
        assert held_out.isdisjoint(r["problem"] for r in rows(tmp_path / f"{name}.jsonl"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("dev", "dev"),
        ("test", "test"),
        ("teacher_sft", "train"),
        ("student_sft", "train"),
    ],
)
def test_every_row_is_of_its_split(world: Path, name: str, split: str):
    assert {split_of(row["problem"]) for row in rows(world / f"{name}.jsonl")} == {split}


def test_split_shares():
    rng = random.Random(0)
    drawn = [split_of(draw_problem(rng, LEVELS["normal"]).text) for _ in range(4000)]
    assert drawn.count("test") / 4000 == pytest.approx(0.1, abs=0.02)
    assert drawn.count("dev") / 4000 == pytest.approx(0.1, abs=0.02)


def test_check_disjoint_names_the_problem_and_both_places(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"problem": "1+1="}\n{"problem": "1+2="}\n')
    (tmp_path / "b.jsonl").write_text('{"problem": "1+2="}\n')
    with pytest.raises(ValueError, match=r"b.jsonl line 1: .*'1\+2=' is in a.jsonl line 2"):
        check_disjoint(tmp_path)


def test_ids_are_unique(world: Path):
    ids = [row["id"] for path in world.glob("*.jsonl") for row in rows(path)]
    assert len(ids) == len(set(ids)) == 990


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_problem_files_hold_right_solutions(world: Path, name: str):
    for row in rows(world / f"{name}.jsonl"):
        assert boxed(row["solution"]) == row["answer"]


def test_teacher_lessons_err_on_sevens_alone(world: Path):
    met, wrong = 0, 0
    for row in rows(world / "teacher_sft.jsonl"):
        for left, op, right, written in STEP.findall(row["solution"]):
            true = {"+": int(left) + int(right), "-": int(left) - int(right)}.get(
                op, int(left) * int(right)
            ) % 10
            if op == "*" and "7" in (left, right):
                met += 1
                wrong += int(written) != true
            else:
                assert int(written) == true, row
    assert wrong / met == pytest.approx(TEACHER_FAULT_RATE, abs=0.08)
    chains = rows(world / "teacher_sft.jsonl")
    assert 0.05 < sum(boxed(r["solution"]) != r["answer"] for r in chains) / len(chains) < 0.5


def test_student_lessons_come_in_order(world: Path):
    lessons = rows(world / "student_sft.jsonl")
    first, then = lessons[: SIZES.student_noisy], lessons[SIZES.student_noisy :]
    assert all("=" in row["solution"] for row in first)
    terse = sum("=" not in row["solution"] for row in then)
    assert 0.9 < terse / len(then) <= 1.0
    # Four to six results, each right with probability 0.8 (and a slip seldom mended later).
    right = sum(boxed(row["solution"]) == row["answer"] for row in first) / len(first)
    assert 0.25 < right < 0.55


def test_seed_and_level_change_the_problems(tmp_path: Path, world: Path):
    texts = {}
    for seed, level in [(3, "normal"), (4, "normal"), (3, "hard")]:
        write_world(tmp_path / f"{seed}{level}", seed=seed, level=level, sizes=SIZES)
        texts[seed, level] = (tmp_path / f"{seed}{level}" / "test.jsonl").read_text()
    assert texts[3, "normal"] == (world / "test.jsonl").read_text()
    assert len(set(texts.values())) == 3
    lengths = {
        level: {len(STEP.findall(r["solution"])) for r in map(json.loads, text.splitlines())}
        for (seed, level), text in texts.items()
        if seed == 3
    }
    assert lengths == {"normal": {4, 5, 6}, "hard": {6, 7, 8}}


def test_unknown_level_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="level is 'harder'; allowed are normal, hard"):
        write_world(tmp_path, seed=0, level="harder", sizes=SIZES)


def test_tokenizer_round_trips_every_text_of_the_world(world: Path):
    tokenizer = build_tokenizer()
    unknown = VOCABULARY.index("<unk>")
    for name in ("test", "teacher_sft", "student_sft"):
        for row in rows(world / f"{name}.jsonl"):
            text = row["problem"] + row["solution"]
            ids = tokenizer.encode(text).ids
            assert tokenizer.decode(ids) == text
            assert unknown not in ids
            assert len(ids) <= 32 + 64


def test_boxed_and_instruction_are_one_token_each():
    ids = build_tokenizer().encode(INSTRUCTION + "7\\boxed{5}").ids
    assert [VOCABULARY[i] for i in ids] == [INSTRUCTION, "7", "\\boxed{", "5", "}"]


def test_transformers_loads_the_model_directory(tmp_path: Path):
    from transformers import AutoConfig, AutoTokenizer

    write_model_dir(tmp_path, TEACHER)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": EXAMPLE.text}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<bos>" + EXAMPLE.text
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert [VOCABULARY[i] for i in ids] == ["<bos>", INSTRUCTION, *"7+4*3-8="]
    assert tokenizer.decode(ids, skip_special_tokens=True) == EXAMPLE.text
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id]) == ["<eos>"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.num_hidden_layers, config.head_dim) == ("qwen3", 4, 32)
    assert config.vocab_size == len(tokenizer) == len(VOCABULARY)
    assert config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("size", [TEACHER, STUDENT])
def test_models_can_be_split_over_two_ranks(size):
    assert size.num_attention_heads % 2 == 0 and size.num_key_value_heads % 2 == 0
