"""Random bijections of the reals, right by construction: couplings, triangular maps, monotone scalars, matrices.

Each layer is a bijection for a reason that is not the compiler's: what it refuses of these is a false refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flowlang.ir.graph import Region
from flowlang.ir.types import TensorType
from tests.soundness.generate import PLAIN
from tests.soundness.shapes import Shapes


class Builder(Shapes):
    """As `Maker`, with right layers only; what conditions may mix in any way that keeps the order."""

    def mix(self, h: int) -> int:
        """A function of a value that reads each axis at its own place or before, in the order of the axes."""
        b, r = self.b, self.r
        a = self.axis(h)
        match r.randrange(5):
            case 0:
                return b.op("shift", h, axis=a, k=1)
            case 1:
                return b.op("cumsum", h, axis=a, exclusive=r.random() < 0.5, reverse=False)
            case 2:
                n = b.type(h).size(a)
                w = self.param(TensorType.of((f"{a}'", n), (a, n)))
                w = b.op(
                    "masked",
                    w,
                    row=f"{a}'",
                    col=a,
                    row_degrees=tuple(range(n)),
                    col_degrees=tuple(range(n)),
                    strict=False,
                )
                out = b.op("rename", b.op("contract", h, w, axes=(a,)), pairs=((f"{a}'", a),))
                return b.op("order", out, names=b.type(h).names)
            case 3 if not self.depth:
                return self.call(h)
        return b.op(r.choice(PLAIN), h)

    def any(self, h: int) -> int:
        """Any function of a known value."""
        for _ in range(self.r.randrange(1, 4)):
            h = super().mix(h) if self.r.random() < 0.5 and not self.depth else self.mix(h)
        return h

    def scaled(self, x: int, h: int) -> int:
        b, r = self.b, self.r
        match r.randrange(4):
            case 0:
                return b.add(x, h)
            case 1:
                return b.mul(x, b.op("exp", b.op("tanh", h)))
            case 2:
                return b.add(b.mul(b.op("softplus", h), x), b.op("sin", h))
        return b.add(x, b.mul(b.op("sigmoid", h), b.mul(b.const(0.9), b.op("sin", x))))

    def coupling(self, x: int) -> int:
        b, r = self.b, self.r
        a = self.axis(x)
        n = b.type(x).size(a)
        if n < 2:
            return self.scalar(x)
        cut = r.randrange(1, n)
        one = b.op("slice", x, axis=a, start=0, stop=cut)
        two = b.op("slice", x, axis=a, start=cut, stop=n)
        source, moved = (one, two) if r.random() < 0.5 else (two, one)
        h = self.any(source)
        if b.type(h).size(a) != b.type(moved).size(a):
            h = b.op("mean", h, axes=(a,))
        h = b.op("expand", h, axes=tuple((s.name, s.size) for s in b.type(moved).axes))
        made = b.op("order", self.scaled(moved, h), names=b.type(moved).names)
        return b.op("join", *((one, made) if source == one else (made, two)), axis=a)

    def autoregressive(self, x: int) -> int:
        b, a = self.b, self.axis(x)
        h = b.op("shift", x, axis=a, k=1)
        for _ in range(self.r.randrange(1, 3)):
            h = self.mix(h)
        return self.scaled(x, b.op("order", h, names=b.type(x).names))

    def scalar(self, x: int) -> int:
        b, r = self.b, self.r
        match r.randrange(6):
            case 0:
                return b.add(x, b.mul(self.param(TensorType(()), "Interval", -0.9, 2.0), b.op("tanh", x)))
            case 1:
                return b.op(r.choice(["sinh", "asinh"]), x)
            case 2:
                return b.add(b.mul(x, b.const(2.0)), b.op(r.choice(["softplus", "sin", "exp"]), x))
            case 3:
                return b.op("leaky_relu", x, slope=r.choice([0.1, 2.0]))
            case 4:
                return b.op("where", b.op("gt", x, b.const(0.0)), x, b.mul(x, b.const(0.5)))
        return b.add(b.op("pow", x, b.const(3.0)), x)

    def linear(self, x: int) -> int:
        b, a = self.b, self.axis(x)
        n = b.type(x).size(a)
        kind = self.r.choice(["LowerTriangular", "UnitLowerTriangular", "Invertible", "Orthogonal"])
        w = self.param(TensorType.of((f"{a}'", n), (a, n)), kind)
        out = b.op("rename", b.op("contract", w, x, axes=(a,)), pairs=((f"{a}'", a),))
        return b.op("order", out, names=b.type(x).names)

    def structure(self, x: int) -> int:
        b, r = self.b, self.r
        a = self.axis(x)
        if r.random() < 0.4:
            return b.op("reverse", x, axis=a)
        if r.random() < 0.4:
            return b.op("cumsum", x, axis=a, exclusive=False, reverse=r.random() < 0.5)
        order = list(range(b.type(x).size(a)))
        r.shuffle(order)
        return b.op("permute", x, axis=a, order=tuple(order))

    def residual(self, x: int) -> int:
        b = self.b
        return b.add(x, b.mul(b.const(0.9), b.op("tanh", self.structure_of(x))))

    def averaged(self, x: int) -> int:
        """x plus what moves or averages it, with a dominant number before x: a matrix that rows show to be regular."""
        b, r = self.b, self.r
        a = self.axis(x)
        every = tuple((s.name, s.size) for s in b.type(x).axes)
        n = b.type(x).size(a)
        order = list(range(n))
        r.shuffle(order)
        parts = [
            b.op("expand", b.op("mean", x, axes=(a,)), axes=every), b.op("reverse", x, axis=a), b.op("shift", x, axis=a, k=1),
            b.op("shift", x, axis=a, k=-1), b.op("permute", x, axis=a, order=tuple(order)),
        ]  # fmt: skip
        total = b.mul(x, b.const(r.choice([2.0, 3.0, -2.0])))
        for part in r.sample(parts, 2):
            total = b.add(total, b.mul(part, b.const(r.choice([0.5, -0.5, 0.9]))))
        return total

    def structure_of(self, x: int) -> int:
        order = list(range(self.b.type(x).size(self.b.type(x).names[0])))
        self.r.shuffle(order)
        return self.b.op("permute", x, axis=self.b.type(x).names[0], order=tuple(order))

    def make(self) -> Region:
        layers: list[Callable[[int], int]] = [
            self.coupling,
            self.autoregressive,
            self.scalar,
            self.linear,
            self.structure,
            self.averaged,
        ]
        more = (
            self.convolution,
            self.mixing,
            self.polar,
            self.bottleneck,
            self.chosen_coupling,
            self.rational,
            self.lagged,
        )
        layers += [partial(f, right=True) for f in more]
        if not self.depth:
            layers += [
                self.residual, self.call, lambda h: self.call(h, invert=True), lambda h: self.call(h, repeat=True),
                lambda h: self.split(h, self.r.choice([self.autoregressive, self.coupling, self.scalar])),
            ]  # fmt: skip
        h = self.x
        for _ in range(self.r.choice([1, 2, 3])):
            h = self.b.op("order", self.r.choice(layers)(h), names=self.type.names)
        self.region.outputs = [h]
        return self.region


def construct(seed: int) -> Region:
    """The bijection of a seed."""
    return Builder(seed, reals=True).make()
