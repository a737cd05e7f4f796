"""GELU's tanh form as CPUs train with it, against torch's form and float64; the allocator that keeps what is freed."""

import resource

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from pretrain.engine.host_memory import keep_freed_memory
from pretrain.models.gelu import gelu_tanh


def value_and_gradient(function: object, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y) * 0.5)
    return y.detach(), gradient


def torchs_form(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def test_it_is_the_tanh_form() -> None:
    """As near to float64 as torch's own: 6e-7 for values, 1e-6 for half the gradient; also beyond one piece."""
    x = torch.linspace(-12, 12, 300_001)
    value, gradient = value_and_gradient(gelu_tanh, x)
    exact_value, exact_gradient = value_and_gradient(torchs_form, x.double())
    assert (value - exact_value).abs().max() < 6e-7
    assert (gradient - exact_gradient).abs().max() < 1.1e-6
    assert not torch.equal(value, torchs_form(x))  # it is another rounding: else this file tests nothing


def test_in_bfloat16_it_rounds_once() -> None:
    """Computed in float32: within one rounding of float64's value, as torch's own is, but for values next to zero."""
    x = torch.linspace(-6, 6, 4001).bfloat16()
    exact_value, exact_gradient = value_and_gradient(torchs_form, x.double())
    value, gradient = value_and_gradient(gelu_tanh, x)
    torch.testing.assert_close(value.double(), exact_value, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-8, atol=2e-6)


def test_other_layouts() -> None:
    """Tensors, and gradients, that lie otherwise in memory; none at all."""
    x = torch.randn(6, 5, 4).transpose(0, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(gelu_tanh(x).sum(), x)  # the gradient of a sum has no memory of its own
    assert torch.allclose(gradient, value_and_gradient(torchs_form, x)[1] * 2, atol=2e-6)
    assert gelu_tanh(torch.empty(0, 3, requires_grad=True)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_evaluation_has_torchs_bits(dtype: torch.dtype) -> None:
    """What is converted and published is computed by torch's own form."""
    x = torch.randn(1000).to(dtype)
    with torch.no_grad():
        assert torch.equal(gelu_tanh(x.requires_grad_()), torchs_form(x))
    assert torch.equal(gelu_tanh(x.detach()), torchs_form(x.detach()))


# --- the allocator ---------------------------------------------------------------------------------------------------


def faults_of_ten_blocks() -> int:
    """Page faults of taking, filling and freeing 100 MB ten times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def before_and_after() -> tuple[int, bool, int]:
    before, done = faults_of_ten_blocks(), keep_freed_memory()
    torch.ones(25_000_000)
    return before, done, faults_of_ten_blocks()


def test_freed_memory_is_kept() -> None:
    """By default each block is mapped and faults anew; then none does. Where there is no glibc nothing is done."""
    before, done, after = run_ranks(before_and_after, 1)[0]
    if not done:
        pytest.skip("no glibc")
    assert before > 1000 and after < before / 10
