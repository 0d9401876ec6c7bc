"""Tiny models with tokenizers and benchmark files of the real sets' schemas, made at test time."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sgopd.__main__ import _parse, main
from megatron_sgopd.atomic_files import json_line
from megatron_sgopd.evaluation.samples import Journal

SHORT = (  # what a tiny model of 512 positions needs of the paper's protocol
    "rollout.engine=embedded",
    "model.dtype=float32",
    "data.chat_template=plain",
    "evaluation.max_new_tokens=12",
    "evaluation.n=5",
    "evaluation.k=3",
    "verifier.num_workers=1",
    "logging.progress=false",
)
AIME = [  # MathArena's schema: integers for answers, no id
    {"problem_idx": 1, "problem": "What is 12 plus 30?", "answer": 42, "problem_type": ["Algebra"]},
    {"problem_idx": 2, "problem": "Three times five?", "answer": 15, "problem_type": ["Algebra"]},
]
HMMT = [  # LaTeX for answers
    {"problem_idx": 1, "problem": "Half of one?", "answer": "\\frac{1}{2}", "problem_type": ["x"]},
    {"problem_idx": 2, "problem": "A root of two?", "answer": "\\sqrt{2}", "problem_type": ["x"]},
    {"problem_idx": 3, "problem": "An interval?", "answer": "(1, 2]", "problem_type": ["x"]},
]


def judge(completion: str, answer: str) -> bool:
    """A verifier of one's own: true of about half of what a random model says."""
    return sum(completion.encode()) % 2 == 0


def always(completion: str, answer: str) -> bool:
    return True


def make_model(folder: Path, seed: int, **sizes: Any) -> Path:
    """A Hugging Face directory of odd sizes, its byte-level tokenizer without chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.support.tiny import make_hf_dir

    sizes = {"layers": 3, "head_dim": 96, "vocab": 331, "positions": 512, **sizes}
    make_hf_dir(folder, seed, tied=False, **sizes)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = " ".join(str(row["problem"]) for row in AIME + HMMT)
    tokenizer.train_from_iterator(
        [text] * 2,
        trainers.BpeTrainer(
            vocab_size=331, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def write_sets(folder: Path) -> list[str]:
    """The options that name two benchmarks, one JSONL and one Parquet."""
    import pyarrow
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    jsonl = folder / "aime25.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in AIME))
    parquet.write_table(pyarrow.Table.from_pylist(HMMT), folder / "hmmt.parquet")
    return ["--benchmark", f"aime25={jsonl}", "--benchmark", f"hmmt={folder / 'hmmt.parquet'}"]


def on_ranks(arguments: Sequence[str]) -> str:
    """`sgopd evaluate` as each of the pool's ranks; its folder's status."""
    import torch.distributed as dist

    from megatron_sgopd.cli.evaluate import config_of
    from megatron_sgopd.distributed.groups import shutdown
    from megatron_sgopd.evaluation import job as evaluation_job

    config = config_of(_parse(["evaluate", *arguments]), dist.get_world_size())
    try:
        evaluation_job.main(config)
    finally:
        shutdown()
        dist.barrier()
    return (Path(config.logging.run_dir or "") / "status").read_text().strip()


def made_on_ranks(arguments: Sequence[str]) -> list[tuple[str, int]]:
    """The same; (problem, sample) of every answer that this rank kept."""
    made: list[tuple[str, int]] = []

    def append(plain: Any, self: Any, row: Any) -> None:
        if "completion" in row:
            made.append((row["id"], row["sample"]))
        plain(self, row)

    with _appending(append):
        assert on_ranks(arguments) == "finished"
    return made


def stopped_on_ranks(arguments: Sequence[str]) -> str:
    """The same in parts of 8 answers, asked to stop by SIGTERM in the first."""
    from megatron_sgopd.evaluation import ask as evaluate

    def append(plain: Any, self: Any, row: Any) -> None:
        plain(self, row)
        os.kill(os.getpid(), signal.SIGTERM)

    at_once, evaluate.AT_ONCE = evaluate.AT_ONCE, 8
    try:
        with _appending(append):
            return on_ranks(arguments)
    finally:
        evaluate.AT_ONCE = at_once


@contextmanager
def _appending(append: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    plain = Journal.append
    Journal.append = lambda self, row: append(plain, self, row)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Journal.append = plain  # type: ignore[method-assign]


def complaint(capsys: Any, *arguments: str) -> str:
    """The one line of a command that refuses."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("sgopd: ") and said.count("\n") == 1, said
    return str(said)


def die(after: int, arguments: Sequence[str]) -> None:
    """`sgopd evaluate` as a rank that ends by SIGKILL in the middle of writing row `after`."""
    from megatron_sgopd.evaluation import ask as evaluate

    plain, rows = Journal.append, [0]

    def append(self: Any, row: Any) -> None:
        rows[0] += 1
        if rows[0] == after:
            os.write(self._file, json_line(row)[:-9])
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, row)

    Journal.append = append  # type: ignore[method-assign]
    evaluate.AT_ONCE = 8  # several parts
    main(["evaluate", *arguments])


if __name__ == "__main__":
    die(int(sys.argv[1]), sys.argv[2:])
