"""SDPAttention against an explicit float64 softmax: padded, packed, over context parallel ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import attention_cases
from tests.support.attention_cases import Case

RAGGED = (1, 7, 0, 24, 5)
RAGGED_OVER_RANKS = (8, 24, 0, 16, 40)  # multiples of twice the ranks
PADDED = 16
BOUND = {"float64": 1e-12, "float32": 1e-5}

FORMS = [
    {},
    {"key_heads": 4},  # MHA
    {"key_heads": 1},
    {"softmax_scale": 0.7},
    {"dtype": "float32"},
    {"checkpoint": True},
]


def label(form: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in form.items()) or "GQA"


def case_of(packed: bool, size: int, form: dict[str, Any]) -> Case:
    if packed:
        return Case(RAGGED if size == 1 else RAGGED_OVER_RANKS, **form)
    return Case((PADDED,), rows=3, **form)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("form", FORMS, ids=label)
def test_output_and_gradients_equal_an_explicit_softmax(
    pool: Any, size: int, packed: bool, form: dict[str, Any]
) -> None:
    case = case_of(packed, size, form)
    for errors in pool(size).run(attention_cases.compare, case, size):
        assert max(errors.values()) < BOUND[case.dtype], errors


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_context_ranks_are_those_of_the_group_given(pool: Any, packed: bool) -> None:
    case = case_of(packed, 2, {})
    for errors in pool(4).run(attention_cases.compare, case, 2):
        assert max(errors.values()) < BOUND[case.dtype], errors


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(8,), (0, 8, 0, 0), (8,) * 5], ids=str)
def test_packed_sequences_of_any_number(pool: Any, size: int, lengths: tuple[int, ...]) -> None:
    for errors in pool(size).run(attention_cases.compare, Case(lengths), size):
        assert max(errors.values()) < BOUND["float64"], errors


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("changed", [0, 3, 4])  # the last stands for the padding
def test_a_packed_sequence_has_no_influence_on_another(pool: Any, size: int, changed: int) -> None:
    case = case_of(True, size, {})
    for got in pool(size).run(attention_cases.influence, case, size, changed):
        assert got["outside"]  # bit for bit
        # A single token attends to itself whatever its query and key: their gradients are 0.
        own = got["inside"][:1] if case.lengths[changed] == 1 else got["inside"]
        assert min(own) > 1e-3


def test_packing_costs_the_sum_of_squared_lengths(pool: Any) -> None:
    (got,) = pool(1).run(attention_cases.cost, Case(RAGGED), 1)
    assert got["products"] == [(n, n) for n in RAGGED if n]
    assert got["collectives"] == []


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("size", [2, 4])
def test_context_ranks_share_the_triangle_with_two_collectives(
    pool: Any, size: int, packed: bool
) -> None:
    case = case_of(packed, size, {})
    chunks = [n // (2 * size) for n in case.lengths if n]
    for rank, got in enumerate(pool(size).run(attention_cases.cost, case, size)):
        stops = (rank + 1, 2 * size - rank)
        assert got["products"] == [(n, stop * n) for n in chunks for stop in stops]
        gather, scatter = got["collectives"]
        assert gather.startswith("all_gather") and scatter.startswith("reduce_scatter")
