"""A second, independent meaning of graphs and programs: a direct evaluation in torch, float64.

It shares nothing with the generated code; the tests compare the two. Values are those of one sample
(no batch dims). Parameters are given by name; under a child's name stand those of each of its copies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowlang.derive.analyse import Analyses
from flowlang.derive.programs import Program, is_map
from flowlang.ir.graph import Graph, Node, Region, result_types
from flowlang.ir.ops.splines import bin_axis, kind_of, numbers_of
from flowlang.ir.types import TensorType
from tests.splines import CURVES, spline, spline_inverse, spline_log_slope

Parameters = Mapping[str, Any]

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x,
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "sqrt": torch.sqrt,
    "square": lambda x: x * x,
    "abs": torch.abs,
    "sign": torch.sign,
    "reciprocal": lambda x: 1 / x,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "asinh": torch.asinh,
    "tanh": torch.tanh,
    "atanh": torch.atanh,
    "atan": torch.atan,
    "sigmoid": torch.sigmoid,
    "logit": lambda x: torch.log(x / (1 - x)),
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "softplus_inverse": lambda x: torch.where(x > 30, x, torch.log(torch.expm1(x.clamp_max(30)))),
    "log_sigmoid": lambda x: -torch.logaddexp(-x, torch.zeros_like(x)),
    "relu": lambda x: x.clamp_min(0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "selu": lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * torch.expm1(x)),
    "erf": torch.erf,
    "erfinv": torch.erfinv,
    "floor": torch.floor,
    "whole_part": torch.floor,
    "fraction_part": lambda x: x - torch.floor(x),
    "round": torch.round,
    "tanh_slope": lambda x: 1 / torch.cosh(x) ** 2,
    "sigmoid_slope": lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
    "log_cosh": lambda x: torch.logaddexp(x, -x) - math.log(2),
    "identity": lambda x: x,
    "within": lambda x: x,
    "stop": lambda x: x.detach(),
    "asin": torch.asin,
    "acos": torch.acos,
    "lgamma": torch.lgamma,
    "not": torch.logical_not,
    "log_abs": lambda x: torch.log(x.abs()),
    "log_bessel_i0e": lambda x: torch.log(torch.special.i0e(x)),
    "log_tanh_slope": lambda x: 2 * (math.log(2) - torch.logaddexp(x, -x)),
    "log_sigmoid_slope": lambda x: -torch.logaddexp(x, torch.zeros_like(x)) - torch.logaddexp(-x, torch.zeros_like(x)),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
    "mod": torch.remainder,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "rotate": lambda a, b: torch.remainder(a + b + math.pi, 2 * math.pi) - math.pi,
    "and": torch.logical_and,
    "or": torch.logical_or,
}


def align(x: Tensor, have: TensorType, want: TensorType) -> Tensor:
    """Axes by name into the wanted order, missing ones of size 1."""
    names = list(have.names)
    order = [names.index(n) for n in want.names if n in names]
    x = x.permute(order)
    shape = [have.size(n) if n in names else 1 for n in want.names]
    return x.reshape(shape)


def evaluate(
    graph: Graph,
    values: Mapping[int, Tensor],
    parameters: Parameters,
    wanted: Sequence[int],
    analyses: Analyses | None = None,
) -> list[Tensor]:
    """Values of nodes for one sample (no batch dims). `analyses` gives the programs of called maps."""
    env: dict[int, Any] = dict(values)
    for n in sorted(graph.reachable(list(wanted))):
        if n in env:
            continue
        env[n] = one(graph, graph[n], env, parameters, analyses)
    return [env[w] for w in wanted]


def run(
    program: Program,
    inputs: Sequence[Tensor],
    parameters: Parameters,
    analyses: Analyses,
    noise: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """The results of a program of `flowlang.derive.programs`."""
    values = {**dict(zip(program.inputs, inputs, strict=True)), **(noise or {})}
    return evaluate(program.graph, values, parameters, program.outputs, analyses)


def parameters_of(region: Region, module: nn.Module) -> dict[str, Any]:
    """The parameter values of a generated module, nested as the region's children are."""
    out: dict[str, Any] = {}
    for node in region.graph:
        if node.op in ("param", "state"):
            held = getattr(module, node.attrs["name"])
            out[node.attrs["name"]] = (held() if isinstance(held, nn.Module) else held).detach()
    for child in region.children.values():
        held = getattr(module, child.name)
        copies = held if isinstance(held, nn.ModuleList) else [held]
        out[child.name] = [parameters_of(child.region, m) for m in copies]
    return out


def one(graph: Graph, node: Node, env: Mapping[int, Any], parameters: Parameters, analyses: Analyses | None) -> Any:
    a = node.attrs
    x = [env[i] for i in node.inputs]
    if node.op == "get":
        return x[0][a["index"]]
    t = [graph[i].tensor for i in node.inputs]
    if node.op in ("call", "repeat") and analyses is None:
        return called(node, x, parameters[a["child"]])
    if node.op in ("call", "repeat"):
        assert analyses is not None
        return call(node, t, x, parameters, analyses)
    if "body" in a:
        assert analyses is not None
        return solve(node, x, parameters, analyses)
    out = node.tensor
    if node.op == "const":
        return torch.tensor(a["value"], dtype=torch.float64)
    if node.op in ("param", "state"):
        return parameters[a["name"]]
    if node.op in UNARY:
        return UNARY[node.op](x[0])
    if node.op in BINARY:
        return BINARY[node.op](align(x[0], t[0], out), align(x[1], t[1], out))
    base = kind_of(node.op)
    if base in CURVES:
        function = {base: spline, f"{base}_inverse": spline_inverse, f"{base}_log_slope": spline_log_slope}[node.op]
        bins = [bin_axis(t[0], s, a) for s in t[1:]]
        wide = [
            align(v, s, TensorType((*out.axes, k))) for v, s, k in zip(x[1:], t[1:], bins, strict=True) if k is not None
        ]
        return function(base, align(x[0], t[0], out).expand(out.shape), wide, numbers_of(node))
    return shaped(node, t, x)


def shaped(node: Node, t: Sequence[TensorType], x: Sequence[Tensor]) -> Tensor:
    """Reductions, moves and matrices."""
    a, out = node.attrs, node.tensor

    def dim(axis: str, k: int = 0) -> int:
        return t[k].position(axis)

    match node.op:
        case "leaky_relu":
            return torch.where(x[0] > 0, x[0], a["slope"] * x[0])
        case "elu":
            return torch.where(x[0] > 0, x[0], a["alpha"] * torch.expm1(x[0]))
        case "clamp":
            return x[0].clamp(a["lo"], a["hi"])
        case "pow":
            return x[0] ** a["exponent"] if "exponent" in a else align(x[0], t[0], out) ** align(x[1], t[1], out)
        case "surrogate":
            value, gradient = (align(v.to(torch.float64), s, out) for v, s in zip(x, t, strict=True))
            return value.detach() + (gradient - gradient.detach())
        case "where":
            return torch.where(*(align(v, s, out) for v, s in zip(x, t, strict=True)))
        case "sum" | "mean":
            return getattr(x[0].double(), node.op)([dim(n) for n in a["axes"]])
        case "prod" | "any" | "all" | "argmax":
            front = [n for n in t[0].names if n not in a["axes"]]
            flat = x[0].permute([dim(n) for n in (*front, *a["axes"])]).flatten(len(front))
            return getattr(torch, node.op)(flat, -1)
        case "length":
            squares = x[0].square().sum([dim(n) for n in a["axes"]])
            some = (
                squares > 0
            )  # at 0 the slope of the square root is no number, and that of what it is multiplied with is
            return torch.where(some, torch.where(some, squares, 1).sqrt(), 0)
        case "normalize":
            return x[0] / x[0].square().sum([dim(n) for n in a["axes"]], keepdim=True).sqrt()
        case "var":
            return x[0].var([dim(n) for n in a["axes"]], correction=a.get("ddof", 0))
        case "logsumexp":
            top = x[0].amax([dim(n) for n in a["axes"]], keepdim=True).detach()
            return torch.log(torch.exp(x[0] - top).sum([dim(n) for n in a["axes"]])) + top.reshape(out.shape)
        case "logit_mixture":
            full = TensorType((*out.axes, next(k for k in t[0].axes if k.name == a["axis"])))
            p, z = align(x[0], t[0], full), align(x[1], t[1], full)
            u, rest = (torch.exp(p - p.amax(-1, True)) * torch.sigmoid(s * z) for s in (1, -1))
            return torch.log(u.sum(-1)) - torch.log(rest.sum(-1))
        case "reduce_max":
            return x[0].amax([dim(n) for n in a["axes"]])
        case "reduce_min":
            return -(-x[0]).amax([dim(n) for n in a["axes"]])
        case "softmax" | "log_softmax":
            z = x[0]
            if "causal" in a:
                i = torch.arange(t[0].size(a["axis"]))
                shape_q, shape_k = [1] * z.dim(), [1] * z.dim()
                shape_q[dim(a["causal"])], shape_k[dim(a["axis"])] = len(i), len(i)
                z = z.masked_fill(i.view(shape_k) > i.view(shape_q), -math.inf)
            return getattr(torch, node.op)(z, dim(a["axis"]))
        case "cumsum":
            d = dim(a["axis"])
            z = x[0].flip(d) if a.get("reverse") else x[0]
            n = z.shape[d]
            before = torch.ones(n, n, dtype=z.dtype).tril(-1 if a.get("exclusive") else 0)
            y = torch.tensordot(z, before, dims=([d], [1])).movedim(-1, d)
            return y.flip(d) if a.get("reverse") else y
        case "sort":
            return x[0].sort(dim(a["axis"])).values
        case "contract":
            names = [*out.names, *a["axes"]]
            wide = TensorType.of(*((n, next(s.size(n) for s in t if s.has(n))) for n in names))
            product = align(x[0], t[0], wide) * align(x[1], t[1], wide)
            return product.sum(list(range(out.rank, len(names))))
        case "slice":
            return x[0].narrow(dim(a["axis"]), a["start"], a["stop"] - a["start"])
        case "pick":
            return x[0].select(dim(a["axis"]), a["index"])
        case "join":
            return torch.cat(x, dim(a["axis"]))
        case "stack":
            return torch.stack(x, 0)
        case "reverse":
            return x[0].flip(dim(a["axis"]))
        case "shift":
            d, k = dim(a["axis"]), a["k"]
            y = torch.zeros_like(x[0])
            n = x[0].shape[d]
            if abs(k) < n:
                y.narrow(d, max(k, 0), n - abs(k)).copy_(x[0].narrow(d, max(-k, 0), n - abs(k)))
            return y
        case "permute":
            return x[0].index_select(dim(a["axis"]), torch.tensor(a["order"]))
        case "rename":
            return x[0]
        case "order":
            return x[0].permute([t[0].position(n) for n in a["names"]])
        case "split":
            shape = [
                s for axis in t[0].axes for s in ([v for _, v in a["into"]] if axis.name == a["axis"] else [axis.size])
            ]
            return x[0].reshape(shape)
        case "merge":
            return x[0].reshape(out.shape)
        case "expand":
            return align(x[0], t[0], out).expand(out.shape)
        case "index":
            return torch.arange(a["size"], dtype=torch.float64)
        case "diagonal":
            made = torch.diagonal(x[0], dim1=dim(a["row"]), dim2=dim(a["col"]))
            have = TensorType.of(
                *((n, t[0].size(n)) for n in t[0].names if n not in (a["row"], a["col"])), (a["row"], made.shape[-1])
            )
            return align(made, have, out)
        case "masked":
            rows, cols = torch.tensor(a["row_degrees"]).double(), torch.tensor(a["col_degrees"]).double()
            keep = rows[:, None] > cols[None] if a["strict"] else rows[:, None] >= cols[None]
            pair = TensorType.of((a["row"], len(rows)), (a["col"], len(cols)))
            return x[0] * align(keep.double(), pair, t[0])
        case "gather":
            return gather(x[0], t[0], x[1], t[1], a["axis"], out)
        case "conv" | "conv_transpose":
            return conv(node, t, x)
        case "max_pool" | "mean_pool":
            return pool(node, t[0], x[0])
        case "norm_bounded":
            front = [n for n in t[0].names if n not in a["axes"]]
            flat = (
                x[0].permute([dim(n) for n in (*front, *a["axes"])]).reshape(math.prod(t[0].size(n) for n in front), -1)
            )
            largest = torch.linalg.eigvalsh(flat @ flat.mT)[-1].clamp_min(0).sqrt()
            if len(x) > 1:
                largest = between(flat, float(largest), *(float(v) for v in x[1:])) * (1 + 1e-6)  # rounding
            return x[0] * min(a["bound"] / float(largest), 1.0)
        case "matrix_solve":
            return matrix_solve(x[0], t[0], x[1], t[1], a["axis"], a["given"], out)
        case "det":
            return torch.linalg.det(x[0].movedim((dim(a["row"]), dim(a["col"])), (-2, -1)))
        case "eigen":
            turned = x[0].movedim((dim(a["row"]), dim(a["col"])), (-2, -1))
            half = (turned + turned.mT) / 2
            made = torch.stack([of_eigenvalues(h, a) for h in half.reshape(-1, *half.shape[-2:])]).reshape(half.shape)
            return made.movedim((-2, -1), (dim(a["row"]), dim(a["col"])))
        case "matrix_log_det":
            return torch.linalg.slogdet(x[0])[1]
    raise NotImplementedError(node.op)


def of_eigenvalues(m: Tensor, a: Any) -> Tensor:
    """By the general solver, which knows no symmetry; the exponential by its series."""
    if a["function"] == "matrix_exp":
        found: Tensor = torch.linalg.matrix_exp(m)
        return found
    values, vectors = torch.linalg.eig(m)
    kept = values.real.clamp_min(a["floor"])
    inner = kept.log() if a["function"] == "matrix_log" else kept ** a["power"]
    return (vectors.real * inner) @ torch.linalg.inv(vectors.real)


def gather(x: Tensor, tx: TensorType, index: Tensor, ti: TensorType, axis: str, out: TensorType) -> Tensor:
    """out[.., i, ..] = x[axis = index[i]], entry by entry; axes that both have run together."""
    found = torch.zeros(out.shape, dtype=x.dtype)
    for place in itertools.product(*(range(n) for n in out.shape)):
        at = dict(zip(out.names, place, strict=True))
        at[axis] = int(index[tuple(at[n] for n in ti.names)])
        found[place] = x[tuple(at[n] for n in tx.names)]
    return found


def matrix_solve(
    w: Tensor, tw: TensorType, y: Tensor, ty: TensorType, axis: str, given: str, out: TensorType
) -> Tensor:
    """x with sum over `axis` of W * x = y, for each index of the other axes."""
    front = [n for n in ty.names if n != given]
    batch = [n for n in tw.names if n not in (axis, given)]
    w = w.permute([tw.position(n) for n in (*batch, given, axis)])
    w = align(w, TensorType.of(*((n, tw.size(n)) for n in (*batch, given, axis))), TensorType.of(*((n, (tw if tw.has(n) else ty).size(n)) for n in (*front, given, axis))))  # fmt: skip
    y = y.permute([ty.position(n) for n in (*front, given)])
    x = (torch.linalg.inv(w) @ y.unsqueeze(-1)).squeeze(-1)
    have = (*front, axis)
    return x.permute([have.index(n) for n in out.names])


def conv(node: Node, t: Sequence[TensorType], x: Sequence[Tensor]) -> Tensor:
    """Sums over every output place and every tap of the window, one by one; zeros outside."""
    a, out = node.attrs, node.tensor
    order = [n for n in t[0].names if n not in (a["channel"], *a["space"])] + [a["channel"], *a["space"]]
    value = x[0].permute([t[0].position(n) for n in order]) if node.op in ("conv", "conv_transpose") else x[0]
    made = torch.zeros([out.size(n) for n in order], dtype=value.dtype)
    groups, n = a["groups"], len(a["space"])
    transposed = node.op == "conv_transpose"
    if transposed:  # y[j] += x[i] w at j = i · stride + tap · dilation - before
        per = x[1].shape[1]
        weight = x[1].reshape(groups, x[1].shape[0] // groups, per, *x[1].shape[2:]).transpose(1, 2)
    else:
        per = x[1].shape[0] // groups
        weight = x[1].reshape(groups, per, *x[1].shape[1:])
    into = weight.shape[2]
    few = value.shape[-n:] if transposed else made.shape[-n:]
    for g, place, tap in itertools.product(
        range(groups), itertools.product(*map(range, few)), itertools.product(*map(range, x[1].shape[2:]))
    ):
        other = [
            p * s + k * d - b
            for p, s, k, d, (b, _) in zip(place, a["stride"], tap, a["dilation"], a["padding"], strict=True)
        ]
        limit = made.shape[-n:] if transposed else value.shape[-n:]
        if all(0 <= j < m for j, m in zip(other, limit, strict=True)):
            source, target = (place, tuple(other)) if transposed else (tuple(other), place)
            part = torch.einsum(
                "...c,kc->...k", value[(..., slice(g * into, (g + 1) * into), *source)], weight[(g, ..., *tap)]
            )
            made[(..., slice(g * per, (g + 1) * per), *target)] += part
    if len(x) > 2:
        made = made + x[2].reshape(-1, *[1] * n)
    return made.permute([order.index(k) for k in out.names])


def pool(node: Node, t: TensorType, x: Tensor) -> Tensor:
    """Window by window over the entries that are there."""
    a, out = node.attrs, node.tensor
    made = torch.zeros(out.shape, dtype=x.dtype)
    for place in itertools.product(*(range(out.size(s)) for s in a["space"])):
        at, to = [slice(None)] * t.rank, [slice(None)] * t.rank
        for p, s, k, stride, (before, _) in zip(place, a["space"], a["kernel"], a["stride"], a["padding"], strict=True):
            first = p * stride - before
            at[t.position(s)], to[t.position(s)] = slice(max(first, 0), first + k), p
        dims = [t.position(s) for s in a["space"]]
        made[tuple(to)] = x[tuple(at)].amax(dims) if node.op == "max_pool" else x[tuple(at)].mean(dims)
    return made


# ---- calls --------------------------------------------------------------------------------------


def call(
    node: Node, types: Sequence[TensorType], x: Sequence[Tensor], parameters: Parameters, analyses: Analyses
) -> Any:
    """A call, index by index of its lifted axes; a repeat, copy by copy."""
    a = node.attrs
    region: Region = a["region"]
    held = parameters[a["child"]]
    method = a.get("method", "forward")
    if node.op == "repeat":
        return repeat(node, region, x, held, method, analyses)
    lifted = [n for n, _ in a.get("lifted", ())]
    results = result_types(node.type)
    places = list(itertools.product(*(range(s) for _, s in a.get("lifted", ()))))
    rows = []
    for place in places:
        at = dict(zip(lifted, place, strict=True))
        picked = []
        for v, t in zip(x, types, strict=True):
            for n in [n for n in t.names if n in at]:
                v, t = v.select(t.position(n), at[n]), t.without((n,))
            picked.append(v)
        rows.append(invoke(region, method, picked, held[0], analyses, log_det=bool(a.get("log_det"))))
    out = tuple(torch.stack([r[k] for r in rows]).reshape(results[k].shape) for k in range(len(results)))
    return out if len(out) > 1 else out[0]


def repeat(node: Node, region: Region, x: Sequence[Tensor], held: Any, method: str, analyses: Analyses) -> Any:
    carried = node.attrs["carried"]
    values, context = list(x[:carried]), list(x[carried:])
    count = node.attrs["count"]
    assert len(held) == count
    total: Any = torch.zeros((), dtype=torch.float64)
    for own in reversed(held) if method in ("inverse", "generate") else held:
        found = invoke(region, method, [*values, *context], own, analyses, log_det=bool(node.attrs.get("log_det")))
        values = found[:carried]
        if node.attrs.get("log_det"):
            total = total + found[-1]
    out = (*values, total) if node.attrs.get("log_det") else tuple(values)
    return out if len(out) > 1 else out[0]


def invoke(
    region: Region, method: str, inputs: list[Tensor], parameters: Parameters, analyses: Analyses, *, log_det: bool
) -> list[Tensor]:
    found = run(analyses.program(region, method), inputs, parameters, analyses)
    return found[:-1] if is_map(region) and not log_det else found


def solve(node: Node, x: Sequence[Tensor], parameters: Parameters, analyses: Analyses) -> Tensor:
    """The solvers that inversion makes, by the plainest method for each."""
    body: Program = node.attrs["body"]
    target, outer = x[0], list(x[1:])

    def f(u: Tensor) -> list[Tensor]:
        found = run(body, [u, *(x if len(body.inputs) == len(x) + 1 else outer)], parameters, analyses)
        return [v.expand(u.shape) for v in found]

    match node.op:
        case "bracket_solve":
            lo, hi = node.attrs["lo"], node.attrs["hi"]
            low = torch.full_like(target, max(lo, -1e4))
            high = torch.full_like(target, min(hi, 1e4))
            for _ in range(120):
                middle = (low + high) / 2
                below = (f(middle)[0] < target) == node.attrs["increasing"]
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            return (low + high) / 2
        case "scan_solve":
            u = torch.full_like(target, node.attrs["placeholder"])
            for _ in range(node.tensor.size(node.attrs["axis"])):
                u = f(u)[0]  # every round makes one slice more right, in either order
            return u
        case "fixed_point_solve":
            u = target
            for _ in range(2000):
                u = target - f(u)[0]
            return u
        case "estimate_log_det":
            n = target.numel()
            j = torch.autograd.functional.jacobian(lambda u: f(u)[0], target)
            assert isinstance(j, Tensor)
            return torch.linalg.slogdet(torch.eye(n, dtype=j.dtype) + j.reshape(n, n))[1]
    raise NotImplementedError(node.op)


def called(node: Node, x: list[Tensor], copies: list[Parameters]) -> Tensor:
    """A called region of one result: its copies in a row, on each index of the lifted axes."""
    region, value = node.attrs["region"], x[0]
    lifted = [s for _, s in node.attrs.get("lifted", ())]
    for parameters in copies:

        def f(v: Tensor, parameters: Parameters = parameters) -> Tensor:
            inputs = dict(zip([*region.inputs, *region.context], [v, *x[1:]], strict=True))
            return evaluate(region.graph, inputs, parameters, region.outputs)[0]

        flat = value.reshape(math.prod(lifted), *value.shape[len(lifted) :])
        g = f if node.attrs["method"] == "forward" else lambda v, f=f: newton(f, v)
        made = torch.stack([g(v) for v in flat])
        value = made.reshape(*lifted, *made.shape[1:])
    return value


def newton(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """x with f(x) = y, by `follow`; a last Newton step carries the gradient."""
    x = follow(f, y.detach(), y.detach())
    end = slope(f, x)
    if not end.isfinite().all():
        return torch.full_like(y, math.nan)  # saturated
    return x - (torch.linalg.pinv(end) @ (f(x) - y).reshape(-1, 1)).reshape(x.shape)


def follow(f: Callable[[Tensor], Tensor], x: Tensor, goal: Tensor) -> Tensor:
    """The solution of f(x) = goal on the way over the line from f(x) to the goal.

    Not-a-number where that way is not followed to its end in float64.
    """
    start, at, stride = f(x).detach(), 0.0, 1.0
    for _ in range(40):
        new = near(f, x, torch.lerp(start, goal, min(at + stride, 1.0)))
        if new is None:
            stride /= 4
            continue
        x, at, stride = new, min(at + stride, 1.0), 2 * stride
        if at == 1.0:
            return x
    return torch.full_like(x, math.nan)


def slope(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found = torch.autograd.functional.jacobian(f, x)
    assert isinstance(found, Tensor)
    return found.reshape(x.numel(), x.numel())


def near(f: Callable[[Tensor], Tensor], x: Tensor, goal: Tensor) -> Tensor | None:
    """The solution by damped Newton steps from x; None where they do not come to rest."""
    error = (f(x) - goal).detach()
    for _ in range(30):
        small = float(error.abs().max()) <= 1e-13 * (1 + float(goal.abs().max()))
        if small or not (steep := slope(f, x)).isfinite().all():
            break
        step = torch.linalg.lstsq(steep, error.reshape(-1, 1)).solution.reshape(x.shape)
        for damping in (1.0, 0.5, 0.25, 0.1, 0.02):
            new = x - damping * step
            left = (f(new) - goal).detach()
            if float(left.norm()) < float(error.norm()):
                break
        else:
            break  # at rest, or stuck
        x, error = new, left
    return x if float(error.abs().max()) <= 1e-9 * (1 + float(goal.abs().max())) else None


def between(matrix: Tensor, spectral: float, p: float, q: float) -> float:
    """The bound of the norm from lp to lq: powers of norms that are known, by the line through (1/2, 1/2) and (1/p, 1/q)."""
    a, b = 1 / p, 1 / q
    if b > a:
        rows, columns = matrix.shape
        return min(
            rows ** (b - a) * between(matrix, spectral, p, p), columns ** (b - a) * between(matrix, spectral, q, q)
        )
    t = max(2 * a - 1, 1 - 2 * b)
    if t == 0:
        return spectral
    a, b = 0.5 + (a - 0.5) / t, 0.5 + (b - 0.5) / t
    lengths = (
        [torch.linalg.vector_norm(c, 1 / max(b, 1e-3)) for c in matrix.T]
        if a > 1 - 1e-9
        else [torch.linalg.vector_norm(r, 1 / max(1 - a, 1e-3)) for r in matrix]
    )
    return spectral ** (1 - t) * float(max(lengths)) ** t
