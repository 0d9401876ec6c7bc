"""Micro-batches hold each rollout's tokens once, shifted by one, and nothing of its neighbours."""

from __future__ import annotations

import pytest
import torch

from megatron_sgopd.packing import micro_batches, num_loss_tokens, token_scales
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


def test_tokens_targets_and_mask_by_hand() -> None:
    (batch,) = micro_batches([rollout((5, 6), (7, 8, 9)), rollout((4,), (3,))], micro_batch_size=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [4, 0, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, 9], [3, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    expected = torch.tensor([[0, -0.7, -0.8, -0.9], [-0.3, 0, 0, 0]])
    assert torch.allclose(batch.sampled_logprobs, expected)


def test_rows_carry_their_rollout_and_order_is_kept() -> None:
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
