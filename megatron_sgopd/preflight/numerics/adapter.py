"""Loads what the suite calls: a function named MODULE:NAME, and what its author declares.

The function at MODULE:NAME is called on every rank of a tensor-parallel group as

    function(student, teacher, *, group, vocab_size, mask) -> per-token reverse KL

with this rank's logits [T, V] of both models (rank i holds columns [i V, (i + 1) V) of the
vocabulary; `student` requires a gradient), the `torch.distributed` group (of one rank at TP 1), the
model's true vocabulary (columns from there on are padding and must not count) and mask [T], bool.
It returns KL(student || teacher), in nats, in one of three forms:

    [T]               differentiable, 0 where the mask is False; the suite weighs every token
    scalar            the sum of the above over the tokens, differentiable
    (scalar, [T])     that sum, and the tokens' values without gradient

The first and the last let the suite compare token by token, and rank by rank bit for bit. All ranks
return the same numbers, and backward on each leaves the whole gradient of that rank's columns.

Instead of a function NAME may be any object (a class, a namespace, a function) whose attributes are
further functions of the same kind; what is not there is not tested:

    reverse_kl, forward_kl   (student, teacher, *, group, vocab_size, mask)
    jsd                      the same and beta: beta KL(q||m) + (1 - beta) KL(p||m), p the student,
                             q the teacher, m = (1 - beta) p + beta q
    nll                      (student, tokens, *, group, vocab_size, mask): -log p(token)
    gated_reverse_kl         (student, teacher, reference, *, tokens, signs, lambdas, group,
                             vocab_size, mask): KL(student || softmax(lam t + (1 - lam) r)), where
                             lam is lambdas[1] for the tokens whose log-ratio T - S has the sign
                             signs[t] (+1 or -1) and lambdas[0] for the others
    distillation_loss        this package's own signature
    worlds                   the group sizes it works at, such as (1,); the default is all
    needs                    names of top-level modules that must be importable
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgopd.config.errors import ConfigError

OURS = "megatron_sgopd.preflight.numerics.ours:loss"
CAPABILITIES = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "nll",
    "gated_reverse_kl",
    "distillation_loss",
)
WORLDS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Adapter:
    """The functions found at MODULE:NAME, by capability."""

    name: str
    functions: dict[str, Callable[..., Any]]
    worlds: tuple[int, ...]
    needs: tuple[str, ...]


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` reads MODULE:NAME; imports nothing."""
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise ConfigError(
            f"--function is {name!r}; it wants MODULE:NAME, such as my_losses:reverse_kl"
        )


def load(name: str) -> Adapter:
    """The adapter at MODULE:NAME; modules of the current folder are found too.

    Raises:
        ConfigError: the module or the name is not there, or what is there is no adapter.
    """
    module_name, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a foreign module does when it is imported
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"--function {name}: cannot import {module_name}: {what}") from None
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ConfigError(f"--function {name}: {module_name} has no {attribute!r}")
        target = getattr(target, part)
    return _adapter(name, target)


def _adapter(name: str, target: Any) -> Adapter:
    needs = tuple(getattr(target, "needs", ()))
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"--function {name} needs {' and '.join(missing)}, not installed here; run the suite "
            "with the python that has it"
        )
    functions = {k: getattr(target, k) for k in CAPABILITIES if callable(getattr(target, k, None))}
    if not functions and callable(target) and not isinstance(target, type):
        functions = {"reverse_kl": target}
    if not functions:
        raise ConfigError(
            f"--function {name} is neither a function nor an object with one of "
            f"{', '.join(CAPABILITIES)}"
        )
    return Adapter(name, functions, tuple(getattr(target, "worlds", WORLDS)), needs)
