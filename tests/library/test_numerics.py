"""The numerical contract: float32 against float64, large parameters and inputs, NaN.

Splines are compared with themselves in float64 over dense grids that hold every joint; the bounds follow
from rounding: an error of some eps in place, times the slope there.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from flowlang.backends.torch import runtime as R
from torch import Tensor

import flowlang as fl
from tests.library.registry import Case, cases
from tests.library.test_bijectors import given

pytestmark = pytest.mark.filterwarnings("error:.*lie outside what this flow can invert")

B = 3.0
EPS = torch.finfo(torch.float32).eps
KINDS = {
    "rqs": (0, 0, -1), "linear_spline": (0,), "quadratic_spline": (0, 1), "cubic_spline": (0, 0, None),
    "rqs_circular": (0, 0, 0),
}  # fmt: skip


def raw(kind: str, bins: int, scale: float, columns: int = 16) -> list[Tensor]:
    g = torch.Generator().manual_seed(bins)
    sizes = [2 if o is None else bins + o for o in KINDS[kind]]
    return [(scale * torch.randn(n, columns, generator=g)).float() for n in sizes]


def grid(parameters: list[Tensor], bins: int, index: int) -> Tensor:
    """A dense grid in float32, the joints of one set of bins and their neighbours in floating point."""
    _, ends = R.spline_bins(parameters[min(index, len(parameters) - 1)].double(), 1e-3, -2)
    joints = (ends * 2 * B).float()
    up, down = (torch.nextafter(joints, torch.full_like(joints, v)) for v in (math.inf, -math.inf))
    even = torch.linspace(-B, B, 2001).unsqueeze(-1).expand(-1, joints.shape[-1])
    return torch.cat((even, joints, up, down)).clamp(-B, B).contiguous()


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("bins", [2, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_spline_in_float32_is_that_of_float64(kind: str, bins: int, scale: float) -> None:
    parameters = raw(kind, bins, scale)
    wide = [p.double() for p in parameters]
    for name, index in ((kind, 0), (f"{kind}_inverse", 1)):
        function = getattr(R, name)
        x = grid(parameters, bins, index)
        if kind == "rqs_circular":
            x = x.clamp_max(B * (1 - 2 * EPS))
        y, log_slope = function(x, *parameters, bound=B)
        assert torch.isfinite(y).all()
        assert torch.isfinite(log_slope).all()
        # Where rounding of x or of a joint moves it by a few eps, the value moves by the slope times that.
        near = [function((x + d).double().clamp(-B, B * (1 - 1e-9)), *wide, bound=B) for d in (-8e-6, 0.0, 8e-6)]
        middle, spread = near[1][0], (near[2][0] - near[0][0]).abs()
        assert ((y - middle).abs() <= spread + 64 * EPS * B).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("bins", [2, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_spline_comes_back_in_float32(kind: str, bins: int, scale: float) -> None:
    parameters = raw(kind, bins, scale)
    x = grid(parameters, bins, 0)
    if kind == "rqs_circular":
        x = x.clamp_max(B * (1 - 2 * EPS))
    y, _ = getattr(R, kind)(x, *parameters, bound=B)
    back, _ = getattr(R, f"{kind}_inverse")(y, *parameters, bound=B)
    forth, _ = getattr(R, kind)(back, *parameters, bound=B)
    # Back and forth again: a flat piece loses the place in x, never the value.
    steep = (
        torch.maximum(
            *(getattr(R, kind)(back.double() + d, *[p.double() for p in parameters], bound=B)[0] for d in (-8e-6, 8e-6))
        )
        - y
    )
    assert ((forth - y).abs() <= steep.abs().float() + 1e-5 * (1 + B)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_splines_are_finite_at_joints_and_far_outside(kind: str) -> None:
    for scale in (0.0, 1.0, 30.0):
        parameters = [p.requires_grad_() for p in raw(kind, 8, scale)]
        x = grid([p.detach() for p in parameters], 8, 0)
        if kind != "rqs_circular":
            x = torch.cat((x, torch.full_like(x[:1], 1e30), torch.full_like(x[:1], -1e30)))
        x = x.requires_grad_()
        for name in (kind, f"{kind}_inverse"):
            y, log_slope = getattr(R, name)(x, *parameters, bound=B)
            found = torch.autograd.grad(y.sum() + log_slope.sum(), [x, *parameters])
            assert all(torch.isfinite(g).all() for g in found)


# ---- every bijector -----------------------------------------------------------------------------

REAL = [c for c in cases() if "x: R[" in c.text]
each = pytest.mark.parametrize("case", REAL, ids=[c.id for c in REAL])


def normal(flow: fl.Flow, n: int, sigma: float) -> Tensor:
    """Points within ±sigma, the corners included."""
    g = torch.Generator().manual_seed(11)
    x = (torch.rand(n, *flow.data_shape, generator=g) * 2 - 1) * sigma
    x[0], x[1] = sigma, -sigma
    x[2:6] = x[2:6].sign() * sigma
    return x


@each
def test_within_five_sigma_at_the_start_every_map_comes_back(case: Case) -> None:
    flow = fl.compile(case.text, seed=0).eval()
    x = normal(flow, 64, 5.0)
    c = given(flow, 64, torch.float32)
    with torch.no_grad():
        back = flow.inverse(*flow(x, **c)[:-1], **c)[0]
    assert (back - x).abs().max() <= 1e-3


@each
def test_within_five_sigma_at_the_start_nothing_is_reported(case: Case) -> None:
    flow = fl.compile(case.text, seed=0).eval()
    x = normal(flow, 64, 5.0)
    c = given(flow, 64, torch.float32)
    with torch.no_grad():
        flow.inverse(*flow(x, **c)[:-1], **c)  # a warning is an error in tests
    assert (flow.round_trip(x, **c) <= 1e-3).all()


def ten_times(case: Case) -> fl.Flow:
    flow = fl.compile(case.text, seed=0).eval()
    with torch.no_grad():
        for p in flow.parameters():
            p *= 10
    return flow


@each
def test_ten_times_the_parameters_and_ten_sigma(case: Case) -> None:
    """log_prob and its gradient stay finite."""
    flow = ten_times(case)
    x = normal(flow, 64, 10.0).requires_grad_()
    c = given(flow, 64, torch.float32)
    density = flow.log_prob(x, **c)
    assert torch.isfinite(density).all()
    found = torch.autograd.grad(density.sum(), [x, *flow.parameters()], allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in found)


@each
def test_ten_times_the_parameters_and_ten_sigma_come_back_or_are_reported(case: Case) -> None:
    """Sample by sample, the report being made of z alone: what is off by more than 1e-3 is warned of."""
    flow = ten_times(case)
    x = normal(flow, 64, 10.0)
    c = given(flow, 64, torch.float32)
    with torch.no_grad():
        for k in range(len(x)):
            one = {n: v[k] for n, v in c.items()}
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                back = flow.inverse(*flow(x[k], **one)[:-1], **one)[0]
            lost = not bool(((back - x[k]).abs() / (1 + x[k].abs())).max() <= 1e-3)
            assert told or not lost
            assert all(w.category is fl.NumericalWarning for w in told)
            assert bool(flow.round_trip(x[k], **one) > 1e-3) == lost


def test_what_cannot_be_inverted_is_said() -> None:
    """The digits of b drown in 1000·a. Samples that come back are not counted, nor is not-a-number."""
    spec = """
    bijector drowned(x: R[D]) {
      a, b = halves[D](x)
      join[D](a, b * 1e-6 + 1000 * a)
    }
    flow f {
      data x: R[D = 2]
      drowned
      base normal
    }
    """
    flow = fl.compile(spec)
    x = torch.tensor([[0.3, 1.7], [0.0, 1.0], [math.nan, 1.0]])
    z = flow(x)[0]
    flow.check_inverse = False
    flow.inverse(z)
    flow.check_inverse = None
    flow.sample((3,))
    with pytest.warns(
        fl.NumericalWarning, match=r"^1 of 3 samples lie outside what this flow can invert in torch.float32"
    ):
        flow.inverse(z)
    assert (flow.round_trip(x)[:2] > 1e-3).tolist() == [True, False]
    flow.double()
    flow.inverse(flow(x.double())[0])
    assert float(flow.round_trip(x[:2].double()).max()) < 1e-6


def test_nothing_is_looked_at_where_there_are_no_numbers() -> None:
    flow = fl.compile("flow f {\n data x: R[D = 2]\n affine_coupling\n base normal\n}", seed=0)
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    found = torch.func.vmap(lambda v: flow.inverse(v)[0])(z)
    torch.testing.assert_close(found, flow.inverse(z)[0])
    meta = copy.deepcopy(flow).to("meta")
    assert meta.inverse(z.to("meta"))[0].shape == (3, 2)


def test_a_scan_is_transformed_with_its_gradient() -> None:
    """`torch.func.vmap` over the inverse of an autoregressive map, inside and outside of a gradient."""
    flow = fl.compile("flow f {\n data x: R[D = 3]\n affine_autoregressive(hidden = [4])\n base normal\n}", seed=0)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    plain = flow.inverse(z)[0]
    wanted = torch.autograd.grad(plain.square().sum(), list(flow.parameters()))
    mapped = torch.func.vmap(lambda v: flow.inverse(v)[0])(z)
    torch.testing.assert_close(mapped, plain)
    for a, b in zip(torch.autograd.grad(mapped.square().sum(), list(flow.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b)
    each = torch.func.vmap(torch.func.grad(lambda v: flow.inverse(v)[0].square().sum()))(z)
    x = z.clone().requires_grad_()
    torch.testing.assert_close(each, torch.autograd.grad(flow.inverse(x)[0].square().sum(), x)[0])


def test_of_many_samples_the_farthest_out_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp drowns the digits of what is far below 0, for one sample in ten thousand; 256 are looked at."""
    flow = fl.compile("bijector m(x: R[D]) { x + exp(x) }\nflow f {\n data x: R[D = 2]\n m\n base normal\n}")
    x = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    z = flow(x)[0]
    flow.inverse(z)
    seen = []
    doubt = type(flow)._doubt
    monkeypatch.setattr(type(flow), "_doubt", lambda self, v, c, f: seen.append(len(v[0])) or doubt(self, v, c, f))
    flow.inverse(z)
    z[1234, 0] = 3e38  # its preimage is a number, and one unit in its last place is 2e31
    with pytest.warns(fl.NumericalWarning, match=r"^1 of 256 samples lie outside"):
        flow.inverse(z)
    assert seen == [256, 256]
    flow.check_inverse = True
    with pytest.warns(fl.NumericalWarning, match=r"^1 of 10000 samples"):
        flow.inverse(z)


def test_looking_moves_no_state_and_draws_nothing() -> None:
    """A forward pass in training moves running statistics, and that of a contraction draws."""
    flow = fl.compile(
        "flow f {\n data x: R[D = 2]\n invertible_batch_norm\n residual_block(net = mlp(8, act = elu))\n base normal\n}",
        seed=0,
    )
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    torch.manual_seed(0)
    flow.inverse(z)
    for looks in (flow, flow.eval()):
        looks.inverse(z)
    looked = torch.randn(1)
    flow.check_inverse = False
    torch.manual_seed(0)
    for _ in range(3):
        flow.inverse(z)
    assert torch.equal(looked, torch.randn(1))
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


def test_whole_numbers_are_no_matter_of_doubt() -> None:
    """Noise is drawn on the way back to the base, so the base's value does not come again; the numbers do."""
    flow = fl.compile(
        "flow f {\n data x: Int(0..8)[D = 2]\n uniform_dequantise(8)\n elementwise(logit)\n base normal\n}"
    )
    x = flow.inverse(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))[
        0
    ]  # a warning is an error in tests
    assert torch.equal(x, x.round())


def test_samples_that_do_not_come_back_are_said() -> None:
    flow = fl.compile("flow f {\n data x: R[D = 2]\n affine_elementwise\n base normal\n}")
    flow.check_inverse = True
    assert flow.sample((8,), torch.Generator().manual_seed(0)).isfinite().all()
    with torch.no_grad():
        for p in flow.parameters():
            p.fill_(math.inf)
    with pytest.warns(fl.NumericalWarning, match="^8 of 8 samples"):
        flow.sample((8,), torch.Generator().manual_seed(0))


@each
def test_nan_stays_with_its_sample(case: Case) -> None:
    flow = copy.deepcopy(fl.compile(case.text, seed=0)).eval()
    x = normal(flow, 8, 2.0)
    c = given(flow, 8, torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        clean = flow.log_prob(x, **c)
        x[3].reshape(-1)[0] = math.nan
        torch.manual_seed(0)
        found = flow.log_prob(x, **c)
    assert torch.isnan(found[3])
    others = [k for k in range(8) if k != 3]
    assert torch.allclose(found[others], clean[others], rtol=1e-5, atol=1e-5)
