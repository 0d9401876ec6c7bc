"""A recipe made tiny, for the self-test: same layout and objective, small models, a few rollouts.

Everything is drawn from fixed seeds, alike on every rank.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_sgopd.config.checks import needs_reference, needs_teacher
from megatron_sgopd.config.hub_names import is_hub_name
from megatron_sgopd.config.layout import frozen_layout, has_own_layout
from megatron_sgopd.config.schema import Config, DistillConfig, ModelConfig, ParallelConfig
from megatron_sgopd.distributed.groups import Groups
from megatron_sgopd.types import Completion, Prompt, Rollout

VOCAB = 67  # odd, so that every tensor parallel size pads it
LENGTHS = (40, 1, 0, 7, 23, 2, 31, 12)  # completions of each replica; ragged, one empty
PACKED_TOKENS = 56
EDGE = 1e-4  # no token this close to a tie: which side it falls on may rightly differ
ROLES = ("student", "teacher", "reference")


def shrink(config: Config) -> Config:
    """The recipe's layout and objective at the sizes of the self-test, in fp32."""
    p = config.parallel
    parallel = replace(
        p,
        micro_batch_size=2,
        micro_batch_tokens=PACKED_TOKENS if p.micro_batch_tokens else None,
        make_vocab_size_divisible_by=1,
        hidden_states_budget_mb=0.01 if p.hidden_states_budget_mb is not None else None,
    )
    return replace(config, parallel=parallel, model=replace(config.model, dtype="float32"))


def make_models(
    recipe: ModelConfig, distill: DistillConfig, seed: int, groups: Groups
) -> dict[str, Any]:
    """Makes a small transformers model for each role that is needed, the same on every rank."""
    wanted = {
        "student": True,
        "teacher": needs_teacher(distill),
        "reference": needs_reference(distill),
    }
    models = {}
    for i, role in enumerate(ROLES):
        if not wanted[role]:
            continue
        torch.manual_seed(seed + i)
        model = AutoModelForCausalLM.from_config(
            _tiny_config(recipe, groups.config, role),
            attn_implementation="eager",
            dtype=torch.float32,
        )
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(std=0.08)
                if "norm" in name:
                    p.mul_(2.5).add_(1.0)
        models[role] = model.to(groups.device).requires_grad_(role == "student")
    return models


def _tiny_config(recipe: ModelConfig, p: ParallelConfig, role: str) -> Qwen3Config:
    """Makes a role's config small: its heads' ratio, tied or not, stages equal or not."""
    path = getattr(recipe, role).hf_path or recipe.student.hf_path
    known = _known_config(path)
    tp, stages = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    stages *= p.virtual_pipeline_model_parallel_size or 1
    if role != "student" and has_own_layout(frozen := getattr(recipe, role)):
        tp, stages = frozen_layout(frozen, p)
    kv = max(2, tp)
    ratio = known.get("num_attention_heads", 2) // known.get("num_key_value_heads", 1)
    uneven = known.get("num_hidden_layers", 0) % stages > 0
    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64 if role != "teacher" else 96,
        intermediate_size=48 * kv,
        num_hidden_layers=max(2, stages) + uneven,
        num_attention_heads=kv * max(1, min(ratio, 4)),
        num_key_value_heads=kv,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=bool(known.get("tie_word_embeddings", role == "student")),
    )


def _known_config(path: str | None) -> dict[str, Any]:
    """The config.json of a directory or of the hub's local cache; {} where there is none."""
    file = Path(path or "", "config.json")
    if path and is_hub_name(path):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json")
        file = Path(cached) if isinstance(cached, str) else file
    if not path or not file.is_file():
        return {}
    known = json.loads(file.read_text(encoding="utf-8"))
    return known if isinstance(known, dict) else {}


def draw_rollouts(models: dict[str, Any], replicas: int) -> list[Rollout]:
    """Ragged rollouts for all replicas: one empty, one cut off, one of the teacher's."""
    rng = random.Random(7)
    rollouts = []
    for i in range(len(LENGTHS) * replicas):
        place = i % len(LENGTHS)
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 6)))
        answer = _draw_answer(models, prompt, LENGTHS[place], rng)
        completion = Completion(
            answer,
            tuple(rng.uniform(-5, -3) for _ in answer),
            "length" if place == 4 else "stop",
            policy_version=0,
            seed=i,
        )
        rollouts.append(
            Rollout(
                Prompt(f"prompt-{i}", prompt, "1"),
                completion,
                "teacher" if place == 5 else "student",
                is_correct=rng.random() < 0.5,
                verifier_advantage=(0.9, -1.1, 0.0)[place % 3],
            )
        )
    return rollouts


def _draw_answer(
    models: dict[str, Any], prompt: tuple[int, ...], length: int, rng: random.Random
) -> tuple[int, ...]:
    """Token by token, so that at none of them two models agree to within the gate's edge."""
    answer: tuple[int, ...] = ()
    with torch.no_grad():
        while len(answer) < length:
            rows = [logits_of(m, (*prompt, *answer))[-1].log_softmax(-1) for m in models.values()]
            for token in rng.sample(range(VOCAB), VOCAB):
                here = sorted(float(row[token]) for row in rows)
                if all(b - a > EDGE for a, b in pairwise(here)):
                    answer = (*answer, token)
                    break
    return answer


def logits_of(model: Any, token_ids: tuple[int, ...]) -> Tensor:
    """Logits [L, V] of one sequence."""
    ids = torch.tensor([token_ids], device=model.device)
    rows: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return rows
