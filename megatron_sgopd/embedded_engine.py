"""A rollout engine in the trainer's ranks: transformers decoding on weights from the one stream.

The laptop's default. The ranks of a replica share the requests, each decodes its part, and the
replica's first rank gets all completions. A request's answer depends on its seed and the weights
alone: the same alone, in any batch, in any order, on any number of ranks (up to the last digit of
the arithmetic).

Shapes: B sequences of a batch, V the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from megatron_sgopd.types import Completion, Request

COMPACT_BELOW = 0.75  # share of unfinished sequences below which the finished leave the batch


class EmbeddedEngine:
    """See `types.Engine`. `group` is the replica's; None is one rank alone."""

    def __init__(
        self,
        hf_config: Any,
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        max_batch_size: int = 512,
    ) -> None:
        self.policy_version = -1  # no weights yet
        self._group, self._device, self._max_batch_size = group, device, max_batch_size
        self._max_positions = hf_config.max_position_embeddings
        self._model: Any = (
            AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa")
            .to(device=device, dtype=dtype)
            .eval()
            .requires_grad_(False)
        )
        self._parameters: dict[str, Tensor] = dict(self._model.named_parameters())

    @torch.no_grad()
    def push_weights(self, hf_weights: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Copies every weight in; reads the (collective) stream to its end.

        Raises:
            ValueError: a name that is unknown, missing or comes twice, or a shape that differs.
        """
        waiting = set(self._parameters)
        for name, tensor in hf_weights:
            parameter = self._parameters.get(name)
            if parameter is None:
                raise ValueError(f"the engine's model has no weight {name!r}")
            if name not in waiting:
                raise ValueError(f"weight {name!r} came twice")
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, the engine's model has "
                    f"{tuple(parameter.shape)}"
                )
            waiting.discard(name)
            parameter.copy_(tensor)
        if waiting:
            raise ValueError(
                f"weight {min(waiting)!r} did not come ({len(waiting)} are missing): the engine "
                "holds a mixture of old and new weights and must not be used"
            )
        self.policy_version = policy_version

    def generate(
        self,
        requests: Sequence[Request],
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> list[Completion]:
        """Completions in the order of the requests on the group's first rank; [] on the others.

        Every rank passes the same requests. `progress(done, total)` counts this rank's share.

        Raises:
            ValueError: a prompt that is empty, or too long for the model, naming the numbers.
        """
        for request in requests:
            self._check(request)
        rank, size = (self._group.rank(), self._group.size()) if self._group else (0, 1)
        # Equal prompt lengths decode together, without padding; dealing them out in that order
        # gives every rank the same mixture.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_token_ids))
        mine = order[rank::size]
        done: dict[int, Completion] = {}
        for _, same in groupby(mine, key=lambda i: len(requests[i].prompt_token_ids)):
            indices = list(same)
            for start in range(0, len(indices), self._max_batch_size):
                part = indices[start : start + self._max_batch_size]
                done |= zip(part, self._decode([requests[i] for i in part]), strict=True)
                progress(len(done), len(mine))
        if size > 1:
            assert self._group is not None, "several ranks are a group"
            first = dist.get_global_rank(self._group, 0)
            shares: list[Any] | None = [None] * size if rank == 0 else None
            dist.gather_object(done, shares, dst=first, group=self._group)
            if shares is None:
                return []
            done = {i: c for share in shares for i, c in share.items()}
        return [done[i] for i in range(len(requests))]

    def close(self) -> None:
        """Frees the model; the engine cannot be used after it."""
        self._model, self._parameters = None, {}

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
                "rollout.max_new_tokens or data's prompt length"
            )

    @torch.no_grad()
    def _decode(self, requests: Sequence[Request]) -> list[Completion]:
        """Decodes prompts of one length together."""
        if all(r.max_new_tokens == 0 for r in requests):
            return [Completion((), (), "length", self.policy_version, r.seed) for r in requests]
        sampler = _Sampler(requests, self._device)
        prompts = torch.tensor([r.prompt_token_ids for r in requests], device=self._device)
        cache = DynamicCache(config=self._model.config)
        rows = torch.arange(len(requests), device=self._device)  # which request each row is
        current, position = prompts, 0
        while True:
            width = current.shape[1]
            positions = torch.arange(position, position + width, device=self._device)[None]
            logits = self._model(
                input_ids=current,
                position_ids=positions.expand(len(rows), -1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            position += width
            tokens = sampler.step(logits, rows)
            alive = ~sampler.finished[rows]
            left = int(alive.sum())
            if left == 0:
                return sampler.completions(self.policy_version)
            current = tokens[:, None]
            if left < COMPACT_BELOW * len(rows):
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, current = rows[keep], current[keep]


class _Sampler:
    """Draws each request's tokens from its own uniforms and keeps what was drawn."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.requests = requests
        self.limit = torch.tensor([r.max_new_tokens for r in requests], device=device)
        temperatures = torch.tensor([r.temperature for r in requests], device=device)
        self.greedy = temperatures == 0
        self.divisor = torch.where(self.greedy, torch.ones_like(temperatures), temperatures)
        # A request's own generator, on the CPU: the same numbers in any batch, on any device.
        uniforms = [
            torch.rand(
                r.max_new_tokens,
                generator=torch.Generator().manual_seed(r.seed),
                dtype=torch.float64,
            )
            for r in requests
        ]
        padded = torch.nn.utils.rnn.pad_sequence(uniforms, batch_first=True)
        self.uniforms = padded.to(device)
        stops = max(len(r.stop_token_ids) for r in requests)
        self.stops = torch.tensor(
            [[*r.stop_token_ids, *[-1] * (stops - len(r.stop_token_ids))] for r in requests],
            device=device,
            dtype=torch.long,
        ).view(len(requests), stops)
        self.finished = self.limit == 0
        self.stopped = torch.zeros_like(self.finished)
        self.tokens: list[Tensor] = []  # one column a step: [requests], -1 where finished
        self.logprobs: list[Tensor] = []

    def step(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The next token of each row, [B]; rows whose request is finished get any token."""
        scaled = logits.float() / self.divisor[rows, None]
        logprobs = scaled.log_softmax(-1)
        # Inverse CDF in float64: the count of entries the uniform has passed. Clamped, since the
        # last entry of a rounded CDF may stay below 1.
        cdf = logprobs.double().exp().cumsum(-1)
        drawn_at = len(self.tokens)
        uniform = self.uniforms[rows, drawn_at]
        sampled = (cdf <= (uniform * cdf[:, -1])[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
        token = torch.where(self.greedy[rows], logits.argmax(-1), sampled)
        open_ = ~self.finished[rows]
        column = torch.full_like(self.limit, -1)
        column[rows] = torch.where(open_, token, -1)
        value = torch.zeros(len(self.requests), device=logits.device)
        value[rows] = logprobs.gather(-1, token[:, None])[:, 0]
        self.tokens.append(column)
        self.logprobs.append(value)
        stop = (self.stops[rows] == token[:, None]).any(-1) & open_
        self.stopped[rows] |= stop
        self.finished[rows] |= stop | (drawn_at + 1 >= self.limit[rows])
        return token

    def completions(self, policy_version: int) -> list[Completion]:
        tokens = torch.stack(self.tokens, 1).tolist()
        logprobs = torch.stack(self.logprobs, 1).tolist()
        stopped = self.stopped.tolist()
        out = []
        for request, ids, values, stop in zip(
            self.requests, tokens, logprobs, stopped, strict=True
        ):
            count = sum(t >= 0 for t in ids)  # -1 only ever follows the last token
            out.append(
                Completion(
                    token_ids=tuple(ids[:count]),
                    logprobs=tuple(values[:count]),
                    finish_reason="stop" if stop else "length",
                    policy_version=policy_version,
                    seed=request.seed,
                )
            )
        return out
