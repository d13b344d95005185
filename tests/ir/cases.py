"""For every op, graphs of that one op with operands to sample: the material of test_registry.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flowlang.backends.torch.codegen import Generator, module_text
from flowlang.backends.torch.load import load_module
from torch import Tensor, nn

from flowlang.derive.analyse import Analyses
from flowlang.ir.build import Builder
from flowlang.ir.domains import Domain, domain
from flowlang.ir.graph import Graph, Node, Region
from flowlang.ir.interval import POSITIVE, REAL, UNIT, Interval, closed, opened
from flowlang.ir.ops import OPS
from flowlang.ir.types import TensorType
from tests.interpreter import evaluate, parameters_of

EDGES = (0.0, -0.0, 1e-6, -1e-6, 30.0, -30.0, 1.0, -1.0, 0.5, 2.0)


def real(*axes: tuple[str, int]) -> TensorType:
    return TensorType.of(*axes)


@dataclass(frozen=True)
class Operand:
    """An operand of a case: a sampled input, or a parameter with a structured domain."""

    type: TensorType
    interval: Interval = REAL
    batched: bool = True
    param: Domain | None = None
    edges: bool = True  # may take the edge values (±30 makes some sums useless)
    distinct: bool = False  # no two entries equal: sorting and extrema have no gradient at ties


@dataclass(frozen=True)
class Case:
    op: str
    operands: tuple[Operand, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return f"{self.op}{'-' + self.note if self.note else ''}"


@dataclass
class Bench:
    """A case made: its region, the one node of the op, its operands and the generated module."""

    case: Case
    region: Region
    node: Node
    operands: list[int]
    analyses: Analyses
    module: nn.Module
    parameters: dict[str, Any]

    @property
    def graph(self) -> Graph:
        return self.region.graph

    def types(self) -> list[TensorType]:
        return [self.graph[i].tensor for i in self.node.inputs]

    def value(self, inputs: Sequence[Tensor], wanted: int | None = None) -> Tensor:
        """The reference value for one sample."""
        given = dict(zip(self.region.inputs, inputs, strict=True))
        target = self.node.id if wanted is None else wanted
        return evaluate(self.graph, given, self.parameters, [target], self.analyses)[0]

    def run(self, *inputs: Tensor) -> Tensor:
        """The generated program's result, without the face's checks; a graph without inputs takes one that tells the batch."""
        found = self.module._forward(*inputs) if inputs else self.module._forward(torch.zeros(()))
        assert isinstance(found, Tensor)
        return found

    def values(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """The generated module's values for several samples at once: for questions that need many of them."""
        operands = [o for o in self.case.operands if o.param is None]
        with torch.no_grad():
            if operands and all(o.batched for o in operands):
                return self.run(*(torch.stack([r[k] for r in rows]) for k in range(len(operands))))
            out = []
            for r in rows:
                y = self.run(*(v.unsqueeze(0) if o.batched else v for o, v in zip(operands, r, strict=True)))
                out.append(y[0] if self.node.batched else y)
            return torch.stack(out)

    def operand_values(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        given = dict(zip(self.region.inputs, inputs, strict=True))
        return [given[i] if i in given else evaluate(self.graph, {}, self.parameters, [i])[0] for i in self.node.inputs]

    def samples(self, seed: int, count: int) -> list[list[Tensor]]:
        g = torch.Generator().manual_seed(seed)
        sampled = [o for o in self.case.operands if o.param is None]
        return [[sample(o, g, k) for o in sampled] for k in range(count)]


def inside(iv: Interval, v: float) -> bool:
    return iv.contains(v) and math.isfinite(v)


def edge_values(iv: Interval) -> list[float]:
    near = [iv.lo + 1e-6, iv.hi - 1e-6, iv.lo, iv.hi]
    return [v for v in (*EDGES, *near) if inside(iv, v)]


def sample(o: Operand, g: torch.Generator, k: int) -> Tensor:
    """Values of one operand: random ones inside its interval, edge values among them."""
    iv, shape = o.interval, o.type.shape
    z = torch.randn(shape, generator=g, dtype=torch.float64) * (0.5 + k % 3)
    if o.type.kind in ("int", "bool"):
        lo, hi = int(iv.lo), int(iv.hi)
        whole = torch.randint(lo, hi + 1, shape, generator=g)
        return whole.bool() if o.type.kind == "bool" else whole.double()
    if iv.finite:
        x = iv.lo + (iv.hi - iv.lo) * torch.sigmoid(z)
    elif iv.lo > -math.inf:
        x = iv.lo + torch.exp(z)
    elif iv.hi < math.inf:
        x = iv.hi - torch.exp(z)
    else:
        x = z
    if o.edges and k % 2 == 0:
        values = torch.tensor(edge_values(iv), dtype=torch.float64)
        pick = torch.randint(0, len(values), shape, generator=g)
        chosen = torch.rand(shape, generator=g) < 0.5
        x = torch.where(chosen, values[pick], x)
    if o.distinct:
        x = x + 1e-3 * torch.arange(x.numel(), dtype=torch.float64).reshape(shape)
    return x


def bench(case: Case) -> Bench:
    region = Region("one_op", "net", Graph())
    b = Builder(region.graph)
    ids: list[int] = []
    for k, o in enumerate(case.operands):
        if o.param is not None:
            start = ("orthogonal",) if o.param.structure in ("plu", "dense", "orthogonal", "stiefel") else 0.3
            ids.append(b.leaf("param", o.type, batched=False, label=f"w{k}", name=f"w{k}", domain=o.param, init=start))
            continue
        limits = Domain("case", (), o.interval, o.type.kind)
        at = b.leaf("input", o.type, batched=o.batched, label=f"x{k}", name=f"x{k}", role="map", domain=limits)
        region.inputs.append(at)
        ids.append(at)
    dummy = b.leaf("input", TensorType(), batched=True, name="unused", role="map") if not region.inputs else None
    # Not through the builder: its simplifications would replace some ops.
    type_ = OPS[case.op].infer([region.graph[i].tensor for i in ids], case.attrs)
    node = region.graph.add(case.op, tuple(ids), type_, case.attrs)
    region.outputs = [node.id]
    region.context = [dummy] if dummy is not None else []
    analyses = Analyses()
    generated = Generator(region, analyses, "one op").generate()
    text = module_text(generated, standalone=False, title="one op", origin="one op")
    before = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        torch.set_default_dtype(torch.float64)
        try:
            module = getattr(load_module(text), generated.root)()
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for p in module.parameters():
                p += 0.3 * torch.randn_like(p)
    return Bench(case, region, node, ids, analyses, module, parameters_of(region, module))


# ---- the cases ----------------------------------------------------------------------------------

LINE = real(("N", 16))
PLANE = real(("T", 3), ("D", 4))
DOMAINS: dict[str, Interval] = {
    "log": POSITIVE, "log1p": Interval(-1, math.inf, True, True), "sqrt": POSITIVE, "logit": UNIT, "atanh": opened(-1, 1),
    "asin": closed(-1, 1), "acos": closed(-1, 1), "softplus_inverse": POSITIVE, "erfinv": opened(-1, 1), "lgamma": POSITIVE,
    "tan": opened(-1.5, 1.5),
}  # fmt: skip
SIDES: dict[str, tuple[Interval, ...]] = {  # ops that are defined, or invertible, on a side of 0 only
    "reciprocal": (POSITIVE, Interval(-math.inf, 0, True, True)), "log_abs": (POSITIVE, Interval(-math.inf, 0, True, True)),
    "square": (REAL, POSITIVE), "abs": (REAL, POSITIVE), "sqrt": (POSITIVE,),
}  # fmt: skip
UNARY = (
    "neg", "exp", "log", "log_abs", "log1p", "expm1", "sqrt", "square", "abs", "sign", "reciprocal", "sin", "cos", "tan",
    "atan", "sinh", "cosh", "log_cosh", "asinh", "tanh", "tanh_slope", "log_tanh_slope", "atanh", "sigmoid", "sigmoid_slope",
    "log_sigmoid_slope", "log_sigmoid", "logit", "softplus", "softplus_inverse", "erf", "erfinv", "relu", "silu", "gelu",
    "floor", "whole_part", "fraction_part", "round", "stop", "asin", "acos", "lgamma", "selu", "log_bessel_i0e",
)  # fmt: skip


def unary_cases() -> Iterator[Case]:
    for op in UNARY:
        for k, iv in enumerate(SIDES.get(op, (DOMAINS.get(op, REAL),))):
            yield Case(op, (Operand(LINE, iv),), note="" if not k else f"side{k}")
    yield Case("not", (Operand(TensorType.of(("N", 16), kind="bool"), closed(0, 1)),))
    for slope in (0.1, 2.0, -0.5):
        yield Case("leaky_relu", (Operand(LINE),), {"slope": slope}, str(slope))
    for alpha in (1.0, 0.5):
        yield Case("elu", (Operand(LINE),), {"alpha": alpha}, str(alpha))
    yield Case("clamp", (Operand(LINE),), {"lo": -0.75, "hi": 2.5})
    for e in (3.0, -1.5, 2.5, -3.0, 4.0):
        for iv in (POSITIVE, REAL) if e in (3.0, 4.0) else (POSITIVE,):
            yield Case("pow", (Operand(LINE, iv),), {"exponent": e}, f"{e}{'' if iv is POSITIVE else 'all'}")


def binary_cases() -> Iterator[Case]:
    full, row, other = PLANE, real(("D", 4)), real(("D", 4), ("T", 3))
    nonzero = Interval(0.25, 4.0)
    for op in ("add", "sub", "mul", "div", "min", "max", "mod", "lt", "le", "gt", "ge", "eq", "ne"):
        right = nonzero if op in ("div", "mod") else REAL
        yield Case(op, (Operand(full), Operand(other, right)), note="same")
        yield Case(op, (Operand(full), Operand(row, right, batched=False)), note="broadcast")
        yield Case(op, (Operand(row), Operand(full, right)), note="wider")
    yield Case("mul", (Operand(full), Operand(other, nonzero)), note="nonzero")
    yield Case("div", (Operand(full, nonzero), Operand(other, nonzero)), note="nonzero")
    yield Case("pow", (Operand(full, Interval(0.1, 9.0)), Operand(row, Interval(-3.0, 3.0))), note="two")
    circle = Interval(-math.pi, math.pi, False, True)
    yield Case("rotate", (Operand(full, circle), Operand(other)), note="same")
    yield Case("rotate", (Operand(full, circle), Operand(row, batched=False)), note="broadcast")
    bits = [TensorType.of(*((a.name, a.size) for a in t.axes), kind="bool") for t in (full, row)]
    for op in ("and", "or"):
        yield Case(op, tuple(Operand(t, closed(0, 1)) for t in bits))
    yield Case("where", (Operand(bits[0], closed(0, 1)), Operand(full), Operand(other)), note="same")
    yield Case("where", (Operand(bits[1], closed(0, 1)), Operand(full), Operand(row, batched=False)), note="broadcast")
    yield Case("surrogate", (Operand(bits[0], closed(0, 1)), Operand(full)), note="same")
    yield Case("surrogate", (Operand(bits[1], closed(0, 1)), Operand(full)), note="broadcast")


def reduction_cases() -> Iterator[Case]:
    for op in ("sum", "mean", "prod", "reduce_max", "reduce_min", "logsumexp", "argmax"):
        for axes in (("D",), ("T", "D")):
            o = Operand(PLANE, distinct="max" in op or "min" in op)
            yield Case(op, (o,), {"axes": axes}, "".join(axes))
    for axes in (("D",), ("T", "D")):
        yield Case("length", (Operand(PLANE),), {"axes": axes}, "".join(axes))
        yield Case("normalize", (Operand(PLANE),), {"axes": axes}, "".join(axes))
    yield Case("prod", (Operand(PLANE, POSITIVE, edges=False),), {"axes": ("T",)}, "positive")
    for ddof in (0, 1):
        yield Case("var", (Operand(PLANE),), {"axes": ("D",), "ddof": ddof}, f"ddof{ddof}")
    for op in ("any", "all"):
        yield Case(op, (Operand(TensorType.of(("T", 3), ("D", 4), kind="bool"), closed(0, 1)),), {"axes": ("T", "D")})
    square = real(("T", 4), ("S", 4), ("h", 2))
    for op in ("softmax", "log_softmax"):
        yield Case(op, (Operand(PLANE, edges=False),), {"axis": "D"})
        yield Case(op, (Operand(PLANE),), {"axis": "D"}, "edges")
    yield Case("softmax", (Operand(square, edges=False),), {"axis": "S", "causal": "T"}, "causal")
    yield Case("softmax", (Operand(real(("T", 3), ("D", 1))),), {"axis": "D"}, "one")
    for exclusive in (False, True):
        for reverse in (False, True):
            attrs = {"axis": "T", "exclusive": exclusive, "reverse": reverse}
            yield Case("cumsum", (Operand(PLANE),), attrs, f"{exclusive}{reverse}")
    mixture = (Operand(real(("K", 3), ("D", 4))), Operand(real(("D", 4), ("K", 3)), edges=False))
    yield Case("logit_mixture", mixture, {"axis": "K"})
    yield Case("sort", (Operand(PLANE, distinct=True),), {"axis": "D"})
    a, c = real(("T", 3), ("D", 4)), real(("D", 4), ("E", 2))
    yield Case("contract", (Operand(a), Operand(c, batched=False)), {"axes": ("D",)}, "matrix")
    yield Case("contract", (Operand(a), Operand(real(("D", 4), ("T", 3)))), {"axes": ("D",)}, "rows")
    yield Case(
        "contract", (Operand(a), Operand(real(("D", 4), ("T", 3)), closed(-0.5, 1.5))), {"axes": ("T", "D")}, "two"
    )
    yield Case("contract", (Operand(c, closed(-2.0, 1.0), batched=False), Operand(a)), {"axes": ("D",)}, "left")


def structure_cases() -> Iterator[Case]:
    x = Operand(PLANE)
    part = Operand(real(("T", 3), ("D", 2)))
    yield Case("identity", (x,))
    yield Case("within", (Operand(PLANE, closed(-0.5, 2.0)),), {"lo": -0.5, "hi": 2.0})
    yield Case("slice", (x,), {"axis": "D", "start": 1, "stop": 3})
    yield Case("pick", (x,), {"axis": "T", "index": 2})
    yield Case("join", (x, part), {"axis": "D"})
    yield Case("join", (x, Operand(real(("T", 3), ("D", 2)), batched=False)), {"axis": "D"}, "mixed")
    yield Case("stack", (x, x), {"axis": "K"})
    yield Case("stack", (x, Operand(PLANE, batched=False)), {"axis": "K"}, "mixed")
    yield Case("reverse", (x,), {"axis": "T"})
    for k in (1, -2, 5):
        yield Case("shift", (x,), {"axis": "D", "k": k}, str(k))
    yield Case("permute", (x,), {"axis": "D", "order": (2, 0, 3, 1)})
    yield Case("rename", (x,), {"pairs": (("D", "E"),)})
    yield Case("rename", (x,), {"pairs": (("D", "T"), ("T", "D"))}, "swap")
    yield Case("order", (x,), {"names": ("D", "T")})
    yield Case("order", (Operand(real(("A", 2), ("B", 3), ("C", 2))),), {"names": ("C", "A", "B")}, "three")
    yield Case("split", (x,), {"axis": "D", "into": (("h", 2), ("d", 2))})
    yield Case(
        "merge",
        (Operand(real(("A", 2), ("B", 3), ("C", 2))),),
        {"axes": ("A", "B"), "into": "M", "sizes": (("A", 2), ("B", 3))},
    )
    yield Case("expand", (Operand(real(("D", 4))),), {"axes": (("T", 3), ("D", 4))})
    yield Case("expand", (Operand(real(("D", 4)), batched=False),), {"axes": (("D", 4), ("T", 3))}, "behind")
    index = TensorType.of(("I", 5), kind="int")
    yield Case("gather", (x, Operand(index, closed(0, 2), batched=False)), {"axis": "T"}, "table")
    yield Case("gather", (x, Operand(index, closed(0, 2))), {"axis": "T"}, "both")
    yield Case("gather", (Operand(PLANE, batched=False), Operand(index, closed(0, 3))), {"axis": "D"}, "embedding")
    yield Case(
        "gather", (x, Operand(TensorType.of(("T", 3), ("I", 2), kind="int"), closed(0, 3))), {"axis": "D"}, "along"
    )
    yield Case("index", (), {"axis": "T", "size": 5})


MATRICES = (
    ("Invertible", ()), ("Invertible", ("dense",)), ("Orthogonal", ()), ("Orthogonal", ("cayley",)), ("Orthogonal", ("exp",)), ("LowerTriangular", ()),
    ("UnitLowerTriangular", ()), ("Spd", ()),
)  # fmt: skip


def matrix_cases() -> Iterator[Case]:
    square = real(("E", 3), ("D", 4), ("F", 4))
    yield Case("diagonal", (Operand(square),), {"row": "D", "col": "F"})
    yield Case("diagonal", (Operand(real(("D", 4), ("F", 4)), batched=False),), {"row": "D", "col": "F"}, "parameter")
    for n in (1, 2, 3, 4):
        yield Case("det", (Operand(real(("D", n), ("E", 2), ("F", n)), edges=False),), {"row": "D", "col": "F"}, str(n))
    yield Case("det", (Operand(real(("F", 3), ("D", 3)), batched=False),), {"row": "D", "col": "F"}, "turned")
    for n, function in ((1, "matrix_exp"), (3, "matrix_exp"), (3, "matrix_log"), (3, "matrix_power")):
        eigen = {"row": "D", "col": "F", "function": function, "power": 0.5, "floor": 0.1}
        yield Case("eigen", (Operand(real(("D", n), ("E", 2), ("F", n)), edges=False),), eigen, f"{function}{n}")
    for name, args in MATRICES:
        found = domain(name, args)
        assert found is not None
        note = "".join((name, *args))
        w = Operand(real(("D'", 4), ("D", 4)), param=found)
        many = Operand(real(("T", 3), ("D'", 4), ("D", 4)), param=found)
        yield Case("contract", (w, Operand(PLANE, edges=False)), {"axes": ("D",)}, note)
        yield Case("contract", (Operand(real(("D'", 4), ("T", 3)), edges=False), w), {"axes": ("D'",)}, f"{note}T")
        yield Case("contract", (many, Operand(PLANE, edges=False)), {"axes": ("D",)}, f"{note}many")
        y = Operand(real(("T", 3), ("D'", 4)), edges=False)
        yield Case("matrix_solve", (w, y), {"axis": "D", "given": "D'"}, note)
        yield Case("matrix_solve", (many, y), {"axis": "D", "given": "D'"}, f"{note}many")
        yield Case(
            "matrix_solve",
            (w, Operand(real(("T", 3), ("D", 4)), edges=False)),
            {"axis": "D'", "given": "D"},
            f"{note}T",
        )
        yield Case("matrix_log_det", (w,), note=note)
        yield Case("matrix_log_det", (many,), note=f"{note}many")
    stiefel = domain("Stiefel")
    assert stiefel is not None
    tall = Operand(real(("D", 4), ("E", 2)), param=stiefel)
    yield Case("contract", (tall, Operand(PLANE, edges=False)), {"axes": ("D",)}, "Stiefel")
    weight = Operand(real(("E", 3), ("D", 4)), batched=False)
    degrees = {"row": "E", "col": "D", "row_degrees": (0, 1, 2), "col_degrees": (0, 1, 2, 3)}
    for strict in (False, True):
        yield Case("masked", (weight,), {**degrees, "strict": strict}, str(strict))
    turned = Operand(real(("D", 4), ("E", 3)), batched=False)
    yield Case("masked", (turned,), {**degrees, "strict": True}, "turned")
    wide = Operand(real(("E", 3), ("h", 2), ("D", 4)), batched=False)
    yield Case("masked", (wide,), {**degrees, "strict": True}, "three")
    square = Operand(real(("D'", 4), ("D", 4)), batched=False)
    several = Operand(real(("T", 3), ("D", 4), ("D'", 4)), batched=False)
    for k, w in enumerate((square, several)):
        yield Case("diagonal", (w,), {"row": "D'", "col": "D"}, str(k))
    plain = domain("R")
    for bound in (0.2, 50.0):
        yield Case(
            "norm_bounded",
            (Operand(real(("E", 3), ("D", 4)), param=plain),),
            {"axes": ("D",), "bound": bound},
            str(bound),
        )
    order = Operand(real(), param=domain("Interval", (1.0, 5.0)))
    yield Case(
        "norm_bounded",
        (Operand(real(("E", 3), ("D", 4)), param=plain), order, order),
        {"axes": ("D",), "bound": 0.2},
        "orders",
    )
    yield from window_cases()


def window_cases() -> Iterator[Case]:
    image = Operand(real(("C", 4), ("H", 5), ("W", 6)))
    plain = {
        "channel": "C",
        "space": ("H", "W"),
        "stride": (1, 1),
        "groups": 1,
        "dilation": (1, 1),
        "padding": ((1, 1), (1, 1)),
    }

    def kernel(*shape: int) -> Operand:
        return Operand(
            TensorType.of(*zip(("K", "C_in", "kd", "kh", "kw")[: len(shape)], shape, strict=True)), batched=False
        )

    for note, shape, attrs in (
        ("3x3", (2, 4, 3, 3), {}), ("even", (2, 4, 2, 4), {"padding": ((0, 1), (1, 2))}), ("stride", (2, 4, 3, 3), {"stride": (2, 2)}),
        ("strides", (2, 4, 4, 3), {"stride": (2, 3)}), ("dilated", (2, 4, 3, 3), {"dilation": (2, 1), "padding": ((2, 2), (0, 0))}),
        ("groups", (4, 2, 3, 1), {"groups": 2, "padding": ((1, 1), (0, 0))}),
    ):  # fmt: skip
        yield Case("conv", (image, kernel(*shape)), {**plain, **attrs}, note)
    for note, shape, attrs in (
        ("3x3", (4, 2, 3, 3), {}), ("doubles", (4, 2, 4, 4), {"stride": (2, 2)}), ("odd", (4, 2, 3, 3), {"stride": (2, 2), "padding": ((1, 0), (1, 0))}),
        ("groups", (4, 2, 3, 2), {"groups": 2, "stride": (1, 2), "padding": ((1, 1), (0, 0))}),
        ("spread", (4, 2, 2, 1), {"stride": (1, 3), "dilation": (3, 1), "padding": ((1, 2), (0, -2))}),
    ):  # fmt: skip
        yield Case("conv_transpose", (image, kernel(*shape)), {**plain, **attrs}, note)
    bias = Operand(real(("K", 2)), batched=False)
    yield Case("conv", (image, kernel(2, 4, 3, 3), bias), plain, "bias")
    yield Case("conv_transpose", (image, kernel(4, 2, 3, 3), bias), {**plain, "stride": (2, 1)}, "bias")
    turned_image = Operand(real(("H", 5), ("W", 6), ("C", 4)))
    yield Case("conv", (turned_image, kernel(2, 4, 3, 3)), plain, "channels_last")
    line = {**plain, "space": ("T",), "stride": (2,), "dilation": (1,), "padding": ((1, 1),)}
    yield Case("conv", (Operand(real(("C", 4), ("T", 7))), kernel(2, 4, 3)), line, "1d")
    yield Case("conv_transpose", (Operand(real(("C", 4), ("T", 4))), kernel(4, 2, 3)), line, "1d")
    solid = {**plain, "space": ("Z", "H", "W"), "stride": (1, 1, 2), "dilation": (1,) * 3, "padding": ((1, 1),) * 3}
    yield Case("conv", (Operand(real(("C", 2), ("Z", 3), ("H", 3), ("W", 4))), kernel(2, 2, 3, 3, 3)), solid, "3d")
    for op in ("max_pool", "mean_pool"):
        window = Operand(image.type, distinct=op == "max_pool")
        base = {
            "space": ("H", "W"),
            "kernel": (2, 2),
            "stride": (2, 2),
            "dilation": (1, 1),
            "padding": ((0, 0), (0, 0)),
        }
        yield Case(op, (window,), base, "2x2")
        yield Case(op, (window,), {**base, "kernel": (3, 3), "padding": ((1, 1), (1, 1))}, "overlapping")
        yield Case(
            op,
            (window,),
            {**base, "space": ("H",), "kernel": (2,), "stride": (3,), "dilation": (1,), "padding": ((0, 0),)},
            "1d",
        )


def spline_cases() -> Iterator[Case]:
    sizes = {
        "rqs": (5, 5, 4),
        "linear_spline": (5,),
        "quadratic_spline": (5, 6),
        "cubic_spline": (5, 5, 2),
        "rqs_circular": (5, 5, 5),
    }
    for kind, counts in sizes.items():
        per_entry = tuple(Operand(real(("D", 2), ("T", 2), (f"K{k}", n)), edges=False) for k, n in enumerate(counts))
        shared = tuple(Operand(real((f"K{k}", n)), batched=False, edges=False) for k, n in enumerate(counts))
        attrs: dict[str, Any] = {"min_height": 0.02} if kind != "quadratic_spline" else {"min_slope": 0.05}
        for suffix in ("", "_inverse", "_log_slope"):
            for bound, params, more in ((3.0, per_entry, {}), (2.0, shared, attrs)):
                circle = Interval(-bound, bound, False, True) if kind == "rqs_circular" else REAL
                x = Operand(real(("T", 2), ("D", 2)), circle)
                yield Case(f"{kind}{suffix}", (x, *params), {"bound": bound, **more}, "shared" if more else "each")


FAMILIES: tuple[Callable[[], Iterator[Case]], ...] = (
    unary_cases, binary_cases, reduction_cases, structure_cases, matrix_cases, spline_cases,
)  # fmt: skip
CASES = [c for family in FAMILIES for c in family()]
