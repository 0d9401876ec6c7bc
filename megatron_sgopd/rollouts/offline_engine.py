"""Teacher rollouts sampled and labelled before the run, in the place of a teacher's engine.

The file is what tools/label_rollouts.py writes: one JSON object a line with the problem as the
data set has it, a completion without its end-of-sequence token, and `is_correct`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_sgopd.data.rows import good_rows, read_rows
from megatron_sgopd.types import Completion, Prompt, Request, WeightStream


class TeacherPool:
    """See `types.Engine`: answers a request with one of the pool's completions of its prompt.

    Which one is drawn by the request's seed. A completion that was labelled wrong, is too long, or
    that the pool does not have, comes as one cut off before its first token: never endorsed.
    """

    name, version, policy_version, answered = "pool", "offline", 0, 0
    every_rank_asks, awaits_weights = True, False

    def __init__(self, completions: dict[tuple[int, ...], list[tuple[int, ...] | None]]) -> None:
        """Takes completions by prompt token ids, with the end token; None is a wrong one."""
        self._completions = completions

    @classmethod
    def load(cls, path: str, prompts: Sequence[Prompt], tokenizer: Any, field: str) -> TeacherPool:
        """Raises ValueError for a file that is not there, malformed, or of other problems."""
        file = Path(path)
        if not file.is_file():
            raise ValueError(
                f"distill.phases.source is {path!r}, which is no file: 'engine', or a JSONL that "
                "tools/label_rollouts.py has labelled"
            )
        by_problem: dict[str, list[tuple[int, ...] | None]] = {}
        fields = (field, "completion", "is_correct")
        for where, row in good_rows(read_rows(file, file.name, fields)):
            for key, kind in ((field, str), ("completion", str), ("is_correct", bool)):
                if not isinstance(row.get(key), kind):
                    raise ValueError(
                        f"{where}: {key!r} is {row.get(key)!r}, a {kind.__name__} is wanted: label "
                        "the file with tools/label_rollouts.py"
                    )
            tokens = None
            if row["is_correct"]:
                ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
                tokens = (*ids, tokenizer.eos_token_id)
            by_problem.setdefault(row[field], []).append(tokens)
        found = {p.token_ids: by_problem[p.text] for p in prompts if p.text in by_problem}
        if not found:
            raise ValueError(
                f"{path} has {len(by_problem)} problems and none of the {len(prompts)} that this "
                f"run trains on: its field {field!r} must hold the problem as data.train has it"
            )
        return cls(found)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        for index, request in enumerate(requests):
            choices = self._completions.get(request.prompt_token_ids, [None])
            tokens = choices[request.seed % len(choices)]
            if tokens is None or len(tokens) > request.max_new_tokens:
                yield index, Completion((), (), "length", 0, request.seed)
            else:
                yield index, Completion(tokens, (0.0,) * len(tokens), "stop", 0, request.seed)

    def push_weights(self, weights: Callable[[], WeightStream], policy_version: int) -> None:
        """Does nothing: the rollouts were sampled before."""

    def probe(self, ask: Callable[[Any], Any]) -> list[tuple[str, Any]]:
        """Asks nobody: there is no server."""
        return []

    def incidents(self) -> dict[str, float]:
        """Returns nothing: a file does not break off."""
        return {}

    def recover(self) -> None: ...

    def sleep(self) -> None: ...

    def wake_up(self) -> None: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...
