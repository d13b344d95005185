"""The gradient of a rational-quadratic spline that is written by hand is that of its formula."""

from __future__ import annotations

import pytest
import torch
from flowlang.backends.torch import runtime as R
from torch import Tensor

LEAST = (1e-3, 1e-3, 1e-3)


def parts(batch: tuple[int, ...], bins: int, scale: float, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(*batch, 2, generator=g, dtype=torch.float64)
    x[0] = torch.tensor([1e3, -1e3])
    raw = [scale * torch.randn(*batch, k, 2, generator=g, dtype=torch.float64) for k in (bins, bins, bins - 1)]
    return [t.requires_grad_() for t in (x, *raw)]


@pytest.mark.parametrize("bins", [2, 3, 8])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("batch", [(40,), (4, 5)])
def test_it_is_that_of_the_formula(batch: tuple[int, ...], bins: int, scale: float) -> None:
    given = parts(batch, bins, scale)
    g = torch.Generator().manual_seed(1)
    by = [torch.randn(given[0].shape, generator=g, dtype=torch.float64) for _ in range(2)]

    def slopes(found: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [*found, *torch.autograd.grad(sum((a * b).sum() for a, b in zip(found, by, strict=True)), given)]

    ours = slopes(R.rqs(*given, bound=5.0))
    for a, b in zip(ours, slopes(R.rqs_plain(*given, 5.0, *LEAST, -2)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        for a, b in zip(ours[:2], R.rqs(*given, bound=5.0), strict=True):
            assert torch.equal(a, b)


def test_by_finite_differences_and_once_more() -> None:
    given = parts((6,), 4, 1.0)
    given[0] = (given[0].detach()[1:].clone()).requires_grad_()
    given[1:] = [t.detach()[1:].clone().requires_grad_() for t in given[1:]]
    assert torch.autograd.gradcheck(R.rqs, given)
    assert torch.autograd.gradgradcheck(R.rqs, given)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # of torch's own, at the first dual number
def test_in_transformations_and_forwards() -> None:
    given = [t.detach() for t in parts((7,), 5, 1.0)]
    value, slope = torch.func.jvp(lambda x: R.rqs(x, *given[1:])[0], (given[0],), (torch.ones_like(given[0]),))
    assert torch.equal(value, R.rqs(*given)[0])
    torch.testing.assert_close(slope, R.rqs(*given)[1].exp())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given[0], torch.ones_like(given[0]))
        tangent = torch.autograd.forward_ad.unpack_dual(R.rqs(dual, *given[1:])[0]).tangent
    torch.testing.assert_close(tangent, slope)


def test_a_value_that_is_no_number_stays_with_its_sample() -> None:
    given = parts((5,), 8, 1.0)
    with torch.no_grad():
        given[0][2, 1] = torch.nan
    y, log_slope = R.rqs(*given, bound=5.0)
    found = torch.autograd.grad(y.sum() + log_slope.sum(), given)
    assert torch.isnan(y).sum() == 1
    assert all(torch.isfinite(d).all() for d in found)
