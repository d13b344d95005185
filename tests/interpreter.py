"""A second, independent meaning of forward graphs: a direct evaluation in torch, float64.

It shares nothing with the generated code; the tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowlang.ir.graph import Graph, Node
from flowlang.ir.types import TensorType

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
    "softplus_inverse": lambda x: torch.log(torch.expm1(x)),
    "log_sigmoid": lambda x: -torch.logaddexp(-x, torch.zeros_like(x)),
    "relu": lambda x: x.clamp_min(0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "selu": lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * torch.expm1(x)),
    "erf": torch.erf,
    "erfinv": torch.erfinv,
    "floor": torch.floor,
    "round": torch.round,
    "tanh_slope": lambda x: 1 - torch.tanh(x) ** 2,
    "sigmoid_slope": lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x)),
    "log_cosh": lambda x: torch.log(torch.cosh(x)),
    "identity": lambda x: x,
    "stop": lambda x: x,
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
}


def align(x: Tensor, have: TensorType, want: TensorType) -> Tensor:
    """Axes by name into the wanted order, missing ones of size 1."""
    names = list(have.names)
    order = [names.index(n) for n in want.names if n in names]
    x = x.permute(order)
    shape = [have.size(n) if n in names else 1 for n in want.names]
    return x.reshape(shape)


Parameters = Mapping[str, Any]
"""Values by name; under a child's name, those of each of its copies."""


def evaluate(graph: Graph, values: Mapping[int, Tensor], parameters: Parameters, wanted: list[int]) -> list[Tensor]:
    """Values of nodes for one sample (no batch dims)."""
    env: dict[int, Any] = dict(values)
    for n in sorted(graph.reachable(wanted)):
        if n in env:
            continue
        env[n] = one(graph, graph[n], env, parameters)
    return [env[w] for w in wanted]


def one(graph: Graph, node: Node, env: Mapping[int, Any], parameters: Parameters) -> Any:
    a = node.attrs
    if node.op in ("call", "repeat"):
        return called(node, [env[i] for i in node.inputs], parameters[a["child"]])
    t = [graph[i].tensor for i in node.inputs]
    x = [env[i] for i in node.inputs]
    out = node.tensor

    def dim(axis: str, k: int = 0) -> int:
        return t[k].position(axis)

    if node.op == "const":
        return torch.tensor(a["value"], dtype=torch.float64)
    if node.op in ("param", "state"):
        return parameters[a["name"]]
    if node.op in UNARY:
        return UNARY[node.op](x[0])
    if node.op in BINARY:
        return BINARY[node.op](align(x[0], t[0], out), align(x[1], t[1], out))
    match node.op:
        case "leaky_relu":
            return torch.where(x[0] > 0, x[0], a["slope"] * x[0])
        case "elu":
            return torch.where(x[0] > 0, x[0], a["alpha"] * torch.expm1(x[0]))
        case "clamp":
            return x[0].clamp(a["lo"], a["hi"])
        case "pow":
            return x[0] ** a["exponent"] if "exponent" in a else align(x[0], t[0], out) ** align(x[1], t[1], out)
        case "where":
            return torch.where(*(align(v, s, out) for v, s in zip(x, t, strict=True)))
        case "sum" | "mean":
            return getattr(x[0], node.op)([dim(n) for n in a["axes"]])
        case "var":
            return x[0].var([dim(n) for n in a["axes"]], correction=a.get("ddof", 0))
        case "logsumexp":
            return torch.log(torch.exp(x[0]).sum([dim(n) for n in a["axes"]]))
        case "reduce_max":
            return x[0].amax([dim(n) for n in a["axes"]])
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
            y = z.cumsum(d) - (z if a.get("exclusive") else 0)
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
            shape = [s for axis in t[0].axes for s in ([v for _, v in a["into"]] if axis.name == a["axis"] else [axis.size])]
            return x[0].reshape(shape)
        case "merge":
            return x[0].reshape(out.shape)
        case "expand":
            return align(x[0], t[0], out).expand(out.shape)
        case "index":
            return torch.arange(a["size"], dtype=torch.float64)
        case "masked":
            rows, cols = torch.tensor(a["row_degrees"]).double(), torch.tensor(a["col_degrees"]).double()
            keep = rows[:, None] > cols[None] if a["strict"] else rows[:, None] >= cols[None]
            pair = TensorType.of((a["row"], len(rows)), (a["col"], len(cols)))
            return x[0] * align(keep.double(), pair, t[0])
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
        value = torch.stack([g(v) for v in flat]).reshape(value.shape)
    return value


def newton(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """x with f(x) = y by damped Newton steps; the last one carries the gradient."""
    goal, n = y.detach(), y.numel()

    def slope(x: Tensor) -> Tensor:
        found = torch.autograd.functional.jacobian(f, x)
        assert isinstance(found, Tensor)
        return found.reshape(n, n)

    x = goal.clone()
    error = (f(x) - goal).detach()
    for _ in range(200):
        if not float(error.abs().max()) > 1e-13 * (1 + float(goal.abs().max())):
            break
        step = torch.linalg.lstsq(slope(x), error.reshape(n, 1)).solution.reshape(x.shape)
        for damping in (1.0, 0.5, 0.25, 0.1, 0.02):
            new = x - damping * step
            left = (f(new) - goal).detach()
            if float(left.norm()) < float(error.norm()):
                break
        x, error = new, left
    return x - torch.linalg.solve(slope(x), (f(x) - y).reshape(n, 1)).reshape(x.shape)
