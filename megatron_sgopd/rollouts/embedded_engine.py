"""A rollout engine in the trainer's ranks: decodes on weights from the one stream.

The laptop's default. The ranks of a replica share the requests, each decodes its part, and the
replica's first rank gets all completions. A request's answer depends on its seed and the weights
alone: the same alone, in any batch, in any order, on any number of ranks (up to the last digit of
the arithmetic).

Shapes: B sequences of a batch, L the batch's longest prompt, V the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_sgopd.rollouts.embedded_decoder import Decoder, make_decoder
from megatron_sgopd.rollouts.embedded_sampling import TokenSampler
from megatron_sgopd.types import Completion, Request

COMPACT_BELOW = 0.75  # share of unfinished sequences below which the finished leave the batch
# Sequences below which a CPU's decoding step costs much the same whatever the batch: so few are
# padded together with their neighbours in length, more decode apart, without padding and mask.
FULL_ON_CPU = 64


class EmbeddedEngine:
    """See `types.Engine`. `group` is the replica's; None is one rank alone."""

    name, version = "embedded", transformers.__version__
    every_rank_asks, awaits_weights = True, True

    def __init__(
        self,
        hf_config: Any,
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        max_batch_size: int = 512,
        shared_vocab_size: int | None = None,  # ids from here on are never sampled; None: all are
    ) -> None:
        self.policy_version, self.answered = -1, 0  # no weights yet, and nothing to keep
        self._group, self._max_batch_size = group, max_batch_size
        self._device, self._dtype = device, dtype
        self._max_positions = hf_config.max_position_embeddings
        self._full = FULL_ON_CPU if device.type == "cpu" else max_batch_size
        self._vocab_size = hf_config.vocab_size
        self._shared_vocab_size = shared_vocab_size or hf_config.vocab_size
        self._decoder: Decoder | None = make_decoder(hf_config, device, dtype)
        # A tied head is no weight of its own, but some writers store it a second time.
        self._parameters, self._tied = self._decoder.parameters, self._decoder.tied

    @torch.no_grad()
    def push_weights(
        self, weights: Callable[[], Iterable[tuple[str, Any]]], policy_version: int
    ) -> None:
        """Copies every weight in; reads the (collective) stream to its end.

        Raises:
            ValueError: a name that is unknown, missing or comes twice, or a shape that differs.
        """
        waiting = {*self._parameters, *self._tied}
        problem = ""
        for name, tensor in weights():
            # After a problem, too: the other ranks wait in the stream's collectives.
            problem = problem or self._problem(name, tensor, waiting)
            if not problem:
                waiting.discard(name)
                if name in self._parameters:
                    self._parameters[name].copy_(tensor)
        absent = waiting - set(self._tied)
        if not problem and absent:
            problem = f"weight {min(absent)!r} did not come ({len(absent)} are missing)"
        if problem:
            raise ValueError(
                f"{problem}: the engine may hold a mixture of old and new weights and must not be "
                "used"
            )
        self.policy_version = policy_version

    def _problem(self, name: str, tensor: Tensor, waiting: set[str]) -> str:
        """Says what is wrong with a weight of the stream; empty if nothing."""
        parameter = self._parameters.get(name, self._tied.get(name))
        if parameter is None:
            return f"the engine's model has no weight {name!r}"
        if name not in waiting:
            return f"weight {name!r} came twice"
        if tensor.shape != parameter.shape:
            return (
                f"weight {name!r} has shape {tuple(tensor.shape)}, the engine's model has "
                f"{tuple(parameter.shape)}"
            )
        return ""

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) on the group's first rank, when all are done; every rank asks."""
        yield from enumerate(self.generate(requests))

    def generate(
        self,
        requests: Sequence[Request],
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> list[Completion]:
        """Completions in the order of the requests on the group's first rank; [] on the others.

        Every rank passes the same requests. `progress(done, total)` counts this rank's share.

        Raises:
            ValueError: a prompt that is empty, too long for the model or beyond its vocabulary,
                naming the numbers.
        """
        for request in requests:
            self._check(request)
        rank, size = (self._group.rank(), self._group.size()) if self._group else (0, 1)
        # Dealing the requests out in the order of their lengths gives every rank the same mixture.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_token_ids))
        own = order[rank::size]
        done: dict[int, Completion] = {}
        for part in self._batches(own, [len(requests[i].prompt_token_ids) for i in own]):
            done |= zip(part, self._decode([requests[i] for i in part]), strict=True)
            progress(len(done), len(own))
        if size > 1:
            assert self._group is not None, "several ranks are a group"
            first = dist.get_global_rank(self._group, 0)
            shares: list[Any] | None = [None] * size if rank == 0 else None
            dist.gather_object(done, shares, dst=first, group=self._group)
            if shares is None:
                return []
            done = {i: c for share in shares for i, c in share.items()}
        return [done[i] for i in range(len(requests))]

    def recover(self) -> None:
        """Does nothing: it is lost only together with the trainer's ranks."""

    def sleep(self) -> None:
        """Does nothing: its weights stay, the next push goes into them."""

    def wake_up(self) -> None:
        """Does nothing: it never sleeps."""

    def forget(self) -> None:
        """Does nothing: no answer is kept."""

    def probe(self, ask: Callable[[Any], Any]) -> list[tuple[str, Any]]:
        """Asks nobody: there is no server."""
        return []

    def incidents(self) -> dict[str, float]:
        """Returns nothing: it ends with the trainer's ranks."""
        return {}

    def close(self) -> None:
        """Frees the model; the engine cannot be used after it."""
        self._decoder, self._parameters, self._tied = None, {}, {}

    def _batches(self, indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Cuts indices, sorted by prompt length, into batches.

        A batch ends at max_batch_size, or where the length changes once it is full.
        """
        batches: list[list[int]] = []
        previous = -1
        for index, length in zip(indices, lengths, strict=True):
            limit = self._max_batch_size if length == previous else self._full
            if not batches or len(batches[-1]) >= min(limit, self._max_batch_size):
                batches.append([])
            batches[-1].append(index)
            previous = length
        return batches

    def _check(self, request: Request) -> None:
        length = len(request.prompt_token_ids)
        if length == 0:
            raise ValueError(
                "a request has an empty prompt; a chat template gives at least one token"
            )
        if length + request.max_new_tokens > self._max_positions:
            raise ValueError(
                f"a prompt of {length} tokens and {request.max_new_tokens} new ones exceed the "
                f"model's {self._max_positions} positions (max_position_embeddings): lower "
                "rollout.max_new_tokens or rollout.max_prompt_tokens"
            )
        if max(request.prompt_token_ids) >= self._vocab_size:
            raise ValueError(
                f"a prompt has token id {max(request.prompt_token_ids)}, the model's vocabulary "
                f"{self._vocab_size} rows: its tokenizer is not the model's"
            )

    @torch.no_grad()
    def _decode(self, requests: Sequence[Request]) -> list[Completion]:
        """Decodes prompts together, left-padded; the copies of a prompt share its pass."""
        if all(r.max_new_tokens == 0 for r in requests):
            return [Completion((), (), "length", self.policy_version, r.seed) for r in requests]
        assert self._decoder is not None, "not closed"
        sampler = TokenSampler(requests, self._device)
        places = {p: i for i, p in enumerate(dict.fromkeys(r.prompt_token_ids for r in requests))}
        steps = max(r.max_new_tokens for r in requests)
        batch = _Batch(list(places), steps, self._device, self._dtype)
        cache = self._decoder.new_cache()
        copies = None
        if len(places) < len(requests):
            copies = torch.tensor([places[r.prompt_token_ids] for r in requests]).to(self._device)
        while True:
            logits = self._decoder.logits(batch.current, batch.positions, batch.mask, cache)
            logits = logits[:, : self._shared_vocab_size]
            if copies is not None:
                logits = logits[copies]
                cache.batch_select_indices(copies)
                batch.select(copies)
                copies = None
            tokens = sampler.step(logits)
            left = sampler.num_open()
            if left == 0:
                return sampler.completions(self.policy_version)
            batch.append(tokens)
            if left < COMPACT_BELOW * len(tokens):
                keep = sampler.compact()
                cache.batch_select_indices(keep)
                batch.select(keep)


class _Batch:
    """The model's inputs, step by step; every row ends in the same column."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(p) for p in prompts])[:, None]
        columns = torch.arange(longest)
        padded = [[0] * (longest - len(p)) + list(p) for p in prompts]
        self.current = torch.tensor(padded, device=device)  # [B, L], then [B, 1]
        self.positions = (columns - padding).clamp(min=0).to(device)  # as current
        # Added to the scores, 0 where a query may look and -inf elsewhere, [B, 1, queries, keys];
        # None: the model's own causal mask, all that prompts of one length need.
        self.mask: Tensor | None = None
        if padding.any():
            keys = torch.arange(longest + steps) >= padding
            self._keys = _bias(keys, dtype).to(device)[:, None, None]  # [B, 1, 1, keys]
            causal = columns[None] <= columns[:, None]
            # A padding query looks at itself: some attention kernels give NaN without any key.
            own = columns[None] == columns[:, None]
            mask = causal & keys[:, None, None, :longest] | own
            self.mask = _bias(mask, dtype).to(device)
        self._width = longest

    def append(self, tokens: Tensor) -> None:
        """Goes on with the sampled tokens, [B]."""
        self._width += 1
        self.current = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = self._keys[..., : self._width]

    def select(self, rows: Tensor) -> None:
        """Its rows become these."""
        self.current, self.positions = self.current[rows], self.positions[rows]
        if self.mask is not None:
            self._keys = self._keys[rows]
            self.mask = self._keys[..., : self._width]


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
