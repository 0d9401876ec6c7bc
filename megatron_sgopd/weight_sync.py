"""Student weights -> rollout engine: the one stream of (Hugging Face name, full tensor)."""

from __future__ import annotations

from megatron_sgopd.hf_weights import iter_hf_weights
from megatron_sgopd.model import ShardedModel
from megatron_sgopd.types import Engine


def push_weights(model: ShardedModel, engine: Engine, policy_version: int) -> None:
    """Gives the engine the model's current weights. Collective over the replica.

    Raises:
        RuntimeError: the engine does not report the version it was given.
    """
    engine.push_weights(iter_hf_weights(model), policy_version)
    if engine.policy_version != policy_version:
        raise RuntimeError(
            f"the engine reports policy version {engine.policy_version} after it was given "
            f"{policy_version}: it would answer with stale weights; restart it"
        )
