"""Small maps as a user would write them, with the clause of ANALYSIS.md that each is about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Map:
    """One map: its clause, the fallback it tries to slip through ("" for single steps), and its text.

    `body` is the body of `bijector m(x: takes)`, unless `text` gives a whole spec.
    """

    name: str
    clause: str
    body: str
    fallback: str = ""
    takes: str = "R[D]"
    data: str = "R[D = 4]"
    base: str = "normal"
    before: str = ""  # other declarations

    def __str__(self) -> str:
        return self.name

    @property
    def text(self) -> str:
        return (
            f"{self.before}\nbijector m(x: {self.takes}) {{\n{self.body}\n}}\n"
            f"flow f {{\n  data x: {self.data}\n  m\n  base {self.base}\n}}\n"
        )


HALVES = "a, b = halves[D](x)\n"
KERNEL = "param L: UnitLowerTriangular[C', C]\nparam K: R[C', C, i = 3, j = 3] ~ normal(0, 0.2)\n"
CORNER = "corner = index[i](K) == 2 and index[j](K) == 2\n"
IMAGE = ("scan", "R[C, H, W]", "R[C = 2, H = 3, W = 3]")
FIELD = "net v(z: R[D], t: R) -> R[D] { sin(3 * z) * (1 + t) }"
MOVED = "integrate(v, x, t = 0 -> 1, rk4(steps = 4))"
UNIT_VECTOR = "param w: Sphere[D]\ns = sum[D](w * x)\n"

NOT_BIJECTIVE: tuple[Map, ...] = (
    # A1: index identity is not name identity
    Map("reversed reader", "A1", "x + 2 * tanh(shift[D](reverse[D](x), 1))", "scan"),
    Map("permuted reader", "A1", "x * shift[D](permute[D](x, [1, 0, 2, 3]), 1)", "scan"),
    Map("half read by its mirror", "A1", HALVES + "join[D](a + 2 * tanh(b), b + 2 * tanh(reverse[D](a)))"),
    Map("merged axis read crosswise", "A1", "y = x[(T, D) -> N]\nx + 3 * tanh(reverse[N](y)[N -> (T, D)])", "scan", "R[T, D]", "R[T = 2, D = 2]"),
    Map("another half of one name", "A1", HALVES + "join[D](a, a + tanh(b))", "scalar"),
    Map("centred over the batch", "A1", "x - mean[B](x)"),
    Map("half shifted by the batch", "A1", HALVES + "join[D](a, b + mean[B](a))"),
    # A2: support
    Map("mask that is not zero after exp", "A2", "param W: UnitLowerTriangular[D', D]\nx + 2 * tanh(sum[D](exp(W) * x) - x)", "scan"),
    Map("upper part read through a sum", "A2", "param L: LowerTriangular[D', D]\nx * sum[D](L * x)", "scan"),
    Map("causal attention reads its own place", "A2", "s = sum[D](x * x[T -> S])\na: R[T, S] = softmax[S](where(index[S](x[T -> S]) <= index[T](x), s, 0))\nx * sum[S](a * x[T -> S])", "scan", "R[T, D]", "R[T = 3, D = 2]"),
    Map("triangle lost by exp", "A2", "param L: LowerTriangular[D', D]\nx + 2 * tanh(shift[D](sum[D](exp(L) * x), 1))", "scan"),
    Map("softmax of masked scores", "A2", "a: R[T, S] = softmax[S](where(index[S](x[T -> S]) < index[T](x), x[T -> S], 0))\nx - 4 * tanh(sum[S](a * x[T -> S]))", "scan", "R[T]", "R[T = 3]"),
    # A3: knowledge and accounting
    Map("a half dropped", "A3", HALVES + "a"),
    Map("a half twice", "A3", HALVES + "join[D](a, a)"),
    Map("one sum twice", "A3", HALVES + "join[D](a + b, a + b)"),
    Map("a difference with itself", "A3", "tanh(x) - tanh(x)"),
    Map("a difference of one value", "A3", "y = sinh(x)\ny - y"),
    Map("one number broadcast", "A3", "param v: R[K = 4]\nx[D = 0] + v", data="R[D = 1]"),
    Map("whole numbers without end", "A3", "x + 0.5", takes="Int[D]", data="Int[D = 4]"),
    Map("overlapping slices", "A3", "join[D](x[D = 0..3], x[D = 2..3])"),
    Map("a slice left out", "A3", "join[D](x[D = 0..2] * 2, x[D = 1..3] * 3)"),
    Map("mean broadcast", "A3", "0 * x + mean[D](x)"),
    Map("projection onto zero mean", "A3", "x - mean[D](x)"),
    Map("shift drops the last", "A3", "shift[D](x, 1)"),
    Map("exclusive cumsum", "A3", "cumsum[D](x) - x"),
    Map("softmax of the data", "A3", "softmax[D](x)"),
    Map("sorted", "A3", "sort[D](x)"),
    Map("scale may vanish", "A3", "param s: R[D]\nx * s"),
    Map("scale by a half may vanish", "A3", HALVES + "join[D](a, b * a)"),
    Map("scale by tanh may vanish", "A3", HALVES + "join[D](a, b * tanh(a))"),
    Map("unconstrained matrix", "A3", "param W: R[D', D]\nsum[D](W * x)"),
    Map("broadcast operand", "A3", "param v: R[D]\nmean[D](x) + v"),
    Map("lifted call of a narrower value", "A3", HALVES + "inner(mean[D](x), x)", before="bijector inner(m: R given c: R) { m + c }"),
    Map("whole numbers", "A3", "x + 0.5", takes="Int(0..8)[D]", data="Int(0..8)[D = 4]"),
    Map("noise wider than a step", "A3", "u: R[D] ~ uniform(0, 2)\nx + u", takes="Int[D]", data="Int[D = 4]"),
    Map("called with its own mirror", "A3", "inner(x, 2 * reverse[D](x))", before="bijector inner(x: R[D] given c: R[D]) { x + c }"),
    # A4: regions and exits
    Map("two unknowns in one exit", "A4", HALVES + "join[D](a + tanh(b), b + 2 * tanh(a))"),
    Map("both halves scaled by each other", "A4", HALVES + "join[D](a * exp(b), b * exp(a))"),
    Map("crossed sums", "A4", HALVES + "join[D](a + sinh(b), b - sinh(a) * 0 + sinh(a))"),
    Map("product and sum", "A4", HALVES + "join[D](a + b, exp(a) * exp(b))"),
    # A5: scans
    Map("not strictly causal", "A5", "x * cumsum[D](x)", "scan"),
    Map("before and after", "A5", "x + 2 * tanh(shift[D](x, 1)) + 2 * tanh(shift[D](x, -1))", "scan"),
    Map("strict along T, itself along D", "A5", "x * shift[T](x, 0) + shift[T](x, 1)", "scan", "R[T, D]", "R[T = 3, D = 2]"),
    Map("earlier slices and a mirror", "A5", "x + shift[T](x, 1) + 3 * tanh(reverse[D](x))", "scan", "R[T, D]", "R[T = 3, D = 2]"),
    Map("shift undone by another", "A5", "x * shift[D](shift[D](x, 1), -1)", "scan"),
    Map("strict by two axes each way", "A5", "x + 2 * tanh(shift[T](shift[D](x, -1), 1)) + 2 * tanh(shift[T](shift[D](x, 1), -1))", "scan", "R[T, D]", "R[T = 2, D = 2]"),
    Map("scale of earlier values may vanish", "A5", "x * shift[D](x, 1)", "scan"),
    Map("triangular product read again", "A5", "param L: LowerTriangular[D', D]\ny = sum[D](L * x)\ny * x", "scan"),
    Map("halves swapped, shifted and swapped back", "A5", "h = shift[D](x, 1)\na, b = halves[D](x)\nw = join[D](b, a) - 2 * tanh(shift[D](x, 2))\nc, d = halves[D](w)\njoin[D](d, c) + tanh(h)", "scan"),
    Map("what a later place holds", "A5", "v = tanh(100 * shift[T](x, 1))[T -> S]\nm: R[T, S] = where(index[S](x[T -> S]) == index[T](x) + 1, cos(x), 0)\nx - 0.2 * sum[S](m * v)", "scan", "R[T]", "R[T = 3]"),
    Map("square in a scan", "A5", "x ^ 2 + shift[D](x, 1)", "scan"),
    Map("mean of earlier and own", "A5", "param W: LowerTriangular[D', D]\nx - 3 * tanh(sum[D](W * x))", "scan"),
    # A5: convolutions
    Map("convolution of one's own kernel", "A5", KERNEL + 'conv(x, weight = K, causal = "H W")', *IMAGE),
    Map("convolution without a tap at the place itself", "A5", KERNEL + CORNER + 'conv(x, weight = where(corner, 0, K), causal = "H W")', *IMAGE),
    Map("convolution that looks both ways", "A5", KERNEL + CORNER + "conv(x, weight = where(corner, L, K))", *IMAGE),
    Map("convolution causal along one axis alone", "A5", KERNEL + CORNER + 'conv(x, weight = where(corner, L, K), causal = "H")', *IMAGE),
    Map("mask that leaks one later tap", "A5", KERNEL + "here = index[i](K) == 1 and index[j](K) == 1\nseen = index[i](K) < 1 or (index[i](K) == 1 and index[j](K) <= 2)\nconv(x, weight = where(here, L, where(seen, K, 0)))", *IMAGE),
    Map("mask off the tap that is triangular", "A5", KERNEL + "corner = index[i](K) == 2 and index[j](K) == 1\nconv(x, weight = where(corner, L, K), causal = \"H W\")", *IMAGE),
    # A6: scalar maps
    Map("square", "A6", "x ^ 2", "scalar"),
    Map("fourth power", "A6", "x ^ 4", "scalar"),
    Map("absolute value", "A6", "abs(x)", "scalar"),
    Map("cosine", "A6", "cos(x)", "scalar"),
    Map("sine too steep", "A6", "x + 1.5 * sin(x)", "scalar"),
    Map("tanh too steep", "A6", "x - 1.5 * tanh(x)", "scalar"),
    Map("unbounded coefficient", "A6", "param a: R[D]\nx + a * tanh(x)", "scalar"),
    Map("coefficient that may reach below -1", "A6", "param a: Interval(-1.5, 0.9)[D]\nx + a * tanh(x)", "scalar"),
    Map("silu", "A6", "silu(x)", "scalar"),
    Map("relu", "A6", "relu(x)", "scalar"),
    Map("clamp", "A6", "clamp(x, -1, 1)", "scalar"),
    Map("floor", "A6", "floor(x)", "scalar"),
    Map("floor beside the identity", "A6", "x - floor(x)", "scalar"),
    Map("rounded", "A6", "x + round(x)", "scalar"),
    Map("sign", "A6", "x + sign(x)", "scalar"),
    Map("branches that do not meet", "A6", "where(x > 0, x + 1, x)", "scalar"),
    Map("branches that meet and turn", "A6", "where(x > 0, x, -x)", "scalar"),
    Map("branches that meet elsewhere", "A6", "where(x > 1, x, 2 * x)", "scalar"),
    Map("wrapped", "A6", "mod(x, 1)", "scalar"),
    Map("condition on a neighbour", "A6", "where(reverse[D](x) > 0, x, 2 * x)", "scalar"),
    Map("zero slope far out", "A6", "x - relu(x - 1)", "scalar"),
    Map("flat power", "A6", "x ^ 0 + 0 * x", "scalar"),
    Map("flat between", "A6", "relu(x - 1) - relu(-x)", "scalar"),
    Map("bump that is flat at a point", "A6", "x + 8 * x / (1 + x ^ 2)", "scalar"),
    Map("bump that turns", "A6", "x - 1.1 * x / (1 + x ^ 2)", "scalar"),
    Map("cubic that turns", "A6", "x ^ 3 - 2 * x ^ 2 + x", "scalar"),
    Map("rational and bounded", "A6", "x ^ 3 / (1 + x ^ 4)", "scalar"),
    Map("product of two increasing", "A6", "x * (x + 3)", "scalar"),
    # A7: contractions
    Map("constant above 1", "A7", "x - 1.5 * tanh(reverse[D](x))", "contraction"),
    Map("a sum costs √n", "A7", "x - 0.9 * tanh(sum[D](x))", "contraction"),
    Map("broadcasting costs √n", "A7", "x - 0.9 * sum[D](tanh(x))", "contraction"),
    Map("a join is a root of squares", "A7", "h = tanh(sqrt(3) * mean[D](x) + 0 * x[D = 0..1])\nx - 0.9 * join[D](h, h, h)", "contraction", data="R[D = 3]"),
    Map("unbounded factor", "A7", "x - 0.5 * reverse[D](x) * tanh(x)", "contraction"),
    Map("jumps", "A7", "x - 0.4 * round(reverse[D](x))", "contraction"),
    Map("a network without bound", "A7", "x + mlp(8)(x)", "contraction"),
    Map("bound above 1", "A7", "x + lipschitz(mlp(8), 1.5)(x)", "contraction"),
    Map("two halves of a bound", "A7", "x - 0.6 * tanh(reverse[D](x)) - 0.6 * tanh(x)", "contraction"),
    Map("orthogonal over both axes", "A7", "param Q: Orthogonal[D', D]\nx - 0.9 * tanh(sum[D', D](Q * x[T -> D'])) ", "contraction", "R[T, D]", "R[T = 3, D = 3]"),
    # A8: low rank
    Map("planar without a bound", "A8", "param w: R[D]\nparam u: R[D]\nx + u * tanh(sum[D](w * x))", "low rank"),
    Map("planar below -1", "A8", UNIT_VECTOR + "x - 2 * w * tanh(s)", "low rank"),
    Map("planar projection", "A8", UNIT_VECTOR + "x - w * s", "low rank"),
    Map("planar with sine", "A8", UNIT_VECTOR + "x + 2 * w * sin(s)", "low rank"),
    Map("planar with relu", "A8", UNIT_VECTOR + "x - w * relu(s)", "low rank"),
    Map("planar with square", "A8", UNIT_VECTOR + "x + w * s ^ 2", "low rank"),
    Map("planar that saturates", "A8", UNIT_VECTOR + "x + w * (tanh(s) - s)", "low rank"),
    Map("radial below -1", "A8", "param a: Positive\nr = sqrt(sum[D](x ^ 2))\nx - 2 * a * x / (a + r)", "low rank"),
    Map("radial flat at its centre", "A8", "param a: Positive\nr = sqrt(sum[D](x ^ 2))\nx - a * x / (a + r)", "low rank"),
    Map("radial into a ball", "A8", "r = sqrt(sum[D](x ^ 2))\nx / (1 + r)", "low rank"),
    Map("radial that turns back", "A8", "x / (1 + sum[D](x ^ 2))", "low rank"),
    Map("radial about another centre", "A8", "param z0: R[D]\nd = x - z0\nr = sqrt(sum[D](d ^ 2))\nd - 3 * x / (1 + r)", "low rank"),
    Map("Sylvester below -1", "A8", "param Q: Stiefel[D, K = 2]\ns = sum[D](Q * x)\nx - 2 * sum[K](Q * tanh(s))", "low rank"),
    Map("Sylvester without orthonormal columns", "A8", "param Q: R[D, K = 2]\ns = sum[D](Q * x)\nx + sum[K](Q * (-0.9 * tanh(s)))", "low rank"),
    Map("Sylvester with a diagonal below -1", "A8", "param Q: Stiefel[D, K = 2]\nparam d: Interval(-1.1, 2)[K]\nparam M: UnitLowerTriangular[K', K]\ns = sum[D](Q * x)\nx + sum[K](Q * d * tanh(sum[K](M * s)))", "low rank"),
    Map("Sylvester with an upper and a lower triangle", "A8", "param Q: Stiefel[D, K = 2]\nparam L: LowerTriangular[K', K]\nparam M: LowerTriangular[K', K]\ns = sum[D](Q * x)\nx + sum[K](Q * sum[K'](L * tanh(sum[K](M * s))[K -> K']))", "low rank"),
    Map("Sylvester turned", "A8", "param Q: Stiefel[D, K = 2]\ns = sum[D](Q * x)\nx + 3 * sum[K](Q * tanh(reverse[K](s)))", "low rank"),
    Map("update that reads x too", "A8", UNIT_VECTOR + "x + w * tanh(s) * x", "low rank"),
    # A9: totality and image
    Map("log of all reals", "A9", "log(x)"),
    Map("square root of all reals", "A9", "sqrt(x)"),
    Map("logit of all reals", "A9", "logit(x)"),
    Map("conditioner is partial", "A9", HALVES + "join[D](a, b * exp(log(a)))"),
    Map("division by a half", "A9", HALVES + "join[D](a, b / a)"),
    Map("exp does not reach the reals", "A9", "exp(x)"),
    Map("tanh does not reach the reals", "A9", "tanh(x)", "scalar"),
    Map("softplus does not reach the reals", "A9", "softplus(x)"),
    Map("exp of a half, shifted", "A9", HALVES + "join[D](a, exp(b) + tanh(a))"),
    Map("sigmoid and tanh", "A9", "sigmoid(x) + tanh(x)", "scalar"),
    Map("2x - 1 on Positive", "A9", "2 * x - 1", takes="Positive[D]", data="Positive[D = 4]"),
    Map("2x - 1 on Positive to exponential", "A9", "2 * x - 1", takes="Positive[D]", data="Positive[D = 4]", base="exponential"),
    Map("sum of halves on Positive", "A9", HALVES + "join[D](a, b + a)", takes="Positive[D]", data="Positive[D = 4]", base="exponential"),
    Map("softsign", "A9", "x / (1 + abs(x))", "scalar"),
    Map("inverse outside its image", "A9", "inverse(e)(x)", before="bijector e(x: R[D]) { exp(x) }"),
    Map("atan in a scan", "A9", "atan(x) + shift[D](x, 1)", "scan"),
    Map("emission off its support", "A9", HALVES + "emit exp(b) ~ normal\na"),
    # A11: blocks and masks
    Map("singular sums", "A11", HALVES + "join[D](a + b, 2 * a + 2 * b)"),
    Map("masks that overlap", "A11", "m = checker[D](x)\nm * x + m * (x * exp(tanh(m * x)))"),
    Map("masks that leave a gap", "A11", "m = checker[D](x)\nm * x * exp(tanh((1 - m) * x))"),
    Map("masked reader of the moved part", "A11", "m = checker[D](x)\nm * x + (1 - m) * (x * (x - m * x))"),
    Map("one part broadcast", "A11", "a = x[D = 0]\nb = x[D = 1..4]\njoin[D](a + b, b - a)"),
    Map("cyclic sums of four", "A11", "a = x[D = 0]\nb = x[D = 1]\nc = x[D = 2]\nd = x[D = 3]\nstack[D](a + b, b + c, c + d, d + a)"),
    Map("mixing that may be singular", "A11", HALVES + "param s: Interval(-2, 2)[b.D]\njoin[D](a + s * b, b + s * a)"),
    Map("Givens of two angles", "A11", HALVES + "param t: R\nparam u: R\njoin[D](cos(t) * a - sin(u) * b, sin(t) * a + cos(u) * b)"),
    Map("rotation that may be singular", "A11", HALVES + "param c: R\nparam s: R\njoin[D](c * a - s * b, s * a + c * b)"),
    # A15: linear maps whose coefficients are numbers
    Map("projection of three", "A15", "x - mean[D](x)", "linear", data="R[D = 3]"),
    Map("centred twice", "A15", "y = x - mean[D](x)\ny + 0.5 * reverse[D](y)", "linear"),
    Map("neighbours that cancel", "A15", "x - 0.5 * shift[D](x, 1) - 0.5 * reverse[D](shift[D](reverse[D](x), 1)) - 0.5 * x[D = 0] * (index[D](x) == 0) - 0.5 * x[D = 3] * (index[D](x) == 3)", "linear"),
    Map("mean over rows and columns", "A15", "x - mean[T](x) - mean[D](x) + mean[T, D](x)", "linear", "R[T, D]", "R[T = 2, D = 3]"),
    Map("mirror added to itself", "A15", "x + reverse[D](x)", "linear"),
    Map("halves that tell one sum", "A15", HALVES + "join[D](a + mean[D](b), b + mean[D](a) - 0 * b)", "linear", data="R[D = 2]"),
    Map("coefficient that is no number", "A15", "param c: R\nx + c * mean[D](x)", "linear"),
    Map("mean with a coefficient of a half", "A15", HALVES + "c = tanh(sum[D](b)) * mean[D](b)\njoin[D](a, b - c)", "linear"),
    Map("linear and its square", "A15", "m = mean[D](x)\nx + m * m", "linear"),
    Map("linear and a product", "A15", "x + 0.1 * mean[D](x) * x", "linear"),
    # Trajectories
    Map("what a field moves, less its start", "A3", "def v(z, t) { sin(3.14159265 * z) }\n" + MOVED + " - x", "ode"),
    Map("field of the value that it moves", "A3", "def v(z, t) { x * z }\n" + MOVED, "ode"),
    Map("trajectory whose half leaves twice", "A3", "y = " + MOVED + "\na, b = halves[D](y)\njoin[D](a, a)", "ode", before=FIELD),
    Map("square of a trajectory", "A6", "y = " + MOVED + "\ny ^ 2", "ode", before=FIELD),
    Map("field that jumps", "A6", MOVED, "ode", before="net v(z: R[D], t: R) -> R[D] { round(z) }"),
    # A12: draws
    Map("a draw that stays inside", "A12", "x + noisy(x)", before="bijector noisy(x: R[D]) {\n  u: R[D] ~ normal\n  emit u ~ normal\n  x\n}"),
    Map("a draw that is not emitted", "A12", "u: R[D] ~ normal\nx + u"),
    Map("a draw that only conditions", "A12", HALVES + "join[D](a, b + noisy(a))", before="bijector noisy(x: R[D]) {\n  u: R[D] ~ normal\n  emit u + x ~ normal\n  x\n}"),
    Map("a draw in a conditioner", "A12", HALVES + "join[D](a, b + noisy(a))", before="bijector noisy(x: R[D]) {\n  u: R[D] ~ normal\n  x + u\n}"),
    Map("a network that draws", "A12", HALVES + "join[D](a, b + noisy(a))", before="net noisy(x: R[D]) -> R[D] {\n  u: R[D] ~ normal\n  x + u\n}"),
    Map("an emission without a draw", "A12", "emit x ~ normal\nx + 1"),
)  # fmt: skip

MIXTURE = "param p: R[D, K = 3]\nparam m: R[D, K = 3]\nparam s: R[D, K = 3]\n"

BIJECTIVE: tuple[Map, ...] = (
    # ANALYSIS.md's own examples
    Map("x + tanh of a cumulative sum", "A5", "x + tanh(cumsum[D](x))", "scan"),
    Map("x + tanh of a triangular product", "A5", "param L: LowerTriangular[D', D]\nx + tanh(sum[D](L * x))", "scan"),
    Map("mixture of logistics", "A9", MIXTURE + "logit(sum[K](softmax[K](p) * sigmoid((x - m) * exp(s))))", "scalar"),
    Map("mixture of tanh", "A9", MIXTURE + "atanh(sum[K](softmax[K](p) * tanh((x - m) * exp(s))))", "scalar"),
    Map("x + log x on Positive", "A9", "x + log(x)", "scalar", "Positive[D]", "Positive[D = 4]"),
    Map("sinh", "A9", "sinh(x)"),
    Map("planar", "A8", "param w: Sphere[D]\nparam u: R[D]\nk = sum[D](w * u)\nx + (u + (softplus(k) - 1 - k) * w) * tanh(sum[D](w * x))", "low rank"),
    Map("radial", "A8", "param z0: R[D]\nparam a: Positive\nparam b: Positive\nd = x - z0\nr = sqrt(sum[D](d ^ 2))\nx + (b - a) * d / (a + r)", "low rank"),
    # What nobody foresaw
    Map("printed RealNVP", "A11", "m = checker[D](x)\nm * x + (1 - m) * (x * exp(tanh(m * x)) + m * x)"),
    Map("masked mlp coupling", "A11", "m = checker[D](x)\ns: R[D], t: R[D] = mlp(8)(m * x)\nm * x + (1 - m) * (x * exp(tanh(s)) + t)"),
    Map("own coupling", "A3", HALVES + "h = sin(a) * a + 1\njoin[D](a, b * (1.5 + cos(h)) + h ^ 2)"),
    Map("coupling twice", "A3", HALVES + "c = b * exp(tanh(a)) + a\njoin[D](a - sinh(c), c)"),
    Map("three parts", "A3", "a = x[D = 0..1]\nb = x[D = 1..2]\nc = x[D = 2..4]\njoin[D](a, b * exp(a) , c + mean[D](b * a))"),
    Map("own autoregression", "A5", "h = shift[D](cumsum[D](x ^ 2), 1)\nx * (1 + h / (1 + h)) - log1p(h)", "scan"),
    Map("backwards autoregression", "A5", "x * exp(sin(shift[D](x, -1)))", "scan"),
    Map("both halves by earlier slices", "A5", "a, b = halves[D](x)\njoin[D](a * exp(tanh(shift[T](b, 1))), b + shift[T](a, 1))", "scan", "R[T, D]", "R[T = 3, D = 4]"),
    Map("raster", "A5", "y = x[(T, D) -> N]\nh = tanh(shift[N](cumsum[N](y), 1))[N -> (T = x.T, D = x.D)]\nx * exp(h) + h", "scan", "R[T, D]", "R[T = 3, D = 2]"),
    Map("earlier rows, and earlier in the row", "A5", "x * exp(tanh(sum[D](shift[T](x, 1)) + shift[D](x, 1)))", "scan", "R[T, D]", "R[T = 3, D = 3]"),
    Map("scalar inside a scan", "A5", "x + 0.5 * sin(x + shift[D](x, 1))", "scan"),
    Map("causal attention of what came before", "A5", "h = shift[T](x, 1)\ns = sum[D](h * h[T -> S])\na: R[T, S] = softmax[S](s, causal = \"T\")\nx + sum[S](a * h[T -> S])", "scan", "R[T, D]", "R[T = 3, D = 2]"),
    Map("every other entry", "A5", "h = shift[D](x, 2)\nx * exp(tanh(h)) + h", "scan"),
    Map("corner convolution", "A5", KERNEL + CORNER + 'conv(x, weight = where(corner, L, K), causal = "H W")', *IMAGE),
    Map("corner convolution put together of its taps", "A5", "param L: UnitLowerTriangular[C', C]\nparam K: R[t = 8, C', C] ~ normal(0, 0.2)\nconv(x, weight = join[t](K, stack[t](L))[t -> (i = 3, j = 3)], causal = \"H W\")", *IMAGE),
    Map("corner convolution backwards", "A5", KERNEL + CORNER + 'reverse[H](conv(reverse[H](x), weight = where(corner, L, K), causal = "H W"))', *IMAGE),
    Map("corner convolution by a mask of a wide kernel", "A5", "param L: Invertible[C', C]\nparam K: R[C', C, i = 5, j = 5] ~ normal(0, 0.2)\n" + CORNER + "seen = index[i](K) <= 2 and index[j](K) <= 2\nconv(x, weight = where(corner, L, where(seen, K, 0)))", *IMAGE),
    Map("causal convolution in time", "A5", "param L: LowerTriangular[C', C]\nparam K: R[C', C, k = 3] ~ normal(0, 0.2)\nconv[C, T](x, weight = where(index[k](K) == 2, L, K), causal = \"T\", dilation = 2)", "scan", "R[C, T]", "R[C = 2, T = 6]"),
    Map("raster convolution", "A5", KERNEL + "here = index[i](K) == 1 and index[j](K) == 1\nseen = index[i](K) < 1 or (index[i](K) == 1 and index[j](K) < 1)\nconv(x, weight = where(here, L, where(seen, K, 0)))", *IMAGE),
    Map("strict convolution and a channel matrix", "A5", KERNEL + CORNER + 'conv(x, weight = where(corner, 0, K), causal = "H W") + sum[C](L * x)', *IMAGE),
    Map("conditioned by a strict convolution", "A5", KERNEL + CORNER + 'h = conv(x, weight = where(corner, 0, K), causal = "H W")\nx * exp(tanh(h)) + h', *IMAGE),
    Map("sine", "A6", "x + 0.9 * sin(x)", "scalar"),
    Map("sine times tanh", "A6", "x + 0.6 * sin(x) * tanh(x)", "scalar"),
    Map("bounded coefficient", "A6", "param a: Interval(-0.9, 3)[D]\nx + a * tanh(x)", "scalar"),
    Map("sum of increasing", "A6", "x ^ 3 + asinh(x) + x", "scalar"),
    Map("decreasing", "A6", "-x - tanh(x)", "scalar"),
    Map("branches that meet", "A6", "where(x > 0, 3 * x, x / 2)", "scalar"),
    Map("branches that meet at one", "A6", "where(x < 1, x, 2 * x - 1)", "scalar"),
    Map("leaky", "A6", "max(x, 0.1 * x)", "scalar"),
    Map("exp plus line", "A6", "exp(x) + x", "scalar"),
    Map("scaled by a known half", "A6", HALVES + "join[D](a, b + 0.5 * sigmoid(a) * sin(b))", "scalar"),
    Map("Haar", "A11", HALVES + "join[D]((a + b) / sqrt(2), (a - b) / sqrt(2))"),
    Map("sums with numbers", "A11", HALVES + "join[D](2 * a + b, a + b)"),
    Map("Givens", "A11", HALVES + "param t: R\njoin[D](cos(t) * a - sin(t) * b, sin(t) * a + cos(t) * b)"),
    Map("x + x/(1 + x²)", "A6", "x + x / (1 + x ^ 2)", "scalar"),
    Map("four parts", "A11", "a = x[D = 0]\nb = x[D = 1]\nc = x[D = 2]\nd = x[D = 3]\nstack[D](a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d)"),
    Map("Givens by a known part", "A11", "a = x[D = 0..1]\nb = x[D = 1..2]\nc = x[D = 2..4]\nt = sum[D](sinh(c))\njoin[D](cos(t) * a - sin(t) * b, sin(t) * a + cos(t) * b + t, c)"),
    Map("bounded mixing", "A11", HALVES + "param s: Interval(-0.9, 0.9)[b.D]\njoin[D](a + tanh(s) * b, b - s * a)"),
    Map("sums in a scan", "A11", HALVES + "h = shift[T](a, 1)\njoin[D](a + 2 * b + tanh(h), 3 * b - a + h)", "", "R[T, D]", "R[T = 3, D = 4]"),
    Map("mean added", "A15", "x + mean[D](x)", "linear"),
    Map("mean taken in part", "A15", "x - 0.9 * mean[D](x) + 1", "linear"),
    Map("mean added along one axis of two", "A15", "x + 2 * mean[T](x)", "linear", "R[T, D]", "R[T = 3, D = 2]"),
    Map("mean added, moved by context of a half", "A15", HALVES + "c = b + mean[D](b) + tanh(a)\njoin[D](a, c)", "linear", data="R[D = 6]"),
    Map("second difference", "A15", "2 * x - 0.5 * shift[D](x, 1) - 0.5 * shift[D](x, -1)", "linear"),
    Map("circulant", "A15", "y = permute[D](x, [1, 2, 3, 0])\n3 * x + y - permute[D](y, [1, 2, 3, 0])", "linear"),
    Map("halves that read each other's mean", "A15", HALVES + "join[D](a + mean[D](b), b - mean[D](a))", "linear"),
    Map("running sums and a mirror", "A15", "cumsum[D](x) + 3 * reverse[D](x)", "linear"),
    Map("bump of a slope of one eighth", "A6", "x - 0.99 * x / (1 + x ^ 2)", "scalar"),
    Map("cubic without a turn", "A6", "x ^ 3 - x ^ 2 + x", "scalar"),
    Map("network of a contraction", "A7", "x + lipschitz(mlp(8), 0.9)(x)", "contraction"),
    Map("mixing contraction", "A7", "x - 0.9 * tanh(reverse[D](x))", "contraction"),
    Map("mean field", "A7", "x + 0.9 * tanh(mean[D](x))", "contraction"),
    Map("two terms", "A7", "x + 0.4 * tanh(reverse[D](x)) - 0.4 * sin(x)", "contraction"),
    Map("Sylvester with sine", "A8", "param Q: Stiefel[D, K = 2]\ns = sum[D](Q * x)\nx + sum[K](Q * (-0.5 * sin(s)))", "low rank"),
    Map("Sylvester with two triangles", "A8", "param Q: Stiefel[D, K = 2]\nparam L: LowerTriangular[K', K]\nparam M: LowerTriangular[K', K]\ns = sum[D](Q * x)\nh = tanh(sum[K](M * s))\nx + sum[K](Q * sum[J](L[K -> J, K' -> K] * h[K -> J]))", "low rank"),
    Map("Sylvester with negative diagonals", "A8", "param Q: Stiefel[D, K = 2]\nparam d: Interval(-0.9, 2)[K]\nparam M: UnitLowerTriangular[K', K]\ns = sum[D](Q * x)\nx + sum[K](Q * d * tanh(sum[K](M * s)))", "low rank"),
    Map("low rank between others", "A8", "param Q: Stiefel[D, K = 2]\na, b = halves[D](x)\ny = join[D](a, b * exp(tanh(a)))\nz = y + sum[K](Q * 0.5 * tanh(sum[D](Q * y)))\nc, d = halves[D](z)\njoin[D](c + d, c - d)", "low rank"),
    Map("polar square", "A8", "x * (1 + sum[D](x ^ 2))", "low rank"),
    Map("rank one", "A8", UNIT_VECTOR + "x + 2 * w * tanh(s)", "low rank"),
    Map("rank one with sine", "A8", UNIT_VECTOR + "x + 0.9 * w * sin(s)", "low rank"),
    Map("positive to positive", "A9", "x * exp(tanh(shift[D](log(1 + x), 1)))", "scan", "Positive[D]", "Positive[D = 4]", "exponential"),
    Map("unit to line", "A9", "logit(x) + 1", "", "Unit[D]", "Unit[D = 4]"),
    Map("inverse of a scan", "A9", "inverse(e)(x)", before="bijector e(x: R[D]) { x * exp(tanh(shift[D](x, 1))) }"),
    Map("strictly masked log", "A13", "param W: LowerTriangular[D', D]\nx * exp(tanh(autoregressive_mlp[D](log(x), hidden = [8])))", "scan", "Positive[D]", "Positive[D = 4]", "exponential"),
    Map("triangle of logs", "A13", "param L: LowerTriangular[D', D]\nh = exp(tanh(shift[D](sum[D](L * log(x)), 1)))\nx * h + log1p(x)", "scan", "Positive[D]", "Positive[D = 4]", "exponential"),
    Map("all but nothing", "A2", "s: R[D] = autoregressive_mlp[D](x, hidden = [8])\nx * exp(tanh(s))", "scan", "R[D]", "R[D = 1]"),
    Map("matrix over one axis", "A10", "param W: Invertible[D', D]\nsum[D](W * x)", "", "R[T, D]", "R[T = 3, D = 2]"),
    Map("scale of one axis", "A10", "param s: Positive[D]\nx * s", "", "R[T, D]", "R[T = 3, D = 2]"),
    Map("own bijector as a conditioner", "A12", HALVES + "join[D](a, b + inner(a))", before="bijector inner(x: R[D]) {\n  param s: Positive[D] = 2\n  x * s\n}"),
    Map("augmented", "A12", "u: R[D] ~ normal\nemit u * exp(tanh(x)) + x ~ normal\nx + 1"),
)  # fmt: skip

# Bijections that no clause here proves yet: refused, which is safe.
NOT_PROVED: tuple[Map, ...] = (
    Map("renamed on the way", "A6", "tanh(x)[D -> E] + x[D -> E]", "scalar"),
)  # fmt: skip
