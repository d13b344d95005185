"""Random typed graphs: maps of one or two values built of layers that are right, nearly right, or wrong.

Nothing here knows which is which; the compiler judges, and the test compares its judgement with the
Jacobian. Layers use several axes, slices, joins, shifts, reversals, cumulative sums, masks, matrix
products, shared values, context, split and merged axes, and called sub-regions: forward, inverted,
repeated, lifted over axes, on coordinates and on values that only condition.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from flowlang.ir.build import Builder
from flowlang.ir.domains import Domain, domain
from flowlang.ir.graph import Child, Graph, Region
from flowlang.ir.types import Axis, TensorType

PLAIN = ("tanh", "sin", "silu", "softplus", "sigmoid")


SHAPES = [(("T", 3), ("D", 4)), (("D", 4),), (("T", 4), ("D", 2)), (("D", 3),), (("H", 2), ("W", 2), ("C", 2))]
DOMAINS = ["R"] * 9 + ["Positive", "Unit"]


class Maker:
    """One random region. `depth` counts the calls around it."""

    def __init__(
        self,
        seed: int | random.Random,
        shape: tuple[tuple[str, int], ...] | None = None,
        depth: int = 0,
        reals: bool = False,
    ):
        self.r = seed if isinstance(seed, random.Random) else random.Random(seed)
        self.depth = depth
        self.graph = Graph()
        self.b = Builder(self.graph)
        self.type = TensorType.of(*(shape or self.r.choice(SHAPES)))
        self.region = Region("random" if not depth else f"inner{self.r.randrange(1000)}", "bijector", self.graph)
        found = domain("R" if depth or reals else self.r.choice(DOMAINS))
        assert found is not None
        self.domain = found
        self.x = self.input("x")
        self.c = self.context() if not depth else None
        self.params = 0

    def input(self, name: str) -> int:
        x = self.b.leaf("input", self.type, batched=True, label=name, name=name, role="map", domain=self.domain)
        self.region.inputs.append(x)
        return x

    def context(self) -> int:
        real = domain("R")
        c = self.b.leaf(
            "input", TensorType.of(("K", 2)), batched=True, label="c", name="c", role="context", domain=real
        )
        self.region.context.append(c)
        return c

    def param(self, type_: TensorType, name: str = "R", *args: float | str) -> int:
        self.params += 1
        found = domain(name, args)
        assert isinstance(found, Domain)
        init = {
            "orthogonal": ("orthogonal",),
            "plu": ("orthogonal",),
            "dense": ("orthogonal",),
            "lower": ("identity",),
            "unit_lower": ("identity",),
        }
        start = init.get(found.structure or "", ("normal", 0.0, 0.5) if name == "R" else 0.4)
        return self.b.leaf(
            "param", type_, batched=False, label=f"p{self.params}", name=f"p{self.params}", domain=found, init=start
        )

    # ---- pieces ---------------------------------------------------------------------------------

    def axis(self, n: int) -> str:
        return self.r.choice(self.b.type(n).names)

    def mix(self, h: int) -> int:
        """A value of the same type that mixes entries in some way, causal or not."""
        b, r = self.b, self.r
        a = self.axis(h)
        size = b.type(h).size(a)
        match r.randrange(14):
            case 0 | 1 | 2:
                return b.op("shift", h, axis=a, k=r.choice([1, 1, 1, -1, 2]))
            case 3:
                return b.op("cumsum", h, axis=a, exclusive=r.random() < 0.7, reverse=r.random() < 0.4)
            case 4:
                return b.op("reverse", h, axis=a)
            case 5:
                order = list(range(size))
                r.shuffle(order)
                return b.op("permute", h, axis=a, order=tuple(order))
            case 6 | 7:
                w = self.param(TensorType.of((f"{a}'", size), (a, size)))
                degrees = tuple(range(size))
                if r.random() < 0.8:
                    w = b.op(
                        "masked",
                        w,
                        row=f"{a}'",
                        col=a,
                        row_degrees=degrees,
                        col_degrees=degrees,
                        strict=r.random() < 0.75,
                    )
                out = b.op("rename", b.op("contract", h, w, axes=(a,)), pairs=((f"{a}'", a),))
                return b.op("order", out, names=b.type(h).names)
            case 8:
                if b.type(h).rank < 2:
                    return b.op("shift", h, axis=a, k=1)
                return self.attention(h, a)
            case 9:
                return b.op("expand", b.op("sum", h, axes=(a,)), axes=tuple((x.name, x.size) for x in b.type(h).axes))
            case 10:
                mask = b.op("mod", b.op("index", axis=a, size=size), b.const(2))
                return b.op("order", b.op("mul", h, mask), names=b.type(h).names)
            case 11:
                return self.call(h, invert=r.random() < 0.3)
            case 12:
                return self.split(h, self.mix) if self.depth < 2 else h
        return h

    def split(self, h: int, f: Callable[[int], int]) -> int:
        """f on the value with an axis split in two, or with two axes merged into one."""
        b, r = self.b, self.r
        t = b.type(h)
        even = [a for a in t.axes if a.size % 2 == 0 and a.size > 2 and not t.has("i")]
        self.depth += 1
        if even and (t.rank < 2 or r.random() < 0.5):
            a = r.choice(even)
            wide = f(b.op("split", h, axis=a.name, into=(("i", 2), ("j", a.size // 2))))
            wide = b.op("order", wide, names=tuple(m for n in t.names for m in (("i", "j") if n == a.name else (n,))))
            h = b.op("merge", wide, axes=("i", "j"), into=a.name)
        elif t.rank >= 2 and not t.has("all"):
            k = r.randrange(t.rank - 1)
            pair = t.axes[k : k + 2]
            flat = f(b.op("merge", h, axes=tuple(p.name for p in pair), into="all"))
            h = b.op("split", flat, axis="all", into=tuple((p.name, p.size) for p in pair))
        self.depth -= 1
        return h if b.type(h).names == t.names else b.op("order", h, names=t.names)

    def call(self, h: int, invert: bool = False, repeat: bool = False) -> int:
        """A sub-region applied to a value: along one axis or all, lifted over the others."""
        b, r = self.b, self.r
        t = b.type(h)
        if self.depth:
            return b.op("tanh", h)
        own = t.axes if repeat else tuple(a for a in t.axes if r.random() < 0.6) or t.axes[-1:]
        inner = self.below(r, tuple((a.name, a.size) for a in own), self.depth + 1).make()
        name = f"inner{len(self.region.children) + 1}"
        inner.name = name
        count = r.choice([2, 3]) if repeat else 1
        self.region.children[name] = Child(name, inner, count=count)
        lifted = tuple((a.name, a.size) for a in t.axes if a not in own)
        into = TensorType((*(Axis(n, s) for n, s in lifted), *own))
        h = b.op("order", h, names=into.names)
        attrs = {"child": name, "region": inner, "method": "inverse" if invert else "forward"}
        attrs |= {"count": count, "carried": 1} if repeat else {"lifted": lifted}
        out = self.graph.add("repeat" if repeat else "call", (h,), into, attrs).id
        return b.op("order", out, names=t.names)

    def below(self, r: random.Random, shape: tuple[tuple[str, int], ...], depth: int) -> Maker:
        """What makes a sub-region."""
        return type(self)(r, shape, depth)

    def attention(self, h: int, a: str) -> int:
        b = self.b
        other = next(n for n in b.type(h).names if n != a)
        size = b.type(h).size(a)
        k = b.op("rename", h, pairs=((a, "S"),))
        score = b.op("contract", h, k, axes=(other,))
        causal = {"causal": a} if self.r.random() < 0.8 else {}
        weights = b.op("softmax", score, axis="S", **causal)
        del size
        return b.op("order", b.op("contract", weights, k, axes=("S",)), names=b.type(h).names)

    def conditioner(self, h: int, target: TensorType) -> int:
        """Some function of h (and sometimes of the context) with the axes of the target."""
        b, r = self.b, self.r
        for _ in range(r.randrange(1, 4)):
            h = self.mix(h)
            if r.random() < 0.6:
                h = b.op(r.choice(PLAIN), h)
            if r.random() < 0.3:
                h = b.mul(h, b.const(r.choice([0.5, -1.0, 2.0])))
        for axis in b.type(h).axes:
            if not target.has(axis.name):
                h = b.op("mean", h, axes=(axis.name,))
            elif target.size(axis.name) != axis.size:
                small = target.size(axis.name)
                if small < axis.size:
                    start = r.randrange(axis.size - small + 1)
                    h = b.op("slice", h, axis=axis.name, start=start, stop=start + small)
                else:
                    h = b.op("mean", h, axes=(axis.name,))
        if self.c is not None and r.random() < 0.3:
            h = b.add(h, b.op("sum", b.op("tanh", self.c), axes=("K",)))
        h = b.op("expand", h, axes=tuple((x.name, x.size) for x in target.axes))
        return b.op("order", h, names=target.names)

    def affine(self, x: int, h: int) -> int:
        b, r = self.b, self.r
        t = b.type(x)
        match r.randrange(4):
            case 0:
                return b.add(x, self.conditioner(h, t))
            case 1:
                return b.mul(x, b.op("exp", b.op("tanh", self.conditioner(h, t))))
            case 2:
                return b.add(b.mul(x, b.op("exp", b.op("tanh", self.conditioner(h, t)))), self.conditioner(h, t))
        return b.mul(x, self.conditioner(h, t))  # may vanish

    # ---- layers ---------------------------------------------------------------------------------

    def coupling(self, x: int) -> int:
        b, r = self.b, self.r
        a = self.axis(x)
        n = b.type(x).size(a)
        if n < 2:
            return x
        cut = r.randrange(1, n)
        one = b.op("slice", x, axis=a, start=0, stop=cut)
        two = b.op("slice", x, axis=a, start=cut, stop=n)
        source = r.choice([one, one, one, one, x, two])
        changed = self.affine(two, source)
        if r.random() < 0.3:
            one = self.affine(one, r.choice([changed, changed, two, one]))
        parts = [one, changed]
        if r.random() < 0.1:
            parts = [changed, one] if b.type(one) == b.type(two) or r.random() < 0.5 else [one, two]
        if r.random() < 0.05 and b.type(one) == b.type(two):
            parts = [one, one]
        return b.op("join", *parts, axis=a)

    def autoregressive(self, x: int) -> int:
        return self.affine(x, x)

    def scalar(self, x: int) -> int:
        b, r = self.b, self.r
        match r.randrange(9):
            case 0:
                amount = self.param(
                    TensorType(()), "Interval", *r.choice([(0.0, 0.9), (-0.9, 0.9), (0.0, 2.0), (-2.0, 0.0)])
                )
                return b.add(x, b.mul(amount, b.op(r.choice(["tanh", "sin", "atan"]), x)))
            case 1:
                return b.op(r.choice(["sinh", "asinh", "exp", "softplus", "tanh", "square", "abs", "silu", "floor"]), x)
            case 2:
                return b.add(
                    b.mul(x, b.const(r.choice([0.5, 2.0, -1.5]))), b.op(r.choice(["softplus", "sin", "exp", "silu"]), x)
                )
            case 3:
                return b.op("leaky_relu", x, slope=r.choice([0.1, 2.0, -0.5]))
            case 4:
                return b.op("elu", x, alpha=1.0)
            case 5:
                return b.add(b.op("pow", x, b.const(3.0)), x)
            case 6:
                return b.op("where", b.op("gt", x, b.const(0.0)), x, b.mul(x, b.const(r.choice([2.0, 0.5]))))
            case 7:
                w = b.op("softmax", self.param(TensorType.of(("M", 3))), axis="M")
                m = self.param(TensorType.of(("M", 3)))
                return b.op("contract", b.op(r.choice(["asinh", "sinh", "sin"]), b.sub(x, m)), w, axes=("M",))
        return b.neg(x)

    def linear(self, x: int) -> int:
        b, r = self.b, self.r
        a = self.axis(x)
        n = b.type(x).size(a)
        kind = r.choice(["LowerTriangular", "UnitLowerTriangular", "Invertible", "Orthogonal", "R"])
        w = self.param(TensorType.of((f"{a}'", n), (a, n)), kind)
        if kind == "Invertible" and r.random() < 0.3:
            w = self.param(TensorType.of((f"{a}'", n), (a, n)), kind, "dense")
        axis = a if r.random() < 0.8 else f"{a}'"
        if axis == a:
            out = b.op("rename", b.op("contract", w, x, axes=(a,)), pairs=((f"{a}'", a),))
        else:
            y = b.op("rename", x, pairs=((a, f"{a}'"),))
            out = b.op("contract", w, y, axes=(f"{a}'",))
        return b.op("order", out, names=b.type(x).names)

    def structure(self, x: int) -> int:
        b, r = self.b, self.r
        a = self.axis(x)
        n = b.type(x).size(a)
        match r.randrange(5):
            case 0:
                return b.op("reverse", x, axis=a)
            case 1:
                order = list(range(n))
                r.shuffle(order)
                return b.op("permute", x, axis=a, order=tuple(order))
            case 2:
                return b.op("cumsum", x, axis=a, exclusive=False, reverse=r.random() < 0.5)
            case 3:
                return b.op("shift", x, axis=a, k=1)
        return b.op("rename", b.op("rename", x, pairs=((a, "Z"),)), pairs=(("Z", a),))

    def residual(self, x: int) -> int:
        b, r = self.b, self.r
        g = self.conditioner(x, b.type(x))
        return b.add(x, b.mul(b.const(r.choice([0.1, 0.9])), b.op("tanh", g))) if r.random() < 0.7 else b.sub(x, g)

    def low_rank(self, x: int) -> int:
        b, r = self.b, self.r
        if b.type(x).rank != 1:
            return self.scalar(x)
        t = b.type(x)
        w = self.param(t, "Sphere")
        u = self.param(t) if r.random() < 0.5 else b.mul(w, self.param(TensorType(()), "Positive"))
        s = b.op("contract", w, x, axes=t.names)
        return b.add(x, b.mul(u, b.op(r.choice(["tanh", "sin", "softplus"]), s)))

    def masked_coupling(self, x: int) -> int:
        """RealNVP's printed form: m·x + (1 - m)·(x·exp(s(m·x)) + t(m·x))."""
        b, r = self.b, self.r
        a = self.axis(x)
        m = b.op("mod", b.op("index", axis=a, size=b.type(x).size(a)), b.const(2))
        other = b.sub(b.const(1.0), m) if r.random() < 0.8 else m
        kept = b.op("order", b.mul(x, m), names=b.type(x).names)
        moved = self.affine(x, kept if r.random() < 0.8 else x)
        return b.op("order", b.add(kept, b.mul(moved, other)), names=b.type(x).names)

    def crossed(self, x: int) -> int:
        """Two halves that read each other's earlier slices."""
        b, r = self.b, self.r
        a = self.axis(x)
        n = b.type(x).size(a)
        if b.type(x).rank < 2 or n % 2:
            return self.coupling(x)
        one = b.op("slice", x, axis=a, start=0, stop=n // 2)
        two = b.op("slice", x, axis=a, start=n // 2, stop=n)
        axis = next(m for m in b.type(x).names if m != a)
        late = [b.op("shift", h, axis=axis, k=r.choice([1, 1, 1, 0])) for h in (one, two)]
        return b.op("join", self.affine(one, late[1]), self.affine(two, late[0]), axis=a)

    def into_real(self, x: int) -> int:
        """The data's domain onto the reals, mostly."""
        b, r = self.b, self.r
        right = {"Positive": "log", "Unit": "logit"}.get(self.domain.name)
        if right is None:
            return x
        return b.op(
            right if r.random() < 0.7 else r.choice(["log", "logit", "softplus_inverse", "square", "sqrt", "tanh"]), x
        )

    def layers(self) -> list[Callable[[int], int]]:
        return [
            self.coupling, self.coupling, self.autoregressive, self.autoregressive, self.scalar, self.linear, self.structure,
            self.residual, self.low_rank, self.masked_coupling, self.crossed, lambda h: self.call(h, self.r.random() < 0.3),
            lambda h: self.call(h, repeat=True), lambda h: self.split(h, self.r.choice([self.autoregressive, self.linear, self.coupling])),
        ]  # fmt: skip

    def make(self) -> Region:
        layers = self.layers()
        h = self.into_real(self.x)
        outputs = []
        if not self.depth and self.r.random() < 0.15:
            z = self.into_real(self.input("z"))
            moved = self.affine(z, self.r.choice([h, h, z]))
            outputs = [moved]
            if self.r.random() < 0.5:
                h = self.affine(h, self.r.choice([moved, moved, z]))
        for _ in range(self.r.choice([1, 1, 2, 2, 3]) if not outputs else 1):
            h = self.r.choice(layers)(h)
            if self.b.type(h).names != self.type.names:
                h = self.b.op("order", h, names=self.type.names)
        self.region.outputs = [h, *outputs]
        return self.region


def make(seed: int) -> Region:
    """The region of a seed; its graph may hold nodes that nothing uses."""
    from tests.soundness.shapes import Shapes

    return Shapes(seed).make()
