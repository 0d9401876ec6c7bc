"""Draws the tokens of a decoding step from its logits, and makes completions of all steps.

Each request draws from uniforms of its own, which its seed alone makes: the same tokens in any
batch, on any device.

Shapes: R requests; B rows, the requests that are being decoded; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_sgopd.types import Completion, Request

CACHED_LOGITS = 2**18  # drawn from at a time on a CPU: 2 MB of float64 stays in its cache


@dataclass(frozen=True)
class _Rows:
    """The requests that are being decoded, one row each."""

    request: Tensor  # int64, its number
    limit: Tensor  # int64, new tokens
    greedy: Tensor  # bool
    divisor: Tensor  # float32, the temperature; 1 where greedy
    uniforms: Tensor  # float64 [B, steps]
    stops: Tensor  # int64 [B, stop ids], -1 beyond a request's own
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    open: Tensor  # bool, not finished; written to

    def select(self, keep: Tensor | slice) -> _Rows:
        return _Rows(**{f.name: getattr(self, f.name)[keep] for f in fields(self)})


class TokenSampler:
    """Draws each request's tokens from its own uniforms and keeps what was drawn."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.requests = requests
        temperatures = torch.tensor([r.temperature for r in requests], device=device)
        greedy = temperatures == 0
        # A request's own generator, on the CPU: the same numbers in any batch, on any device.
        uniforms = [
            torch.rand(
                r.max_new_tokens,
                generator=torch.Generator().manual_seed(r.seed),
                dtype=torch.float64,
            )
            for r in requests
        ]
        stops = max(len(r.stop_token_ids) for r in requests)
        limit = torch.tensor([r.max_new_tokens for r in requests], device=device)
        self._rows = _Rows(
            request=torch.arange(len(requests), device=device),
            limit=limit,
            greedy=greedy,
            divisor=temperatures.masked_fill(greedy, 1.0),
            uniforms=torch.nn.utils.rnn.pad_sequence(uniforms, batch_first=True).to(device),
            stops=torch.tensor(
                [[*r.stop_token_ids, *[-1] * (stops - len(r.stop_token_ids))] for r in requests],
                device=device,
                dtype=torch.long,
            ).view(len(requests), stops),
            top_p=torch.tensor([r.top_p for r in requests], device=device),
            top_k=torch.tensor([r.top_k or 2**31 for r in requests], device=device),
            min_p=torch.tensor([r.min_p for r in requests], device=device),
            open=limit > 0,
        )
        # What nobody asks for is not computed.
        self._scales = any(r.temperature not in (0, 1) for r in requests)
        self._truncates = any(r.top_p < 1 or r.top_k or r.min_p for r in requests)
        self._any_greedy = any(r.temperature == 0 for r in requests)
        steps = max(r.max_new_tokens for r in requests)
        self._step = 0
        self.tokens = torch.full((steps, len(requests)), -1, device=device)  # -1 where finished
        self.logprobs = torch.zeros((steps, len(requests)), device=device)

    def num_open(self) -> int:
        return int(self._rows.open.sum())

    def compact(self) -> Tensor:
        """Gives up the rows that are finished; the numbers of those that are kept."""
        keep = self._rows.open.nonzero()[:, 0]
        self._rows = self._rows.select(keep)
        return keep

    def step(self, logits: Tensor) -> Tensor:
        """The next token of each row, [B]; rows whose request is finished get any token."""
        rows, at = self._rows, self._step
        size = len(logits)
        if logits.device.type == "cpu":
            size = max(1, CACHED_LOGITS // logits.shape[1])
        if size >= len(logits):
            token, logprob = self._draw(logits, rows)
        else:
            blocks = [slice(i, i + size) for i in range(0, len(logits), size)]
            drawn = [self._draw(logits[block], rows.select(block)) for block in blocks]
            token, logprob = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        self.tokens[at].index_copy_(0, rows.request, token.masked_fill(~rows.open, -1))
        self.logprobs[at].index_copy_(0, rows.request, logprob)
        self._step += 1
        stop = (rows.stops == token[:, None]).any(-1)
        rows.open.logical_and_(~stop).logical_and_(rows.limit > self._step)
        return token

    def _draw(self, logits: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
        """A token of each of these rows, and its log-probability."""
        scaled = logits.float()
        logprobs = (scaled / rows.divisor[:, None] if self._scales else scaled).log_softmax(-1)
        if self._truncates:
            logprobs = _truncated(logprobs, rows)
        token = _drawn(logprobs, rows.uniforms[:, self._step])
        if self._any_greedy:
            token = torch.where(rows.greedy, logits.argmax(-1), token)
        return token, logprobs.gather(-1, token[:, None])[:, 0]

    def completions(self, policy_version: int) -> list[Completion]:
        tokens, logprobs = self.tokens.T.tolist(), self.logprobs.T.tolist()
        out = []
        for request, ids, values in zip(self.requests, tokens, logprobs, strict=True):
            count = len(ids) - ids.count(-1)  # which only ever follows the last token
            stopped = count > 0 and ids[count - 1] in request.stop_token_ids
            out.append(
                Completion(
                    token_ids=tuple(ids[:count]),
                    logprobs=tuple(values[:count]),
                    finish_reason="stop" if stopped else "length",
                    policy_version=policy_version,
                    seed=request.seed,
                )
            )
        return out


def _drawn(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF in float64: the count of entries that the uniform has passed, [B]."""
    cdf = logprobs.double().exp_().cumsum_(-1)
    count = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    # The last entry of a rounded CDF may stay below 1.
    return count.clamp_(max=logprobs.shape[-1] - 1)


def _truncated(logprobs: Tensor, rows: _Rows) -> Tensor:
    """Log-probs [B, V] over what min_p, top_k and top_p keep, in this order, as vLLM does."""
    least = logprobs.amax(-1, keepdim=True) + rows.min_p[:, None].log()
    ranked, order = logprobs.masked_fill(logprobs < least, -torch.inf).sort(
        dim=-1, descending=True, stable=True
    )
    places = torch.arange(ranked.shape[-1], device=ranked.device)
    ranked = ranked.masked_fill(places >= rows.top_k[:, None], -torch.inf)
    shares = ranked.double().softmax(-1)
    # An entry stays while those before it hold less than top_p: the first always does.
    before = shares.cumsum(-1) - shares
    dropped = (before >= rows.top_p[:, None].double()) & (places > 0)
    dropped &= rows.top_p[:, None] < 1
    ranked = ranked.masked_fill(dropped, -torch.inf).log_softmax(-1)
    return torch.empty_like(logprobs).scatter_(-1, order, ranked)
