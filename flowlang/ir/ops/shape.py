"""Ops that move values about: slices, joins, renaming, splitting and merging of axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowlang.ir.interval import Interval, closed, point
from flowlang.ir.ops.base import Attrs, Facts, LocalLogDet, Need, Op, OpProblem
from flowlang.ir.relation import MAX_BITS, Matrix, Relation, Support, eye, matrix
from flowlang.ir.types import Axis, TensorType, Type

if TYPE_CHECKING:
    from flowlang.ir.build import Builder
    from flowlang.ir.graph import Node

OPS: list[Op] = []


def need(t: TensorType, axis: str) -> int:
    if not t.has(axis):
        raise OpProblem(
            "FL0302",
            f"this value has no axis `{axis}`; its axes are {', '.join(f'`{n}`' for n in t.names) or 'none'}",
            suggestion="name one of its axes, or rename one, as in `x[D -> E]`",
        )
    return t.size(axis)


def one(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    return ivs[0]


def hull(ivs: Sequence[Interval], types: Sequence[TensorType], node: Node) -> Interval:
    out = ivs[0]
    for i in ivs[1:]:
        out = out.union(i)
    return out


def no_needs(node: Node, slot: int, facts: Facts) -> Sequence[Need] | str:
    return ()


def zero_log_det(b: Builder, node: Node, slot: int, args: Sequence[int], out: int) -> LocalLogDet:
    return LocalLogDet(None)


def same(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, tangent: int) -> int | None:
    """The tangent goes the way of the value: these ops are linear."""
    return b.op(node.op, tangent, **dict(node.attrs))


def lip_one(node: Node, types: Sequence[TensorType], slot: int, ivs: Sequence[Interval]) -> float | None:
    return 1.0


def sized(n: int, m: int) -> bool:
    return n * m <= MAX_BITS


def mapping(n: int, m: int, image: Any) -> Matrix | None:
    """Row i relates to column image(i) (None: to none)."""
    if not sized(n, m):
        return None
    return matrix(n, m, ((1 << j) if (j := image(i)) is not None and 0 <= j < m else 0 for i in range(n)))


# ---- slices and picks ---------------------------------------------------------------------------


def _slice_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    need(types[0], attrs["axis"])
    return types[0].resized(attrs["axis"], attrs["stop"] - attrs["start"])


def _slice_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    axis, start = node.attrs["axis"], node.attrs["start"]
    n, m = node.tensor.size(axis), types[0].size(axis)
    return Relation.equal(
        node.tensor.axes, types[0].axes, but=(axis,), extra={(axis, axis): mapping(n, m, lambda i: i + start)}
    )


def _cut_support(node: Node, supports: Sequence[Support | None]) -> Support | None:
    return supports[0].without((node.attrs["axis"],)) if supports[0] is not None else None


def _slice_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    axis, start, stop = attrs["axis"], attrs["start"], attrs["stop"]
    t = b.type(args[0])
    if t.has(axis) and start == 0 and stop == t.size(axis):
        return args[0]
    inner = b.graph[args[0]]
    if inner.op == "slice" and inner.attrs["axis"] == axis:
        return b.op(
            "slice", inner.inputs[0], axis=axis, start=inner.attrs["start"] + start, stop=inner.attrs["start"] + stop
        )
    if inner.op == "join" and inner.attrs["axis"] == axis:
        at = 0
        for part in inner.inputs:
            size = b.type(part).size(axis)
            if at == start and at + size == stop:
                return part
            at += size
    return None


OPS.append(Op(
    "slice", _slice_infer, _slice_depend, interval=one, jvp=same, lipschitz=lip_one, simplify=_slice_simplify,
    support=lambda node, types, supports: _cut_support(node, supports),
    why_not={"invert": "one slice does not tell the rest; all of them together do"},
))  # fmt: skip


def _pick_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    need(types[0], attrs["axis"])
    return types[0].without((attrs["axis"],))


def _pick_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    axis, index = node.attrs["axis"], node.attrs["index"]
    size = types[0].size(axis)
    return Relation.equal(node.tensor.axes, types[0].axes, extra={(None, axis): mapping(1, size, lambda i: index)})


def _pick_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    inner = b.graph[args[0]]
    if inner.op == "stack" and inner.attrs["axis"] == attrs["axis"]:
        return inner.inputs[attrs["index"]]
    if inner.op == "slice" and inner.attrs["axis"] == attrs["axis"] and attrs["index"] >= 0:
        return b.op("pick", inner.inputs[0], axis=attrs["axis"], index=inner.attrs["start"] + attrs["index"])
    return None


OPS.append(Op(
    "pick", _pick_infer, _pick_depend, interval=one, jvp=same, lipschitz=lip_one, simplify=_pick_simplify,
    support=lambda node, types, supports: _cut_support(node, supports),
    why_not={"invert": "one index does not tell the rest; all of them together do"},
))  # fmt: skip


# ---- join and stack -----------------------------------------------------------------------------


def _join_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    axis = attrs["axis"]
    total = sum(need(t, axis) for t in types)
    first = types[0]
    for t in types[1:]:
        if t.resized(axis, 1).axes != first.resized(axis, 1).axes:
            raise OpProblem(
                "FL0301",
                f"the parts of a join differ beside `{axis}`: `{first}` and `{t}`",
                suggestion="parts of a join agree in all other axes",
            )
    kind = "int" if all(t.kind == "int" for t in types) else "real"
    return first.resized(axis, total).as_kind(kind)


def offset_of(node: Node, types: Sequence[TensorType], slot: int) -> int:
    return sum(t.size(node.attrs["axis"]) for t in types[:slot])


def _join_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    axis = node.attrs["axis"]
    n, m, off = node.tensor.size(axis), types[slot].size(axis), offset_of(node, types, slot)
    return Relation.equal(
        node.tensor.axes, types[slot].axes, but=(axis,), extra={(axis, axis): mapping(n, m, lambda i: i - off)}
    )


def _join_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    zero = b.const(0.0)
    parts = [
        t if k == slot else b.op("expand", zero, axes=tuple((x.name, x.size) for x in b.type(a).axes))
        for k, a in enumerate(args)
    ]
    return b.op("join", *parts, axis=node.attrs["axis"])


def _join_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    """A join of adjacent slices that cover a value is the value."""
    axis = attrs["axis"]
    nodes = [b.graph[a] for a in args]
    if len(args) == 1:
        return args[0]
    if all(n.op == "slice" and n.attrs["axis"] == axis for n in nodes):
        source = nodes[0].inputs[0]
        at = 0
        for n in nodes:
            if n.inputs[0] != source or n.attrs["start"] != at:
                return None
            at = n.attrs["stop"]
        return source if at == b.type(source).size(axis) else None
    return None


OPS.append(Op(
    "join", _join_infer, _join_depend, interval=hull, jvp=_join_jvp, lipschitz=lip_one, simplify=_join_simplify,
    why_not={"invert": "parts are read off by slices"},
))  # fmt: skip


def _stack_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    first = types[0]
    for t in types[1:]:
        if t.axes != first.axes:
            raise OpProblem(
                "FL0301",
                f"the parts of a stack differ: `{first}` and `{t}`",
                suggestion="parts of a stack have the same axes and sizes",
            )
    kind = "int" if all(t.kind == "int" for t in types) else "real"
    return first.with_axis(attrs["axis"], len(types), 0).as_kind(kind)


def _stack_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    axis = node.attrs["axis"]
    n = node.tensor.size(axis)
    return Relation.equal(
        node.tensor.axes, types[slot].axes, but=(axis,),
        extra={(axis, None): matrix(n, 1, (1 if i == slot else 0 for i in range(n)))},
    )  # fmt: skip


def _stack_jvp(b: Builder, node: Node, args: Sequence[int], out: int, slot: int, t: int) -> int | None:
    zero = b.const(0.0)
    parts = [
        t if k == slot else b.op("expand", zero, axes=tuple((x.name, x.size) for x in b.type(a).axes))
        for k, a in enumerate(args)
    ]
    return b.op("stack", *parts, axis=node.attrs["axis"])


OPS.append(Op(
    "stack", _stack_infer, _stack_depend, interval=hull, jvp=_stack_jvp, lipschitz=lip_one,
    why_not={"invert": "parts are read off by picks"},
))  # fmt: skip


# ---- along one axis -----------------------------------------------------------------------------


def _keep_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    need(types[0], attrs["axis"])
    return types[0]


def _along(image: Any) -> Any:
    def depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
        axis = node.attrs["axis"]
        n = node.tensor.size(axis)
        return Relation.equal(
            node.tensor.axes, types[0].axes, but=(axis,),
            extra={(axis, axis): mapping(n, n, lambda i: image(node, n, i))},
        )  # fmt: skip

    return depend


def _reverse_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    inner, axis = b.graph[args[0]], attrs["axis"]
    if inner.op == "reverse" and inner.attrs["axis"] == axis:
        return inner.inputs[0]
    t = b.type(args[0])
    return args[0] if t.has(axis) and t.size(axis) == 1 else None


OPS.append(Op(
    "reverse", _keep_infer, _along(lambda node, n, i: n - 1 - i), interval=one, jvp=same, lipschitz=lip_one,
    invert=lambda b, node, slot, args, out: b.op("reverse", out, axis=node.attrs["axis"]), needs=no_needs,
    log_det=zero_log_det, log_det_cost="0",
    simplify=_reverse_simplify,
))  # fmt: skip

OPS.append(Op(
    "shift", _keep_infer, _along(lambda node, n, i: i - node.attrs["k"]),
    interval=lambda ivs, types, node: ivs[0].union(point(0.0)) if node.attrs["k"] else ivs[0], jvp=same, lipschitz=lip_one,
    why_not={"invert": "`shift` drops the last entries"},
))  # fmt: skip


def _permute_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    n = need(types[0], attrs["axis"])
    if sorted(attrs["order"]) != list(range(n)):
        raise OpProblem(
            "FL0305",
            f"an order of axis `{attrs['axis']}` names each of 0..{n} once",
            suggestion="as in `permute[D]([1, 0])` for two",
        )
    return types[0]


def _permute_invert(b: Builder, node: Node, slot: int, args: Sequence[int | None], out: int) -> int:
    order = node.attrs["order"]
    back = [0] * len(order)
    for i, j in enumerate(order):
        back[j] = i
    return b.op("permute", out, axis=node.attrs["axis"], order=tuple(back))


OPS.append(Op(
    "permute", _permute_infer, _along(lambda node, n, i: node.attrs["order"][i]), interval=one, jvp=same, lipschitz=lip_one,
    invert=_permute_invert, needs=no_needs, log_det=zero_log_det, log_det_cost="0",
    simplify=lambda b, args, attrs: args[0] if tuple(attrs["order"]) == tuple(range(len(attrs["order"]))) else None,
))  # fmt: skip


# ---- names and order of axes --------------------------------------------------------------------


def _rename_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    pairs = dict(attrs["pairs"])
    for old in pairs:
        need(types[0], old)
    found = types[0].renamed(pairs)
    if len(set(found.names)) != len(found.names):
        raise OpProblem(
            "FL0307",
            f"two axes would have one name in `{found}`",
            suggestion="choose another name, or a prime as in `D'`",
        )
    return found


def _rename_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    pairs = dict(node.attrs["pairs"])
    parts = {(pairs.get(a.name, a.name), a.name): eye(a.size) for a in types[0].axes}
    return Relation.of(node.tensor.axes, types[0].axes, parts)  # type: ignore[arg-type]


def _rename_invert(b: Builder, node: Node, slot: int, args: Sequence[int | None], out: int) -> int:
    return b.op("rename", out, pairs=tuple((n, o) for o, n in node.attrs["pairs"]))


def _rename_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    pairs = tuple((o, n) for o, n in attrs["pairs"] if o != n)
    if not pairs:
        return args[0]
    inner = b.graph[args[0]]
    if inner.op == "rename":
        first = dict(inner.attrs["pairs"])
        back = {n: o for o, n in first.items()}
        merged = dict(first)
        for o, n in pairs:
            merged[back.get(o, o)] = n
        return b.op("rename", inner.inputs[0], pairs=tuple((o, n) for o, n in merged.items() if o != n))
    return None


OPS.append(Op(
    "rename", _rename_infer, _rename_depend, interval=one, jvp=same, lipschitz=lip_one, invert=_rename_invert,
    support=lambda node, types, supports: supports[0].renamed(dict(node.attrs["pairs"])) if supports[0] else None,
    needs=no_needs, log_det=zero_log_det, log_det_cost="0", simplify=_rename_simplify,
))  # fmt: skip


def _order_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    names = attrs["names"]
    if sorted(names) != sorted(types[0].names):
        raise OpProblem("FL0307", f"an order names each axis of `{types[0]}` once", suggestion="list every axis once")
    return TensorType(tuple(Axis(n, types[0].size(n)) for n in names), types[0].kind)


def _order_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    if b.type(args[0]).names == tuple(attrs["names"]):
        return args[0]
    inner = b.graph[args[0]]
    if inner.op == "order":
        return b.op("order", inner.inputs[0], names=tuple(attrs["names"]))
    return None


def _by_name(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.equal(node.tensor.axes, types[slot].axes)


def _order_invert(b: Builder, node: Node, slot: int, args: Sequence[int | None], out: int) -> int:
    return b.op("order", out, names=tuple(node.attrs["before"]) if "before" in node.attrs else b.type(out).names)


OPS.append(Op(
    "order", _order_infer, _by_name, interval=one, jvp=same, lipschitz=lip_one,
    invert=lambda b, node, slot, args, out: out, needs=no_needs, log_det=zero_log_det, log_det_cost="0",
    support=lambda node, types, supports: supports[0], simplify=_order_simplify,
))  # fmt: skip


def _split_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    n = need(types[0], attrs["axis"])
    total = 1
    for _, s in attrs["into"]:
        total *= s
    if total != n:
        raise OpProblem(
            "FL0301",
            f"axis `{attrs['axis']}` of size {n} does not split into {total}",
            suggestion="choose sizes whose sum is the axis's",
        )
    at = types[0].position(attrs["axis"])
    axes = list(types[0].axes)
    axes[at : at + 1] = [Axis(a, s) for a, s in attrs["into"]]
    if len({a.name for a in axes}) != len(axes):
        raise OpProblem(
            "FL0307", "two axes would have one name", suggestion="choose another name, or a prime as in `D'`"
        )
    return TensorType(tuple(axes), types[0].kind)


def strides(sizes: Sequence[int]) -> list[int]:
    out = [1] * len(sizes)
    for k in range(len(sizes) - 2, -1, -1):
        out[k] = out[k + 1] * sizes[k + 1]
    return out


def _split_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    axis = node.attrs["axis"]
    m = types[0].size(axis)
    sizes = [s for _, s in node.attrs["into"]]
    extra: dict[tuple[str | None, str | None], Matrix | None] = {}
    for (name, size), stride in zip(node.attrs["into"], strides(sizes), strict=True):
        extra[(name, axis)] = _digits(size, m, stride)
    return Relation.equal(node.tensor.axes, types[0].axes, but=(axis,), extra=extra)


def _digits(size: int, m: int, stride: int) -> Matrix | None:
    """Row i relates to every flat index whose digit of this stride is i."""
    if not sized(size, m):
        return None
    rows = [0] * size
    for j in range(m):
        rows[j // stride % size] |= 1 << j
    return matrix(size, m, rows)


def _split_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    inner = b.graph[args[0]]
    if inner.op == "merge" and inner.attrs["into"] == attrs["axis"]:
        source = b.type(inner.inputs[0])
        if tuple((n, source.size(n)) for n in inner.attrs["axes"]) == tuple(attrs["into"]):
            return inner.inputs[0]
    return None


OPS.append(Op(
    "split", _split_infer, _split_depend, interval=one, jvp=same, lipschitz=lip_one,
    invert=lambda b, node, slot, args, out: b.op(
        "merge", b.op("order", out, names=node.tensor.names), axes=tuple(n for n, _ in node.attrs["into"]),
        into=node.attrs["axis"]),
    needs=no_needs, log_det=zero_log_det, log_det_cost="0", simplify=_split_simplify,
))  # fmt: skip


def _merge_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    names = list(attrs["axes"])
    for n in names:
        need(types[0], n)
    at = types[0].position(names[0])
    if list(types[0].names[at : at + len(names)]) != names:
        raise OpProblem("FL0307", "the axes of a group do not stand together", suggestion="reorder them first")
    total = 1
    for n in names:
        total *= types[0].size(n)
    axes = list(types[0].axes)
    axes[at : at + len(names)] = [Axis(attrs["into"], total)]
    if len({a.name for a in axes}) != len(axes):
        raise OpProblem(
            "FL0307", "two axes would have one name", suggestion="choose another name, or a prime as in `D'`"
        )
    return TensorType(tuple(axes), types[0].kind)


def _merge_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    into = node.attrs["into"]
    n = node.tensor.size(into)
    names = node.attrs["axes"]
    sizes = [types[0].size(a) for a in names]
    extra: dict[tuple[str | None, str | None], Matrix | None] = {}
    for name, size, stride in zip(names, sizes, strides(sizes), strict=True):
        extra[(into, name)] = mapping(n, size, lambda i, stride=stride, size=size: i // stride % size)
    return Relation.equal(node.tensor.axes, types[0].axes, but=names, extra=extra)


def _merge_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    inner = b.graph[args[0]]
    same_axis = inner.op == "split" and inner.attrs["axis"] == attrs["into"]
    if same_axis and tuple(n for n, _ in inner.attrs["into"]) == tuple(attrs["axes"]):
        return inner.inputs[0]
    return None


def _merge_invert(b: Builder, node: Node, slot: int, args: Sequence[int | None], out: int) -> int:
    return b.op("split", out, axis=node.attrs["into"], into=tuple(node.attrs["sizes"]))


def _merge_simplify_sizes(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    found = _merge_simplify(b, args, attrs)
    if found is not None:
        return found
    if "sizes" not in attrs:  # the inverse needs the sizes of the parts
        t = b.type(args[0])
        sizes = tuple((n, need(t, n)) for n in attrs["axes"])
        return b.op("merge", *args, axes=tuple(attrs["axes"]), into=attrs["into"], sizes=sizes)
    return None


OPS.append(Op(
    "merge", _merge_infer, _merge_depend, interval=one, jvp=same, lipschitz=lip_one, invert=_merge_invert,
    needs=no_needs, log_det=zero_log_det, log_det_cost="0", simplify=_merge_simplify_sizes,
))  # fmt: skip


def _expand_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    target = TensorType.of(*attrs["axes"], kind=types[0].kind)
    for a in types[0].axes:
        if not target.has(a.name):
            raise OpProblem(
                "FL0307",
                f"axis `{a.name}` cannot be broadcast away",
                suggestion="reduce over it, as by `sum` or `mean`",
            )
        if target.size(a.name) != a.size:
            raise OpProblem(
                "FL0301",
                f"axis `{a.name}` has size {a.size} and size {target.size(a.name)}",
                suggestion="sizes agree where values meet",
            )
    return target


def _expand_simplify(b: Builder, args: Sequence[int], attrs: Attrs) -> int | None:
    t = b.type(args[0])
    names = tuple(n for n, _ in attrs["axes"])
    if t.names == names:
        return args[0]
    if set(t.names) == set(names):
        return b.op("order", args[0], names=names)
    return None


OPS.append(Op(
    "expand", _expand_infer, _by_name, interval=one, jvp=same,
    support=lambda node, types, supports: supports[0], simplify=_expand_simplify,
    lipschitz=lambda node, types, slot, ivs: (max(node.tensor.count, 1) / max(types[0].count, 1)) ** 0.5,
    why_not={"invert": "copies of a value are no new dimensions"},
))  # fmt: skip


# ---- gather and index ---------------------------------------------------------------------------


def _gather_infer(types: Sequence[TensorType], attrs: Attrs) -> Type:
    need(types[0], attrs["axis"])
    rest = types[0].without((attrs["axis"],))
    for a in types[1].axes:
        if rest.has(a.name) and rest.size(a.name) != a.size:
            raise OpProblem(
                "FL0301",
                f"axis `{a.name}` has size {rest.size(a.name)} and size {a.size}",
                suggestion="sizes agree where values meet",
            )
    axes = [a for a in types[1].axes if not rest.has(a.name)]
    return TensorType((*axes, *rest.axes), types[0].kind)


def _gather_depend(node: Node, types: Sequence[TensorType], slot: int, supports: Sequence[Support | None]) -> Relation:
    return Relation.equal(node.tensor.axes, types[slot].axes, but=(node.attrs["axis"],) if slot == 0 else ())


OPS.append(Op(
    "gather", _gather_infer, _gather_depend, interval=one, continuous=lambda slot: slot == 0,
    why_not={"invert": "an index may leave entries out", "jvp": "gathers belong to data", "lipschitz": "an entry may be taken often"},
))  # fmt: skip

OPS.append(Op(
    "index", lambda types, attrs: TensorType.of((attrs["axis"], attrs["size"]), kind="int"), _by_name,
    interval=lambda ivs, types, node: closed(0, max(int(node.attrs["size"]) - 1, 0)),
    why_not={"invert": "no operand", "jvp": "no operand", "lipschitz": "no operand"},
))  # fmt: skip
