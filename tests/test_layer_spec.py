"""The norm of the local layer spec against torch's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_sgopd.layer_spec import RMSNorm

EPS = 1e-5


@pytest.mark.parametrize("shape", [(7, 3, 64), (5, 2, 4, 32), (1, 8)], ids=str)
def test_the_norm_is_torchs_and_so_are_its_gradients(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape, generator=g) * 3 for _ in range(2))
    config = SimpleNamespace(
        use_cpu_initialization=True, params_dtype=torch.float32, sequence_parallel=False
    )
    norm = RMSNorm(config, shape[-1], eps=EPS)
    with torch.no_grad():
        norm.weight += torch.randn(shape[-1], generator=g) * 0.3
    x.requires_grad_()
    output = norm(x)
    torch.testing.assert_close(
        output, F.rms_norm(x, norm.weight.shape, norm.weight, EPS), rtol=0, atol=0
    )
    got = torch.autograd.grad(output, (x, norm.weight), grad)
    leaves = [y.detach().double().requires_grad_() for y in (x, norm.weight)]
    exact = F.rms_norm(leaves[0], norm.weight.shape, leaves[1], EPS)
    expected = torch.autograd.grad(exact, leaves, grad.double())
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).abs().max() < 1e-6 * theirs.abs().max()
