"""Many tensors as one flat buffer of bytes, cut into buckets: the wire format of a weight push.

Both ends import this file, the trainer's ranks and vLLM's workers: torch alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: a view of any dtype may start here


@dataclass(frozen=True)
class Entry:
    """Describes where one tensor lies in a bucket; travels as JSON."""

    name: str
    dtype: str  # torch's name, such as bfloat16
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * getattr(torch, self.dtype).itemsize

    def as_json(self) -> list[Any]:
        return [self.name, self.dtype, list(self.shape), self.offset]

    @staticmethod
    def from_json(row: Sequence[Any]) -> Entry:
        name, dtype, shape, offset = row
        return Entry(str(name), str(dtype), tuple(shape), int(offset))


@dataclass
class Bucket:
    entries: list[Entry]
    flat: Tensor  # uint8


def buckets(
    weights: Iterable[tuple[str, Tensor]], max_bytes: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Bucket]:
    """Packs a stream of weights, cast to `dtype`, into buffers of at most `max_bytes`.

    A tensor larger than that is a bucket of its own. Tensors are copied into the buffer as they
    come, so that beside it only the stream's current one is held. Each bucket is a fresh buffer:
    the receiver may still hold views of the one before.
    """
    flat, used = torch.empty(0, dtype=torch.uint8), 0
    entries: list[Entry] = []
    for name, tensor in weights:
        entry = Entry(name, str(dtype).removeprefix("torch."), tuple(tensor.shape), used)
        size = _aligned(entry.num_bytes)
        if used + size > flat.numel():
            if entries:
                yield Bucket(entries, flat[:used])
                entry, entries, used = replace(entry, offset=0), [], 0
            del flat  # before the next one is made; so should the caller
            flat = torch.empty(max(max_bytes, size), dtype=torch.uint8, device=device)
        view(flat, entry).copy_(tensor)
        del tensor  # as well
        entries.append(entry)
        used += size
    if entries:
        yield Bucket(entries, flat[:used])


def view(flat: Tensor, entry: Entry) -> Tensor:
    """The tensor of an entry, sharing the buffer's memory."""
    part = flat[entry.offset : entry.offset + entry.num_bytes]
    return part.view(getattr(torch, entry.dtype)).view(entry.shape)


def size_of(entries: Sequence[Entry]) -> int:
    """Bytes of the buffer that holds these entries."""
    last = max(entries, key=lambda e: e.offset)
    return last.offset + _aligned(last.num_bytes)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
