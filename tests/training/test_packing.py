"""Micro-batches hold each rollout's tokens once, shifted by one, and nothing of its neighbours."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megatron_sgopd.training import packing
from megatron_sgopd.training.packing import (
    MicroBatch,
    balanced_bins,
    balanced_shares,
    context_columns,
    num_loss_tokens,
    padding_share,
    token_scales,
)
from megatron_sgopd.types import Completion, Prompt, Rollout, RolloutSource


def rollout(
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    *,
    finish: str = "stop",
    source: RolloutSource = "student",
    advantage: float = 0.5,
) -> Rollout:
    completion = Completion(answer, tuple(-0.1 * t for t in answer), finish, 0, 0)  # type: ignore[arg-type]
    return Rollout(Prompt("p", prompt, "1"), completion, source, True, advantage)


def micro_batches(rollouts: list[Rollout], **options: Any) -> list[MicroBatch]:
    settings = {"micro_batch_size": 4, **options}
    return packing.micro_batches(rollouts, [0.25] * len(rollouts), **settings)


def test_tokens_targets_and_mask_by_hand() -> None:
    (batch,) = micro_batches([rollout((5, 6), (7, 8, 9)), rollout((4,), (3,))], micro_batch_size=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [4, 0, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, 9], [3, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    expected = torch.tensor([[0, -0.7, -0.8, -0.9], [-0.3, 0, 0, 0]])
    assert torch.allclose(batch.sampled_logprobs, expected)
    assert batch.token_scale.tolist() == [[0, 0.25, 0.25, 0.25], [0.25, 0, 0, 0]]
    assert batch.cu_seqlens is None


def test_rows_carry_their_rollout_and_equal_lengths_keep_their_order() -> None:
    rollouts = [
        rollout((1,), (2,), advantage=float(i), source="teacher" if i == 2 else "student")
        for i in range(5)
    ]
    batches = micro_batches(rollouts, micro_batch_size=2)
    assert [b.input_ids.shape[0] for b in batches] == [2, 2, 1]
    assert [v for b in batches for v in b.verifier_advantage[:, 0].tolist()] == [0, 1, 2, 3, 4]
    imitated = [v for b in batches for v in b.is_imitated[:, 0].tolist()]
    assert imitated == [False, False, True, False, False]


def test_empty_completion_has_a_row_and_no_loss() -> None:
    (batch,) = micro_batches([rollout((1, 2), ()), rollout((3,), ())], micro_batch_size=2)
    assert batch.input_ids.tolist() == [[1], [0]]
    assert not batch.loss_mask.any()


@pytest.mark.parametrize(("masked", "count"), [(True, 0), (False, 3)])
def test_truncated_completion_is_masked_when_asked(masked: bool, count: int) -> None:
    cut = rollout((1, 2), (3, 4, 5), finish="length")
    assert num_loss_tokens(cut, masked) == count
    (batch,) = micro_batches([cut], micro_batch_size=1, mask_truncated=masked)
    assert int(batch.loss_mask.sum()) == count


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("seq_mean_token_mean", [1 / (4 * 3), 0.0, 1 / (4 * 1)]), ("token_mean", [0.1, 0.1, 0.1])],
)
def test_token_scales(aggregation: str, expected: list[float]) -> None:
    rollouts = [rollout((1,), (2, 3, 4)), rollout((1,), ()), rollout((1,), (2,))]
    got = token_scales(
        rollouts, aggregation=aggregation, num_sequences=4, num_tokens=10, mask_truncated=False
    )
    assert got == pytest.approx(expected)


def test_unknown_aggregation_names_the_allowed() -> None:
    with pytest.raises(ValueError, match=r"'mean'.*seq_mean_token_mean.*token_mean"):
        token_scales([], aggregation="mean", num_sequences=1, num_tokens=1, mask_truncated=False)


# -- padded rows under a layout --------------------------------------------------------------------


def test_rollouts_of_like_length_share_a_micro_batch() -> None:
    rollouts = [rollout((1,), tuple(range(2, 2 + n))) for n in (1, 9, 2, 8)]
    assert [b.shape for b in micro_batches(rollouts, micro_batch_size=2)] == [(2, 9), (2, 2)]


def test_padded_columns_are_aligned_and_positions_go_on() -> None:
    (batch,) = micro_batches([rollout((1, 2), (3, 4))], align=2, align_sequence=4)
    assert batch.shape == (1, 8)
    assert batch.position_ids.tolist() == [list(range(8))]
    assert batch.loss_mask.tolist() == [[False, True, True, *[False] * 5]]


@pytest.mark.parametrize("max_tokens", [None, 4])
def test_the_number_of_micro_batches_is_a_multiple(max_tokens: int | None) -> None:
    batches = micro_batches(
        [rollout((1,), (2, 3, 4))] * 3, micro_batch_size=1, max_tokens=max_tokens, multiple_of=4
    )
    assert len(batches) == 4
    assert [int(b.loss_mask.sum()) for b in batches] == [3, 3, 3, 0]
    assert all(b.shape[1] >= 1 for b in batches)


# -- packed ----------------------------------------------------------------------------------------


def test_packed_by_hand() -> None:
    (batch,) = micro_batches(
        [rollout((5, 6), (7, 8, 9)), rollout((4,), (3,), advantage=-1.0), rollout((1,), ())],
        max_tokens=16,
    )
    assert batch.cu_seqlens == (0, 4, 5)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 4]]
    assert batch.targets.tolist() == [[6, 7, 8, 9, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, True, True]]
    assert batch.token_scale.tolist() == [[0, 0.25, 0.25, 0.25, 0.25]]
    assert batch.verifier_advantage.tolist() == [[0.5, 0.5, 0.5, 0.5, -1.0]]
    assert torch.allclose(batch.sampled_logprobs, torch.tensor([[0, -0.7, -0.8, -0.9, -0.3]]))


def test_sequence_ids_tell_the_rollouts_of_a_micro_batch_apart() -> None:
    rollouts = [rollout((5, 6), (7, 8, 9)), rollout((4,), (3,)), rollout((1,), (2, 3))]
    (padded,) = micro_batches(rollouts)
    (packed,) = micro_batches(rollouts, max_tokens=16)
    assert padded.sequence_ids.tolist() == [[0] * 4, [1] * 4, [2] * 4]
    assert packed.sequence_ids[packed.loss_mask].bincount().tolist() in ([3, 2, 1], [3, 1, 2])
    assert packed.context_shard(0, 1).sequence_ids.shape == packed.shape


def test_packed_sequences_are_aligned_and_a_fill_is_a_sequence_of_its_own() -> None:
    rollouts = [rollout((5, 6), (7, 8, 9, 1)), rollout((4,), (3,))]
    (batch,) = micro_batches(rollouts, max_tokens=16, align_sequence=4, align=4)
    assert batch.cu_seqlens == (0, 8, 12, 16)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0, 4, *[0] * 7]]
    assert batch.position_ids.tolist() == [[*range(8), *range(4), *range(4)]]
    assert int(batch.loss_mask.sum()) == 5
    assert padding_share([batch], rollouts) == (10, 16)


def test_a_packed_micro_batch_of_nothing_still_has_a_token() -> None:
    (batch,) = micro_batches([rollout((1,), ())], max_tokens=8)
    assert batch.cu_seqlens == (0, 1)
    assert not batch.loss_mask.any()


def test_every_rollout_is_packed_once() -> None:
    rng = random.Random(0)
    rollouts = [rollout((1,), tuple([i + 2] * rng.randint(0, 20))) for i in range(40)]
    batches = micro_batches(rollouts, max_tokens=32)
    trained = sorted(t for b in batches for t in b.targets[b.loss_mask].tolist())
    assert trained == sorted(t for r in rollouts for t in r.completion.token_ids)
    assert all(b.shape[1] <= 32 for b in batches)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_shards_share_the_columns_out(size: int) -> None:
    rollouts = [rollout((1, 2), tuple(range(3, 3 + n))) for n in (7, 1, 12)]
    for max_tokens in (None, 64):
        (batch,) = micro_batches(rollouts, max_tokens=max_tokens, align_sequence=2 * size)
        parts = [batch.context_shard(r, size) for r in range(size)]
        assert {p.shape[1] for p in parts} == {batch.shape[1] // size}
        whole = sorted(batch.input_ids.flatten().tolist())
        assert sorted(t for p in parts for t in p.input_ids.flatten().tolist()) == whole
        assert all(p.cu_seqlens == batch.cu_seqlens for p in parts)
        assert sum(float(p.token_scale.sum()) for p in parts) == float(batch.token_scale.sum())


def test_context_columns_are_the_zigzag_of_each_sequence() -> None:
    assert context_columns(12, (0, 8, 12), 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_columns(12, (0, 8, 12), 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert context_columns(8, None, 1, 2).tolist() == [2, 3, 4, 5]


# -- which rollouts go together --------------------------------------------------------------------


def test_bins_hold_everything_once_and_never_too_much() -> None:
    rng = random.Random(1)
    for _ in range(200):
        lengths = [rng.randint(0, 100) for _ in range(rng.randint(1, 60))]
        capacity, multiple = rng.randint(100, 400), rng.choice((1, 2, 4))
        bins = balanced_bins(lengths, capacity, multiple_of=multiple)
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        filled = [sum(lengths[i] for i in b) for b in bins]
        assert max(filled) <= capacity
        assert len(bins) % multiple == 0
        # Two neighbours that together fit in one bin would be waste.
        assert len(bins) <= 2 * sum(lengths) / capacity + multiple


def test_a_rollout_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of 11 tokens.*micro_batch_tokens\s+10"):
        balanced_bins([3, 11], 10)


def test_shares_hold_every_rollout_once_and_even_the_tokens_out() -> None:
    rng = random.Random(2)
    for _ in range(200):
        replicas = rng.randint(1, 8)
        lengths = [[rng.randint(1, 200) for _ in range(32)] for _ in range(replicas)]
        shares = balanced_shares(lengths)
        assert shares == balanced_shares(lengths)
        everything = [(d, i) for d, own in enumerate(lengths) for i in range(len(own))]
        assert sorted(x for share in shares for x in share) == everything
        totals = [sum(lengths[d][i] for d, i in share) for share in shares]
        assert max(totals) <= max(map(sum, lengths))
        assert max(totals) - sum(totals) / replicas <= 200


def test_even_replicas_keep_their_own() -> None:
    for replica, share in enumerate(balanced_shares([[5, 3, 1], [4, 4, 1], [1, 3, 5]])):
        assert {d for d, _ in share} == {replica}


def test_a_replica_is_never_left_without_a_rollout() -> None:
    shares = balanced_shares([[1000], [1, 1, 1], [2, 2]])
    assert all(shares)
