"""Data sets read, prompts rendered and dealt out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sgopd.config.schema import DataConfig
from megatron_sgopd.data.problems import Problem, load_problems
from megatron_sgopd.data.rendering import load_tokenizer, render, stop_token_ids
from megatron_sgopd.data.stream import PromptStream, share
from megatron_sgopd.types import Prompt

SPECIALS = ["<eos>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, so that decoding gives back exactly what was encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def one(tokenizer: Any, problem: Problem | None = None, limit: int = 1000, **data: Any) -> Prompt:
    """The only prompt that `render` makes of one problem."""
    (prompt,) = render([problem or Problem("p", "2+3=", "5")], tokenizer, DataConfig(**data), limit)
    return prompt


# -- reading ---------------------------------------------------------------------------------------


def load(path: Path | str, **options: Any) -> list[Problem]:
    return load_problems(
        str(path),
        **{
            "problem_field": "problem",
            "answer_field": "answer",
            "solution_field": None,
            "min_difficulty": None,
            **options,
        },
    )


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"id": "a", "problem": "1+1=", "answer": "2"}


@pytest.mark.parametrize(
    ("second", "named"),
    [
        (b'{"id": "b", "problem": ', ["data.jsonl:2", "not JSON", "column"]),
        (b"[1, 2]", ["data.jsonl:2", "a JSON object is wanted, got list"]),
        (b'{"problem": "1+2="}', ["data.jsonl:2", "no field 'answer'", "data.answer_field"]),
        (b'{"question": "x", "answer": 1}', ["data.jsonl:2", "'problem'", "answer, question"]),
        (b'{"problem": "  ", "answer": "2"}', ["data.jsonl:2", "'problem' is empty"]),
        (b'{"problem": "x", "answer": ""}', ["data.jsonl:2", "'answer' is empty"]),
        (b'{"problem": "x", "answer": null}', ["data.jsonl:2", "'answer' is NoneType"]),
        (b'{"problem": "x", "answer": true}', ["data.jsonl:2", "'answer' is bool"]),
        (b'{"problem": ["x"], "answer": "2"}', ["data.jsonl:2", "'problem' is list"]),
        (b'{"problem": "x", "answer": Infinity}', ["data.jsonl:2", "'answer' is inf"]),
        (b'{"id": ["a"], "problem": "x", "answer": "2"}', ["data.jsonl:2", "'id' is list"]),
        (b'{"id": "a", "problem": "y", "answer": "2"}', ["data.jsonl:2", "'a'", "data.jsonl:1"]),
        (b'{"problem": "\xff", "answer": "2"}', ["data.jsonl:2", "not UTF-8", "byte 13"]),
        (b'{"problem": "\\ud83d", "answer": "2"}', ["data.jsonl:2", "'problem'", "surrogate"]),
        (b'{"problem": "x", "answer": ' + b"9" * 5000 + b"}", ["data.jsonl:2", "not JSON"]),
        (b"[" * 100_000, ["data.jsonl:2", "not JSON", "recursion"]),
    ],
)
def test_a_broken_row_is_named_by_file_line_and_field(
    tmp_path: Path, second: bytes, named: list[str]
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + second + b"\n")
    with pytest.raises(ValueError) as error:
        load(file)
    for part in named:
        assert part in str(error.value)


def test_blank_lines_count_as_lines(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n\nnonsense\n")
    with pytest.raises(ValueError, match=r"data\.jsonl:4: not JSON"):
        load(file)


def test_bom_crlf_and_a_missing_last_newline_are_no_trouble(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    rows = [json.dumps(GOOD), json.dumps({"id": "b", "problem": "π?", "answer": "ü"})]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert load(file) == [Problem("a", "1+1=", "2"), Problem("b", "π?", "ü")]


@pytest.mark.parametrize(("answer", "text"), [(7, "7"), (-3, "-3"), (0, "0"), (2.5, "2.5")])
def test_number_answers_become_text(tmp_path: Path, answer: float, text: str) -> None:
    (problem,) = load(jsonl(tmp_path / "d.jsonl", {"problem": "x", "answer": answer}))
    assert problem.answer == text


def test_rows_without_an_id_are_named_by_their_place(tmp_path: Path) -> None:
    rows = [{"problem": "x", "answer": 1}, {"problem": "y", "answer": 2, "id": None}]
    assert [p.id for p in load(jsonl(tmp_path / "d.jsonl", *rows))] == ["d.jsonl:1", "d.jsonl:2"]


def test_other_field_names_and_the_solution(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "d.jsonl", {"q": "x", "final": 1, "steps": "so 1"})
    names = {"problem_field": "q", "answer_field": "final"}
    assert load(file, **names, solution_field="steps")[0].solution == "so 1"
    assert load(file, **names)[0].solution is None
    with pytest.raises(ValueError, match=r"d\.jsonl:1: no field 'proof'.*data\.solution_field"):
        load(file, **names, solution_field="proof")


def test_difficulty_filter(tmp_path: Path) -> None:
    rows = [{"id": d, "problem": "x", "answer": 1, "difficulty": d} for d in (5.5, 6, 6.5, 9, -1)]
    file = jsonl(tmp_path / "d.jsonl", *rows)
    assert [p.id for p in load(file, min_difficulty=6.0)] == ["6", "6.5", "9"]
    assert len(load(file)) == 5
    with pytest.raises(ValueError, match=r"d\.jsonl holds no problems of difficulty 9\.5 or more"):
        load(file, min_difficulty=9.5)


@pytest.mark.parametrize("difficulty", [None, "7", "hard"])
def test_a_difficulty_that_is_no_number(tmp_path: Path, difficulty: object) -> None:
    file = jsonl(tmp_path / "d.jsonl", {**GOOD, "difficulty": difficulty})
    with pytest.raises(ValueError, match=r"d\.jsonl:1: field 'difficulty' is .*a number is wanted"):
        load(file, min_difficulty=6.0)


def test_parquet_gives_the_same_problems_as_jsonl(tmp_path: Path) -> None:
    rows = [{"id": str(i), "problem": f"{i}+1=", "answer": i + 1} for i in range(5)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load(tmp_path / "d.parquet") == load(jsonl(tmp_path / "d.jsonl", *rows))


def test_parquet_rows_are_counted_beyond_a_batch(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}=", "answer": str(i)} for i in range(2500)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    problems = load(tmp_path / "d.parquet")
    assert [p.answer for p in problems] == [str(i) for i in range(2500)]
    assert problems[-1].id == "d.parquet:2500"
    rows[2077]["answer"] = ""
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet:2078: field 'answer' is empty"):
        load(tmp_path / "d.parquet")


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"d\.parquet.*not a readable Parquet file"):
        load(tmp_path / "d.parquet")
    parquet.write_table(arrow.Table.from_pylist([{"problem": "x"}]), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"e\.parquet: no column for field 'answer'; it has"):
        load(tmp_path / "e.parquet")


def test_a_parquet_file_damaged_inside_is_named(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}+1=" + "x" * i, "answer": str(i)} for i in range(500)]
    file = tmp_path / "d.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), file)
    content = bytearray(file.read_bytes())
    content[100:1000] = b"\0" * 900
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.parquet is not a readable Parquet file"):
        load(file)


def test_of_parquet_only_the_needed_columns_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": "x", "final_answer": "1", "difficulty": 7.0, "r1_solution_1": "long"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    asked: list[list[str]] = []
    iter_batches = parquet.ParquetFile.iter_batches

    def spy(self: Any, *, columns: list[str], **options: Any) -> Any:
        asked.append(columns)
        return iter_batches(self, columns=columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", spy)
    names = {"problem_field": "question", "answer_field": "final_answer"}
    assert load(tmp_path / "d.parquet", **names, min_difficulty=6.0)[0].answer == "1"
    assert asked == [["question", "final_answer", "difficulty"]]
    with pytest.raises(ValueError, match=r"no column for field 'problem'; it has .*r1_solution_1"):
        load(tmp_path / "d.parquet")


def test_utf16_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(ValueError, match=r"d\.jsonl is UTF-16, UTF-8 is wanted: iconv"):
        load(tmp_path / "d.jsonl")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "no/such/folder"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"does not exist: give a \.jsonl or \.parquet file"):
        load(tmp_path / name)


def test_a_folder_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data/train is no file: give a \.jsonl"):
        load("data/train")


@pytest.mark.parametrize("name", ["owner/set", "owner/set-v1.5"])
def test_hub_data_sets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for split, answer in (("test", 0), ("train", 2)):
        rows = [{"problem": "1+1=", "answer": answer}]
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / f"data/{split}-0.parquet")
    asked: list[tuple[str, str]] = []

    def snapshot_download(name: str, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load(name) == [Problem(f"{name}/data/train-0.parquet:1", "1+1=", "2")]
    assert asked == [(name, "dataset")]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match=r"could not be had from the hub \(ZeroDivisionError"):
        load(name)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"d\.jsonl holds no problems"):
        load(tmp_path / "d.jsonl")


# -- rendering -------------------------------------------------------------------------------------


def test_the_tokenizers_own_template(tokenizer: Any) -> None:
    prompt = one(tokenizer)
    expected = "<|im_start|>user\n2+3=<|im_end|><|im_start|>assistant\n"
    assert tokenizer.decode(prompt.token_ids) == expected
    start, end = (tokenizer.convert_tokens_to_ids(s) for s in SPECIALS[1:])
    assert Counter(prompt.token_ids)[start] == 2  # a token each, not its characters
    assert Counter(prompt.token_ids)[end] == 1
    assert (prompt.id, prompt.answer, prompt.text) == ("p", "5", "2+3=")
    assert prompt.solution_token_ids is None


def test_the_recipes_template_wins_and_serves_where_the_tokenizer_has_none() -> None:
    template = "Q: {{ messages[0].content }} A:"
    for tokenizer in (byte_tokenizer(), byte_tokenizer(None)):
        prompt = one(tokenizer, chat_template=template)
        assert tokenizer.decode(prompt.token_ids) == "Q: 2+3= A:"
    with pytest.raises(ValueError, match=r"no chat template: set data\.chat_template"):
        one(byte_tokenizer(None))


def test_a_broken_template_is_the_users_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"chat template.*cannot be rendered"):
        one(tokenizer, chat_template="{% for m in messages %}")
    with pytest.raises(ValueError, match=r"chat template.*system role not supported"):
        one(tokenizer, chat_template="{{ raise_exception('system role not supported') }}")


@pytest.mark.parametrize("key", ["tokenize", "add_generation_prompt", "chat_template"])
def test_template_arguments_that_are_fixed(tokenizer: Any, key: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.chat_template_kwargs sets {key}, which is fixed"):
        one(tokenizer, chat_template_kwargs={key: False})


@pytest.mark.parametrize("from_recipe", [False, True])
def test_enable_thinking_really_changes_the_ids(from_recipe: bool) -> None:
    tokenizer = byte_tokenizer(None if from_recipe else TEMPLATE)
    options: dict[str, Any] = {"chat_template": TEMPLATE} if from_recipe else {}
    off = one(tokenizer, chat_template_kwargs={"enable_thinking": False}, **options)
    on = one(tokenizer, chat_template_kwargs={"enable_thinking": True}, **options)
    assert on.token_ids == one(tokenizer, **options).token_ids
    assert tokenizer.decode(off.token_ids) == tokenizer.decode(on.token_ids) + "<think></think>"


def test_system_prompt_and_suffix(tokenizer: Any) -> None:
    prompt = one(tokenizer, system_prompt="Be short.", prompt_suffix="\nBox it.")
    assert tokenizer.decode(prompt.token_ids) == (
        "<|im_start|>system\nBe short.<|im_end|><|im_start|>user\n2+3=\nBox it.<|im_end|>"
        "<|im_start|>assistant\n"
    )
    assert prompt.text == "2+3="  # what the user wrote


def test_an_empty_system_prompt_is_still_a_message(tokenizer: Any) -> None:
    assert "system" in tokenizer.decode(one(tokenizer, system_prompt="").token_ids)


def test_long_prompts_are_left_out_at_the_exact_length(tokenizer: Any) -> None:
    data = DataConfig(chat_template="{{ messages[0].content }}")
    problems = [Problem(str(n), "x" * n, "1") for n in (3, 8, 5, 6, 4)]
    kept = render(problems, tokenizer, data, 5)
    assert [(p.id, len(p.token_ids)) for p in kept] == [("3", 3), ("5", 5), ("4", 4)]
    with pytest.raises(ValueError, match=r"max_prompt_tokens 2 \(the longest has 8 tokens\)"):
        render(problems, tokenizer, data, 2)


def test_solutions_end_with_eos(tokenizer: Any) -> None:
    ids = one(tokenizer, Problem("p", "2+3=", "5", "so \\boxed{5}")).solution_token_ids
    assert ids is not None
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == "so \\boxed{5}"


def test_solutions_need_an_eos_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert one(tokenizer).solution_token_ids is None
    with pytest.raises(ValueError, match=r"no end-of-sequence token"):
        one(tokenizer, Problem("p", "2+3=", "5", "so 5"))


def test_load_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "good")
    assert one(load_tokenizer(tmp_path / "good")) == one(tokenizer)
    (tmp_path / "bad").mkdir()
    with pytest.raises(ValueError, match=r"bad holds no usable tokenizer"):
        load_tokenizer(tmp_path / "bad")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, ["<eos>"]),
        ({}, ["<eos>"]),
        ({"eos_token_id": None}, ["<eos>"]),
        ({"eos_token_id": "<|im_end|>"}, ["<eos>", "<|im_end|>"]),
        ({"eos_token_id": ["<|im_end|>", "<eos>"]}, ["<eos>", "<|im_end|>"]),
    ],
)
def test_stop_ids_are_the_union(
    tmp_path: Path, tokenizer: Any, generation: dict[str, Any] | None, expected: list[str]
) -> None:
    if generation is not None:
        eos = generation.get("eos_token_id")
        ids = tokenizer.convert_tokens_to_ids(eos) if eos else eos
        content = {**generation, "eos_token_id": ids} if generation else {}
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    wanted = sorted(tokenizer.convert_tokens_to_ids(expected))
    assert stop_token_ids(tokenizer, tmp_path) == tuple(wanted)


def test_stop_ids_of_both_files(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert stop_token_ids(tokenizer, tmp_path) == (9, tokenizer.eos_token_id)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 9]}')
    assert stop_token_ids(tokenizer, tmp_path) == (4, 9, tokenizer.eos_token_id)


@pytest.mark.parametrize("content", ["{broken", '{"eos_token_id": ["x"]}', "[1]"])
def test_unreadable_stop_ids_are_named(tmp_path: Path, tokenizer: Any, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id cannot be read"):
        stop_token_ids(tokenizer, tmp_path)


def test_no_stop_id_at_all(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"set rollout\.stop_token_ids"):
        stop_token_ids(tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert stop_token_ids(tokenizer, tmp_path) == (7,)


# -- dealing out -----------------------------------------------------------------------------------


def stream(size: int, *, seed: int = 1, shuffle: bool = True, per_step: int = 3) -> PromptStream:
    prompts = [Prompt(str(i), (i,), "0") for i in range(size)]
    return PromptStream(prompts, seed, shuffle, per_step)


def dealt(source: PromptStream, steps: int) -> list[str]:
    return [p.id for step in range(steps) for p in source.take(step)]


@pytest.mark.parametrize(("size", "per_step"), [(7, 3), (7, 7), (4, 9), (1, 2), (12, 4)])
def test_an_epoch_holds_each_prompt_exactly_once(size: int, per_step: int) -> None:
    ids = dealt(stream(size, per_step=per_step), 4 * size)
    epochs = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    assert len(epochs) >= 4
    assert all(Counter(e) == Counter(map(str, range(size))) for e in epochs)
    if size > 6:
        assert len({tuple(e) for e in epochs}) > 1  # each epoch has an order of its own


def test_a_step_is_a_function_of_seed_and_step() -> None:
    source = stream(50)
    forward = [source.take(s) for s in range(40)]
    backward = [stream(50).take(s) for s in reversed(range(40))]
    assert forward == backward[::-1]
    assert dealt(stream(50, seed=2), 17) != dealt(source, 17)


def test_without_shuffling_the_given_order_stays() -> None:
    assert dealt(stream(5, shuffle=False), 4) == list("012340123401")


@pytest.mark.parametrize("replicas", [1, 2, 3, 6])
def test_shares_partition_the_step(replicas: int) -> None:
    prompts = stream(6).prompts
    shares = [share(prompts, rank, replicas) for rank in range(replicas)]
    assert [p for s in shares for p in s] == prompts
    assert {len(s) for s in shares} == {6 // replicas}


def test_unequal_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_prompts 6 cannot be shared by 4 replicas"):
        share(stream(6).prompts, 0, 4)
