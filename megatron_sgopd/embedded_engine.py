"""A rollout engine in the trainer's ranks: transformers decoding on weights from the one stream.

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
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from megatron_sgopd.types import Completion, Request

COMPACT_BELOW = 0.75  # share of unfinished sequences below which the finished leave the batch
# Sequences below which a CPU's decoding step costs much the same whatever the batch: so few are
# padded together with their neighbours in length, more decode apart, without padding and mask.
FULL_ON_CPU = 64


class EmbeddedEngine:
    """See `types.Engine`. `group` is the replica's; None is one rank alone."""

    name, version = "embedded", transformers.__version__

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
        self._group, self._device, self._max_batch_size = group, device, max_batch_size
        self._max_positions = hf_config.max_position_embeddings
        self._full = FULL_ON_CPU if device.type == "cpu" else max_batch_size
        self._vocab_size = hf_config.vocab_size
        self._shared_vocab_size = shared_vocab_size or hf_config.vocab_size
        # The type goes in here, not through .to(dtype): that would round the rotary frequencies
        # too, and far positions would be wrong.
        self._model: Any = (
            AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=dtype)
            .to(device=device)
            .eval()
            .requires_grad_(False)
        )
        self._parameters: dict[str, Tensor] = dict(self._model.named_parameters())
        # A tied head is no weight of its own, but some writers store it a second time.
        self._tied: dict[str, Tensor] = {
            name: parameter
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if name not in self._parameters
        }

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
        """What is wrong with a weight of the stream; empty if nothing."""
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
        mine = order[rank::size]
        done: dict[int, Completion] = {}
        for part in self._batches(mine, [len(requests[i].prompt_token_ids) for i in mine]):
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

    def recover(self) -> None:
        """An engine in the trainer's own ranks is lost with them only."""

    def sleep(self) -> None:
        """Its weights stay: a push goes into them."""

    def wake_up(self) -> None:
        """It never sleeps."""

    def forget(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Frees the model; the engine cannot be used after it."""
        self._model, self._parameters = None, {}

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
        """Decodes prompts together, left-padded to the longest."""
        if all(r.max_new_tokens == 0 for r in requests):
            return [Completion((), (), "length", self.policy_version, r.seed) for r in requests]
        sampler = _Sampler(requests, self._device)
        batch = _Batch(requests, self._device)
        cache = DynamicCache(config=self._model.config)
        while True:
            logits = self._model(
                input_ids=batch.current,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            tokens = sampler.step(logits[:, : self._shared_vocab_size], batch.rows)
            alive = ~sampler.finished[batch.rows]
            left = int(alive.sum())
            if left == 0:
                return sampler.completions(self.policy_version)
            batch.append(tokens)
            if left < COMPACT_BELOW * len(tokens):
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                batch.select(keep)


class _Batch:
    """The model's inputs, step by step; every row ends in the same column."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        prompts = [r.prompt_token_ids for r in requests]
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(p) for p in prompts])[:, None]
        columns = torch.arange(longest)
        padded = [[0] * (longest - len(p)) + list(p) for p in prompts]
        self.rows = torch.arange(len(requests), device=device)  # which request each row is, [B]
        self.current = torch.tensor(padded, device=device)  # [B, L], then [B, 1]
        self.positions = (columns - padding).clamp(min=0).to(device)  # as current
        # True where a query may look, [B, 1, queries, keys]; None: the model's own causal mask,
        # all that prompts of one length need. Written out here, the model need not build it anew
        # in each step.
        self.mask: Tensor | None = None
        if padding.any():
            steps = max(r.max_new_tokens for r in requests)
            keys = torch.arange(longest + steps) >= padding
            self.keys = keys.to(device)[:, None, None]  # [B, 1, 1, keys]: no padding
            causal = columns[None] <= columns[:, None]
            # A padding query looks at itself: some attention kernels give NaN without any key.
            own = columns[None] == columns[:, None]
            mask = causal & keys[:, None, None, :longest] | own
            self.mask = mask.to(device)
        self._width = longest

    def append(self, tokens: Tensor) -> None:
        """Goes on with the sampled tokens, [B]."""
        self._width += 1
        self.current = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = self.keys[..., : self._width]

    def select(self, keep: Tensor) -> None:
        """Keeps these rows; after `append`."""
        self.rows, self.current = self.rows[keep], self.current[keep]
        self.positions = self.positions[keep]
        if self.mask is not None:
            self.keys = self.keys[keep]
            self.mask = self.keys[..., : self._width]


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
        self.top_p = torch.tensor([r.top_p for r in requests], device=device)
        self.top_k = torch.tensor([r.top_k or 2**31 for r in requests], device=device)
        self.min_p = torch.tensor([r.min_p for r in requests], device=device)
        self.truncates = any(r.top_p < 1 or r.top_k or r.min_p for r in requests)
        self.finished = self.limit == 0
        self.stopped = torch.zeros_like(self.finished)
        self.tokens: list[Tensor] = []  # one column a step: [requests], -1 where finished
        self.logprobs: list[Tensor] = []

    def step(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The next token of each row, [B]; rows whose request is finished get any token."""
        scaled = logits.float() / self.divisor[rows, None]
        logprobs = scaled.log_softmax(-1)
        if self.truncates:
            logprobs = self.truncated(logprobs, rows)
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

    def truncated(self, logprobs: Tensor, rows: Tensor) -> Tensor:
        """Log-probs [B, V] over what min_p, top_k and top_p keep, in this order, as vLLM does."""
        least = logprobs.amax(-1, keepdim=True) + self.min_p[rows, None].log()
        ranked, order = logprobs.masked_fill(logprobs < least, -torch.inf).sort(
            dim=-1, descending=True, stable=True
        )
        places = torch.arange(ranked.shape[-1], device=ranked.device)
        ranked = ranked.masked_fill(places >= self.top_k[rows, None], -torch.inf)
        shares = ranked.double().softmax(-1)
        # An entry stays while those before it hold less than top_p: the first always does.
        before = shares.cumsum(-1) - shares
        dropped = (before >= self.top_p[rows, None].double()) & (places > 0)
        dropped &= self.top_p[rows, None] < 1
        ranked = ranked.masked_fill(dropped, -torch.inf).log_softmax(-1)
        return torch.empty_like(logprobs).scatter_(-1, order, ranked)

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
