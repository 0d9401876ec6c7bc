"""Pushes from real Megatron ranks to a real vLLM server, healthy and spoilt; run by the pool."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_sgopd import versions
from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.schema import (
    Config,
    DataConfig,
    DistillConfig,
    ModelConfig,
    PhasesConfig,
    RolloutConfig,
    StudentConfig,
    TeacherServersConfig,
    VllmConfig,
)
from megatron_sgopd.metrics import mismatch_kl
from megatron_sgopd.model.hf_location import read_hf_config
from megatron_sgopd.model.weight_stream import iter_hf_weights, load_hf_weights
from megatron_sgopd.rollouts.engine_jobs import OnFirstRank
from megatron_sgopd.rollouts.make_engine import make_engine
from megatron_sgopd.rollouts.vllm_servers.client import VllmClient
from megatron_sgopd.rollouts.vllm_servers.engine import Remote, VllmEngine
from megatron_sgopd.rollouts.vllm_servers.weight_sender import WeightSender
from megatron_sgopd.training.weight_sync import Guard, StaleWeights
from megatron_sgopd.types import Completion, EngineLost, Request
from tests.support.layouts import layout
from tests.support.model_cases import build

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
    from megatron_sgopd.model.weight_stream import load_stream

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


def preflight(url: str, key: str, path: str, log_folder: str) -> dict[str, str]:
    """What is said before training of each way in which a server may not fit."""
    os.environ["SGOPD_ENGINE_KEY"] = key
    plain = config_of(path, temperature=1.0)

    def refusal(model: Path = Path(path), role: str = "student", **vllm: Any) -> str:
        vllm = {"urls": [url], "num_engines": 1, "max_model_len": 400, **vllm}
        settings = replace(plain.rollout.vllm, **vllm)
        settings = replace(settings, teacher=TeacherServersConfig(urls=[url]))
        config = replace(
            plain,
            rollout=replace(plain.rollout, vllm=settings),
            logging=replace(plain.logging, run_dir=log_folder),
        )
        try:
            make_engine(config, groups, read_hf_config(model), model, role).close()
        except (ConfigError, EngineLost) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was said"

    def other(**changes: Any) -> Path:
        """Another model's directory, as far as an engine is compared with one."""
        folder = Path(log_folder, "other-" + "-".join(changes))
        folder.mkdir(parents=True)
        config = json.loads(Path(path, "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    with layout(1) as groups, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = {
            "it fits": refusal(),
            "unreachable": refusal(urls=["http://127.0.0.1:9"]),
            "vocabulary": refusal(other(vocab_size=332)),
            "wrong model": refusal(other(model_type="llama")),
            "wrong width": refusal(other(intermediate_size=77)),
            "student's as the teacher's": refusal(role="teacher"),
            "dtype": refusal(dtype="bfloat16"),
            "too short": refusal(max_model_len=401),
            "port taken": refusal(urls=None, port=taken.getsockname()[1]),
            "no vLLM": refusal(urls=None, python="/usr/bin/true"),
            "server that ends": refusal(urls=None, extra_args=["--no-such-option"]),
        }
        os.environ["SGOPD_ENGINE_KEY"] = "another"
        said["wrong key"] = refusal()
        os.environ["SGOPD_ENGINE_KEY"] = key
        tested, versions.TESTED["vllm"] = versions.TESTED["vllm"], ("9.9.9",)
        said["wrong version"] = refusal()
        versions.TESTED["vllm"] = tested
        del os.environ["SGOPD_ENGINE_KEY"]
        return said


def killed(path: str, folder: str) -> dict[str, Any]:
    """A server killed in the middle of generation, and the next one in the middle of a push."""
    plain = config_of(path, temperature=1.0)
    vllm = replace(plain.rollout.vllm, urls=None, num_engines=1, max_model_len=400)
    vllm = replace(vllm, bucket_mb=0.1)
    config = replace(
        plain,
        rollout=replace(plain.rollout, vllm=vllm),
        logging=replace(plain.logging, run_dir=folder),
    )
    requests = [
        Request(tuple(range(5, 60 + i)), seed=i, max_new_tokens=5 + 6 * i, temperature=1.0)
        for i in range(32)
    ]
    with layout(1) as groups:
        model = build(path, groups)
        load_hf_weights(model, Path(path))
        engine = make_engine(config, groups, read_hf_config(Path(path)), Path(path))
        assert isinstance(engine, VllmEngine)
        guard = Guard(SimpleNamespace(model=model, groups=groups), config)  # type: ignore[arg-type]
        jobs = OnFirstRank(groups, lambda: [engine], vllm.max_restarts)
        engine.push_weights(lambda: iter_hf_weights(model), 7)
        undisturbed = jobs.run(lambda: engine.generate(requests))
        (remote,) = engine._remotes
        assert engine.incidents()["engine/restarts"] == 0
        asked: list[Request] = []
        answered: list[Completion] = []
        plain_complete, plain_send = remote.client.complete, WeightSender.send
        sends: list[int] = []
        lock = threading.Lock()

        def complete(request: Request) -> Completion:
            asked.append(request)
            answer = plain_complete(request)
            with lock:
                answered.append(answer)
                if len(answered) == 8:
                    kill()
            return answer

        def kill() -> None:
            assert remote.server is not None and remote.server.pid is not None
            for process in psutil.Process(remote.server.pid).children(recursive=True):
                if not any("resource_tracker" in part for part in process.cmdline()):
                    process.kill()

        def send(self: WeightSender, bucket: Any) -> None:
            sends.append(len(bucket.entries))
            if len(sends) == 3:
                kill()
            plain_send(self, bucket)

        remote.client.complete = complete  # type: ignore[method-assign]
        WeightSender.send = send  # type: ignore[method-assign]
        begun = time.monotonic()
        answers = jobs.run(lambda: engine.generate(requests))
        seconds = time.monotonic() - begun
        WeightSender.send = plain_send  # type: ignore[method-assign]
        told = {
            "answers": len(answers),
            "versions": {c.policy_version for c in answers},
            "seeds in order": [c.seed for c in answers] == [r.seed for r in requests],
            "asked": len(asked),
            **engine.incidents(),
            "sends": len(sends),
            "differ": sum(
                a.token_ids != b.token_ids for a, b in zip(answers, undisturbed, strict=True)
            ),
            "probe": guard.check(engine, 7)["engine/probe_mismatch_kl"],
            "seconds": seconds,
        }
        pid = remote.server.pid if remote.server else None
        engine.close()
        told["left"] = pid is not None and psutil.pid_exists(pid)
        return told
