"""The table from op to ONNX nodes, beside that of the PyTorch backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from flowlang.backends.onnx import special
from flowlang.backends.onnx.graph import BOOL, INT, REAL, Dim, Value, broadcast
from flowlang.backends.onnx.lower import EMITTERS, Lowering, Result, Unlowered, emitter, results_of

from flowlang.ir.graph import Node, Region, result_types
from flowlang.ir.types import TensorType

# ---- leaves -------------------------------------------------------------------------------------


@emitter("const")
def _const(w: Lowering, n: Node) -> Value:
    value = n.attrs["value"]
    return w.g.const(value, BOOL if n.tensor.kind == "bool" else REAL)


@emitter("param", "state", "running", "start")
def _param(w: Lowering, n: Node) -> Value:
    if w.shared.training and n.op == "running":
        live, new = (w.value(i) for i in n.inputs)
        w.keep(str(n.attrs["name"]), new, n)
        return live
    newest = w.shared.states.get((id(w.weights.identity), str(n.attrs["name"]))) if n.op == "state" else None
    if newest is not None and not n.attrs.get("path"):
        return newest[1]
    path, weights = n.attrs.get("path", ()), w.weights
    for child, copy in path:
        weights = weights.child(child) if copy is None else weights.copies(child)[copy]
    scopes = [child if copy is None else f"{child}.{copy}" for child, copy in path]
    name = "/".join([*w.g.scopes, *scopes, str(n.attrs["name"])])
    array = np.broadcast_to(np.asarray(weights.value(n.attrs["name"]), dtype=np.float64), n.tensor.shape)
    return w.g.const(array, name=name)


@emitter("input")
def _input(w: Lowering, n: Node) -> Value:
    raise AssertionError(f"input {n.label} was not bound")


@emitter("index")
def _index(w: Lowering, n: Node) -> Value:
    return w.g.const(np.arange(n.attrs["size"]))


# ---- elementwise --------------------------------------------------------------------------------

UNARY = {
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs", "sign": "Sign", "reciprocal": "Reciprocal", "sin": "Sin",
    "cos": "Cos", "tanh": "Tanh", "softplus": "Softplus", "relu": "Relu",
    "floor": "Floor", "whole_part": "Floor", "round": "Round",
}  # fmt: skip


@emitter(*UNARY)
def _unary(w: Lowering, n: Node) -> Value:
    return w.g.unary(UNARY[n.op], w.number(w.value(n.inputs[0])))


@emitter("fraction_part")
def _fraction_part(w: Lowering, n: Node) -> Value:
    x = w.number(w.value(n.inputs[0]))
    return w.g.sub(x, w.g.unary("Floor", x))


@emitter(*special.UNARY)
def _special(w: Lowering, n: Node) -> Value:
    return special.UNARY[n.op](w.g, w.number(w.value(n.inputs[0])))


@emitter("not")
def _not(w: Lowering, n: Node) -> Value:
    return w.g.unary("Not", w.value(n.inputs[0]), BOOL)


@emitter("neg")
def _neg(w: Lowering, n: Node) -> Value:
    return w.g.neg(w.number(w.value(n.inputs[0])))


@emitter("identity", "within", "stop", "rename")
def _identity(w: Lowering, n: Node) -> Value:
    return w.value(n.inputs[0])


@emitter("leaky_relu")
def _leaky(w: Lowering, n: Node) -> Value:
    x = w.value(n.inputs[0])
    if w.g.dtype == "float64":  # onnxruntime has the op for float32 alone
        return w.g.where(w.g.binary("GreaterOrEqual", x, 0.0, BOOL), x, w.g.mul(x, float(n.attrs["slope"])))
    return w.g.unary("LeakyRelu", x, alpha=float(n.attrs["slope"]))


@emitter("elu")
def _elu(w: Lowering, n: Node) -> Value:
    return special.elu(w.g, w.value(n.inputs[0]), float(n.attrs["alpha"]))


@emitter("clamp")
def _clamp(w: Lowering, n: Node) -> Value:
    return w.g.clip(w.value(n.inputs[0]), float(n.attrs["lo"]), float(n.attrs["hi"]))


@emitter("add", "sub", "mul", "div")
def _arithmetic(w: Lowering, n: Node) -> Value:
    a, b = (w.number(w.aligned(i, n.tensor)) for i in n.inputs)
    made = {"add": w.g.add, "sub": w.g.sub, "mul": w.g.mul, "div": w.g.div}[n.op](a, b)
    return shaped(w, made, n.tensor)


def shaped(w: Lowering, v: Value, t: TensorType) -> Value:
    """Leading axes that no operand wrote have size 1 and are put back; others are broadcast already."""
    own: tuple[Dim, ...] = v.shape[max(v.rank - t.rank, 0) :]
    if own == t.shape:
        return v
    lead = v.shape[: max(v.rank - t.rank, 0)]
    return w.g.expand(v, (*lead, *t.shape))


COMPARE = {"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal"}


@emitter("lt", "le", "gt", "ge", "eq", "ne")
def _compare(w: Lowering, n: Node) -> Value:
    a, b = (w.number(w.aligned(i, n.tensor)) for i in n.inputs)
    if n.op == "ne":
        return shaped(w, w.g.unary("Not", w.g.binary("Equal", a, b, BOOL), BOOL), n.tensor)
    return shaped(w, w.g.binary(COMPARE[n.op], a, b, BOOL), n.tensor)


@emitter("and", "or")
def _logic(w: Lowering, n: Node) -> Value:
    a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    return shaped(w, w.g.binary({"and": "And", "or": "Or"}[n.op], a, b, BOOL), n.tensor)


@emitter("square")
def _square(w: Lowering, n: Node) -> Value:
    x = w.value(n.inputs[0])
    return w.g.mul(x, x)


@emitter("pow")
def _pow(w: Lowering, n: Node) -> Value:
    if "exponent" in n.attrs:
        return w.g.binary("Pow", w.value(n.inputs[0]), float(n.attrs["exponent"]))
    a, b = (w.number(w.aligned(i, n.tensor)) for i in n.inputs)
    return shaped(w, w.g.binary("Pow", a, b), n.tensor)


@emitter("min", "max")
def _extremum(w: Lowering, n: Node) -> Value:
    a, b = (w.number(w.aligned(i, n.tensor)) for i in n.inputs)
    return shaped(w, w.g.binary({"min": "Min", "max": "Max"}[n.op], a, b), n.tensor)


@emitter("mod")
def _mod(w: Lowering, n: Node) -> Value:
    a, b = (w.number(w.aligned(i, n.tensor)) for i in n.inputs)
    return shaped(w, w.g.sub(a, w.g.mul(b, w.g.unary("Floor", w.g.div(a, b)))), n.tensor)


@emitter("rotate")
def _rotate(w: Lowering, n: Node) -> Value:
    """x + t in [-π, π)."""
    a, b = (w.number(w.aligned(i, n.tensor)) for i in n.inputs)
    turn = 2 * math.pi
    x = w.g.add(w.g.add(a, b), math.pi)
    x = w.g.sub(w.g.sub(x, w.g.mul(w.g.unary("Floor", w.g.mul(x, 1 / turn)), turn)), math.pi)
    top = math.pi if w.g.dtype == "float64" else 3.1415925  # the largest number below π
    return shaped(w, w.g.clip(x, -top, top - w.g.eps), n.tensor)


@emitter("where")
def _where(w: Lowering, n: Node) -> Value:
    c, a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    return shaped(w, w.g.where(c, w.number(a), w.number(b)), n.tensor)


# ---- reductions ---------------------------------------------------------------------------------

REDUCE = {
    "sum": "ReduceSum", "mean": "ReduceMean", "logsumexp": "ReduceLogSumExp", "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin", "prod": "ReduceProd",
}  # fmt: skip


def dims(w: Lowering, n: Node) -> list[int]:
    return [w.dim(n.inputs[0], a) for a in n.attrs["axes"]]


@emitter(*REDUCE)
def _reduce(w: Lowering, n: Node) -> Value:
    return w.g.reduce(REDUCE[n.op], w.number(w.value(n.inputs[0])), dims(w, n))


@emitter("length")
def _length(w: Lowering, n: Node) -> Value:
    x = w.value(n.inputs[0])
    return w.g.unary("Sqrt", w.g.reduce("ReduceSumSquare", x, dims(w, n)))


@emitter("normalize")
def _normalize(w: Lowering, n: Node) -> Value:
    """x over its length; where that is 0, the vector of equal entries."""
    x = w.value(n.inputs[0])
    length = w.g.unary("Sqrt", w.g.reduce("ReduceSumSquare", x, dims(w, n), keep=True))
    zero = w.g.binary("Equal", length, 0.0, BOOL)
    even = math.prod(n.tensor.size(a) for a in n.attrs["axes"]) ** -0.5
    return w.g.where(zero, even, w.g.div(x, w.g.where(zero, 1.0, length)))


@emitter("batch_mean", "batch_var", "batch_sum", "batch_max", "batch_min")
def _batch_moment(w: Lowering, n: Node) -> Value:
    """Over the batch and axes; used outside `running` a model's result depends on who else is in the batch."""
    x = w.full(w.value(n.inputs[0]), w.type(n.inputs[0]).rank)
    axes = [*(k - x.rank for k in range(len(w.leads))), *dims(w, n)]
    if n.op != "batch_var":
        return w.g.reduce(f"Reduce{n.op.removeprefix('batch_').title()}", x, axes)
    off = w.g.sub(x, w.g.reduce("ReduceMean", x, axes, keep=True))
    mean = w.g.reduce("ReduceMean", w.g.mul(off, off), axes)
    ddof = float(n.attrs.get("ddof", 0))
    if not ddof:
        return mean
    count = w.g.reduce("ReduceProd", w.g.cast(w.g.shape_of([x.shape[a] for a in axes]), REAL), [-1])
    return w.g.mul(mean, w.g.div(count, w.g.sub(count, ddof)))


@emitter("var")
def _var(w: Lowering, n: Node) -> Value:
    x = w.value(n.inputs[0])
    off = w.g.sub(x, w.g.reduce("ReduceMean", x, dims(w, n), keep=True))
    count = math.prod(w.type(n.inputs[0]).size(a) for a in n.attrs["axes"])
    ddof = int(n.attrs.get("ddof", 0))
    mean = w.g.reduce("ReduceMean", w.g.mul(off, off), dims(w, n))
    return w.g.mul(mean, count / (count - ddof)) if ddof else mean


@emitter("any", "all")
def _any(w: Lowering, n: Node) -> Value:
    x = w.g.cast(w.value(n.inputs[0]), REAL)
    found = w.g.reduce("ReduceMax" if n.op == "any" else "ReduceMin", x, dims(w, n))
    return w.g.binary("Greater", found, 0.5, BOOL)


@emitter("argmax")
def _argmax(w: Lowering, n: Node) -> Value:
    i = n.inputs[0]
    t = w.type(i)
    axes = list(n.attrs["axes"])
    rest = [a for a in t.names if a not in axes]
    x = w.ordered(w.value(i), t.names, [*rest, *axes])
    x = w.g.reshape(x, (*x.shape[: x.rank - len(axes)], math.prod(t.size(a) for a in axes)))
    found = w.g.op("ArgMax", x, shape=x.shape[:-1], kind=INT, axis=x.rank - 1, keepdims=0)
    return w.g.cast(found, REAL)


@emitter("softmax", "log_softmax")
def _softmax(w: Lowering, n: Node) -> Value:
    i = n.inputs[0]
    x = w.value(i)
    if "causal" in n.attrs:
        t = w.type(i)
        q, k = t.position(n.attrs["causal"]), t.position(n.attrs["axis"])
        hidden = np.where(np.triu(np.ones((t.axes[q].size, t.axes[k].size)), 1) > 0, -np.inf, 0.0)
        shape = [1] * t.rank
        shape[q], shape[k] = t.axes[q].size, t.axes[k].size
        x = w.g.add(x, w.g.const((hidden if q < k else hidden.T).reshape(shape)))
    return w.g.softmax(x, w.dim(i, n.attrs["axis"]), log=n.op == "log_softmax")


@emitter("logit_mixture")
def _logit_mixture(w: Lowering, n: Node) -> Value:
    p, t = n.inputs
    bins = next(a for a in w.type(p).axes if a.name == n.attrs["axis"])
    whole = TensorType((bins, *n.tensor.axes))
    dim = -whole.rank
    share, at = w.g.softmax(w.aligned(p, whole), dim, log=True), w.aligned(t, whole)
    low, high = (
        w.g.reduce("ReduceLogSumExp", w.g.add(share, special.log_sigmoid(w.g, v)), [dim])
        for v in (at, w.g.unary("Neg", at))
    )
    return w.g.sub(low, high)


@emitter("cumsum")
def _cumsum(w: Lowering, n: Node) -> Value:
    i = n.inputs[0]
    return w.g.cumsum(
        w.value(i), w.dim(i, n.attrs["axis"]), bool(n.attrs.get("exclusive")), bool(n.attrs.get("reverse"))
    )


@emitter("sort")
def _sort(w: Lowering, n: Node) -> Value:
    i = n.inputs[0]
    x, t = w.value(i), w.type(i)
    rest = [a for a in t.names if a != n.attrs["axis"]]
    if x.array is not None:
        return w.g.const(np.sort(x.array, w.dim(i, n.attrs["axis"])))
    last = w.ordered(x, t.names, [*rest, n.attrs["axis"]])
    count = w.g.ints([t.size(n.attrs["axis"])])
    values, _ = w.g.multi("TopK", last, count, shapes=[last.shape, last.shape], axis=last.rank - 1, largest=0, sorted=1)
    return w.ordered(values, [*rest, n.attrs["axis"]], t.names)


@emitter("contract")
def _contract(w: Lowering, n: Node) -> Value:
    a, b = n.inputs
    found, names = contract(w, w.value(a), w.type(a), w.value(b), w.type(b), list(n.attrs["axes"]))
    return w.ordered(found, names, n.tensor.names)


def contract(
    w: Lowering, a: Value, ta: TensorType, b: Value, tb: TensorType, axes: Sequence[str]
) -> tuple[Value, list[str]]:
    """The sum of products over `axes`: a matrix product with the shared axes as a stack. Gives its axes."""
    a, b = w.number(a), w.number(b)
    stack = [x for x in ta.names if tb.has(x) and x not in axes]
    left = [x for x in ta.names if x not in stack and x not in axes]
    right = [x for x in tb.names if x not in stack and x not in axes]
    if a.rank == ta.rank and b.rank > tb.rank:  # weights stand on the right
        return contract(w, b, tb, a, ta, axes)
    if not right and not left:
        wide = TensorType(tuple(x for x in ta.axes if x.name in stack) + tuple(x for x in ta.axes if x.name in axes))
        product = w.g.mul(w.align(a, ta, wide), w.align(b, tb, wide))
        return w.g.reduce("ReduceSum", product, [-k - 1 for k in range(len(axes))]), stack
    va = w.ordered(a, ta.names, [*stack, *left, *axes])
    vb = w.ordered(b, tb.names, [*stack, *axes, *right])
    inner = math.prod(ta.size(x) for x in axes)
    simple = not stack and b.rank == tb.rank and len(axes) == 1
    if simple:  # a matrix on the right: any axes may stand in front
        vb = w.g.reshape(vb, (inner, math.prod(tb.size(x) for x in right)))
        if va.rank == 1:
            found = w.g.squeeze(w.g.matmul(w.g.unsqueeze(va, [-2]), vb), [-2])
        else:
            found = w.g.matmul(va, vb)
        front = found.shape[:-1]
    else:
        lead_a, lead_b = w.lead(a, ta.rank), w.lead(b, tb.rank)
        sizes = tuple(ta.size(x) for x in stack)
        rows, columns = math.prod(ta.size(x) for x in left), math.prod(tb.size(x) for x in right)
        va = w.g.reshape(va, (*lead_a, *sizes, rows, inner))
        vb = w.g.reshape(vb, (*lead_b, *sizes, inner, columns))
        found = w.g.matmul(va, vb)
        front = (*broadcast(lead_a, lead_b), *sizes, *(ta.size(x) for x in left))
    found = w.g.reshape(found, (*front, *(tb.size(x) for x in right)))
    return found, [*stack, *left, *right]


# ---- structure ----------------------------------------------------------------------------------


@emitter("slice")
def _slice(w: Lowering, n: Node) -> Value:
    return w.g.slice(w.value(n.inputs[0]), w.dim(n.inputs[0], n.attrs["axis"]), n.attrs["start"], n.attrs["stop"])


@emitter("pick")
def _pick(w: Lowering, n: Node) -> Value:
    i = n.inputs[0]
    return w.g.pick(w.value(i), w.dim(i, n.attrs["axis"]), n.attrs["index"] % w.type(i).size(n.attrs["axis"]))


@emitter("join")
def _join(w: Lowering, n: Node) -> Value:
    return w.g.concat(
        w.joint([w.number(w.value(i)) for i in n.inputs], n.tensor.rank),
        n.tensor.position(n.attrs["axis"]) - n.tensor.rank,
    )


@emitter("stack")
def _stack(w: Lowering, n: Node) -> Value:
    at = n.tensor.position(n.attrs["axis"]) - n.tensor.rank
    parts = w.joint([w.number(w.value(i)) for i in n.inputs], n.tensor.rank - 1)
    return w.g.concat([w.g.unsqueeze(p, [at]) for p in parts], at)


@emitter("reverse")
def _reverse(w: Lowering, n: Node) -> Value:
    return w.g.flip(w.value(n.inputs[0]), w.dim(n.inputs[0], n.attrs["axis"]))


@emitter("shift")
def _shift(w: Lowering, n: Node) -> Value:
    i = n.inputs[0]
    x, d = w.value(i), w.dim(i, n.attrs["axis"])
    size = w.type(i).size(n.attrs["axis"])
    k = max(min(int(n.attrs["k"]), size), -size)
    if k == 0:
        return x
    if abs(k) == size:
        return w.g.mul(x, 0.0)
    kept = w.g.slice(x, d, max(-k, 0), size - max(k, 0))
    before, after = [0] * x.rank, [0] * x.rank
    (before if k > 0 else after)[d % x.rank] = abs(k)
    if x.array is not None:
        return w.g.const(np.pad(np.asarray(kept.array), list(zip(before, after, strict=True))))
    return w.g.op("Pad", kept, w.g.ints([*before, *after]), shape=x.shape)


@emitter("permute")
def _permute(w: Lowering, n: Node) -> Value:
    return w.g.take(w.value(n.inputs[0]), w.dim(n.inputs[0], n.attrs["axis"]), list(n.attrs["order"]))


@emitter("order")
def _order(w: Lowering, n: Node) -> Value:
    return w.ordered(w.value(n.inputs[0]), w.type(n.inputs[0]).names, n.attrs["names"])


@emitter("split", "merge")
def _reshape(w: Lowering, n: Node) -> Value:
    v = w.value(n.inputs[0])
    return w.g.reshape(v, (*w.lead(v, w.type(n.inputs[0]).rank), *n.tensor.shape))


@emitter("expand")
def _expand(w: Lowering, n: Node) -> Value:
    v = w.aligned(n.inputs[0], n.tensor)
    return shaped(w, v, n.tensor)


@emitter("gather")
def _gather(w: Lowering, n: Node) -> Value:
    i, k = n.inputs
    x, index = w.value(i), w.g.cast(w.value(k), INT)
    ti, tk = w.type(i), w.type(k)
    axis = n.attrs["axis"]
    shared = [a for a in tk.names if ti.has(a) and a != axis]
    if shared or (x.rank != ti.rank and index.rank != tk.rank):
        return _gather_each(w, n, x, index, shared)
    rest = [a for a in ti.names if a != axis]
    front = x.rank - ti.rank
    v = w.ordered(x, ti.names, [axis, *rest])
    shape = (*v.shape[:front], *index.shape, *(ti.size(a) for a in rest))
    return w.g.op("Gather", v, index, shape=shape, axis=front)


def _gather_each(w: Lowering, n: Node, x: Value, index: Value, shared: list[str]) -> Value:
    """Each sample, and each place along axes that both have, is picked from by its own index."""
    (ti, tk), axis = (w.type(i) for i in n.inputs), n.attrs["axis"]
    rest = [a for a in ti.names if a != axis and a not in shared]
    own = [a for a in tk.names if a not in shared]
    x, index = w.ordered(x, ti.names, [*shared, axis, *rest]), w.ordered(index, tk.names, [*shared, *own])
    leads = broadcast(w.lead(x, ti.rank), w.lead(index, tk.rank))
    x = w.g.expand(x, (*leads, *x.shape[x.rank - ti.rank :]))
    index = w.g.unsqueeze(w.g.expand(index, (*leads, *index.shape[index.rank - tk.rank :])), [-1])
    batch = len(leads) + len(shared)
    shape = (*index.shape[:-1], *x.shape[batch + 1 :])
    found = w.g.op("GatherND", x, index, shape=shape, kind=x.kind, batch_dims=batch)
    return w.ordered(found, [*shared, *own, *rest], n.tensor.names)


# ---- matrices -----------------------------------------------------------------------------------


@emitter("masked")
def _masked(w: Lowering, n: Node) -> Value:
    t = n.tensor
    row, col = n.attrs["row"], n.attrs["col"]
    r, c = np.asarray(n.attrs["row_degrees"])[:, None], np.asarray(n.attrs["col_degrees"])[None, :]
    mask = ((r > c) if n.attrs["strict"] else (r >= c)).astype(np.float64)
    pair = TensorType.of((row, mask.shape[0]), (col, mask.shape[1]))
    return w.g.mul(w.value(n.inputs[0]), w.align(w.g.const(mask), pair, t))


@emitter("diagonal")
def _diagonal(w: Lowering, n: Node) -> Value:
    t, row, col = w.type(n.inputs[0]), n.attrs["row"], n.attrs["col"]
    pair = TensorType.of((row, t.size(row)), (col, t.size(row)))
    kept = w.g.mul(w.value(n.inputs[0]), w.align(w.g.const(np.eye(t.size(row))), pair, t))
    return w.g.reduce("ReduceSum", kept, [t.position(col) - t.rank])


def constant_matrix(w: Lowering, n: Node, i: int) -> Any:
    v = w.value(i)
    if v.array is None:
        raise Unlowered(n, "ONNX has no solve for a matrix that varies with the input", "use a matrix parameter")
    return v.array


@emitter("matrix_solve")
def _matrix_solve(w: Lowering, n: Node) -> Value:
    m, y = n.inputs
    tm, ty = w.type(m), w.type(y)
    given, axis = n.attrs["given"], n.attrs["axis"]
    rest = [a for a in tm.names if a not in (given, axis)]
    matrix = np.transpose(constant_matrix(w, n, m), [tm.position(a) for a in (*rest, given, axis)])
    inverse = w.g.const(np.linalg.inv(matrix))
    ti = TensorType.of(*((a, tm.size(a)) for a in (*rest, axis, given)))
    found, names = contract(w, w.value(y), ty, inverse, ti, [given])
    return w.ordered(found, names, n.tensor.names)


@emitter("matrix_log_det")
def _matrix_log_det(w: Lowering, n: Node) -> Value:
    return w.g.const(np.linalg.slogdet(constant_matrix(w, n, n.inputs[0]))[1])


@emitter("det")
def _det(w: Lowering, n: Node) -> Value:
    """Small ones written out: onnxruntime's Det knows float32 alone."""
    g, i = w.g, n.inputs[0]
    row, col = n.attrs["row"], n.attrs["col"]
    names = w.type(i).names
    m = w.ordered(w.value(i), names, [*(a for a in names if a not in (row, col)), row, col])
    size = w.type(i).size(row)
    if size > 3:
        return g.op("Det", m, shape=m.shape[:-2])
    a, *others = [g.pick(m, -2, k) for k in range(size)]
    if size == 1:
        return g.pick(a, -1, 0)
    if size == 2:
        (b,) = others
        return g.sub(g.mul(g.pick(a, -1, 0), g.pick(b, -1, 1)), g.mul(g.pick(a, -1, 1), g.pick(b, -1, 0)))

    def turned(v: Value, k: int) -> Value:
        return g.concat([g.slice(v, -1, k, 3), g.slice(v, -1, 0, k)], -1)

    b, c = others
    cross = g.sub(g.mul(turned(b, 1), turned(c, 2)), g.mul(turned(b, 2), turned(c, 1)))
    return g.reduce("ReduceSum", g.mul(a, cross), [-1])


def induced_bound(weight: Any, p: float, q: float, space: tuple[int, ...]) -> float:
    """What the module scales by, of weights that are constants here."""
    import torch
    from flowlang.backends.torch.runtime.parameters import induced_norm

    return float(induced_norm(torch.tensor(weight), p, q, space))


@emitter("norm_bounded")
def _norm_bounded(w: Lowering, n: Node) -> Value:
    t, axes = n.tensor, list(n.attrs["axes"])
    order = [a for a in t.names if a not in axes] + axes
    weight = np.transpose(constant_matrix(w, n, n.inputs[0]), [t.position(a) for a in order])
    rows = math.prod(weight.shape[: weight.ndim - len(axes)])
    space = tuple(n.attrs.get("space", ()))
    matrix = weight if space else weight.reshape(rows, -1)
    orders = [float(constant_matrix(w, n, i)) for i in n.inputs[1:]]
    norm = induced_bound(matrix, orders[0], orders[1], space) if orders else np.linalg.norm(matrix, 2)
    scaled = weight * (n.attrs["bound"] / max(norm, n.attrs["bound"]))
    return w.g.const(np.transpose(scaled, [order.index(a) for a in t.names]))


def moving(w: Lowering, n: Node, op: str, own: list[str], *others: Value, **attributes: Any) -> Value:
    """An op of ONNX on [N, C, *space], its operand brought there and its result back."""
    i = n.inputs[0]
    names = w.type(i).names
    rest = [a for a in names if a not in own]
    x = w.ordered(w.value(i), names, [*rest, *own])
    front = x.shape[: len(x.shape) - len(own)]
    merged: Dim = front[0] if len(front) == 1 else 1 if not front else "*".join(map(str, front))
    if all(isinstance(d, int) for d in front):
        merged = math.prod(d for d in front if isinstance(d, int))
    inner = tuple(n.tensor.size(a) for a in own)
    pool = own == list(n.attrs["space"])
    lead: tuple[Dim, ...] = (merged, 1) if pool else (merged,)
    y = w.g.op(op, w.g.reshape(x, (*lead, *x.shape[len(front) :])), *others, shape=(*lead, *inner), **attributes)
    return w.ordered(w.g.reshape(y, (*front, *inner)), [*rest, *own], n.tensor.names)


def windows(n: Node, kernel: tuple[int, ...]) -> dict[str, Any]:
    a = n.attrs
    pads = [p for p, _ in a["padding"]] + [p for _, p in a["padding"]]
    return {"kernel_shape": list(kernel), "pads": pads, "strides": list(a["stride"])}


@emitter("conv")
def _conv(w: Lowering, n: Node) -> Value:
    kernel = w.type(n.inputs[1]).shape[2:]
    others = [w.value(i) for i in n.inputs[1:]]
    own = [n.attrs["channel"], *n.attrs["space"]]
    return moving(
        w,
        n,
        "Conv",
        own,
        *others,
        **windows(n, kernel),
        dilations=list(n.attrs["dilation"]),
        group=int(n.attrs["groups"]),
    )


@emitter("conv_transpose")
def _conv_transpose(w: Lowering, n: Node) -> Value:
    a, kernel = n.attrs, w.type(n.inputs[1]).shape[2:]
    more = tuple(max(-p, -q, 0) for p, q in a["padding"])
    if any(
        p < 0 or (q < 0 and m >= max(s, d))
        for (p, q), m, s, d in zip(a["padding"], more, a["stride"], a["dilation"], strict=True)
    ):
        raise Unlowered(n, "ONNX cannot add so many zeros after a transposed convolution", "use a larger window")
    attributes = windows(n, kernel)
    attributes["pads"] = [p for p, _ in a["padding"]] + [max(q, 0) for _, q in a["padding"]]
    others = [w.value(i) for i in n.inputs[1:]]
    return moving(
        w, n, "ConvTranspose", [a["channel"], *a["space"]], *others, **attributes, dilations=list(a["dilation"]),
        output_padding=list(more), group=int(a["groups"]),
    )  # fmt: skip


@emitter("max_pool", "mean_pool")
def _pool(w: Lowering, n: Node) -> Value:
    op = "MaxPool" if n.op == "max_pool" else "AveragePool"
    return moving(w, n, op, list(n.attrs["space"]), **windows(n, n.attrs["kernel"]))


# ---- noise --------------------------------------------------------------------------------------


@emitter("random_like")
def _random(w: Lowering, n: Node) -> Value:
    """Standard noise of a kind, an input or a seeded op; draws of a one-hot vector take Gumbel noise."""
    kind = n.attrs["kind"]
    name = "/".join([*w.g.scopes, n.label or "noise"])
    shape = (*w.leads, *n.tensor.shape)
    if not n.inputs:
        return w.shared.noise(name, kind, shape, None, None)
    form = w.aligned(n.inputs[0], n.tensor)
    if kind == "onehot":
        scores = w.g.add(form, w.shared.noise(name, "gumbel", shape, None, None))
        best = w.g.op("ArgMax", scores, shape=(*scores.shape[:-1], 1), kind=INT, axis=scores.rank - 1, keepdims=1)
        count = n.tensor.shape[-1]
        return w.g.cast(w.g.binary("Equal", best, w.g.const(np.arange(count), INT), BOOL), REAL)
    number = float(form.array.flat[0]) if form.array is not None and np.ptp(form.array) == 0 else None
    found = w.shared.noise(name, kind, shape, number, form)
    if found.constant:
        raise Unlowered(n, f"ONNX has no random op for {kind} noise", "leave out the seed: noise is an input then")
    return found


# ---- calls --------------------------------------------------------------------------------------


def flow_of(values: list[Value], n: Node) -> Result:
    """One value for a call with one result, else the list that `get` reads."""
    return values[0] if isinstance(n.type, TensorType) else values[: results_of(n)]


@emitter("call")
def _call(w: Lowering, n: Node) -> Result:
    child = n.attrs["child"]
    arguments = [w.lifted_argument(i, tuple(n.attrs.get("lifted", ()))) for i in n.inputs]
    return flow_of(w.call(n, w.weights.child(child), arguments, child), n)


@emitter("get")
def _get(w: Lowering, n: Node) -> Value:
    found = w.env[n.inputs[0]]
    return found[n.attrs["index"]] if isinstance(found, list) else found


@emitter("choose")
def _choose(w: Lowering, n: Node) -> Result:
    """A deployed model is one for inference, unless a training pass is asked for."""
    return [w.value(i) for i in n.inputs_in(w.shared.training)]


@emitter("scan")
def _scan(w: Lowering, n: Node) -> Result:
    g, axis, count, reverse = w.g, n.attrs["axis"], int(n.attrs["count"]), bool(n.attrs["reverse"])
    if axis == "B":
        raise Unlowered(
            n, "a scan over the batch is no function of a sample", "write what inference does under `if not training`"
        )
    carried, sliced = int(n.attrs["carried"]), int(n.attrs["sliced"])
    child, weights = n.attrs["child"], w.weights.child(n.attrs["child"])
    start = [w.full(w.number(w.value(i)), w.type(i).rank) for i in n.inputs[:carried]]
    slices, context = n.inputs[carried : carried + sliced], [w.value(i) for i in n.inputs[carried + sliced :]]

    def step(i: Value, now: list[Value]) -> tuple[None, list[Value]]:
        at = g.binary("Sub", g.const(count - 1, INT), i, INT) if reverse else i
        parts = [slice_at(w, s, w.dim(s, axis), at) for s in slices]
        found = w.call(n, weights, [*now, *parts, *context], child)
        rest = zip(found[carried:], result_types(n.type)[carried:], strict=True)
        return None, [*found[:carried], *(w.full(v, t.rank - 1) for v, t in rest)]

    found = g.loop(count, start, step, child)
    out = found[:carried]
    for v, t in zip(found[carried:], result_types(n.type)[carried:], strict=True):
        v = g.transpose(v, [*range(1, v.rank - t.rank + 1), 0, *range(v.rank - t.rank + 1, v.rank)])
        out.append(g.flip(v, -t.rank) if reverse else v)
    return out


def slice_at(w: Lowering, n: int, dim: int, at: Value) -> Value:
    """One slice along an axis, which goes; the index is known when the model runs."""
    x = w.value(n)
    axis = dim % x.rank
    shape = tuple(d for k, d in enumerate(x.shape) if k != axis)
    return w.g.op("Gather", x, at, shape=shape, kind=x.kind, axis=axis)


@emitter("surrogate")
def _surrogate(w: Lowering, n: Node) -> Value:
    return w.full_axes(w.number(w.aligned(n.inputs[0], n.tensor)), n.tensor.axes)


@emitter("repeat")
def _repeat(w: Lowering, n: Node) -> Result:
    """Unrolled: the copies differ in their weights, and these make up the model's size."""
    region: Region = n.attrs["region"]
    carried = int(n.attrs["carried"])
    method = n.attrs.get("method", "forward")
    arguments = [w.value(i) for i in n.inputs]
    values, context = arguments[:carried], arguments[carried:]
    copies = list(enumerate(w.weights.copies(n.attrs["child"])))
    total = w.g.const(0.0)
    has_log_det = w.shared.program(region, method).log_det
    for k, weights in reversed(copies) if method in ("inverse", "generate") else copies:
        found = w.call(n, weights, [*values, *context], f"{n.attrs['child']}.{k}")
        values = found[:carried]
        if has_log_det:
            total = w.g.add(total, found[-1])
    return flow_of([*values, total] if n.attrs.get("log_det") else values, n)


__all__ = ["EMITTERS"]
