"""Pushes from real Megatron ranks to a real vLLM server, healthy and spoilt; run by the pool."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.schema import (
    Config,
    DataConfig,
    DistillConfig,
    ModelConfig,
    PhasesConfig,
    RolloutConfig,
    StudentConfig,
    VllmConfig,
)
from megatron_sgopd.hf_weights import iter_hf_weights, load_hf_weights
from megatron_sgopd.metrics import mismatch_kl
from megatron_sgopd.types import Request
from megatron_sgopd.vllm_client import VllmClient
from megatron_sgopd.vllm_engine import Remote, VllmEngine
from megatron_sgopd.weight_sender import WeightSender
from megatron_sgopd.weight_sync import Guard, StaleWeights
from tests.layouts import layout
from tests.model_cases import build

CPU = torch.device("cpu")
SKIPPED = "model.layers.1.mlp.down_proj.weight"


def config_of(model: str, temperature: float) -> Config:
    return resolve(
        Config(
            name="t",
            model=ModelConfig(student=StudentConfig(hf_path=model), dtype="float32"),
            distill=DistillConfig(method="grpo", phases=PhasesConfig(enabled=False)),
            rollout=RolloutConfig(
                engine="vllm",
                temperature=temperature,
                max_prompt_tokens=100,
                max_new_tokens=200,
                vllm=VllmConfig(urls=["http://127.0.0.1:1"]),
            ),
            data=DataConfig(train="unused"),
        )
    )


def engine_of(url: str, key: str, groups: Any, transport: str, bucket_bytes: int) -> VllmEngine:
    remotes = []
    if groups.is_replica_first_rank:
        client = VllmClient(url, key)
        remotes = [Remote(0, client, None, WeightSender(client, transport, CPU, None))]
    return VllmEngine(
        remotes,
        groups,
        version="0",
        dtype=torch.float32,
        bucket_bytes=bucket_bytes,
        max_concurrency=16,
        max_restarts=1,
        patience_s=5.0,
    )


@torch.no_grad()
def change(model: Any, seed: int) -> None:
    """What a step or two do: every weight moves a little, the same under every layout."""
    stream = {name: tensor.clone() for name, tensor in iter_hf_weights(model)}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(stream):
        noise = torch.randn(stream[name].shape, generator=generator)
        stream[name] *= 1 + 0.02 * noise
    from megatron_sgopd.hf_weights import load_stream

    load_stream(model, stream.items(), "the test's change")


def pushes(
    url: str, key: str, path: str, layout_of: dict[str, int], transport: str, bucket_bytes: int
) -> dict[str, Any]:
    """Push, ask, change, and again: gaps to transformers, and what the guard measured."""
    config = config_of(path, temperature=0.7)
    with layout(**layout_of) as groups:
        model = build(path, groups)
        load_hf_weights(model, Path(path))
        engine = engine_of(url, key, groups, transport, bucket_bytes)
        guard = Guard(SimpleNamespace(model=model, groups=groups), config)  # type: ignore[arg-type]
        told: dict[str, Any] = {"probe": [], "gap": [], "gap_to_old": []}
        before = None
        for version in (1, 2, 3):
            engine.push_weights(lambda: iter_hf_weights(model), version)
            told["probe"].append(guard.check(engine, version)["engine/probe_mismatch_kl"])
            weights = {n: t.clone() for n, t in iter_hf_weights(model)}
            if groups.is_replica_first_rank:
                asked = [
                    Request(tuple(range(5, 140 + i)), seed=i, max_new_tokens=24, temperature=0.7)
                    for i in range(4)
                ]
                answers = engine.generate(asked)
                assert {c.policy_version for c in answers} == {version}
                engine.forget()
                told["gap"].append(largest_gap(path, weights, asked, answers))
                if before is not None:
                    told["gap_to_old"].append(largest_gap(path, before, asked, answers))
            before = weights
            change(model, seed=version)
        engine.close()
        return told


def largest_gap(path: str, weights: Any, requests: Any, completions: Any) -> float:
    """Largest difference to transformers with these weights, at the requests' temperature."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    worst = 0.0
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.tensor([[*request.prompt_token_ids, *completion.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(request.prompt_token_ids) - 1 : -1]
        logprobs = (logits / request.temperature).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    return worst


def faults(url: str, key: str, path: str, temperature: float) -> dict[str, tuple[float, str]]:
    """For each fault the guard's mismatch_kl and what it says; "healthy": the largest of ten."""
    config = config_of(path, temperature)
    with layout(1) as groups:
        model = build(path, groups)
        load_hf_weights(model, Path(path))
        engine = engine_of(url, key, groups, "gloo", 1 << 20)
        guard = Guard(SimpleNamespace(model=model, groups=groups), config)  # type: ignore[arg-type]
        version = 100
        healthy = []
        found: dict[str, tuple[float, str]] = {}

        def push(weights: Any = lambda: iter_hf_weights(model)) -> None:
            nonlocal version
            version += 1
            engine.push_weights(weights, version)

        for seed in range(10):
            push()
            healthy.append(guard.check(engine, version)["engine/probe_mismatch_kl"])
            change(model, seed)
        found["healthy"] = (max(healthy), "")

        def fails(name: str) -> None:
            ours, before = guard.trainer_logprobs(), guard.before
            ((_, theirs),) = engine.probe(guard.engine_logprobs)
            try:
                guard.check(engine, version)
                found[name] = (mismatch_kl(theirs, ours), "nothing was said")
            except StaleWeights as error:
                found[name] = (mismatch_kl(theirs, ours), str(error))
            guard.before = before if name == "stale" else ours
            push()
            guard.check(engine, version)  # well again

        push()
        guard.check(engine, version)
        plain_reset = VllmClient.reset_prefix_cache
        change(model, 50)
        VllmClient.reset_prefix_cache = lambda self: None  # type: ignore[method-assign]
        push()
        VllmClient.reset_prefix_cache = plain_reset  # type: ignore[method-assign]
        fails("no cache reset")

        change(model, 51)
        push(lambda: without(SKIPPED, iter_hf_weights(model)))
        fails("one tensor skipped")

        old = {n: t.clone() for n, t in iter_hf_weights(model)}
        change(model, 52)
        push(lambda: old.items())
        fails("stale")

        plain = VllmClient.next_logprob
        VllmClient.next_logprob = (  # type: ignore[method-assign]
            lambda self, prefix, token, t: plain(self, prefix, token, 1.1 * t)
        )
        ours = guard.trainer_logprobs()
        ((_, theirs),) = engine.probe(guard.engine_logprobs)
        try:
            guard.check(engine, version)
            found["wrong temperature"] = (mismatch_kl(theirs, ours), "nothing was said")
        except StaleWeights as error:
            found["wrong temperature"] = (mismatch_kl(theirs, ours), str(error))
        VllmClient.next_logprob = plain  # type: ignore[method-assign]
        engine.close()
        return found


def without(name: str, stream: Any) -> Iterator[tuple[str, Tensor]]:
    return ((n, t) for n, t in stream if n != name)


def push_memory(url: str, key: str, path: str, bucket_bytes: int) -> tuple[float, float]:
    """(bytes by which this rank's peak memory grew in a push, bytes of all weights)."""
    with layout(1) as groups:
        model = build(path, groups)
        load_hf_weights(model, Path(path))
        total = sum(t.numel() * t.element_size() for _, t in iter_hf_weights(model))
        engine = engine_of(url, key, groups, "gloo", bucket_bytes)
        engine.push_weights(lambda: iter_hf_weights(model), 1)  # what is allocated once
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        engine.push_weights(lambda: iter_hf_weights(model), 2)
        grown = resident("VmHWM") - before
        engine.close()
        assert resource.getpagesize() > 0
        return grown, total


def resident(key: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024.0
