"""Repairs DistributedOptimizer's state loading with torch's AdamW (megatron-core 0.16.1).

Without Transformer Engine and apex, on CPU or GPU alike, it cannot load its own checkpoint:
optimizer/distrib_optimizer.py:642 expects a `step` that a fresh AdamW does not have, :940 copies
into `step` and into a leaf view under grad mode, :819 gives all parameters one step tensor, which
AdamW then increments once per parameter.
"""

from __future__ import annotations

from typing import Any

import torch

_installed = False


def install() -> None:
    """Patches DistributedOptimizer, once, and only where neither TE nor apex is there."""
    global _installed
    from megatron.core.optimizer import distrib_optimizer

    if _installed or getattr(distrib_optimizer, "HAVE_APEX_OR_TE", True):
        return
    _installed = True
    cls = distrib_optimizer.DistributedOptimizer
    plain_state_dict, plain_load = cls.state_dict, cls.load_state_dict

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            for key, tensor in {"param": main, **self.optimizer.state[main]}.items():
                if key != "step":
                    tensor.copy_(tensors[key])

    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return plain_state_dict(self)

    def load_state_dict(self: Any, state: Any) -> None:
        plain_load(self, state)
        for entry in self.optimizer.state.values():
            entry["step"] = entry["step"].clone()

    cls._set_main_param_and_optimizer_states = set_states
    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict
