"""Files of records -> rows, each with its place: JSONL or Parquet, local or of the hub.

A row that cannot be read comes as a `BadRow` in its place, so that the reader decides whether it
stops; a file that cannot be read is an error at once.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sgopd.config.hub_names import is_hub_name

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl")
REJECTS = ".rejects.jsonl"  # files that `prepare` leaves beside its output; no data
_BATCH_ROWS = 256  # Parquet rows in memory at once


class BadRow(ValueError):
    """A row that cannot be used; `reason` is a word for tables, the message says the rest."""

    def __init__(self, reason: str, where: str, message: str, field: str | None = None) -> None:
        super().__init__(f"{where}: {message}")
        self.reason = reason
        self.where = where
        self.message = message  # without the place
        self.field = field


def read_rows(
    file: Path, label: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, Row | BadRow]]:
    """(where it stands, row) of every row; `label` is what the places call the file.

    Of a Parquet file only the columns of `required` and `optional` are read.

    Raises:
        ValueError: a file that cannot be read as JSONL or Parquet at all, or a Parquet file without
            a column of `required`.
    """
    if file.suffix == ".parquet":
        return _parquet_rows(file, label, required, optional)
    return _jsonl_rows(file, label)


def good_rows(rows: Iterator[tuple[str, Row | BadRow]]) -> Iterator[tuple[str, Row]]:
    """The rows, for a reader that stops at the first bad one. Raises it."""
    for where, row in rows:
        if isinstance(row, BadRow):
            raise row
        yield where, row


def count_rows(file: Path) -> int:
    """Rows of a Parquet file, or lines of a JSONL file that are not blank.

    Raises:
        ValueError: no readable Parquet file.
    """
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            return int(parquet.read_metadata(file).num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise _no_parquet(file, error) from error
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _parquet_rows(
    file: Path, label: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> Iterator[tuple[str, Row | BadRow]]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        # Batch by batch: the rows of a whole set with long solutions fill gigabytes.
        with parquet.ParquetFile(file) as source:
            names = source.schema_arrow.names
            for field in required:
                if _column(field, names) is None:
                    raise ValueError(
                        f"{label}: no column for field {field!r}; it has {', '.join(names)}. Name "
                        "the one that is meant"
                    )
            wanted = {_column(field, names) for field in (*required, *optional)}
            columns = [name for name in names if name in wanted]
            for batch in source.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for row in _python_rows(batch):
                    number += 1
                    where = f"{label}:{number}"
                    if isinstance(row, UnicodeDecodeError):
                        yield where, BadRow("not_utf8", where, f"not UTF-8 ({row.reason})")
                    else:
                        yield where, row
    except (pyarrow.ArrowException, OSError) as error:  # OSError: pages cut short or damaged
        raise _no_parquet(file, error) from error


def _no_parquet(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is not a readable Parquet file: {error}")


def _column(field: str, names: list[str]) -> str | None:
    """The column that a field stands in: its own, or that of the first name of its path."""
    first = field.split(".", 1)[0]
    return field if field in names else first if first in names else None


def _python_rows(batch: Any) -> list[Row | UnicodeDecodeError]:
    try:
        rows: list[Row | UnicodeDecodeError] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [error]
    return [row for i in range(len(batch)) for row in _python_rows(batch.slice(i, 1))]


def _jsonl_rows(file: Path, label: str) -> Iterator[tuple[str, Row | BadRow]]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if number == 1 and raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError(
                    f"{file} is UTF-16, UTF-8 is wanted: iconv -f UTF-16 -t UTF-8 {file.name}"
                )
            text = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if text.strip():
                where = f"{label}:{number}"
                yield where, _json_row(text, where)


def _json_row(raw: bytes, where: str) -> Row | BadRow:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", where, f"not UTF-8 ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return BadRow("not_json", where, f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number or nesting without measure
        return BadRow("not_json", where, f"not JSON ({error})")
    if not isinstance(row, dict):
        message = f"a JSON object is wanted, got {type(row).__name__}"
        return BadRow("not_an_object", where, message)
    return row


# -- fields ----------------------------------------------------------------------------------------

_ABSENT = object()


def text_field(row: Row, field: str, where: str, key: str) -> str:
    """The text of a field, numbers made text. `field` may be a path: prompt.0.content.

    Raises:
        BadRow: no such field (`key` is the option that names another), no text, or empty.
    """
    value = _value(row, field)
    if value is _ABSENT:
        raise BadRow(
            "missing_field",
            where,
            f"no field {field!r}; it has {', '.join(sorted(row)) or 'none'}. Set {key} to one of "
            "them",
            field,
        )
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        message = f"field {field!r} is {type(value).__name__}, text is wanted"
        raise BadRow("wrong_type", where, message, field)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow("wrong_type", where, f"field {field!r} is {value}, no number", field)
    text = str(value)
    if not text.strip():
        raise BadRow("empty", where, f"field {field!r} is empty", field)
    if re.search(r"[\ud800-\udfff]", text):  # JSON can spell it, no tokenizer takes it
        message = f"field {field!r} has half a surrogate pair, no Unicode text"
        raise BadRow("not_unicode", where, message, field)
    return text


def number_field(row: Row, field: str, where: str, hint: str = "") -> float | None:
    """The number of a field; None where it is absent or null.

    Raises:
        BadRow: something else.
    """
    value = _value(row, field)
    if value is _ABSENT or value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        message = f"field {field!r} is {value!r}, a number is wanted{hint}"
        raise BadRow("wrong_type", where, message, field)
    return value


def id_field(row: Row, field: str, where: str) -> str | None:
    """The id of a row, text or a number; None where it is absent or null.

    Raises:
        BadRow: something else.
    """
    if _value(row, field) in (_ABSENT, None):
        return None
    return text_field(row, field, where, "")


def _value(row: Row, field: str) -> Any:
    if field in row:
        return row[field]
    value: Any = row
    for name in field.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return _ABSENT
    return value


# -- files -----------------------------------------------------------------------------------------


def files_of(path: str, split: str) -> list[tuple[str, Path]]:
    """(label, file) of the files behind a file, a folder or a hub data set OWNER/NAME, in order.

    Of a folder or hub set: its .parquet and .jsonl files that name the split, or all of
    them where none does.

    Raises:
        ValueError: nothing there, or nothing of these kinds.
    """
    local = Path(path)
    if local.is_file():
        return [(local.name, local)]
    if is_hub_data_set(path):
        return hub_files(path, split)
    if not local.is_dir():
        raise ValueError(
            f"{path} does not exist: give a .jsonl or .parquet file, a folder of them, or a hub "
            "data set OWNER/NAME"
        )
    return _files_in(local, split, path)


def is_hub_data_set(path: str) -> bool:
    """Returns whether a data set is asked for by its hub name; a file's ending says it is not."""
    return Path(path).suffix not in (*SUFFIXES, ".json") and is_hub_name(path)


def hub_files(name: str, split: str) -> list[tuple[str, Path]]:
    """(label, file) of a hub data set's split, downloaded where the cache lacks it.

    Raises:
        ValueError: it cannot be had, or holds no Parquet or JSONL file.
    """
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:
        raise ValueError(
            f"{name} is no local file or folder and could not be had from the hub "
            f"({type(error).__name__}: {error}): download it where the hub can be reached "
            f"(hf download {name} --repo-type dataset --local-dir FOLDER) and give its files"
        ) from error
    return [(f"{name}/{label}", file) for label, file in _files_in(folder, split, name)]


def _files_in(folder: Path, split: str, given: str) -> list[tuple[str, Path]]:
    found = {
        file.relative_to(folder).as_posix(): file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES and file.is_file() and not file.name.endswith(REJECTS)
    }
    labels = sorted(label for label in found if not re.search(r"(^|/)\.", label))
    named = [label for label in labels if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", label)]
    if not labels:
        raise ValueError(f"{given} holds no {' or '.join(SUFFIXES)} file")
    return [(label, found[label]) for label in named or labels]
