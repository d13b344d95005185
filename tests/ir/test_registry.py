"""Every op of the registry against what its rules claim: numbers, shapes, bounds, slopes, inverses, determinants.

References are independent of the rules and of the generated code: tests/interpreter.py in float64, mpmath with
60 digits for elementwise functions, autograd for Jacobians, and plain perturbation for dependence.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mpmath
import pytest
import torch
from flowlang.backends.torch.emit import EMITTERS
from flowlang.backends.torch.native import BY_HAND, TITLES
from torch import Tensor

from flowlang.derive.jvp import tangent
from flowlang.ir.build import Builder
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Graph, Node
from flowlang.ir.interval import Interval, point
from flowlang.ir.ops import OPS, control
from flowlang.ir.ops.base import NoTangent
from flowlang.ir.relation import Matrix, Relation, Support
from flowlang.ir.types import TensorType
from tests.interpreter import evaluate
from tests.ir.cases import CASES, UNARY, Bench, Case, bench

LEAVES = {"input", "param", "state", "const", "index"}
# Ops that run other graphs; test_programs.py compares them with the interpreter.
CONTROL = {op.name for op in control.OPS}
# Moving a value about costs no arithmetic.
FREE = LEAVES | {
    "identity", "within", "stop", "surrogate", "slice", "pick", "join", "stack", "reverse", "shift", "permute", "rename", "order", "split", "merge",
    "expand", "gather",
}  # fmt: skip
RULES = ("interval", "jvp", "invert", "lipschitz")
by_case = pytest.mark.parametrize("case", CASES, ids=str)


@cache
def made(index: int) -> Bench:
    return bench(CASES[index])


def of(case: Case) -> Bench:
    return made(next(k for k, c in enumerate(CASES) if c is case))


# ---- completeness -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_rule_is_there_or_says_why_not(name: str) -> None:
    op = OPS[name]
    for rule in RULES:
        if getattr(op, rule) is None:
            why = op.why_not.get(rule, "")
            assert len(re.findall(r"\w{2,}", why)) >= 2, f"{name} has no `{rule}` and does not say why"
        else:
            assert rule not in op.why_not, f"{name} has `{rule}` and says why it has none"
    assert set(op.why_not) <= {*RULES, "infer", "depend"}
    assert (op.invert is None) == (op.needs is None) == (op.log_det is None), "invert, needs and log_det go together"


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_has_a_torch_emitter(name: str) -> None:
    assert name in EMITTERS, name


def test_every_emitter_belongs_to_an_op() -> None:
    """Or to what takes the place of several ops: a kernel of torch or a function of the runtime (backends/torch/native.py)."""
    native = {*TITLES, *BY_HAND}
    assert set(EMITTERS) - native <= set(OPS)
    assert not native & set(OPS)


def test_every_op_has_a_case() -> None:
    # Statistics of the batch are no function of one sample: tests/library/test_linear.py has them.
    pooled = {op.name for op in OPS.values() if op.pools}
    assert set(OPS) - {c.op for c in CASES} - CONTROL - LEAVES - pooled == set()


@by_case
def test_arithmetic_costs_something(case: Case) -> None:
    b = of(case)
    cost = OPS[case.op].cost(b.node, b.types())
    assert cost == 0 if case.op in FREE else cost > 0


# ---- numbers ------------------------------------------------------------------------------------


@by_case
def test_torch_agrees_with_the_reference(case: Case) -> None:
    b = of(case)
    operands = [o for o in case.operands if o.param is None]
    for values in b.samples(1, 6):
        wanted = b.value(values)
        assert tuple(wanted.shape) == b.node.tensor.shape
        if case.op == "index":
            got = b.run()
        else:
            inputs = [v.expand(2, 1, *v.shape) if o.batched else v for o, v in zip(operands, values, strict=True)]
            got = b.run(*inputs)
            if b.node.batched:
                assert got.shape == (2, 1, *b.node.tensor.shape)
                got = got[1, 0]
        assert tuple(got.shape) == b.node.tensor.shape
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-9, atol=1e-12, equal_nan=True)


@by_case
def test_float32_agrees_with_float64(case: Case) -> None:
    b = of(case)
    if any(o.param is not None for o in case.operands) or case.op in (
        "floor",
        "whole_part",
        "fraction_part",
        "round",
        "mod",
        "eq",
        "ne",
        "lt",
        "gt",
        "le",
        "ge",
    ):
        return  # decided by the last digit, or by a factorisation whose condition is not the op's
    operands = [o for o in case.operands if o.param is None]
    values = next(iter(b.samples(5, 1)))
    low = [v.float() if v.is_floating_point() else v for v in values]
    wanted = b.value([v.double() if v.is_floating_point() else v for v in low])
    if case.op == "index":
        return
    got = b.module.float()._forward(*(v.unsqueeze(0) if o.batched else v for o, v in zip(operands, low, strict=True)))
    b.module.double()
    if got.is_floating_point() and case.op not in ("index",):
        assert got.dtype == torch.float32
    got = got[0] if b.node.batched else got
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2e-4, atol=2e-5, equal_nan=True)


mp = mpmath.mp.clone()
mp.dps = 60
EXACT: dict[str, Callable[[Any], Any]] = {
    "neg": lambda x: -x, "exp": mp.exp, "log": mp.log, "log_abs": lambda x: mp.log(abs(x)), "log1p": lambda x: mp.log(1 + x),
    "expm1": lambda x: mp.exp(x) - 1, "sqrt": mp.sqrt, "square": lambda x: x * x, "abs": abs, "sign": mp.sign,
    "reciprocal": lambda x: 1 / x, "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "atan": mp.atan, "sinh": mp.sinh, "cosh": mp.cosh,
    "log_cosh": lambda x: mp.log(mp.cosh(x)), "asinh": mp.asinh, "tanh": mp.tanh, "tanh_slope": lambda x: 1 - mp.tanh(x) ** 2,
    "log_tanh_slope": lambda x: mp.log(1 - mp.tanh(x) ** 2), "atanh": mp.atanh, "sigmoid": lambda x: 1 / (1 + mp.exp(-x)),
    "sigmoid_slope": lambda x: mp.exp(-x) / (1 + mp.exp(-x)) ** 2,
    "log_sigmoid_slope": lambda x: mp.log(mp.exp(-x) / (1 + mp.exp(-x)) ** 2),
    "log_sigmoid": lambda x: -mp.log(1 + mp.exp(-x)), "logit": lambda x: mp.log(x / (1 - x)),
    "softplus": lambda x: mp.log(1 + mp.exp(x)), "softplus_inverse": lambda x: mp.log(mp.exp(x) - 1), "erf": mp.erf,
    "erfinv": mp.erfinv, "relu": lambda x: max(x, mp.mpf(0)), "silu": lambda x: x / (1 + mp.exp(-x)),
    "gelu": lambda x: x * mp.ncdf(x), "floor": mp.floor, "whole_part": mp.floor, "fraction_part": lambda x: x - mp.floor(x), "round": mp.nint, "stop": lambda x: x, "asin": mp.asin, "acos": mp.acos,
    "lgamma": mp.loggamma, "log_bessel_i0e": lambda x: mp.log(mp.besseli(0, x)) - abs(x),
    "selu": lambda x: mp.mpf(1.0507009873554805) * (x if x > 0 else mp.mpf(1.6732632423543772) * (mp.exp(x) - 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.op in UNARY], ids=str)
def test_elementwise_is_right_to_the_last_digits(case: Case) -> None:
    b = of(case)
    values = torch.cat([s[0].reshape(-1) for s in b.samples(2, 2)])
    got = b.module._forward(values[:16].unsqueeze(0))[0]
    for x, y in zip(values[:16].tolist(), got.tolist(), strict=True):
        exact = EXACT[case.op](mp.mpf(x))
        # A rounding of the operand alone moves the value by this much.
        slope = (
            abs(mp.diff(EXACT[case.op], mp.mpf(x)))
            if case.op
            not in ("floor", "whole_part", "fraction_part", "round", "sign", "relu", "abs", "selu", "log_bessel_i0e")
            else 1
        )
        # Log-slopes near 0 are sums that nearly cancel: what counts in a log-det is their absolute error.
        floor = 2**-50 if case.op in ("log_cosh", "log_tanh_slope", "log_bessel_i0e") else 0
        allowed = floor + 8 * 2**-53 * (abs(exact) + slope * abs(mp.mpf(x))) + mp.mpf(10) ** -300
        assert abs(mp.mpf(y) - exact) <= allowed, f"{case.op}({x!r}) = {y!r}, and {mp.nstr(exact, 20)} is right"


# ---- bounds, zeros, dependence ------------------------------------------------------------------


def interval_of(b: Bench, k: int) -> Interval:
    o = b.case.operands[k]
    return o.param.interval if o.param is not None else o.interval


@by_case
def test_interval_holds_every_value(case: Case) -> None:
    b, op = of(case), OPS[case.op]
    if op.interval is None:
        return
    bound = op.interval([interval_of(b, k) for k in range(len(case.operands))], b.types(), b.node)
    for values in b.samples(3, 8):
        found = b.value(values).double().reshape(-1)
        assert not torch.isnan(found).any()
        slack = 1e-9 * (1 + found.abs())
        assert bool(((found >= bound.lo - slack) & (found <= bound.hi + slack)).all()), f"{found} not in {bound}"
        # And around the values that were given alone.
        parts = [hull(v) for v in b.operand_values(values)]
        tight = op.interval(parts, b.types(), b.node)
        assert bool(((found >= tight.lo - slack) & (found <= tight.hi + slack)).all()), f"{found} not in {tight}"


def hull(v: Tensor) -> Interval:
    low, high = float(v.double().min()), float(v.double().max())
    return point(low) if low == high else Interval(low, high)


@pytest.mark.parametrize("case", [c for c in CASES if c.op in UNARY], ids=str)
def test_interval_is_not_too_wide_at_a_point(case: Case) -> None:
    """A function of one number maps a point to a point, but for rounding: else bounds cannot be refined."""
    b, op = of(case), OPS[case.op]
    assert op.interval is not None
    if case.op in ("floor", "whole_part", "fraction_part", "round", "sign", "erfinv", "lgamma", "tan", "acos", "stop"):
        return
    for x in b.samples(4, 1)[0][0].tolist():
        found = op.interval([point(x)], b.types(), b.node)
        assert found.hi - found.lo <= 1e-6 * (1 + abs(found.lo)) or math.isinf(found.hi), f"{case.op}({x}) in {found}"


def indices(t: TensorType) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(n) for n in t.shape)))


def related(relation: Relation, row: Sequence[int], col: Sequence[int]) -> bool:
    at = dict(zip((a.name for a in relation.rows), row, strict=True))
    to = dict(zip((a.name for a in relation.cols), col, strict=True))

    def holds(key: tuple[str | None, str | None], m: Matrix) -> bool:
        r, c = key
        return m.has(at[r] if r is not None else 0, to[c] if c is not None else 0)

    return any(all(holds(k, m) for k, m in part) for part in relation.parts)


def supports_of(b: Bench) -> list[Support | None]:
    out: list[Support | None] = []
    for i in b.node.inputs:
        rule = OPS[b.graph[i].op].support
        out.append(rule(b.graph[i], [], []) if rule is not None else None)
    return out


@by_case
def test_dependence_holds_the_pattern_of_change(case: Case) -> None:
    b, op = of(case), OPS[case.op]
    for slot, o in enumerate(case.operands):
        if o.param is not None:
            continue
        relation = op.depend(b.node, b.types(), slot, supports_of(b))
        where = [k for k, p in enumerate(case.operands) if p.param is None].index(slot)
        base, other = b.samples(6, 2)
        rows, cols = [base], indices(o.type)[:24]
        for col in cols:
            moved = [v.clone() for v in base]
            moved[where][col] = other[where][col]
            if o.type.kind != "bool":
                moved[where][col] = other[where][col] if other[where][col] != base[where][col] else base[where][col] / 2
            rows.append(moved)
        before, *after = b.values(rows)
        for col, now in zip(cols, after, strict=True):
            for row in itertools.compress(indices(b.node.tensor), moved_places(now, before)):
                assert related(relation, row, col), f"{case}: result {row} changes with operand {slot} {col}"


def moved_places(now: Tensor, before: Tensor) -> list[bool]:
    """Which entries changed, rounding of vectorised functions aside."""
    return (~torch.isclose(now.double(), before.double(), rtol=1e-12, atol=1e-14, equal_nan=True)).reshape(-1).tolist()


@by_case
def test_support_holds_every_nonzero_value(case: Case) -> None:
    b, op = of(case), OPS[case.op]
    if op.support is None:
        return
    for given in ([None] * len(case.operands), supports_of(b)):
        found = op.support(b.node, b.types(), given)
        if found is None:
            continue
        for values in b.samples(8, 2):
            value = b.value(values)
            for place in indices(b.node.tensor):
                at = dict(zip(b.node.tensor.names, place, strict=True))
                inside = all(m.has(at[r or ""], at[c] if c is not None else 0) for (r, c), m in found.parts)
                assert inside or value[place] == 0


def test_support_of_a_masked_operand_is_kept() -> None:
    """Rules that pass a support on: the operand is zero outside it, and so is the result."""
    lower = Support.of({("T", "D"): Matrix(3, 4, (0b1, 0b11, 0b111))})
    zero = torch.tril(torch.ones(3, 4, dtype=torch.float64))
    for case in CASES:
        op = OPS[case.op]
        if op.support is None or not case.operands or case.operands[0].type != TensorType.of(("T", 3), ("D", 4)):
            continue
        b = of(case)
        found = op.support(b.node, b.types(), [lower] + [None] * (len(case.operands) - 1))
        if found is None:
            continue
        values = b.samples(9, 1)[0]
        values[0] = values[0] * zero
        value = b.value(values)
        for place in indices(b.node.tensor):
            at = dict(zip(b.node.tensor.names, place, strict=True))
            inside = all(m.has(at[r or ""], at[c] if c is not None else 0) for (r, c), m in found.parts)
            assert inside or value[place] == 0, f"{case} {place}"


# ---- slopes -------------------------------------------------------------------------------------

SMOOTH = [c for c in CASES if OPS[c.op].jvp is not None]


def partial(b: Bench, values: list[Tensor], slot: int) -> Tensor:
    """The Jacobian of the result in one operand, by autograd through the interpreter: [results, operands]."""
    operands = b.operand_values(values)

    def f(v: Tensor) -> Tensor:
        env = {i: (v if k == slot else operands[k]) for k, i in enumerate(b.node.inputs)}
        return evaluate(b.graph, env, b.parameters, [b.node.id], b.analyses)[0]

    j = torch.autograd.functional.jacobian(f, operands[slot])
    assert isinstance(j, Tensor)
    return j.reshape(b.node.tensor.count, max(operands[slot].numel(), 1))


def program(b: Bench) -> tuple[Builder, dict[int, int]]:
    """A fresh graph with the operands and the result as inputs, in which rules may build."""
    builder = Builder(Graph())
    env = {}
    for i in (*dict.fromkeys(b.node.inputs), b.node.id):
        n = b.graph[i]
        if n.op == "param":
            env[i] = builder.copy(n, [])
        else:
            env[i] = builder.leaf("input", n.type, batched=True, name=f"v{i}", role="map")
    return builder, env


def fill(b: Bench, env: dict[int, int], values: list[Tensor]) -> dict[int, Tensor]:
    operands = b.operand_values(values)
    known = {env[i]: v for i, v in zip(b.node.inputs, operands, strict=True)}
    known[env[b.node.id]] = b.value(values)
    return known


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_jvp_is_the_derivative(case: Case) -> None:
    b, op = of(case), OPS[case.op]
    assert op.jvp is not None
    for slot, o in enumerate(case.operands):
        if o.type.kind != "real":
            continue
        builder, env = program(b)
        t = builder.leaf("input", o.type, batched=True, name="t", role="map")
        try:
            found = op.jvp(builder, b.node, [env[i] for i in b.node.inputs], env[b.node.id], slot, t)
        except NoTangent:
            assert slot, f"{case.op} has a rule for none of its operands"
            continue
        g = torch.Generator().manual_seed(11)
        for values in b.samples(12, 4):
            direction = torch.randn(o.type.shape, generator=g, dtype=torch.float64)
            wanted = (partial(b, values, slot) @ direction.reshape(-1)).reshape(b.node.tensor.shape)
            if found is None:
                assert not wanted.any()
                continue
            assert builder.type(found).axes == b.node.tensor.axes, "the tangent has the type of the result"
            known = {**fill(b, env, values), t: direction}
            got = evaluate(builder.graph, known, b.parameters, [found])[0]
            at_kink = kinks(case, b.operand_values(values), wanted)
            torch.testing.assert_close(got[~at_kink], wanted[~at_kink], rtol=1e-9, atol=1e-9)


def kinks(case: Case, operands: Sequence[Tensor], like: Tensor) -> Tensor:
    """Where the derivative is one-sided: any value between is right there."""
    if case.op in ("relu", "leaky_relu", "abs", "selu", "elu", "log_abs"):
        return operands[0] == 0
    if case.op in ("min", "max"):
        return torch.ones_like(like, dtype=torch.bool) if any((a == c).any() for a in operands[0].reshape(-1) for c in operands[1].reshape(-1)) else torch.zeros_like(like, dtype=torch.bool)  # fmt: skip
    return torch.zeros_like(like, dtype=torch.bool)


@by_case
def test_lipschitz_bounds_every_slope(case: Case) -> None:
    b, op = of(case), OPS[case.op]
    if op.lipschitz is None:
        return
    ivs = [interval_of(b, k) for k in range(len(case.operands))]
    for slot, o in enumerate(case.operands):
        if o.type.kind != "real" or o.param is not None:
            continue
        constant = op.lipschitz(b.node, b.types(), slot, ivs)
        if constant is None:
            continue
        for values in b.samples(13, 4):
            norm = float(torch.linalg.matrix_norm(partial(b, values, slot), ord=2))
            assert norm <= constant * (1 + 1e-9), f"{case} operand {slot}: slope {norm} above {constant}"


@by_case
def test_continuity_claims_hold(case: Case) -> None:
    """Along a segment between two samples, finer steps make smaller jumps where an op says it is continuous."""
    b, op = of(case), OPS[case.op]
    for slot, o in enumerate(case.operands):
        if o.type.kind != "real" or o.param is not None or not op.continuous(slot) or case.op.endswith("_log_slope"):
            continue  # log-slopes of splines jump at knots; they are never asked for continuity
        where = [k for k, p in enumerate(case.operands) if p.param is None].index(slot)
        first, second = b.samples(14, 2)

        def line(
            low: float, high: float, first: list[Tensor] = first, second: list[Tensor] = second, where: int = where
        ) -> list[float]:
            rows = []
            for s in torch.linspace(low, high, 9, dtype=torch.float64).tolist():
                now = list(first)
                now[where] = torch.lerp(first[where], second[where], s)
                rows.append(now)
            return b.values(rows).double().reshape(9, -1).diff(dim=0).abs().amax(1).tolist()

        low, high = 0.0, 1.0
        jumps = line(low, high)
        whole = max(jumps)
        for _ in range(14):  # into the steepest piece, again and again: a jump stays, a slope shrinks
            k = max(range(8), key=jumps.__getitem__)
            low, high = low + (high - low) * k / 8, low + (high - low) * (k + 1) / 8
            jumps = line(low, high)
        assert max(jumps) <= 1e-3 * whole, f"{case} operand {slot}: {whole} -> {max(jumps)}"


# ---- inverses and determinants ------------------------------------------------------------------


class CaseFacts:
    def __init__(self, b: Bench):
        self.b = b

    def interval(self, node: int) -> Interval:
        n = self.b.graph[node]
        domain = n.attrs.get("domain")
        return domain.interval if isinstance(domain, Domain) else Interval(-math.inf, math.inf, True, True)

    def node(self, node: int) -> Node:
        return self.b.graph[node]


def solvable(b: Bench, slot: int) -> bool:
    """Whether the search would solve for that operand: it has every axis of the result (A3), and the rule's needs hold."""
    if OPS[b.case.op].elementwise and set(b.node.tensor.names) - set(b.case.operands[slot].type.names):
        return False
    needs = OPS[b.case.op].needs
    assert needs is not None
    found = needs(b.node, slot, CaseFacts(b))
    if isinstance(found, str):
        assert len(found.split()) >= 3
        return False
    return all(n.holds(CaseFacts(b).interval(b.node.inputs[n.slot])) for n in found)


INVERTIBLE = [c for c in CASES if OPS[c.op].invert is not None]


def condition(j: Tensor) -> float:
    s = torch.linalg.svdvals(j)
    return float(s[0] / s[-1].clamp_min(1e-300))


@pytest.mark.parametrize("case", INVERTIBLE, ids=str)
def test_invert_goes_back_and_log_det_is_the_jacobian(case: Case) -> None:
    b, op = of(case), OPS[case.op]
    assert op.invert is not None
    assert op.log_det is not None
    for slot, o in enumerate(case.operands):
        if o.param is not None or not solvable(b, slot):
            continue
        assert b.node.tensor.count == o.type.count, "a solved operand has the dimension of the result"
        builder, env = program(b)
        arguments: list[int | None] = [None if k == slot else env[i] for k, i in enumerate(b.node.inputs)]
        back = op.invert(builder, b.node, slot, arguments, env[b.node.id])
        if builder.type(back).names != o.type.names:
            back = builder.op("order", back, names=o.type.names)
        assert builder.type(back).axes == o.type.axes
        local = op.log_det(builder, b.node, slot, [env[i] for i in b.node.inputs], env[b.node.id])
        for values in b.samples(15, 5):
            known = fill(b, env, values)
            jacobian = partial(b, values, slot)
            size = condition(jacobian)
            if not math.isfinite(size) or size > 1e8:
                continue  # saturated in float64
            x = b.operand_values(values)[slot]
            got = evaluate(builder.graph, known, b.parameters, [back])[0]
            error = float((got - x).abs().max())
            assert error <= 1e-9 * (1 + float(x.abs().max())) * max(size, 1), f"{case}: {error} at condition {size}"
            wanted = float(torch.linalg.slogdet(jacobian)[1])
            total = 0.0
            if local.value is not None:
                rest = [a for a in o.type.axes if a.name not in local.consumed]
                total_id = builder.total(local.value, rest)
                total = float(evaluate(builder.graph, known, b.parameters, [total_id])[0])
            assert abs(total - wanted) <= 1e-8 * (1 + abs(wanted)), f"{case}: {total} and slogdet {wanted}"


def test_enough_ops_are_inverted() -> None:
    """The test above must not pass by skipping: every op with a rule is inverted in some case."""
    done = {c.op for c in INVERTIBLE for s, o in enumerate(c.operands) if o.param is None and solvable(of(c), s)}
    assert {c.op for c in INVERTIBLE} - done == set()


def test_tangent_through_a_graph_is_the_chain_rule() -> None:
    b = Builder(Graph())
    x = b.leaf("input", TensorType.of(("D", 5)), batched=True, name="x", role="map")
    y = b.add(b.op("tanh", b.mul(x, b.const(1.3))), b.mul(b.op("softplus", x), b.op("exp", b.op("sin", x))))
    env = {n.id: n.id for n in b.graph}
    path = set(range(x, y + 1))
    slope = tangent(b, b.graph, env, path, x, y)
    assert slope is not None
    value = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def f(v: Tensor) -> Tensor:
        return evaluate(b.graph, {x: v}, {}, [y])[0]

    jacobian = torch.autograd.functional.jacobian(f, value)
    assert isinstance(jacobian, Tensor)
    torch.testing.assert_close(
        evaluate(b.graph, {x: value}, {}, [slope])[0], jacobian.diagonal(), rtol=1e-12, atol=1e-12
    )
