"""More random layers: masks in the author's text, blocks, convolutions, polar and low-rank updates, rational maps.

Each draws from right, nearly right and wrong variants; `right` makes it one that is a bijection for sure.
"""

from __future__ import annotations

from collections.abc import Callable

from flowlang.ir.types import TensorType
from tests.soundness.generate import PLAIN, Maker


class Shapes(Maker):
    """As `Maker`, with more kinds of layers."""

    def layers(self) -> list[Callable[[int], int]]:
        return [
            *super().layers(), self.convolution, self.mixing, self.polar, self.bottleneck, self.chosen_coupling, self.rational, self.lagged,
        ]  # fmt: skip

    # ---- convolutions ---------------------------------------------------------------------------

    def convolution(self, x: int, right: bool = False) -> int:
        """A window that looks one way, with a matrix at the place itself; or one that leaks, lacks it, or has any."""
        b, r, t = self.b, self.r, self.b.type(x)
        if t.rank < 2:
            return self.lagged(x, right)
        channel = t.names[-1]
        space = t.names[:-1][-2:]
        sizes = {s: r.choice([2, 3]) for s in space}
        window = {s: f"w{k}" for k, s in enumerate(space)}
        n = t.size(channel)
        kernel = self.param(TensorType.of(("O", n), (channel, n), *((window[s], sizes[s]) for s in space)))
        domains = ["UnitLowerTriangular", "LowerTriangular", "Invertible", "Orthogonal"]
        tap = self.param(TensorType.of(("O", n), (channel, n)), r.choice(domains if right else [*domains, "R"]))
        back = {s: right or r.random() < 0.85 for s in space}
        place = {s: sizes[s] - 1 if back[s] else (sizes[s] - 1) // 2 for s in space}
        if not right and r.random() < 0.15:
            place[space[0]] = 0
        weight = self.at(window, place, tap, kernel, sizes)
        mask = r.randrange(4)
        if mask == 1:  # nothing in the line of the place itself but what was before it
            weight = self.at(
                {space[0]: window[space[0]]},
                {space[0]: place[space[0]]},
                self.at(window, place, tap, b.const(0.0), sizes),
                weight,
                sizes,
            )
        elif mask == 2 and not right:
            weight = self.at(window, place, b.const(0.0), kernel, sizes)
        weight = b.op("order", weight, names=("O", channel, *window.values()))
        padding = tuple(
            (sizes[s] - 1, 0) if back[s] else ((sizes[s] - 1) // 2, sizes[s] - 1 - (sizes[s] - 1) // 2) for s in space
        )
        ones = (1,) * len(space)
        y = b.op("conv", x, weight, channel=channel, space=space, stride=ones, dilation=ones, padding=padding, groups=1)
        y = b.op("order", y, names=t.names)
        if mask == 2:
            added = b.mul(b.op("tanh", y), b.const(0.5))
            return b.add(
                x if right or r.random() < 0.7 else b.op("sin", x), y if not right else self.strictly(added, x)
            )
        return y

    def strictly(self, h: int, x: int) -> int:
        a = self.b.type(x).names[0]
        return self.b.op("shift", h, axis=a, k=1)

    def at(
        self, window: dict[str, str], place: dict[str, int], here: int, elsewhere: int, sizes: dict[str, int]
    ) -> int:
        """`here` at one place of the window, `elsewhere` at all others."""
        b = self.b
        found: int | None = None
        for s, name in window.items():
            one = b.op("eq", b.op("index", axis=name, size=sizes[s]), b.const(place[s]))
            found = one if found is None else b.op("and", found, one)
        assert found is not None
        return b.op("where", found, here, elsewhere)

    # ---- blocks ---------------------------------------------------------------------------------

    def mixing(self, x: int, right: bool = False) -> int:
        """Two or three parts of one size, mixed by numbers, bounded parameters or rotations."""
        b, r, t = self.b, self.r, self.b.type(x)
        a = self.axis(x)
        n = t.size(a)
        count = 3 if n == 3 else 2
        if n % count or n < 2:
            return x
        width = n // count
        parts = [b.op("slice", x, axis=a, start=k * width, stop=(k + 1) * width) for k in range(count)]
        if r.random() < 0.3:
            parts[0] = b.op("sinh", parts[0])
        mixed = self.sums(parts) if count == 3 or r.random() < 0.5 else self.rotated(parts, right)
        if right and count == 3:
            u, v, w = parts
            mixed = [b.add(u, v), b.add(v, w), b.add(w, u)]
        elif right and len(mixed) == 2 and r.random() < 0.5:
            u, v = parts
            mixed = [b.add(u, b.mul(v, b.const(2.0))), b.sub(v, u)]
        return b.op("join", *(b.op("order", m, names=t.names) for m in mixed), axis=a)

    def sums(self, parts: list[int]) -> list[int]:
        b, r = self.b, self.r
        out = []
        for _ in parts:
            total: int | None = None
            for p in parts:
                c = r.choice([1.0, 1.0, 2.0, -1.0, 0.5, 0.0])
                if c and total is None:
                    total = p if c == 1 else b.mul(p, b.const(c))
                elif c and total is not None:
                    total = b.add(total, b.mul(p, b.const(c)))
            out.append(total if total is not None else parts[0])
        return out

    def rotated(self, parts: list[int], right: bool) -> list[int]:
        b, r = self.b, self.r
        angle = self.param(TensorType(()))
        other = angle if right or r.random() < 0.7 else self.param(TensorType(()))
        if not right and r.random() < 0.3:  # bounded, and so regular or not
            s = self.param(TensorType(()), "Interval", *r.choice([(-0.9, 0.9), (-2.0, 2.0)]))
            return [
                b.add(parts[0], b.mul(s, parts[1])),
                b.sub(parts[1], b.mul(s, parts[0])) if r.random() < 0.5 else b.add(parts[1], b.mul(s, parts[0])),
            ]
        cos, sin = b.op("cos", angle), b.op("sin", other)
        sign = b.sub if right or r.random() < 0.8 else b.add
        return [sign(b.mul(cos, parts[0]), b.mul(sin, parts[1])), b.add(b.mul(sin, parts[0]), b.mul(cos, parts[1]))]

    # ---- polar and low rank ---------------------------------------------------------------------

    def polar(self, x: int, right: bool = False) -> int:
        """x + β·(x - z0)/(α + r), with β bounded as it must be, or not."""
        b, r, t = self.b, self.r, self.b.type(x)
        arm = b.sub(x, self.param(t)) if r.random() < 0.5 else x
        radius = b.op("length", arm, axes=t.names)
        alpha, beta = self.param(TensorType(()), "Positive"), self.param(TensorType(()), "Positive")
        push = (
            b.sub(beta, alpha)
            if right or r.random() < 0.6
            else r.choice([beta, b.neg(beta), b.mul(alpha, b.const(-1.0))])
        )
        moved = arm if right or r.random() < 0.8 else x
        return b.add(x, b.mul(b.div(push, b.add(alpha, radius)), moved))

    def bottleneck(self, x: int, right: bool = False) -> int:
        """x + Q·h(Qᵀx) with orthonormal columns."""
        b, r, t = self.b, self.r, self.b.type(x)
        if t.rank != 1 or t.axes[0].size < 3:
            return self.polar(x, right)
        d = t.names[0]
        q = self.param(TensorType.of((d, t.axes[0].size), ("K", 2)), "Stiefel")
        s = b.op("contract", q, x, axes=(d,))
        h = b.op(r.choice(["tanh", "sin"]), s)
        if not right and r.random() < 0.3:
            h = b.op("reverse", h, axis="K")
        elif r.random() < 0.4:
            h = b.op("tanh", b.op("shift", s, axis="K", k=1))
        scale = r.choice([0.5, 0.9] if right else [0.5, 0.9, -0.9, 2.0, -2.0])
        return b.add(x, b.op("contract", q, b.mul(h, b.const(scale)), axes=("K",)))

    # ---- masks, rational maps, lags -------------------------------------------------------------

    def chosen_coupling(self, x: int, right: bool = False) -> int:
        """x·exp((1 - m)·s(m·x)) + (1 - m)·t(m·x), with a mask that is a comparison, or one that does not fit."""
        b, r, t = self.b, self.r, self.b.type(x)
        a = self.axis(x)
        n = t.size(a)
        if n < 2:
            return x
        index = b.op("index", axis=a, size=n)
        test = b.op("lt", index, b.const(r.randrange(1, n)))
        m = b.op("where", test, b.const(1.0), b.const(0.0))
        other = b.sub(b.const(1.0), m) if right or r.random() < 0.8 else r.choice([m, b.const(1.0)])
        kept = b.op("order", b.mul(m, x), names=t.names)
        h = kept if right or r.random() < 0.8 else x
        scale, shift = (b.op(r.choice(PLAIN), self.spread(h, a)) for _ in range(2))
        moved = b.add(b.mul(x, b.op("exp", b.mul(other, b.op("tanh", scale)))), b.mul(other, shift))
        return b.op("order", moved, names=t.names)

    def spread(self, h: int, axis: str) -> int:
        """Every entry reads all others along the axis."""
        b, n = self.b, self.b.type(h).size(axis)
        w = self.param(TensorType.of((f"{axis}'", n), (axis, n)))
        out = b.op("rename", b.op("contract", h, w, axes=(axis,)), pairs=((f"{axis}'", axis),))
        return b.op("order", out, names=b.type(h).names)

    def rational(self, x: int, right: bool = False) -> int:
        b, r = self.b, self.r
        square = b.op("square", x)
        c = r.choice([-0.9, 0.9, 1.0, 3.0] if right else [-0.9, 0.9, 1.0, 3.0, -1.1, 9.0])
        match r.randrange(3):
            case 0:
                return b.add(x, b.mul(b.const(c), b.div(x, b.add(b.const(1.0), square))))
            case 1:
                return b.add(
                    b.sub(b.mul(square, x), square), x if right else b.mul(x, b.const(r.choice([1.0, 0.3, 0.5])))
                )
        return b.add(x, b.div(b.mul(square, x), b.add(b.const(1.0 if right else r.choice([1.0, 0.1])), square)))

    def lagged(self, x: int, right: bool = False) -> int:
        b, r = self.b, self.r
        a = self.axis(x)
        h = b.op("shift", x, axis=a, k=2)
        if not right and r.random() < 0.3:
            h = b.op("shift", h, axis=a, k=r.choice([-1, -2]))
        h = b.op(r.choice(PLAIN), h)
        return b.add(b.mul(x, b.op("exp", b.op("tanh", h))), h)
