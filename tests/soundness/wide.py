"""Random models of what `shapes` does not make: whole numbers with noise drawn for them, rules given by hand, several
values of different shapes and domains, points of spheres, causal networks deep enough for an incremental inverse, values that a
later place holds, parts swapped within a scan, statistics of the batch, and noise where nothing undoes it.

As there, each draws from right, nearly right and wrong variants, and nothing here tells the judge which.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from flowlang.compiler import compile_source
from flowlang.ir.build import Builder
from flowlang.ir.distributions import DISTRIBUTIONS
from flowlang.ir.domains import Domain, domain
from flowlang.ir.graph import Child, Draw, Emission, Graph, Region, Rule
from flowlang.ir.types import Axis, TensorType, TupleType
from flowlang.source import Source
from tests.soundness.generate import PLAIN
from tests.soundness.shapes import Shapes

KINDS = ["whole_numbers", "ruled", "records", "spheres", "sequence", "numbers"] * 3 + [
    "ahead",
    "swapped",
    "pooled",
    "noisy",
]
RECORDS = [(("D", 4),), (("D", 3),), (("T", 3), ("D", 2)), (("T", 3), ("D", 3)), (("E", 2),), (("T", 3),)]
SPHERE = """
bijector own(p: Sphere[Q]) {
  param w: R[Q] = 0.3
  %s(p, w = w)
}
flow f {
  data p: Sphere[Q = %d]
  own
  base uniform_sphere
}
"""


@cache
def map_of_sphere(name: str, size: int) -> Region:
    """A bijector of the library that is declared on spheres, with its rules by hand."""
    found = compile_source(Source("sphere.flow", SPHERE % (name, size)))
    assert found.ok, [d.message for d in found.report.errors]
    return next(r for r in found.regions["f"].walk() if r.name == name)


class Wide(Shapes):
    """One random region of a kind that `Shapes` has not."""

    def __init__(self, seed: int):
        r = random.Random(seed)
        self.kind = r.choice(KINDS)
        shape: tuple[tuple[str, int], ...] | None = None
        if self.kind in ("sequence", "ahead"):
            shape = (("T", r.choice([4, 5, 6])), ("C", r.choice([2, 3])))
        elif self.kind == "records":
            shape = r.choice(RECORDS)
        elif self.kind == "spheres":
            shape = (("D", r.choice([2, 3])),)
        super().__init__(r, shape, reals=self.kind != "records")

    def below(self, r: random.Random, shape: tuple[tuple[str, int], ...], depth: int) -> Shapes:
        return Shapes(r, shape, depth)

    def make(self) -> Region:
        found: list[int] = getattr(self, self.kind)()
        self.region.outputs = found
        return self.region

    def leaf(self, name: str, type_: TensorType, domain_: Domain, role: str = "map") -> int:
        made = self.b.leaf("input", type_, batched=True, label=name, name=name, role=role, domain=domain_)
        if role == "map":
            self.region.inputs.append(made)
        return made

    def known(self, h: int, t: TensorType) -> int:
        """A function of a value with the axes of a type, whatever axes the value has."""
        return self.conditioner(self.b.op(self.r.choice(["sin", "tanh"]), h), t)

    def some_layers(self, h: int, most: int = 2) -> int:
        t = self.b.type(h)
        for _ in range(self.r.randrange(most + 1)):
            h = self.b.op("order", self.r.choice(self.layers())(h), names=t.names)
        return h

    # ---- whole numbers --------------------------------------------------------------------------

    def noise(self, t: TensorType, law: str, *ends: float) -> int:
        ends_ = tuple((n, self.b.const(float(v))) for n, v in zip(("lo", "hi"), ends, strict=False))
        support = DISTRIBUTIONS[law].support(dict(zip(("lo", "hi"), ends, strict=False)))
        u = self.leaf("u", t, Domain("R", (), support), "draw")
        self.region.draws.append(Draw(u, DISTRIBUTIONS[law], ends_))
        return u

    def whole_numbers(self) -> list[int]:
        """n + a number in (0, 1) that is made of noise and of what n says, and then on; or not quite that."""
        b, r, t = self.b, self.r, self.type
        lo, hi = r.choice([(0, 8), (0, 2), (-3, 3), (None, None)])
        numbers = domain("Int", () if lo is None or hi is None else (lo, hi))
        assert numbers is not None
        beside = r.random() < 0.4
        if not beside:
            self.region.inputs = []
        n = self.leaf("n", t.as_kind("int"), numbers)
        c = b.mul(n, b.const(0.25))
        match r.randrange(8):
            case 0 | 1:
                u = self.noise(t, "uniform", *r.choice([(), (), (0, 1), (0, 0.5), (0, 2), (-0.5, 0.5)]))
                y = b.add(n, u)
            case 2:
                y = b.add(n, b.op("sigmoid", b.add(self.noise(t, "normal"), self.known(c, t))))
            case 3:
                z = b.mul(self.noise(t, "normal"), b.op("exp", b.op("tanh", self.known(c, t))))
                y = b.add(b.op("sigmoid", z), n)
            case 4:
                y = b.add(n, b.op(r.choice(["square", "sqrt", "sin"]), self.noise(t, "uniform")))
            case 5:
                u = self.noise(t, "uniform")
                y = r.choice(
                    [b.sub(n, u), b.add(b.mul(n, b.const(2)), u), b.add(n, b.mul(u, b.const(0.5))), b.mul(n, u)]
                )
            case 6:  # as many numbers of noise as there are without one axis
                if t.rank < 2:
                    y = b.add(n, b.mul(self.noise(t, "uniform"), b.const(r.choice([1.0, 0.9]))))
                else:
                    y = b.add(n, self.noise(TensorType(t.axes[1:]), "uniform"))
            case _:
                y = b.op("tanh", c) if r.random() < 0.3 else b.add(n, b.op("sigmoid", self.noise(t, "laplace")))
        if lo is not None and hi is not None and r.random() < 0.7:
            y = b.div(b.sub(y, b.const(float(lo))), b.const(float(hi - lo if r.random() < 0.8 else hi)))
            y = b.op("logit", y) if r.random() < 0.9 else b.op("log", y)
        y = self.some_layers(y, 1)
        if not beside:
            return [y]
        x = self.affine(self.x, r.choice([y, y, c, b.op("sin", self.x)]))
        if r.random() < 0.4:
            y = self.affine(y, r.choice([x, x, self.x]))
        return r.choice([[x, y], [y, x]])

    # ---- rules by hand --------------------------------------------------------------------------

    def ruled(self) -> list[int]:
        h = self.some_layers(self.x, 1)
        h = self.by_hand(h)
        return [self.some_layers(h, 1)]

    def by_hand(self, h: int) -> int:
        """A called map with both rules given, or one of them; right, or wrong in one place."""
        r, t = self.r, self.b.type(h)
        inner = Region(f"by_hand{len(self.region.children) + 1}", "bijector", Graph())
        own = TensorType(t.axes[r.randrange(t.rank) :])
        b = Builder(inner.graph)
        real = domain("R")
        x = b.leaf("input", own, batched=True, label="x", name="x", role="map", domain=real)
        y = b.leaf("input", own, batched=True, label="y", name="y", role="result")
        forward, back, log_det = r.choice(
            [self.rank_one, self.stretched, self.mirrored, self.turned, self.moved, self.even]
        )(b, x, y)
        if r.random() < 0.4:  # one of the two is not right
            if r.random() < 0.5:
                back = self.spoiled(b, back, y)
            else:
                log_det = self.spoiled_log_det(b, log_det, x, own)
        inner.inputs, inner.outputs = [x], [b.op("order", forward, names=own.names)]
        rules = {"inverse": Rule((y,), (b.op("order", b.expand(back, own), names=own.names),))}
        rules["log_det"] = Rule((x,), (log_det,))
        if r.random() < 0.15:
            del rules[r.choice(list(rules))]
        inner.rules = rules
        self.region.children[inner.name] = Child(inner.name, inner)
        lifted = tuple((a.name, a.size) for a in t.axes if a not in own.axes)
        into = TensorType((*(Axis(n, s) for n, s in lifted), *own.axes))
        attrs = {"child": inner.name, "region": inner, "method": "forward", "lifted": lifted}
        out = self.graph.add("call", (self.b.op("order", h, names=into.names),), into, attrs).id
        return self.b.op("order", out, names=t.names)

    def inner_param(self, b: Builder, t: TensorType, name: str = "R") -> int:
        self.params += 1
        label = f"p{self.params}"
        return b.leaf("param", t, batched=False, label=label, name=label, domain=domain(name), init=0.4)

    def rank_one(self, b: Builder, x: int, y: int) -> tuple[int, int, int]:
        t = b.type(x)
        c = b.const(self.r.choice([1.0, 0.3, -0.2, 2.0]))
        over = b.add(b.const(1.0), b.mul(c, b.const(float(t.count))))
        back = b.sub(y, b.mul(b.div(c, over), b.sum_all(y)))
        return b.add(x, b.mul(c, b.sum_all(x))), back, self.of_sample(b, b.log_abs(over), x)

    def of_sample(self, b: Builder, value: int, x: int) -> int:
        """A constant as a value of each sample, as an author writes it."""
        return b.add(value, b.mul(b.const(0.0), b.sum_all(x)))

    def stretched(self, b: Builder, x: int, y: int) -> tuple[int, int, int]:
        s = self.inner_param(b, TensorType(()), "Positive")
        slope = b.add(b.op("log", s), b.op("log", b.op("cosh", x)))
        return b.mul(s, b.op("sinh", x)), b.op("asinh", b.div(y, s)), b.sum_all(slope)

    def mirrored(self, b: Builder, x: int, y: int) -> tuple[int, int, int]:
        w = self.inner_param(b, b.type(x))
        size = b.op("max", b.sum_all(b.op("square", w)), b.const(1e-30))

        def f(v: int) -> int:
            return b.sub(v, b.mul(w, b.div(b.mul(b.const(2.0), b.sum_all(b.mul(w, v))), size)))

        return f(x), f(y), b.mul(b.const(0.0), b.sum_all(x))

    def turned(self, b: Builder, x: int, y: int) -> tuple[int, int, int]:
        a = b.type(x).axes[-1]
        if a.size % 2:
            return self.moved(b, x, y)
        angle = self.inner_param(b, TensorType(()))

        def f(v: int, way: Callable[[int, int], int], other: Callable[[int, int], int]) -> int:
            p = b.op("slice", v, axis=a.name, start=0, stop=a.size // 2)
            q = b.op("slice", v, axis=a.name, start=a.size // 2, stop=a.size)
            c, s = b.op("cos", angle), b.op("sin", angle)
            return b.op("join", way(b.mul(c, p), b.mul(s, q)), other(b.mul(c, q), b.mul(s, p)), axis=a.name)

        return f(x, b.sub, b.add), f(y, b.add, b.sub), b.mul(b.const(0.0), b.sum_all(x))

    def moved(self, b: Builder, x: int, y: int) -> tuple[int, int, int]:
        """Scaled by a function of the part that stays."""
        a = b.type(x).axes[-1]
        if a.size < 2:
            return self.stretched(b, x, y)

        def parts(v: int) -> tuple[int, int, int]:
            p = b.op("slice", v, axis=a.name, start=0, stop=1)
            q = b.op("slice", v, axis=a.name, start=1, stop=a.size)
            return p, q, b.op("tanh", b.op("sum", p, axes=(a.name,)))

        p, q, s = parts(x)
        forward = b.op("join", p, b.op("order", b.mul(q, b.op("exp", s)), names=b.type(q).names), axis=a.name)
        u, v, k = parts(y)
        back = b.op("join", u, b.op("order", b.div(v, b.op("exp", k)), names=b.type(v).names), axis=a.name)
        return forward, back, b.mul(b.const(float(a.size - 1)), b.sum_all(s))

    def even(self, b: Builder, x: int, y: int) -> tuple[int, int, int]:
        """No bijection: its inverse holds for positive values alone."""
        slope = b.op("log", b.mul(b.const(2.0), b.op("abs", x)))
        return b.op("square", x), b.op("sqrt", b.op("abs", y)), b.sum_all(slope)

    def spoiled(self, b: Builder, back: int, y: int) -> int:
        match self.r.randrange(4):
            case 0:
                return b.mul(back, b.const(self.r.choice([1.1, -1.0, 0.999])))
            case 1:
                return b.add(back, b.const(self.r.choice([0.1, 1e-4])))
            case 2:  # right for small values
                return b.add(back, b.op("relu", b.sub(y, b.const(1.0))))
        return b.op("reverse", back, axis=b.type(back).names[-1]) if b.type(back).axes[-1].size > 1 else b.neg(back)

    def spoiled_log_det(self, b: Builder, value: int, x: int, own: TensorType) -> int:
        match self.r.randrange(4):
            case 0:
                return b.add(value, b.const(self.r.choice([1.0, 0.01, 1e-4])))
            case 1:
                return b.sub(b.neg(value), b.const(0.5))
            case 2:
                return b.add(value, b.mul(b.const(0.1), b.sum_all(b.op("sin", x))))
        return b.add(b.mul(value, b.const(1.5)), b.const(0.01))

    # ---- several values -------------------------------------------------------------------------

    def records(self) -> list[int]:
        b, r = self.b, self.r
        values = [self.into_real(self.x)]
        for k in range(r.choice([1, 1, 2])):
            found = domain(r.choice(["R", "R", "Positive", "Unit"]))
            assert found is not None
            self.domain = found
            values.append(self.into_real(self.leaf(f"z{k}", TensorType.of(*r.choice(RECORDS)), found)))
        for _ in range(r.choice([1, 2, 2, 3])):
            i = r.randrange(len(values))
            j = r.choice([k for k in range(len(values)) if k != i] * 9 + [i])
            if r.random() < 0.25:
                values[i] = self.some_layers(values[i], 1)
            elif r.random() < 0.3 and i != j:
                values[i], values[j] = self.across(values[i], values[j])
            else:
                values[i] = self.affine(values[i], b.op("sin", values[j]) if r.random() < 0.5 else values[j])
        r.shuffle(values)
        if r.random() < 0.05:
            values[0] = values[-1]
        return values

    def across(self, x: int, z: int) -> tuple[int, int]:
        """Two values that differ in one axis, as one: mapped together and cut elsewhere."""
        b, r = self.b, self.r
        s, t = b.type(x), b.type(z)
        axes = [a.name for a in s.axes if t.has(a.name) and s.resized(a.name, 1) == t.resized(a.name, 1)]
        if not axes or x == z:
            return self.affine(x, z), z
        a = r.choice(axes)
        whole = b.op("join", x, z, axis=a)
        whole = b.op("order", r.choice(self.layers())(whole), names=s.names)
        n = b.type(whole).size(a)
        cut = r.choice([s.size(a), t.size(a), r.randrange(1, n)])
        return (
            b.op("slice", whole, axis=a, start=0, stop=cut),
            b.op("slice", whole, axis=a, start=cut if r.random() < 0.95 else cut - 1, stop=n),
        )

    # ---- spheres --------------------------------------------------------------------------------

    def spheres(self) -> list[int]:
        b, r = self.b, self.r
        size = r.choice([2, 3, 3, 4])
        sphere = domain("Sphere")
        assert sphere is not None
        many = r.random() < 0.6
        t = TensorType.of(*((("T", 3),) if many else ()), ("Q", size))
        x, p = self.x, self.leaf("p", t, sphere)
        q = self.leaf("q", TensorType.of(("Q", size)), sphere) if r.random() < 0.3 else None
        for _ in range(r.choice([1, 2, 2, 3])):
            match r.randrange(10):
                case 0 | 1 | 2:
                    p = self.turned_sphere(p, r.choice([x, x, p if r.random() < 0.3 else x, q if q is not None else x]))
                case 3 if many:
                    p = r.choice(
                        [
                            lambda p=p: b.op("reverse", p, axis="T"),
                            lambda p=p: b.op("permute", p, axis="T", order=(2, 0, 1)),
                            lambda p=p: b.op("shift", p, axis="T", k=1),
                        ]
                    )()
                case 4 if many:  # one of them turned by the others
                    one = b.op("slice", p, axis="T", start=0, stop=1)
                    two = b.op("slice", p, axis="T", start=1, stop=3)
                    moved = self.turned_sphere(two, r.choice([one, one, one, two]))
                    p = b.op("join", *r.choice([(one, moved), (moved, one)]), axis="T")
                case 5 if q is not None:
                    q = self.turned_sphere(q, r.choice([x, p, p]))
                case 6:
                    p = r.choice([self.stretched_sphere, self.mixed_sphere])(p)
                case 7:
                    x = self.some_layers(x, 1)
                case _:
                    x = self.affine(x, self.known(r.choice([p, p, p, q if q is not None else p]), b.type(x)))
        out = [x, p, *([q] if q is not None else [])]
        r.shuffle(out)
        return out

    def turned_sphere(self, p: int, by: int) -> int:
        """A Möbius map whose centre is made of another value."""
        b, r = self.b, self.r
        t = b.type(p)
        one = TensorType(t.axes[-1:])
        w = self.known(by, one) if r.random() < 0.8 else self.param(one)
        w = b.mul(w, b.const(0.3))
        inner = map_of_sphere(r.choice(["moebius_sphere", "symmetrized_moebius"]), t.axes[-1].size)
        name = f"turn{len(self.region.children) + 1}"
        self.region.children[name] = Child(name, inner)
        attrs = {
            "child": name,
            "region": inner,
            "method": "forward",
            "lifted": tuple((a.name, a.size) for a in t.axes[:-1]),
        }
        return self.graph.add("call", (p, w), t, attrs).id

    def stretched_sphere(self, p: int) -> int:
        """Not a map of the sphere for the compiler: a chart's change of measure is no surface's."""
        b, r = self.b, self.r
        c = b.const(r.choice([2.0, -1.0, 0.5]))
        moved = b.add(b.mul(p, c), b.const(r.choice([0.0, 0.3])))
        return b.op("normalize", moved, axes=("Q",)) if r.random() < 0.7 else moved

    def mixed_sphere(self, p: int) -> int:
        b, r = self.b, self.r
        match r.randrange(3):
            case 0:
                return b.op("reverse", p, axis="Q")
            case 1:
                return b.add(p, b.mul(b.const(0.1), b.op("tanh", p)))
        return self.linear(p)

    # ---- linear maps with numbers for coefficients -------------------------------------------------

    def numbers(self) -> list[int]:
        h = self.some_layers(self.x, 1)
        h = self.mixed_by_numbers(h)
        return [self.some_layers(h, 1)]

    def mixed_by_numbers(self, x: int) -> int:
        """A sum of moved, summed and filtered copies with numbers before them; sometimes singular, or not linear."""
        b, r, t = self.b, self.r, self.b.type(x)
        c = self.axis(x)
        total = b.mul(x, b.const(r.choice([1.0, 1.0, 2.0, -1.0, 3.0])))
        for _ in range(r.choice([1, 1, 2])):
            h = x
            for _ in range(r.choice([1, 1, 2])):
                h = self.copied(h)
            factor = b.const(r.choice([0.5, -0.5, -1.0, 1.0, 0.1, 2.0]))
            if r.random() < 0.06:
                factor = r.choice([self.param(TensorType(())), b.op("sum", b.op("tanh", x), axes=t.names)])
            total = b.add(total, b.mul(b.op("order", h, names=t.names), factor))
        if r.random() < 0.4:
            total = b.add(
                total, r.choice([self.param(TensorType((t.axes[-1],))), self.known(self.c or x, t), b.const(1.0)])
            )
        if r.random() < 0.15 and t.size(c) % 2 == 0:  # through parts, mixed across
            n = t.size(c)
            one, two = (b.op("slice", total, axis=c, start=k, stop=k + n // 2) for k in (0, n // 2))
            total = b.op("join", b.add(one, b.op("reverse", two, axis=c)), b.sub(two, one), axis=c)
        return b.op("order", total, names=t.names)

    def copied(self, h: int) -> int:
        b, r, t = self.b, self.r, self.b.type(h)
        a = self.axis(h)
        n = t.size(a)
        every = tuple((x.name, x.size) for x in t.axes)
        match r.randrange(9):
            case 0 | 1:
                axes = (a,) if r.random() < 0.7 else t.names
                return b.op("expand", b.op(r.choice(["mean", "sum"]), h, axes=axes), axes=every)
            case 2:
                return b.op("reverse", h, axis=a)
            case 3:
                order = list(range(n))
                r.shuffle(order)
                return b.op("permute", h, axis=a, order=tuple(order))
            case 4:
                return b.op("shift", h, axis=a, k=r.choice([1, -1]))
            case 5:
                return b.op("cumsum", h, axis=a, exclusive=r.random() < 0.5, reverse=r.random() < 0.5)
            case 6:
                mask = b.op("lt", b.op("index", axis=a, size=n), b.const(r.randrange(1, n)))
                return b.op("order", b.op("where", mask, h, b.const(0.0)), names=t.names)
            case 7:  # a product with a matrix of numbers
                row, col = b.op("index", axis=f"{a}'", size=n), b.op("index", axis=a, size=n)
                near = b.op("eq", b.op("expand", row, axes=((f"{a}'", n), (a, n))), col)
                w = b.op("where", near, b.const(r.choice([1.0, 2.0])), b.const(r.choice([0.1, 0.5, 1.0])))
                out = b.op("rename", b.op("contract", w, h, axes=(a,)), pairs=((f"{a}'", a),))
                return b.op("order", out, names=t.names)
        return self.blurred(h) if t.rank > 1 else b.neg(h)

    def blurred(self, h: int) -> int:
        """A convolution with a kernel of numbers."""
        b, r, t = self.b, self.r, self.b.type(h)
        space, channel = t.names[0], t.names[-1]
        n = t.size(channel)
        middle = b.op("eq", b.op("index", axis="w", size=3), b.const(r.randrange(3)))
        w = b.op("where", middle, b.const(r.choice([1.0, 0.5])), b.const(r.choice([0.0, 0.1, -0.2])))
        w = b.op("expand", w, axes=(("O", n), (channel, n), ("w", 3)))
        y = b.op(
            "conv", h, w, channel=channel, space=(space,), stride=(1,), dilation=(1,), padding=(r.choice([(1, 1), (2, 0)]),), groups=1
        )  # fmt: skip
        return b.op("order", y, names=t.names)

    # ---- causal networks ------------------------------------------------------------------------

    def sequence(self) -> list[int]:
        """x · exp(tanh s) + m with s and m by a deep network that reads what came before; mostly."""
        b, r, x = self.b, self.r, self.x
        t = self.type
        turn = r.random() < 0.2
        if turn:
            x = b.op("reverse", x, axis="T")
        first = r.random() < 0.5
        right = r.random() < 0.8
        h = b.op("shift", x, axis="T", k=r.choice([1, 1, 2])) if first and right else x
        for _ in range(r.choice([1, 2, 3, 4])):
            new = r.choice([self.window, self.looked_up, self.summed, self.linear_attention, self.each])(h)
            new = b.op(r.choice(PLAIN), new) if r.random() < 0.6 else new
            h = b.add(h, new) if r.random() < 0.4 else new
        if right and not first:
            h = b.op("shift", h, axis="T", k=1)
        if r.random() < 0.05:
            h = b.op("reverse", h, axis="T")
        s = b.op("tanh", self.each(h))
        y = b.add(b.mul(x, b.op("exp", s)), self.each(h)) if r.random() < 0.8 else self.scaled_sum(x, h)
        y = b.op("order", y, names=t.names)
        return [b.op("reverse", y, axis="T") if turn else y]

    # ---- within a scan --------------------------------------------------------------------------

    def ahead(self) -> list[int]:
        """x + c·Σ over places S of f(x at T)·g(what stood earlier at S), with S before T, at T, or ahead of it."""
        b, r, t = self.b, self.r, self.type
        x = self.some_layers(self.x, 1)
        size = t.size("T")
        lag, reach = r.choice([1, 1, 2]), r.choice([-1, 0, 0, 1, 1, 2])
        late = b.op("shift", x, axis="T", k=lag)
        late = b.op("rename", b.op("tanh", b.mul(late, b.const(r.choice([1.0, 30.0])))), pairs=(("T", "S"),))
        own = b.op(r.choice(["sin", "cos", "tanh"]), x)
        place, other = (b.op("index", axis=a, size=size) for a in "TS")
        place = b.op("expand", b.add(place, b.const(reach)), axes=(("T", size), ("S", size)))
        near = b.op(r.choice(["eq", "ge"]), place, other)
        zero = b.const(0.0)
        if r.random() < 0.6:  # the weights hold the unknown value
            every = (("T", size), ("S", size), ("C", t.size("C")))
            weights = b.op("where", near, b.op("expand", own, axes=every), zero)
            total = b.op("contract", weights, late, axes=("S",))
        else:
            weights = b.op("where", near, b.const(1.0), zero)
            total = b.mul(own, b.op("contract", weights, late, axes=("S",)))
        total = b.mul(b.op("order", total, names=t.names), b.const(r.choice([0.15, -0.15, 0.02])))
        y = b.add(x, total) if r.random() < 0.8 else b.mul(x, b.op("exp", total))
        return [b.op("order", y, names=t.names)]

    def swapped(self) -> list[int]:
        """Parts exchanged, moved by what stood earlier, and exchanged again, beside an autoregression."""
        b, r, t = self.b, self.r, self.type
        x = self.some_layers(self.x, 1)
        a = self.axis(x)
        n = t.size(a)
        if n < 2:
            return [x]
        cut = r.randrange(1, n)

        def turned(v: int, at: int) -> int:
            parts = [b.op("slice", v, axis=a, start=i, stop=j) for i, j in ((at, n), (0, at))]
            return b.op("join", *parts, axis=a)

        lag = r.choice([1, cut, n - cut, n - cut, min(n - cut + 1, n - 1)])
        moved = b.op(r.choice(["tanh", "sin"]), b.op("shift", x, axis=a, k=lag))
        moved = b.mul(moved, b.const(r.choice([0.5, -2.0, 2.0])))
        w = b.add(turned(x, cut), moved)
        y = turned(w, n - cut) if r.random() < 0.9 else w
        if r.random() < 0.8:
            y = b.add(y, b.op("tanh", b.op("shift", x, axis=a, k=1)))
        return [y]

    # ---- what one sample alone cannot undo ----------------------------------------------------------

    def pooled(self) -> list[int]:
        """A layer whose condition is taken over the batch."""
        b, r, t = self.b, self.r, self.type
        h = self.some_layers(self.x, 1)
        a = self.axis(h)
        n = t.size(a)
        if n > 1 and r.random() < 0.7:
            cut = r.randrange(1, n)
            one = b.op("slice", h, axis=a, start=0, stop=cut)
            two = b.op("slice", h, axis=a, start=cut, stop=n)
            source = b.op("batch_mean", one, axes=())
            if r.random() < 0.5:
                source = b.sub(one, source) if r.random() < 0.5 else b.mul(source, b.const(0.5))
            h = b.op("join", one, self.affine(two, source), axis=a)
        else:
            h = b.sub(h, b.mul(b.op("batch_mean", h, axes=()), b.const(r.choice([1.0, 0.5, 0.0]))))
        return [b.op("order", h, names=t.names)]

    def noisy(self) -> list[int]:
        """A map that draws and emits, taken as a map or as a condition; what it emits is forgotten."""
        b, r, t = self.b, self.r, self.type
        h = self.some_layers(self.x, 1)
        inner = Region("noisy", "bijector", Graph())
        c = Builder(inner.graph)
        v = c.leaf("input", t, batched=True, label="v", name="v", role="map", domain=domain("R"))
        law = DISTRIBUTIONS["normal"]
        u = c.leaf("input", t, batched=True, label="u", name="u", role="draw", domain=domain("R"))
        drawn = c.mul(u, c.op("exp", c.op("tanh", v))) if r.random() < 0.5 else c.mul(u, c.const(0.5))
        out, led = r.choice([(c.add(v, drawn), v), (v, c.add(drawn, v)), (drawn, c.mul(v, c.const(2.0)))])
        inner.inputs, inner.draws, inner.outputs = [v], [Draw(u, law, ())], [out]
        inner.emissions = [Emission(led, law, ())]
        self.region.children["noisy"] = Child("noisy", inner)
        attrs = {"child": "noisy", "region": inner, "method": "forward", "lifted": ()}
        call = self.graph.add("call", (h,), TupleType((t, t)), attrs).id
        made = self.graph.add("get", (call,), t, {"index": r.choice([0, 0, 0, 1])}).id
        y = r.choice([lambda: made, lambda: b.add(h, made), lambda: self.affine(h, made)])()
        return [b.op("order", y, names=t.names)]

    def scaled_sum(self, x: int, h: int) -> int:
        """A monotone map of each entry inside the scan."""
        b = self.b
        return b.add(x, b.mul(b.mul(b.const(0.8), b.op("sigmoid", h)), b.op("sin", x)))

    def each(self, h: int) -> int:
        """A matrix at each place."""
        b, t = self.b, self.b.type(h)
        n = t.size("C")
        w = self.param(TensorType.of(("O", n), ("C", n)))
        return b.op("order", b.op("rename", b.op("contract", w, h, axes=("C",)), pairs=(("O", "C"),)), names=t.names)

    def window(self, h: int) -> int:
        b, r, t = self.b, self.r, self.b.type(h)
        n, size, d = t.size("C"), r.choice([2, 3]), r.choice([1, 1, 2])
        kernel = self.param(TensorType.of(("O", n), ("C", n), ("w", size)))
        reach = (size - 1) * d
        before = reach if r.random() < 0.9 else reach // 2
        y = b.op(
            "conv", h, kernel, channel="C", space=("T",), stride=(1,), dilation=(d,), padding=((before, reach - before),), groups=1
        )  # fmt: skip
        return b.op("order", y, names=t.names)

    def looked_up(self, h: int) -> int:
        """Attention to the places up to one's own, with queries, keys and values."""
        b, r, t = self.b, self.r, self.b.type(h)
        query, key, value = (self.each(h) if r.random() < 0.7 else h for _ in range(3))
        key, value = (b.op("rename", v, pairs=(("T", "S"),)) for v in (key, value))
        score = b.op("contract", query, key, axes=("C",))
        causal = {"causal": "T"} if r.random() < 0.9 else {}
        weights = b.op("softmax", score, axis="S", **causal)
        return b.op("order", b.op("contract", weights, value, axes=("S",)), names=t.names)

    def summed(self, h: int) -> int:
        r = self.r
        return self.b.op("cumsum", h, axis="T", exclusive=r.random() < 0.3, reverse=r.random() < 0.07)

    def linear_attention(self, h: int) -> int:
        """Sums of outer products of keys and values, read by a query."""
        b, r, t = self.b, self.r, self.b.type(h)
        key = b.op("rename", b.op("sigmoid", self.each(h)), pairs=(("C", "K"),))
        query = b.op("rename", b.op("softplus", h), pairs=(("C", "K"),))
        state = b.op("cumsum", b.mul(key, h), axis="T", exclusive=r.random() < 0.3, reverse=False)
        return b.op("order", b.op("contract", query, state, axes=("K",)), names=t.names)


def make(seed: int) -> Region:
    """The model of a seed in the soundness run: two in five are of these kinds."""
    return Wide(seed).make() if seed % 5 in (3, 4) else Shapes(seed).make()


__all__ = ["Wide", "make"]
