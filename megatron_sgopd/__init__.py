"""Sign-gated on-policy distillation on Megatron-Core.

What other programs may rely on, besides the command line:

    from megatron_sgopd import distillation_loss, coefficients, teacher_fraction, verify

Each is imported when it is first asked for, so that `import megatron_sgopd` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sgopd.sgopd import coefficients as coefficients
    from megatron_sgopd.sgopd import teacher_fraction as teacher_fraction
    from megatron_sgopd.verifier import verify as verify
    from megatron_sgopd.vocab_parallel import distillation_loss as distillation_loss

_PUBLIC = {  # name -> the module that has it
    "coefficients": "megatron_sgopd.sgopd",
    "distillation_loss": "megatron_sgopd.vocab_parallel",
    "teacher_fraction": "megatron_sgopd.config.phases",
    "verify": "megatron_sgopd.verifier",
}
__all__ = ["coefficients", "distillation_loss", "teacher_fraction", "verify"]


def __getattr__(name: str) -> Any:
    """Imports a public function, or reads `__version__`, when it is first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("megatron_sgopd")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'megatron_sgopd' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """Lists the public names too, which are not loaded yet."""
    return sorted({*globals(), *__all__, "__version__"})
