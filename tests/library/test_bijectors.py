"""Every bijector of the library: round trip, log-det, structure, gradients and a training step.

References are autograd Jacobians in float64. Points include 0, ±1e-6, ±30, the ends of the spline boxes
and, at their start, the joints of the splines (raw 0 puts eight knots of [-4, 4] on the whole numbers).
"""

from __future__ import annotations

import copy
import math
import re
from functools import cache

import pytest
import torch
from torch import Tensor

import flowlang as fl
from flowlang.analysis.dependence import Dependence
from flowlang.api import analyse
from flowlang.ir.relation import Relation
from tests.library.registry import ELSEWHERE, Case, cases, compiled

CASES = cases()
each = pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])
SPECIAL = (0.0, 1e-6, -1e-6, 30.0, -30.0, *(float(k) for k in range(-4, 5)))


def points(case: Case, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Random points of the entry's domain and the special ones, on every coordinate and on one alone."""
    g = torch.Generator().manual_seed(7)
    random = torch.randn(10, *shape, generator=g, dtype=torch.float64) * 2
    every = torch.tensor(SPECIAL, dtype=torch.float64).view(-1, *[1] * len(shape)).expand(-1, *shape)
    mixed = torch.randn(len(SPECIAL), *shape, generator=g, dtype=torch.float64)
    mixed.reshape(len(SPECIAL), -1)[:, 0] = torch.tensor(SPECIAL, dtype=torch.float64)
    x = torch.cat((random, every, mixed))
    if "x: Positive" in case.text:
        x = x.abs().clamp_min(1e-6)
    if "x: Unit" in case.text:
        x = torch.sigmoid(x.clamp(-14, 14))
    if interval := re.search(r"x: Interval\((.*), (.*)\)\[", case.text):
        lo, hi = (eval(t, {}) for t in interval.groups())
        x = lo + (hi - lo) * torch.sigmoid(x.clamp(-14, 14))
    if "x: Torus" in case.text:
        x = torch.remainder(x + math.pi, 2 * math.pi) - math.pi
    return x.to(dtype)


def given(flow: fl.Flow, n: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(8)
    return {k: torch.randn(n, *s, generator=g, dtype=torch.float64).to(dtype) for k, s in flow.given_shapes.items()}


def jacobian(flow: fl.Flow, x: Tensor, c: dict[str, Tensor]) -> Tensor:
    x = x.clone().requires_grad_()
    z = torch.cat([part.flatten(1) for part in flow(x, **c)[:-1]], -1)
    rows = [torch.autograd.grad(z[:, k].sum(), x, retain_graph=True)[0].flatten(1) for k in range(z.shape[1])]
    return torch.stack(rows, 1)


def condition(j: Tensor) -> Tensor:
    values = torch.linalg.svdvals(j)
    return (values[:, 0] / values[:, -1]).clamp_min(1)


@cache
def facts(case: Case) -> dict[str, object]:
    return next(d for d in fl.info(case.text) if d["kind"] == "flow")


def estimated(case: Case) -> bool:
    return facts(case)["exactness"] != "exact"


def test_no_bijector_is_left_out() -> None:
    from flowlang.catalogue import entries

    tested = {c.name.split("(")[0] for c in CASES} | set(ELSEWHERE)
    assert {e["name"] for e in entries() if e["kind"] == "bijector"} == tested


@each
def test_round_trip(case: Case) -> None:
    flow = compiled(case)
    x = points(case, flow.data_shape)
    c = given(flow, len(x))
    with torch.no_grad():
        back = flow.inverse(*flow(x, **c)[:-1], **c)[0]
    scale = (1 + x.abs()).flatten(1).amax(1) * condition(jacobian(flow, x, c))
    worst = ((back - x).abs().flatten(1).amax(1) / scale).max()
    exact = facts(case)["inverse"] in ("analytic",) or str(facts(case)["inverse"]).startswith("scan")
    assert worst <= (1e-9 if exact else 1e-7)


@each
def test_round_trip_in_float32(case: Case) -> None:
    flow = compiled(case)
    x = points(case, flow.data_shape)
    scale = (1 + x.abs()).flatten(1).amax(1) * condition(jacobian(flow, x, given(flow, len(x))))
    single = copy.deepcopy(flow).float()
    y, c = x.float(), given(flow, len(x), torch.float32)
    if "x: Unit" in case.text or "x: Interval" in case.text:  # 1 - 1e-6 has too few digits left: a side that saturates
        keep = (y - 0.5).abs().flatten(1).amax(1) < 0.499
        y, scale, c = y[keep], scale[keep], {k: v[keep] for k, v in c.items()}
    with torch.no_grad():
        back = single.inverse(*single(y, **c)[:-1], **c)[0]
    error = (back - y).abs()
    if "Torus" in case.text:
        error = torch.minimum(error, 2 * math.pi - error)
    assert (error.flatten(1).amax(1) / scale).max() <= 1e-5


@each
def test_log_det_is_that_of_the_jacobian(case: Case) -> None:
    flow = compiled(case)
    x = points(case, flow.data_shape)
    c = given(flow, len(x))
    wanted = torch.linalg.slogdet(jacobian(flow, x, c))[1]
    if estimated(case):
        torch.manual_seed(0)
        runs = torch.stack([flow(x, **c)[-1].detach() for _ in range(400)])
        errors = (runs.mean(0) - wanted).abs() / (runs.std(0) / math.sqrt(len(runs)) + 1e-9)
        assert errors.max() <= 4
        return
    with torch.no_grad():
        z_and_log_det = flow(x, **c)
        back = flow.inverse(*z_and_log_det[:-1], **c)[1]
    assert ((z_and_log_det[-1] - wanted).abs() / wanted.abs().clamp_min(1)).max() <= 1e-8
    # The inverse's own value, away from kinks, where rounding may take it to the other side.
    scale = wanted.abs().clamp_min(1) * condition(jacobian(flow, x, c))
    assert ((z_and_log_det[-1] + back).abs() / scale)[:10].max() <= 1e-8


def pattern(relation: Relation | None, count: int) -> Tensor:
    """The entries that a relation allows, as a matrix of result by entry coordinates."""
    if relation is None:
        return torch.zeros(count, count, dtype=torch.bool)
    rows, cols = [a.size for a in relation.rows], [a.size for a in relation.cols]
    out = torch.zeros(*rows, *cols, dtype=torch.bool)
    for part in relation.parts:
        allowed = torch.ones_like(out)
        for (r, c), found in part:
            m = torch.tensor([[found.has(i, j) for j in range(found.m)] for i in range(found.n)])
            shape = [1] * (len(rows) + len(cols))
            if r is not None:
                shape[[a.name for a in relation.rows].index(r)] = found.n
            if c is not None:
                shape[len(rows) + [a.name for a in relation.cols].index(c)] = found.m
            allowed &= m.reshape(shape)
        out |= allowed
    return out.reshape(math.prod(rows), math.prod(cols))


@each
def test_claimed_structure_is_the_jacobians(case: Case) -> None:
    comp = analyse(case.text, sized=True)
    region = comp.regions["f"]
    if len(region.outputs) != 1:
        return
    relation = Dependence(region.graph, region.inputs[0], comp.analyses.summaries).of(region.outputs[0])
    flow = compiled(case)
    x = points(case, flow.data_shape)
    found = (jacobian(flow, x, given(flow, len(x))) != 0).any(0)
    claimed = pattern(relation, found.shape[0])
    assert not (found & ~claimed).any()
    assert (claimed & ~found).sum() == 0 or claimed.all()


@each
def test_gradients_are_finite_everywhere(case: Case) -> None:
    """Far outside the boxes, at the joints, and on branches that are not taken."""
    flow = compiled(case)
    x = points(case, flow.data_shape)
    if "x: R[" in case.text:
        x = torch.cat((x, torch.full_like(x[:2], 1e4), torch.full_like(x[:2], -1e4)))
    x.requires_grad_()
    parameters = list(flow.parameters())
    torch.manual_seed(0)
    density = flow.log_prob(x, **given(flow, len(x)))
    assert torch.isfinite(density).all()
    for gradient in torch.autograd.grad(density.sum(), [x, *parameters], allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


@each
def test_a_training_step_does_not_raise_the_loss(case: Case) -> None:
    flow = fl.compile(case.text, seed=0)
    x = points(case, flow.data_shape, torch.float32)[:10]
    c = given(flow, 10, torch.float32)
    flow.eval()
    if not any(p.requires_grad for p in flow.parameters()):
        return
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-4)
    torch.manual_seed(0)
    before = -flow.log_prob(x, **c).mean()
    before.backward()
    optimizer.step()
    torch.manual_seed(0)
    after = -flow.log_prob(x, **c).mean()
    assert torch.isfinite(after)
    assert after <= before + 1e-4 * (1 + before.abs())
