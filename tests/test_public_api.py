"""What other programs rely on: names, signatures, and that the package alone loads no torch."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import megatron_sgopd
import megatron_sgopd.sgopd
import megatron_sgopd.verifier
import megatron_sgopd.vocab_parallel

# What callers may write. `/` ends what may be given by position; a default is part of the promise.
SIGNATURES = {
    "coefficients": "method / **options",
    "distillation_loss": (
        "student teacher / reference=None tokens mask group=None vocab_size coefficients "
        "lambdas=(1.0, 1.8) estimator='sampled' temperature=1.0 token_scale=None "
        "candidate_lambda=None divergence='reverse_kl' beta=0.5 top_k=None overwrite_student=False "
        "student_entropy=True chunk_tokens=None sum_hidden_gradient=True backend='auto'"
    ),
    "teacher_fraction": "step / num_steps rho0=0.5 hold_frac=0.1 end_frac=0.4",
    "verify": "completion answer /",
}


def described(function: Any) -> list[str]:
    """Returns the parameters as SIGNATURES writes them."""
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD and "/" not in words:
            words.append("/")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        words.append(f"{stars}{parameter.name}{default}")
    return words if "/" in words else [*words, "/"]


@pytest.mark.parametrize("name", megatron_sgopd.__all__)
def test_signatures_stay_as_published(name: str) -> None:
    published = SIGNATURES[name].replace("(1.0, 1.8)", "(1.0,1.8)").split()
    words = [word.replace("(1.0, 1.8)", "(1.0,1.8)") for word in described(_function(name))]
    position = words.index("/")
    assert words[: position + 1] == published[: published.index("/") + 1]
    assert set(published) <= set(words), "a parameter was renamed, or lost its default"
    for added in set(words) - set(published):
        assert "=" in added, f"{added} breaks callers: what is added has a default"


def _function(name: str) -> Any:
    return getattr(megatron_sgopd, name)


def test_the_documented_module_paths_are_kept() -> None:
    assert megatron_sgopd.coefficients is megatron_sgopd.sgopd.coefficients
    assert megatron_sgopd.teacher_fraction is megatron_sgopd.sgopd.teacher_fraction
    assert megatron_sgopd.verify is megatron_sgopd.verifier.verify
    assert megatron_sgopd.distillation_loss is megatron_sgopd.vocab_parallel.distillation_loss


def test_the_package_alone_loads_neither_torch_nor_sympy() -> None:
    program = (
        "import sys, megatron_sgopd; dir(megatron_sgopd); megatron_sgopd.__version__; "
        "megatron_sgopd.teacher_fraction; "
        "print([m for m in ('torch', 'sympy', 'megatron', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(megatron_sgopd, "distilation_loss")
