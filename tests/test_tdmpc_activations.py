"""Fast ELU and tanh: the same numbers and gradients as torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import elu

from agents.tdmpc import activations
from agents.tdmpc.activations import ELU, MANY, Tanh, elu_in_place, tanh_in_place

TOLERANCES = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 8e-3}


def numbers(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Small and large of both signs, some of them extreme."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(count - 6, generator=generator, dtype=torch.float64) * 3
    extreme = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 80.0, -200.0], dtype=torch.float64)
    return torch.cat([extreme, spread]).to(dtype)


@pytest.mark.parametrize("count", [100, MANY, 3 * MANY])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("ours", "oracle"), [(ELU(), elu), (Tanh(), torch.tanh)], ids=["elu", "tanh"])
def test_values_and_gradients_are_those_of_torch(ours, oracle, dtype, count) -> None:
    x = numbers(dtype, count)
    exact = x.double().clone().requires_grad_()
    oracle(exact).square().sum().backward()
    given = x.clone().requires_grad_()
    made = ours(given)
    made.double().square().sum().backward()
    assert made.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(made.double(), oracle(exact), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(given.grad.double(), exact.grad, atol=8 * tolerance, rtol=8 * tolerance)
    torch.testing.assert_close(ours(x), made.detach(), atol=tolerance, rtol=tolerance)  # without gradients
    assert torch.equal(given.detach(), x)


@pytest.mark.parametrize("count", [100, 2 * MANY])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("in_place", "module"), [(elu_in_place, ELU()), (tanh_in_place, Tanh())], ids=["elu", "tanh"]
)
def test_in_place_makes_the_same(in_place, module, dtype, count) -> None:
    x = numbers(dtype, count)
    wanted = module(x.clone())
    made = in_place(x)
    assert made.data_ptr() == x.data_ptr()
    torch.testing.assert_close(made, wanted, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_elu_is_continuous_where_the_method_changes() -> None:
    few, many = numbers(torch.float32, MANY - 1), numbers(torch.float32, MANY)
    torch.testing.assert_close(ELU()(few)[:100], elu(few)[:100], atol=0, rtol=0)
    torch.testing.assert_close(ELU()(many)[:100], elu(many)[:100], atol=1e-7, rtol=0)
    assert not torch.equal(ELU()(many), elu(many)), "by an exponential it differs in the last bits"


def test_nan_stays_nan() -> None:
    x = numbers(torch.float32, 2 * MANY)
    x[7] = float("nan")
    for made in (ELU()(x), Tanh()(x), elu_in_place(x.clone()), tanh_in_place(x.clone())):
        assert made[7].isnan()
        assert made.isnan().sum() == 1


def test_modules_have_no_state() -> None:
    assert not activations.ELU().state_dict()
    assert not activations.Tanh().state_dict()
