"""One table from op to PyTorch expression, and the writer of a method's body."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowlang.backends.torch.names import Names

from flowlang.derive.programs import Program, is_map
from flowlang.derive.schedule import schedule
from flowlang.ir.graph import Graph, Node, Region, result_types
from flowlang.ir.ops import OPS
from flowlang.ir.ops.control import Series
from flowlang.ir.ops.splines import SPLINES, bin_axis, kind_of, numbers_of
from flowlang.ir.tangents import plain_method, probes_of
from flowlang.ir.types import TensorType, TupleType

if TYPE_CHECKING:
    from flowlang.backends.torch.codegen import ClassScope

ATOM, POWER, UNARY, PRODUCT, SUM, COMPARE = 6, 5, 4, 3, 2, 1
INLINE_WIDTH = 64
RESULT_WIDTH = 72


@dataclass(frozen=True)
class Expr:
    """Python text with the strength of its outermost operator."""

    text: str
    level: int = ATOM

    def at(self, level: int) -> str:
        return self.text if self.level >= level else f"({self.text})"


class Writer:
    """Writes one program (or a solver's body) as statements."""

    def __init__(self, scope: ClassScope, graph: Graph, names: Names | None = None):
        self.scope = scope
        self.graph = graph
        self.names = names or Names(scope.generator.reserved)
        self.env: dict[int, Expr] = {}
        self.lines: list[str] = []
        self.batch = ""  # the batch shape, as a tuple
        self.generator = "None"
        self.reference = ""  # a tensor of the flow's dtype and device
        self.uses: dict[int, int] = {}
        self.results: set[int] = set()
        self.numbers: dict[int, float | int | bool | None] = {}
        self.pairs: dict[tuple[Any, ...], tuple[str, str]] = {}
        self.replaced: set[str] = set()  # states that the program writes
        self.needed: set[int] = set()
        self.alias: dict[int, Node] = {}  # body inputs that stand for parameters outside

    # ---- driving --------------------------------------------------------------------------------

    def run(self, outputs: Sequence[int], effects: Sequence[tuple[str, int]] = ()) -> list[str]:
        self.results = set(outputs)
        self.replaced = {name for name, _ in effects}
        self.needed = needed = self.graph.reachable([*outputs, *(n for _, n in effects)])
        later = needed - self.always(outputs)
        for n in needed:
            node = self.graph[n]
            weight = 2 if "body" in node.attrs else 1
            for i in node.inputs:
                self.uses[i] = self.uses.get(i, 0) + weight
        for o in [*outputs, *(n for _, n in effects)]:
            self.uses[o] = self.uses.get(o, 0) + 1
        for n in sorted(needed - later):
            if n not in self.env:
                self.emit(self.graph[n])
        return [self.env[o].text for o in outputs]

    def always(self, outputs: Sequence[int]) -> set[int]:
        """What the results need in training and at inference; the rest is written where the mode is asked for."""
        return self.graph.reachable(list(outputs), lambda n: () if n.op in ("running", "choose") else n.inputs)

    def write_effects(self, effects: Sequence[tuple[str, int]], results: Sequence[str], trained: bool) -> list[str]:
        """States take their new values when the results are made; gives the results as names.

        `trained`: the program runs in training alone.
        """
        kept = []
        for text in results:
            if not text.isidentifier():
                name = self.names.fresh("y")
                self.lines.append(f"{name} = {text}")
                text = name
            kept.append(text)
        counted = self.counted(effects)
        lines, values = self.blocks([n for name, n in effects if name not in counted])
        lines += [f"self.{self.scope.attributes[name]}.add_({by})" for name, by in counted.items()]
        for (name, n), value in zip((e for e in effects if e[0] not in counted), values, strict=True):
            state = f"self.{self.scope.attributes[name]}"
            lines.append(f"{state}.{'fill_' if self.is_number(n) else 'copy_'}({value})")
        lines = ["with torch.no_grad():", *(f"    {x}" for x in lines)]
        self.lines += lines if trained else ["if self.training:", *(f"    {x}" for x in lines)]
        return kept

    def counted(self, effects: Sequence[tuple[str, int]]) -> dict[str, str]:
        """Counters: states to which a number is added, and that nothing else reads."""
        read = {
            e: {self.graph[i].attrs["name"] for i in self.graph.reachable([n]) if self.graph[i].op == "state"}
            for e, n in effects
        }
        found = {}
        for name, n in effects:
            node = self.graph[n]
            own = [i for i in node.inputs if self.graph[i].op == "state" and self.graph[i].attrs["name"] == name]
            if node.op != "add" or len(own) != 1 or {n, own[0]} & set(self.env):
                continue
            by = self.number(node.inputs[1 - node.inputs.index(own[0])])
            if by is not None and not any(name in states for e, states in read.items() if e != name):
                found[name] = literal(by)
        return found

    def block(self, value: int) -> tuple[list[str], str]:
        """The statements that make a value, apart from the others, and the value."""
        made, (text,) = self.blocks([value])
        return made, text

    def blocks(self, values: Sequence[int]) -> tuple[list[str], list[str]]:
        """The statements that make values, apart from the others, and the values."""
        known, lines = dict(self.env), self.lines
        self.lines = []
        always = self.always([v for v in values if v not in self.env])
        for n in sorted(always):
            if n not in self.env:
                self.emit(self.graph[n])
        made, texts = self.lines, [self.env[v].text for v in values]
        self.env, self.lines = known, lines
        return made, texts

    def emit(self, node: Node) -> None:
        if node.op == "get" and node.id in self.env:
            return
        value = self.number(node.id) if isinstance(node.type, TensorType) else None
        if value is not None:
            text = literal(value)
            self.env[node.id] = Expr(text, UNARY if text.startswith("-") else ATOM)
            return
        rule = EMITTERS.get(node.op)
        if rule is None:
            from flowlang.backends.torch.codegen import Unlowered

            raise Unlowered(node)
        expr = rule(self, node)
        if expr is None:
            return
        if node.op in ("const", "input"):
            self.env[node.id] = expr
            return
        simple = expr.level == ATOM and "(" not in expr.text and "[" not in expr.text
        once = self.uses.get(node.id, 0) <= 1
        width = RESULT_WIDTH if node.id in self.results else INLINE_WIDTH if node.label is None else 0
        if simple or (once and (len(expr.text) <= width or takes_bias(self, node))):
            self.env[node.id] = expr
            return
        self.env[node.id] = Expr(self.assign(node, expr.text))

    def assign(self, node: Node, text: str, wanted: str | None = None) -> str:
        name = self.names.fresh(wanted or node.label or self.short(node))
        comment = ""
        if isinstance(node.type, TensorType) and node.tensor.axes and len(text) < 80:
            comment = f"  # [{', '.join(node.tensor.names)}]"
        self.lines.append(f"{name} = {text}{comment}")
        return name

    def short(self, node: Node) -> str:
        """A name for a value that the spec does not name; that of what it rearranges, where it only does so."""
        while node.op in ("rename", "order", "split", "merge", "expand") and self.graph[node.inputs[0]].label is None:
            node = self.graph[node.inputs[0]]
        if node.op == "add" and any(self.graph[i].op == "contract" for i in node.inputs):
            return "linear"
        return node.label or short(node.op, node)

    def variable(self, n: int, wanted: str | None = None) -> str:
        """The value as a plain name (solver bodies capture names, not expressions)."""
        expr = self.env[n]
        if expr.text.removeprefix("self.").isidentifier():
            return expr.text
        name = self.names.fresh(wanted or self.graph[n].label or self.short(self.graph[n]))
        self.lines.append(f"{name} = {expr.text}")
        self.env[n] = Expr(name)
        return name

    def batch_text(self) -> str:
        """The batch dims, to be spread into a shape."""
        return f"*{self.batch}"

    def with_batch(self, sizes: str) -> str:
        """Arguments of `expand`: the batch dims, then sizes. A spread of no dims at all would be no argument."""
        return f"*{self.batch}, {sizes}" if sizes else self.batch

    # ---- operands -------------------------------------------------------------------------------

    def type(self, n: int) -> TensorType:
        return self.graph[n].tensor

    def const(self, n: int) -> float | int | bool | None:
        node = self.graph[n]
        if node.op == "const" and not node.tensor.axes:
            value = node.attrs["value"]
            assert isinstance(value, float | int | bool)
            return value
        return None

    def tensor(self, n: int) -> str:
        """The value as a tensor expression of full strength."""
        return self.as_tensor(n) if self.const(n) is not None else self.env[n].at(ATOM)

    def as_tensor(self, n: int) -> str:
        """A tensor even where the value is a number in Python."""
        return self.full("()", n) if self.is_number(n) else self.env[n].at(ATOM)

    def full(self, shape: str, n: int) -> str:
        """A tensor of a shape filled with a number."""
        if self.const(n) == 0:
            return f"{self.reference}.new_zeros({shape})"
        return f"{self.reference}.new_full({shape}, {self.env[n].text})"

    def number_tensor(self, n: int, text: str) -> str:
        """A tensor without axes that holds a number, of its kind."""
        if self.type(n).kind == "real":
            return f"{self.reference}.new_full((), {text})"
        return f"torch.tensor({text}, device={self.reference}.device)"

    def is_number(self, n: int) -> bool:
        """Whether the value is a Python number: made of constants alone."""
        return self.number(n) is not None

    def number(self, n: int) -> float | int | bool | None:
        """The value of a node that is made of constant numbers."""
        if n not in self.numbers:
            self.numbers[n] = None
            node = self.graph[n]
            if node.op == "const":
                self.numbers[n] = self.const(n)
            elif node.op in ARITHMETIC and not node.tensor.axes:
                found = [self.number(i) for i in node.inputs]
                if all(v is not None for v in found):
                    self.numbers[n] = evaluate(node.op, [float(v) for v in found if v is not None])
        return self.numbers[n]

    def aligned(self, n: int, target: TensorType) -> Expr:
        """The operand with its axes where the result has them."""
        if self.is_number(n):
            return self.env[n]
        t = self.type(n)
        expr = self.env[n]
        order = [a for a in target.names if t.has(a)]
        if list(t.names) != order:
            expr = Expr(moved(expr.at(ATOM), t.names, order))
        inserted = False
        index: list[str] = []
        seen_left = False
        for a in target.names:
            if t.has(a):
                index.append(":")
                seen_left = True
            elif seen_left or self.graph[n].batched:
                index.append("None")
                inserted = True
        if inserted:
            lead = "..., " if self.graph[n].batched else ""
            expr = Expr(f"{expr.at(ATOM)}[{lead}{', '.join(index)}]")
        return expr

    def dim(self, n: int, axis: str) -> int:
        t = self.type(n)
        return t.position(axis) - t.rank

    def dims(self, n: int, axes: Sequence[str]) -> str:
        found = sorted(self.dim(n, a) for a in axes)
        return str(found[0]) if len(found) == 1 else str(tuple(found))

    def at(self, n: int, axis: str, index: str) -> str:
        """`x[..., index, :, :]` with the index on an axis."""
        after = -self.dim(n, axis) - 1
        return f"{self.tensor(n)}[..., {index}{', :' * after}]"


def moved(text: str, have: Sequence[str], want: Sequence[str]) -> str:
    """Axes in another order; batch dims stay in front."""
    if list(have) == list(want):
        return text
    n = len(have)
    if n == 2:
        return f"{text}.mT"
    differ = [k for k in range(n) if have[k] != want[k]]
    if len(differ) == 2:
        return f"{text}.transpose({differ[0] - n}, {differ[1] - n})"
    for i in (differ[0], differ[-1]):
        rest = [a for a in have if a != have[i]]
        j = list(want).index(have[i])
        if [*rest[:j], have[i], *rest[j:]] == list(want):
            return f"{text}.movedim({i - n}, {j - n})"
    source = tuple(list(have).index(a) - n for a in want)
    return f"{text}.movedim({source}, {tuple(range(-n, 0))})"


NAMES = {
    "add": "total", "sub": "difference", "mul": "scaled", "div": "ratio", "neg": "negative", "contract": "product",
    "sum": "total", "exp": "scale", "get": "part", "random_like": "noise", "matrix_log_det": "log_det",
    "relu": "h", "silu": "h", "gelu": "h", "elu": "h", "selu": "h", "leaky_relu": "h", "tanh": "h", "softplus": "h",
    "log_abs": "log_size", "order": "moved", "expand": "spread", "masked": "weight", "norm_bounded": "weight",
}  # fmt: skip


def short(op: str, node: Node | None = None) -> str:
    """A name for a value that the spec does not name."""
    if node is not None and op == "call":
        return f"{node.attrs['child']}_out"
    return NAMES.get(op, op.split("_")[0] if len(op) > 12 else op)


ARITHMETIC: dict[str, Callable[..., float]] = {
    "neg": lambda a: -a, "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "identity": lambda a: a, "rename": lambda a: a, "order": lambda a: a, "exp": math.exp,
    "log": math.log, "log1p": math.log1p, "expm1": math.expm1, "sqrt": math.sqrt, "square": lambda a: a * a,
    "abs": abs, "lgamma": math.lgamma, "sin": math.sin, "cos": math.cos, "tanh": math.tanh,
}  # fmt: skip


def evaluate(op: str, values: Sequence[float]) -> float | None:
    """Arithmetic on constants; None outside an op's domain."""
    try:
        found = ARITHMETIC[op](*values)
    except (ArithmeticError, ValueError):
        return None
    return found if math.isfinite(found) else None


def literal(value: float | int | bool) -> str:
    if isinstance(value, bool):
        return repr(value)
    if isinstance(value, float):
        if value == math.inf:
            return "math.inf"
        if value == -math.inf:
            return "-math.inf"
    return repr(value)


def integers(values: Sequence[int]) -> str:
    """A list of whole numbers, as a short expression where there is one."""
    n = len(values)
    if n > 1 and list(values) == list(range(values[0], values[0] + n)):
        return f"range({n})" if values[0] == 0 else f"range({values[0]}, {values[0] + n})"
    if n > 2 and len(set(values)) == 1:
        return f"[{values[0]}] * {n}"
    first = values[0] if n else 0
    for top in (values[-1] - first, values[-1] - first + 1) if n > 4 else ():
        if list(values) == [first + j * top // n for j in range(n)]:
            return f"[{f'{first} + ' if first else ''}j * {top} // {n} for j in range({n})]"
    if n > 1 and list(values) == list(range(values[0], values[0] - n, -1)):
        return f"range({values[0]}, {values[0] - n}, -1)"
    return repr(list(values))


Emitter = Callable[[Writer, Node], "Expr | None"]
EMITTERS: dict[str, Emitter] = {}


def emitter(*ops: str) -> Callable[[Emitter], Emitter]:
    def put(fn: Emitter) -> Emitter:
        for op in ops:
            assert op not in EMITTERS, op
            EMITTERS[op] = fn
        return fn

    return put


# ---- leaves -------------------------------------------------------------------------------------


@emitter("const")
def _const(w: Writer, n: Node) -> Expr:
    value = n.attrs["value"]
    if not n.tensor.axes:
        text = literal(value)
        return Expr(text, UNARY if text.startswith("-") else ATOM)
    return Expr(w.scope.buffer("constant", f"torch.tensor({value!r})"))


@emitter("param")
def _param(w: Writer, n: Node) -> Expr:
    return Expr(w.scope.parameter(n))


@emitter("state")
def _state(w: Writer, n: Node) -> Expr:
    if n.attrs["name"] not in w.replaced:
        return Expr(w.scope.parameter(n))
    return Expr(w.assign(n, f"{w.scope.parameter(n)}.clone()"))  # it is replaced before the backward pass


@emitter("choose")
def _choose(w: Writer, n: Node) -> Expr | None:
    half = len(n.inputs) // 2
    read = {u.attrs["index"]: u for u, _ in w.graph.users(n.id) if u.op == "get" and u.id in w.needed}
    names = {k: w.names.fresh(read[k].label or "h") for k in sorted(read)}
    for head, first in (("if self.training:", 0), ("else:", half)):
        ids = [n.inputs[first + k] for k in names]
        lines, values = w.blocks(ids)
        values = [w.number_tensor(i, v) if w.is_number(i) else v for i, v in zip(ids, values, strict=True)]
        made = [f"{name} = {value}" for name, value in zip(names.values(), values, strict=True) if name != value]
        w.lines += [head, *(f"    {x}" for x in [*lines, *made] or ["pass"])]
    for k, name in names.items():
        w.env[read[k].id] = Expr(name)
    return None


@emitter("running")
def _running(w: Writer, n: Node) -> Expr | None:
    state = w.scope.matrix(n)
    live, new = n.inputs
    var = w.names.fresh(n.label or n.attrs["name"])
    lines, value = w.block(live)
    w.lines += ["if self.training:", *(f"    {x}" for x in lines), f"    {var} = {value}"]
    known = dict(w.env)
    w.env[live] = Expr(var)
    lines, value = w.block(new)
    w.env = known
    w.lines += ["    with torch.no_grad():", *(f"        {x}" for x in lines), f"        {state}.copy_({value})"]
    w.lines += ["else:", f"    {var} = {state}"]
    w.env[n.id] = Expr(var)
    return None


@emitter("start")
def _start(w: Writer, n: Node) -> Expr:
    own = w.scope.matrix(n)
    value = w.aligned(n.inputs[0], n.tensor).text
    constrained = n.attrs["domain"].name in ("Positive", "Unit", "Interval")
    w.lines.append(f"{own}.assign({value})" if constrained else f"{w.scope.use('assign')}({own}, {value})")
    return Expr(f"{own}()" if constrained else own)


OVER_BATCH = {"batch_sum": "torch.sum", "batch_max": "torch.amax", "batch_min": "torch.amin"}


@emitter("batch_mean", "batch_var", *OVER_BATCH)
def _batch_moment(w: Writer, n: Node) -> Expr:
    x = n.inputs[0]
    t = w.type(x)
    dims = [w.dim(x, a) for a in n.attrs["axes"]]
    ddof = f", {n.attrs['ddof']}" if n.attrs.get("ddof") else ""
    if n.op in OVER_BATCH:
        return Expr(f"{w.scope.use('over_batch')}({OVER_BATCH[n.op]}, {argument(w, x)}, {t.rank}, {tuple(dims)!r})")
    return Expr(f"{w.scope.use(n.op)}({argument(w, x)}, {t.rank}, {tuple(dims)!r}{ddof})")


@emitter("input")
def _input(w: Writer, n: Node) -> Expr | None:
    raise AssertionError(f"input {n.label} was not bound")


@emitter("index")
def _index(w: Writer, n: Node) -> Expr:
    return Expr(
        w.scope.buffer(f"index_{n.attrs['axis']}", f"torch.arange({n.attrs['size']}, dtype=torch.get_default_dtype())")
    )


# ---- elementwise --------------------------------------------------------------------------------

TORCH_UNARY = {
    "exp": "torch.exp", "log": "torch.log", "log1p": "torch.log1p", "expm1": "torch.expm1", "sqrt": "torch.sqrt",
    "square": "torch.square", "abs": "torch.abs", "sign": "torch.sign", "reciprocal": "torch.reciprocal", "sin": "torch.sin",
    "cos": "torch.cos", "tan": "torch.tan", "sinh": "torch.sinh", "cosh": "torch.cosh", "tanh": "torch.tanh", "asinh": "torch.asinh",
    "atanh": "torch.atanh", "atan": "torch.atan", "asin": "torch.asin", "acos": "torch.acos", "sigmoid": "torch.sigmoid",
    "logit": "torch.logit", "softplus": "F.softplus", "log_sigmoid": "F.logsigmoid", "relu": "F.relu", "selu": "F.selu",
    "silu": "F.silu", "gelu": "F.gelu", "erf": "torch.erf", "erfinv": "torch.erfinv", "floor": "torch.floor", "whole_part": "torch.floor",
    "round": "torch.round", "not": "torch.logical_not", "lgamma": "torch.lgamma",
}  # fmt: skip
RUNTIME_UNARY = (
    "softplus_inverse", "log_cosh", "log_tanh_slope", "tanh_slope", "sigmoid_slope", "log_sigmoid_slope", "log_abs",
    "log_bessel_i0e",
)  # fmt: skip


IN_PLACE = ("F.linear(", "torch.addmm(", "convolve(")  # their backward does not need their result


def _relu(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    fresh = w.uses.get(i) == 1 and w.env[i].text.startswith(IN_PLACE) and w.env[i].text.endswith(")")
    return Expr(f"F.relu({argument(w, i)}{', inplace=True' if fresh else ''})")


def _unary(w: Writer, n: Node) -> Expr:
    return Expr(f"{TORCH_UNARY[n.op]}({argument(w, n.inputs[0])})")


def argument(w: Writer, n: int) -> str:
    """An operand as a function's only argument: no parentheses needed."""
    return w.as_tensor(n) if w.is_number(n) else w.env[n].text


def _runtime_unary(w: Writer, n: Node) -> Expr:
    return Expr(f"{w.scope.use(n.op)}({argument(w, n.inputs[0])})")


for _op in TORCH_UNARY:
    EMITTERS[_op] = _unary
EMITTERS["relu"] = _relu
for _op in RUNTIME_UNARY:
    EMITTERS[_op] = _runtime_unary


@emitter("neg")
def _neg(w: Writer, n: Node) -> Expr:
    return Expr(f"-{w.env[n.inputs[0]].at(UNARY)}", UNARY)


@emitter("identity", "within")
def _identity(w: Writer, n: Node) -> Expr:
    return w.env[n.inputs[0]]


@emitter("stop")
def _stop(w: Writer, n: Node) -> Expr:
    return Expr(f"{w.tensor(n.inputs[0])}.detach()")


@emitter("leaky_relu")
def _leaky(w: Writer, n: Node) -> Expr:
    return Expr(f"F.leaky_relu({argument(w, n.inputs[0])}, {n.attrs['slope']!r})")


@emitter("elu")
def _elu(w: Writer, n: Node) -> Expr:
    return Expr(f"F.elu({argument(w, n.inputs[0])}, {n.attrs['alpha']!r})")


@emitter("clamp")
def _clamp(w: Writer, n: Node) -> Expr:
    return Expr(f"torch.clamp({argument(w, n.inputs[0])}, {literal(n.attrs['lo'])}, {literal(n.attrs['hi'])})")


SIGNS = {"add": ("+", SUM), "sub": ("-", SUM), "mul": ("*", PRODUCT), "div": ("/", PRODUCT)}
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


@emitter("add", "sub", "mul", "div")
def _arithmetic(w: Writer, n: Node) -> Expr:
    fused = _linear_with_bias(w, n)
    if fused is not None:
        return fused
    sign, level = SIGNS[n.op]
    a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    right = level + 1 if n.op in ("sub", "div") else level
    if n.op == "add" and b.text.startswith("-") and b.level == UNARY:
        return Expr(f"{a.at(SUM)} - {b.text[1:]}", SUM)
    return Expr(f"{a.at(level)} {sign} {b.at(right)}", level)


def _linear_with_bias(w: Writer, n: Node) -> Expr | None:
    """`F.linear(x, W, b)` for a product and a bias."""
    if n.op != "add":
        return None
    a, b = (w.graph[i] for i in n.inputs)
    if a.op == "contract" and w.uses.get(a.id) == 1 and a.tensor.rank == 2 and not w.is_number(b.id):
        product = _product(w, a)
        if product is not None and w.env[a.id].level == PRODUCT and a.tensor.names == n.tensor.names:
            return Expr(f"torch.addmm({w.aligned(b.id, n.tensor).text}, {', '.join(product)})")
    if a.op != "contract" or w.uses.get(a.id) != 1 or a.label is not None or b.batched or w.is_number(b.id):
        return None
    for x, m in (a.inputs, tuple(reversed(a.inputs))):
        if (
            linear_form(w, a, x, m)
            and a.tensor.names == n.tensor.names
            and b.tensor.names == w.type(m).names[:-1]
            and w.env[a.id].text.startswith("F.linear(")
        ):
            return Expr(linear_text(w, a, x, m, w.env[b.id].at(ATOM)))
    return None


@emitter("lt", "le", "gt", "ge", "eq", "ne")
def _compare(w: Writer, n: Node) -> Expr:
    a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    return Expr(f"{a.at(SUM)} {COMPARISONS[n.op]} {b.at(SUM)}", COMPARE)


@emitter("and", "or")
def _logic(w: Writer, n: Node) -> Expr:
    a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    return Expr(f"torch.logical_{n.op}({a.text}, {b.text})")


@emitter("pow")
def _pow(w: Writer, n: Node) -> Expr:
    if "exponent" in n.attrs:
        e = float(n.attrs["exponent"])
        text = repr(int(e)) if e.is_integer() else repr(e)
        return Expr(f"{w.tensor(n.inputs[0])} ** {text}" if e >= 0 else f"{w.tensor(n.inputs[0])} ** ({text})", POWER)
    a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    return Expr(f"torch.pow({a.text}, {b.text})")


@emitter("min", "max")
def _extremum(w: Writer, n: Node) -> Expr:
    numbers = [w.const(i) for i in n.inputs]
    for k in (0, 1):
        if numbers[k] is not None:
            other = n.inputs[1 - k]
            side = "min" if n.op == "max" else "max"
            return Expr(f"torch.clamp({argument(w, other)}, {side}={literal(numbers[k])})")  # type: ignore[arg-type]
    a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    return Expr(f"torch.{n.op}imum({a.text}, {b.text})")


@emitter("mod")
def _mod(w: Writer, n: Node) -> Expr:
    a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    return Expr(f"torch.remainder({a.text}, {b.text})")


@emitter("fraction_part")
def _fraction(w: Writer, n: Node) -> Expr:
    return Expr(f"torch.remainder({argument(w, n.inputs[0])}, 1)")


@emitter("rotate")
def _rotate(w: Writer, n: Node) -> Expr:
    a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    return Expr(f"{w.scope.use('rotate')}({a.text}, {b.text})")


@emitter("surrogate")
def _surrogate(w: Writer, n: Node) -> Expr:
    value, gradient = (w.aligned(i, n.tensor) for i in n.inputs)
    return Expr(f"{w.scope.use('surrogate')}({value.text}, {gradient.text})")


@emitter("where")
def _where(w: Writer, n: Node) -> Expr:
    c, a, b = (w.aligned(i, n.tensor) for i in n.inputs)
    if w.is_number(n.inputs[1]) and w.is_number(n.inputs[2]):
        return Expr(f"torch.where({c.text}, {w.as_tensor(n.inputs[1])}, {b.text})")
    return Expr(f"torch.where({c.text}, {a.text}, {b.text})")


# ---- reductions ---------------------------------------------------------------------------------


@emitter("sum", "mean", "logsumexp")
def _reduce(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    if n.op == "logsumexp":
        return Expr(f"torch.logsumexp({w.env[i].text}, {w.dims(i, n.attrs['axes'])})")
    return Expr(f"{w.tensor(i)}.{n.op}({w.dims(i, n.attrs['axes'])})")


@emitter("logit_mixture")
def _logit_mixture(w: Writer, n: Node) -> Expr:
    p, t = n.inputs
    bins = next(a for a in w.type(p).axes if a.name == n.attrs["axis"])
    whole = TensorType((bins, *n.tensor.axes))
    dim = "" if n.tensor.rank == 1 else f", dim={-1 - n.tensor.rank}"
    return Expr(f"{w.scope.use('logit_mixture')}({w.aligned(p, whole).text}, {w.aligned(t, whole).text}{dim})")


@emitter("var")
def _var(w: Writer, n: Node) -> Expr:
    i, ddof = n.inputs[0], n.attrs.get("ddof", 0)
    dims = tuple(w.dim(i, a) for a in n.attrs["axes"])
    more = f", {ddof}" if ddof else ""
    return Expr(f"{w.scope.use('variance')}({argument(w, i)}, {dims!r}{more})")


@emitter("reduce_max", "reduce_min")
def _amax(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    return Expr(f"{w.tensor(i)}.a{n.op.removeprefix('reduce_')}({w.dims(i, n.attrs['axes'])})")


@emitter("prod", "any", "all", "argmax")
def _one_by_one(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    t = w.type(i)
    axes = list(n.attrs["axes"])
    if n.op == "argmax" and len(axes) > 1:
        text = moved(w.tensor(i), t.names, [a for a in t.names if a not in axes] + axes)
        return Expr(f"{text}.flatten(-{len(axes)}).argmax(-1)")
    text = w.tensor(i)
    for d in sorted((w.dim(i, a) for a in axes), reverse=False):
        text = f"{text}.{n.op}({d})"
    return Expr(text)


@emitter("length")
def _length(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    return Expr(f"torch.linalg.vector_norm({argument(w, i)}, dim={w.dims(i, n.attrs['axes'])})")


@emitter("normalize")
def _normalize(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    dims = tuple(w.dim(i, a) for a in n.attrs["axes"])
    return Expr(f"{w.scope.use('unit_vector')}({argument(w, i)}, {dims!r})")


@emitter("softmax", "log_softmax")
def _softmax(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    d = w.dim(i, n.attrs["axis"])
    if "causal" in n.attrs:
        log = ", log=True" if n.op == "log_softmax" else ""
        return Expr(f"{w.scope.use('causal_softmax')}({w.env[i].text}, {d}, {w.dim(i, n.attrs['causal'])}{log})")
    return Expr(f"torch.{n.op}({argument(w, i)}, {d})")


@emitter("cumsum")
def _cumsum(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    d = w.dim(i, n.attrs["axis"])
    if not n.attrs.get("exclusive") and not n.attrs.get("reverse"):
        return Expr(f"torch.cumsum({argument(w, i)}, {d})")
    return Expr(
        f"{w.scope.use('cumsum_along')}({argument(w, i)}, {d}, {bool(n.attrs.get('exclusive'))}, {bool(n.attrs.get('reverse'))})"
    )


@emitter("sort")
def _sort(w: Writer, n: Node) -> Expr:
    return Expr(f"{w.tensor(n.inputs[0])}.sort({w.dim(n.inputs[0], n.attrs['axis'])}).values")


def linear_form(w: Writer, n: Node, x: int, m: int) -> bool:
    """Whether a contraction is x·Mᵀ along the last axis of both, M without batch dims."""
    tx, tm, axes = w.type(x), w.type(m), tuple(n.attrs["axes"])
    return (
        len(axes) == 1
        and not w.graph[m].batched
        and w.graph[x].batched
        and tm.rank >= 2
        and tm.names[-1:] == axes == tx.names[-1:]
        and n.tensor.names == (*tx.names[:-1], *tm.names[:-1])
    )


def takes_bias(w: Writer, n: Node) -> bool:
    """Whether a product's only use is a sum with a bias, which becomes its third argument."""
    if n.op != "contract" or n.label is not None or n.id in w.results:
        return False
    for user, slot in w.graph.users(n.id):
        if user.op != "add" or user.tensor.names != n.tensor.names:
            continue
        other = w.graph[user.inputs[1 - slot]]
        for x, m in (n.inputs, tuple(reversed(n.inputs))):
            if linear_form(w, n, x, m) and not other.batched and other.tensor.names == w.type(m).names[:-1]:
                return True
    return False


def linear_text(w: Writer, n: Node, x: int, m: int, bias: str | None) -> str:
    """`F.linear`, with the matrix's rows as one axis meanwhile where it has several axes of rows."""
    rows = w.type(m).shape[:-1]
    flat = len(rows) > 1
    matrix = f"{w.env[m].at(ATOM)}.flatten(0, {len(rows) - 1})" if flat else argument(w, m)
    if bias is not None and flat:
        bias = f"{bias}.flatten()"
    text = f"F.linear({argument(w, x)}, {matrix}{f', {bias}' if bias is not None else ''})"
    return f"{text}.unflatten(-1, {rows})" if flat else text


@emitter("contract")
def _contract(w: Writer, n: Node) -> Expr:
    a, b = n.inputs
    ta, tb = w.type(a), w.type(b)
    for x, m in ((a, b), (b, a)):
        if linear_form(w, n, x, m):
            return Expr(linear_text(w, n, x, m, None))
    product = _product(w, n)
    if product is not None:
        return Expr(f"{product[0]} @ {product[1]}", PRODUCT)
    if ta.names == tb.names == tuple(n.attrs["axes"]) and len(ta.names) == 1:
        return Expr(f"torch.linalg.vecdot({argument(w, a)}, {argument(w, b)})")
    letters: dict[str, str] = {}
    for name in (*ta.names, *tb.names):
        letters.setdefault(name, "abcdefghijklmnopqrstuvwxyz"[len(letters)])

    def side(i: int) -> str:
        return ("..." if w.graph[i].batched else "") + "".join(letters[x] for x in w.type(i).names)

    out = ("..." if n.batched else "") + "".join(letters[x] for x in n.tensor.names)
    return Expr(f'torch.einsum("{side(a)},{side(b)}->{out}", {argument(w, a)}, {argument(w, b)})')


def _product(w: Writer, n: Node) -> tuple[str, str] | None:
    """A matrix product of two values without batch dims: its factors."""
    axes = tuple(n.attrs["axes"])
    if len(axes) != 1 or any(w.graph[i].batched for i in n.inputs):
        return None
    for m, x in (n.inputs, tuple(reversed(n.inputs))):
        tm, tx = w.type(m).names, w.type(x).names
        if tm[-1:] == axes == tx and n.tensor.names == tm[:-1]:
            return w.env[m].at(PRODUCT), w.env[x].at(UNARY)
        if tm[-1:] != axes or tx[-2:-1] != axes:
            continue
        plain = len(tx) == 2 and n.tensor.names == (*tm[:-1], tx[1])
        each = len(tm) == 2 and n.tensor.names == (*tx[:-2], tm[0], tx[-1])
        if plain or each:
            return w.env[m].at(PRODUCT), w.env[x].at(UNARY)
    return None


# ---- structure ----------------------------------------------------------------------------------


@emitter("slice")
def _slice(w: Writer, n: Node) -> Expr | None:
    i, axis = n.inputs[0], n.attrs["axis"]
    size = w.type(i).size(axis)
    parts = parted(w, n)
    if parts:
        names = [w.names.fresh(known_as(w, p)) for p in parts]
        sizes = [p.attrs["stop"] - p.attrs["start"] for p in parts]
        # (`split` of tensors is Python code, these two are not.)
        call = f"chunk({len(parts)}" if len(set(sizes)) == 1 else f"split_with_sizes({tuple(sizes)}"
        w.lines.append(f"{', '.join(names)} = {w.tensor(i)}.{call}, {w.dim(i, axis)})")
        w.env |= {p.id: Expr(name) for p, name in zip(parts, names, strict=True)}
        return None
    start = str(n.attrs["start"]) if n.attrs["start"] else ""
    stop = str(n.attrs["stop"]) if n.attrs["stop"] != size else ""
    return Expr(w.at(i, axis, f"{start}:{stop}"))


def known_as(w: Writer, part: Node) -> str:
    """The spec's name for a part of a value, given to it or to the only thing that rearranges it."""
    users = [user for user, _ in w.graph.users(part.id) if user.id in w.needed]
    label = users[0].label if len(users) == 1 else None
    if part.label or label is None:
        return part.label or "part"
    return {"rename": label, "order": label, "split": f"{label}_flat", "merge": f"{label}_flat"}.get(
        users[0].op, "part"
    )


def parted(w: Writer, n: Node) -> list[Node]:
    """The slices that share out a value without rest, in order; nothing where there is a rest, or an overlap.

    One split of them is one call, and its gradient is one join; each slice alone would fill a tensor of zeros.
    """
    i, axis = n.inputs[0], n.attrs["axis"]
    users = [user for user, _ in w.graph.users(i) if user.id in w.needed]
    parts = sorted((u for u in users if u.op == "slice" and u.attrs["axis"] == axis), key=lambda u: u.attrs["start"])
    ends = [0, *(p.attrs["stop"] for p in parts)]
    fits = [p.attrs["start"] for p in parts] == ends[:-1] and ends[-1] == w.type(i).size(axis)
    # A view of several is no place to write to, which is for the caller of a method to decide.
    return parts if fits and len(parts) > 1 and not any(p.id in w.results or p.id in w.env for p in parts) else []


@emitter("pick")
def _pick(w: Writer, n: Node) -> Expr:
    return Expr(w.at(n.inputs[0], n.attrs["axis"], str(n.attrs["index"])))


@emitter("join")
def _join(w: Writer, n: Node) -> Expr:
    d = n.tensor.position(n.attrs["axis"]) - n.tensor.rank
    parts = ", ".join(argument(w, i) for i in n.inputs)
    if len({w.graph[i].batched for i in n.inputs}) == 1:
        return Expr(f"torch.cat(({parts}), {d})")
    return Expr(f"{w.scope.use('broadcast_cat')}(({parts}), {d}, {n.tensor.rank})")


@emitter("stack")
def _stack(w: Writer, n: Node) -> Expr:
    d = n.tensor.position(n.attrs["axis"]) - n.tensor.rank
    parts = ", ".join(argument(w, i) for i in n.inputs)
    trail = "," if len(n.inputs) == 1 else ""
    if len({w.graph[i].batched for i in n.inputs}) == 1:
        return Expr(f"torch.stack(({parts}{trail}), {d})")
    return Expr(f"{w.scope.use('broadcast_stack')}(({parts}{trail}), {d}, {n.tensor.rank - 1})")


@emitter("reverse")
def _reverse(w: Writer, n: Node) -> Expr:
    return Expr(f"{w.tensor(n.inputs[0])}.flip({w.dim(n.inputs[0], n.attrs['axis'])})")


@emitter("shift")
def _shift(w: Writer, n: Node) -> Expr:
    return Expr(
        f"{w.scope.use('shift_along')}({argument(w, n.inputs[0])}, {n.attrs['k']}, {w.dim(n.inputs[0], n.attrs['axis'])})"
    )


@emitter("permute")
def _permute(w: Writer, n: Node) -> Expr:
    order = w.scope.buffer("order", f"torch.tensor({list(n.attrs['order'])!r})")
    return Expr(f"{w.tensor(n.inputs[0])}.index_select({w.dim(n.inputs[0], n.attrs['axis'])}, {order})")


@emitter("rename")
def _rename(w: Writer, n: Node) -> Expr:
    return w.env[n.inputs[0]]


@emitter("order")
def _order(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    if w.is_number(i):
        return w.env[i]
    return Expr(moved(w.tensor(i), w.type(i).names, list(n.attrs["names"])))


@emitter("split")
def _split(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    return Expr(f"{w.tensor(i)}.unflatten({w.dim(i, n.attrs['axis'])}, {tuple(s for _, s in n.attrs['into'])})")


@emitter("merge")
def _merge(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    axes = n.attrs["axes"]
    return Expr(f"{w.tensor(i)}.flatten({w.dim(i, axes[0])}, {w.dim(i, axes[-1])})")


@emitter("expand")
def _expand(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    sizes = ", ".join(str(a.size) for a in n.tensor.axes)
    if w.is_number(i):
        return Expr(w.full(repr(n.tensor.shape), i))
    text = w.aligned(i, n.tensor).at(ATOM)
    if w.graph[i].batched:
        return Expr(f"{text}.expand({w.with_batch(sizes)})")
    return Expr(f"{text}.expand({sizes})")


@emitter("gather")
def _gather(w: Writer, n: Node) -> Expr:
    i, k = n.inputs
    axis = n.attrs["axis"]
    apart = not any(w.type(i).has(a) for a in w.type(k).names if a != axis)
    if apart and not w.graph[i].batched:
        return Expr(f"{w.scope.use('take_along')}({argument(w, i)}, {argument(w, k)}, {w.dim(i, axis)})")
    if apart and not w.graph[k].batched:
        rank = w.type(i).rank
        return Expr(f"{w.scope.use('pick_along')}({argument(w, i)}, {argument(w, k)}, {w.dim(i, axis)}, {rank})")
    rest = [a for a in w.type(i).names if a != axis]
    table = moved(w.tensor(i), w.type(i).names, [*rest, axis])
    new = n.tensor.rank - len(rest)
    if new and w.graph[i].batched:
        table = f"{table}[..., {', '.join(['None'] * new + [':'] * (len(rest) + 1))}]"
    index = w.aligned(k, n.tensor)
    return Expr(f"{w.scope.use('take_aligned')}({table}, {index.text})")


# ---- matrices -----------------------------------------------------------------------------------


@emitter("masked")
def _masked(w: Writer, n: Node) -> Expr:
    t = n.tensor
    row, col = n.attrs["row"], n.attrs["col"]
    rows, cols = integers(n.attrs["row_degrees"]), integers(n.attrs["col_degrees"])
    made = f"{w.scope.use('degree_mask')}({rows}, {cols}, strict={bool(n.attrs['strict'])})"
    mask = w.scope.buffer("mask", made)
    have = [a for a in t.names if a in (row, col)]
    if have != [row, col]:
        mask = f"{mask}.mT"
    index = ["None" if a not in (row, col) else ":" for a in t.names]
    while index[0] == "None":
        index.pop(0)
    if "None" in index:
        mask = f"{mask}[{', '.join(index)}]"
    return Expr(f"{w.tensor(n.inputs[0])} * {mask}", PRODUCT)


def matrix_node(w: Writer, n: int) -> tuple[Node, dict[str, str]]:
    """The parameter behind renames, and the names that its axes have here."""
    renames: dict[str, str] = {}
    node = w.graph[n]
    while True:
        if node.op == "rename":
            for o, new in node.attrs["pairs"]:
                renames[o] = renames.pop(new, new)
            node = w.graph[node.inputs[0]]
        elif node.op == "order":
            node = w.graph[node.inputs[0]]
        elif node.id in w.alias:
            return w.alias[node.id], renames
        else:
            return node, renames


@emitter("diagonal")
def _diagonal(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    row, col = w.dim(i, n.attrs["row"]), w.dim(i, n.attrs["col"])
    names = [a for a in w.type(i).names if a not in (n.attrs["row"], n.attrs["col"])]
    made = f"torch.diagonal({argument(w, i)}, dim1={row}, dim2={col})"
    return Expr(moved(made, [*names, n.attrs["row"]], list(n.tensor.names)))


@emitter("matrix_solve")
def _matrix_solve(w: Writer, n: Node) -> Expr:
    matrix, renames = matrix_node(w, n.inputs[0])
    y = n.inputs[1]
    ty = w.type(y)
    row, _ = (renames.get(a, a) for a in matrix.tensor.names[-2:])
    transposed = n.attrs["axis"] == row
    given = n.attrs["given"]
    own = [renames.get(a, a) for a in matrix.tensor.names[:-2]]  # a matrix for each index of these
    last = [a for a in ty.names if a != given and a not in own] + own + [given]
    text = moved(w.tensor(y), ty.names, last)
    solved = f"{w.scope.matrix(matrix)}.solve({text}{', transposed=True' if transposed else ''})"
    names = [n.attrs["axis"] if a == given else a for a in last]
    want = [n.attrs["axis"] if a == given else a for a in ty.names]
    return Expr(moved(solved, names, want))


@emitter("matrix_log_det")
def _matrix_log_det(w: Writer, n: Node) -> Expr:
    matrix, _ = matrix_node(w, n.inputs[0])
    return Expr(f"{w.scope.matrix(matrix)}.log_det()")


@emitter("det")
def _det(w: Writer, n: Node) -> Expr:
    i = n.inputs[0]
    row, col = n.attrs["row"], n.attrs["col"]
    names = w.type(i).names
    order = [a for a in names if a not in (row, col)] + [row, col]
    text = moved(w.env[i].at(ATOM) if list(names) != order else argument(w, i), names, order)
    return Expr(f"{w.scope.use('determinant')}({text})")


@emitter("eigen")
def _eigen(w: Writer, n: Node) -> Expr:
    a = n.attrs
    return moving(
        w, n, "of_eigenvalues", [a["row"], a["col"]], [repr(a["function"]), repr(a["power"]), repr(a["floor"])]
    )


@emitter("norm_bounded")
def _norm_bounded(w: Writer, n: Node) -> Expr:
    t = n.tensor
    axes = list(n.attrs["axes"])
    order = [a for a in t.names if a not in axes] + axes
    text = moved(w.tensor(n.inputs[0]), t.names, order)
    orders = "".join(f", {w.tensor(i)}" for i in n.inputs[1:])
    space = tuple(n.attrs.get("space", ()))
    orders += f", space={space!r}" if space else ""
    made = f"{w.scope.use('norm_bounded')}({text}, {n.attrs['bound']!r}, {len(axes)}{orders})"
    return Expr(moved(made, order, t.names))


def moving(w: Writer, n: Node, call: str, own: list[str], arguments: list[str]) -> Expr:
    """A function over the last dims, with its operand brought there and its result back."""
    x = n.inputs[0]
    names = w.type(x).names
    order = [a for a in names if a not in own] + own
    text = moved(w.env[x].at(ATOM) if list(names) != order else argument(w, x), names, order)
    return Expr(moved(f"{w.scope.use(call)}({', '.join([text, *arguments])})", order, names))


@emitter("conv", "conv_transpose")
def _conv(w: Writer, n: Node) -> Expr:
    a = n.attrs
    bias = argument(w, n.inputs[2]) if len(n.inputs) > 2 else "None"
    numbers = [repr(a[k]) for k in ("stride", "padding", "dilation")] + ([str(a["groups"])] if a["groups"] > 1 else [])
    call = ("convolve_rows" if a.get("rows") else "convolve") if n.op == "conv" else "convolve_transposed"
    return moving(w, n, call, [a["channel"], *a["space"]], [argument(w, n.inputs[1]), bias, *numbers])


@emitter("max_pool", "mean_pool")
def _pool(w: Writer, n: Node) -> Expr:
    a = n.attrs
    padding = tuple(before for before, _ in a["padding"])
    return moving(
        w,
        n,
        "pooled",
        list(a["space"]),
        [repr(n.op[: -len("_pool")]), repr(a["kernel"]), repr(a["stride"]), repr(padding)],
    )


# ---- splines ------------------------------------------------------------------------------------


def _spline_key(n: Node, inputs: Sequence[int]) -> tuple[Any, ...]:
    return (kind_of(n.op), tuple(inputs), tuple(sorted(n.attrs.items())))


def _spline_call(w: Writer, n: Node, function: str) -> str:
    x, *params = n.inputs
    parts = [w.aligned(x, n.tensor).text]
    for p in params:
        # The runtime's layout: bins in front of x's axes.
        bins = bin_axis(w.type(x), w.type(p), n.attrs)
        assert bins is not None
        parts.append(w.aligned(p, TensorType((bins, *n.tensor.axes))).text)
    defaults = SPLINES[kind_of(n.op)].numbers
    parts += [f"{k}={v!r}" for k, v in numbers_of(n).items() if k == "bound" or v != defaults[k]]
    if n.tensor.rank != 1:
        parts.append(f"dim={-1 - n.tensor.rank}")
    return f"{w.scope.use(function)}({', '.join(parts)})"


def _spline(w: Writer, n: Node) -> Expr | None:
    value = w.names.fresh(n.label or "y")
    read = any(m.op.endswith("_log_slope") for m in w.graph)
    slope = w.names.fresh("log_slope") if read else "_"
    w.lines.append(f"{value}, {slope} = {_spline_call(w, n, n.op)}")
    w.pairs[_spline_key(n, n.inputs)] = (value, slope)
    if n.op.endswith("_inverse"):
        # The forward map's slope at the solved point.
        w.pairs[_spline_key(n, (n.id, *n.inputs[1:]))] = (value, slope)
    w.env[n.id] = Expr(value)
    return None


def _spline_slope(w: Writer, n: Node) -> Expr | None:
    x = n.inputs[0]
    found = w.pairs.get(_spline_key(n, n.inputs))
    while found is None and w.graph[x].op in ("rename", "order", "identity"):
        x = w.graph[x].inputs[0]
        found = w.pairs.get(_spline_key(n, (x, *n.inputs[1:])))
    if found is not None:
        return Expr(found[1])
    slope = w.names.fresh("log_slope")
    w.lines.append(f"_, {slope} = {_spline_call(w, n, n.op.removesuffix('_log_slope'))}")
    w.env[n.id] = Expr(slope)
    return None


for _kind in SPLINES:
    EMITTERS[_kind] = _spline
    EMITTERS[f"{_kind}_inverse"] = _spline
    EMITTERS[f"{_kind}_log_slope"] = _spline_slope


# ---- noise --------------------------------------------------------------------------------------


@emitter("random_like")
def _random(w: Writer, n: Node) -> Expr:
    sizes = "".join(f", {s}" for _, s in n.attrs["axes"])
    shape = "".join(f", {w.aligned(i, n.tensor).text}" for i in n.inputs)
    return Expr(
        f'{w.scope.use("standard_noise")}("{n.attrs["kind"]}", ({w.batch_text()}{sizes or ","}), {w.reference}, {w.generator}{shape})'
    )


@emitter("paired")
def _paired(w: Writer, n: Node) -> Expr:
    x, y = n.inputs
    return Expr(f"{w.scope.use('paired')}({argument(w, x)}, {argument(w, y)}, {n.tensor.rank})")


# ---- calls --------------------------------------------------------------------------------------


def _call_arguments(w: Writer, n: Node) -> list[str]:
    """Arguments with lifted axes in front, missing ones broadcast."""
    lifted = [a for a, _ in n.attrs.get("lifted", ())]
    out: list[str] = []
    some_batched = any(w.graph[i].batched for i in n.inputs)
    region: Region = n.attrs["region"]
    one_for_all = len(n.inputs) - len(region.context)  # weights of the caller come as they are, last in the context
    for k, i in enumerate(n.inputs):
        t = w.type(i)
        if k >= one_for_all and some_batched and not region.graph[region.context[k - one_for_all]].batched:
            out.append(argument(w, i))
            continue
        missing = [(a, s) for a, s in n.attrs.get("lifted", ()) if not t.has(a)]
        if missing or (some_batched and not w.graph[i].batched):
            sizes = dict(n.attrs.get("lifted", ()))
            own = [a for a in t.names if a not in lifted]
            index = ["None" if not t.has(a) else ":" for a in lifted]
            text = w.as_tensor(i)
            if missing:
                text = f"{text}[..., {', '.join([*index, *([':'] * len(own))])}]"
            shape = ", ".join([*(str(sizes[a]) for a in lifted), *(str(t.size(a)) for a in own)])
            out.append(f"{text}.expand({w.with_batch(shape) if some_batched else shape})")
        else:
            out.append(argument(w, i))
    return out


def _results(w: Writer, n: Node) -> list[str]:
    """Names for the results of a multi-result call, by the labels of the `get` nodes that read them."""
    count = len(result_types(n.type))
    labels: dict[int, str] = {}
    used: set[int] = set()
    for user, _ in w.graph.users(n.id):
        if user.op == "get":
            used.add(user.attrs["index"])
            if user.label:
                labels[user.attrs["index"]] = user.label
    out = []
    for k in range(count):
        if k not in used:
            out.append("_")
            continue
        default = "log_det" if n.attrs.get("log_det") and k == count - 1 else "y"
        out.append(w.names.fresh(labels.get(k, default)))
    return out


def method_name(program: str, value_only: bool) -> str:
    """The method of a class that runs a program, with its log-det or without."""
    if not value_only or program == "initialise":
        return program
    return "value" if program == "forward" else f"{program}_value"


def called(n: Node) -> tuple[Region, str, bool]:
    """What a call or repeat runs: region, program, and whether without the log-det."""
    region: Region = n.attrs["region"]
    return region, n.attrs.get("method", "forward"), is_map(region) and not n.attrs.get("log_det")


def _method(n: Node) -> str:
    _, program, value_only = called(n)
    name = method_name(program, value_only)
    return "" if name == "forward" else f".{name}"


@emitter("call")
def _call(w: Writer, n: Node) -> Expr | None:
    arguments = _call_arguments(w, n)
    if w.scope.generator.noisy(*called(n)):
        arguments.append(f"generator={w.generator}")
    child = w.scope.children[n.attrs["child"]]
    if w.scope.generator.recalls(n, w.scope.region):
        text = f"{w.scope.use('recall')}({', '.join([f'self.{child}', *arguments])})"
    else:
        text = f"self.{child}{_method(n)}({', '.join(arguments)})"
    if isinstance(n.type, TupleType):
        names = _results(w, n)
        w.lines.append(f"{', '.join(names)} = {text}")
        _bind_results(w, n, names)
        return None
    return Expr(text)


def _bind_results(w: Writer, n: Node, names: Sequence[str]) -> None:
    for user, _ in w.graph.users(n.id):
        if user.op == "get":
            w.env[user.id] = Expr(names[user.attrs["index"]])
    w.env[n.id] = Expr(names[0])


@emitter("get")
def _get(w: Writer, n: Node) -> Expr:
    return Expr(f"{w.env[n.inputs[0]].at(ATOM)}[{n.attrs['index']}]")


@emitter("repeat")
def _repeat(w: Writer, n: Node) -> Expr | None:
    carried = int(n.attrs["carried"])
    _, method, _ = called(n)
    child = w.scope.children[n.attrs["child"]]
    with_log_det = bool(n.attrs.get("log_det"))
    count = len(result_types(n.type))
    if isinstance(n.type, TupleType):
        names = [x if x != "_" else w.names.fresh("y") for x in _results(w, n)]
    else:
        names = [w.names.fresh(n.label or "h")]
    values = names[:carried]
    context = [w.variable(i) if not w.is_number(i) else w.as_tensor(i) for i in n.inputs[carried:]]
    back = w.scope.generator.undoes(n)
    if back is not None:
        blocks = f"self.{child}[::-1]" if method == "inverse" else f"self.{child}"
        start = "".join(f"{argument(w, i)}, " for i in n.inputs[:carried]).strip()
        held = f", ({''.join(f'{c}, ' for c in context).strip()})" if context else ""
        there = method_name(method, not with_log_det)
        text = f'{w.scope.use("reversible")}({blocks}, "{there}", "{back}", ({start}){held})'
        w.lines.append(f"{', '.join(names) if len(names) > 1 else f'({names[0]},)'} = {text}")
        return _bound(w, n, names)
    w.lines.append(f"{', '.join(values)} = {', '.join(argument(w, i) for i in n.inputs[:carried])}")
    block = w.names.fresh("block")
    arguments = [*values, *context]
    if w.scope.generator.noisy(*called(n)):
        arguments.append(f"generator={w.generator}")
    backwards = method in ("inverse", "generate")
    source = f"reversed(self.{child})" if backwards else f"self.{child}"
    one = f"{block}{_method(n)}({', '.join(arguments)})"
    if with_log_det:
        total = names[count - 1]
        part = w.names.fresh("part")
        w.lines.append(f"{total} = 0.0")
        w.lines.append(f"for {block} in {source}:")
        w.lines.append(f"    {', '.join([*values, part])} = {one}")
        w.lines.append(f"    {total} = {total} + {part}")
    else:
        w.lines.append(f"for {block} in {source}:")
        w.lines.append(f"    {', '.join(values)} = {one}")
    return _bound(w, n, names)


def _bound(w: Writer, n: Node, names: Sequence[str]) -> None:
    if isinstance(n.type, TupleType):
        _bind_results(w, n, names)
    else:
        w.env[n.id] = Expr(names[0])


@emitter("scan")
def _scan(w: Writer, n: Node) -> Expr | None:
    """A loop over slices: carried values in, slices in, context in; carried values out, the others stacked."""
    carried, sliced, over_batch = int(n.attrs["carried"]), int(n.attrs["sliced"]), n.attrs["axis"] == "B"
    axis, count, types = n.attrs["axis"], int(n.attrs["count"]), result_types(n.type)
    region: Region = n.attrs["region"]
    names = [x if x != "_" or k >= carried else w.names.fresh("h") for k, x in enumerate(_results(w, n))]
    for name, i in zip(names[:carried], n.inputs, strict=False):
        w.lines.append(f"{name} = {_carried_start(w, i, over_batch)}")
    slices, context = n.inputs[carried : carried + sliced], n.inputs[carried + sliced :]
    items, sources = [], []
    for i in slices:
        items.append(w.names.fresh(f"{w.graph[i].label or 'x'}_{'n' if over_batch else axis.lower()}"))
        if over_batch:
            sizes = ", ".join(str(a.size) for a in w.type(i).axes)
            sources.append(f"{w.tensor(i)}.reshape({f'-1, {sizes}' if sizes else '-1'}).unbind(0)")
        else:
            sources.append(f"{w.tensor(i)}.unbind({w.dim(i, axis)})")
    reverse = bool(n.attrs["reverse"])
    if reverse:
        sources = [f"reversed({x})" for x in sources]
    arguments = [*names[:carried], *items, *(w.variable(i) if not w.is_number(i) else w.as_tensor(i) for i in context)]
    stacked = {k: w.names.fresh(f"{x}_steps") for k, x in enumerate(names) if k >= carried and x != "_"}
    step = {k: w.names.fresh(f"{names[k]}_step") for k in stacked}
    w.lines += [f"{x}: list[Tensor] = []" for x in stacked.values()]
    if sum(map(len, sources)) > 60:
        for k, (item, source) in enumerate(zip(items, sources, strict=True)):
            sources[k] = w.names.fresh(f"{item}_slices")
            w.lines.append(f"{sources[k]} = {source}")
    loop = (
        f"zip({', '.join(sources)}, strict=True)" if len(sources) > 1 else sources[0] if sources else f"range({count})"
    )
    results = [names[k] if k < carried else step.get(k, "_") for k in range(len(names))]
    w.lines.append(f"for {', '.join(items) or '_'} in {loop}:")
    if w.scope.generator.noisy(*called(n)):
        arguments.append(f"generator={w.generator}")
    w.lines.append(f"    {', '.join(results)} = self.{w.scope.children[n.attrs['child']]}({', '.join(arguments)})")
    w.lines += [f"    {x}.append({step[k]})" for k, x in stacked.items()]
    for k, x in stacked.items():
        order = f"{x}[::-1]" if reverse else x
        t = types[k]
        if over_batch:
            shape = ", ".join([f"*{w.batch}", *(str(a.size) for a in t.axes)])
            text = f"torch.stack({order}).reshape({shape})"
        else:
            text = f"torch.stack({order}, {-t.rank})"
            if not region.graph[region.outputs[k]].batched:
                text += f".expand({w.with_batch(', '.join(str(a.size) for a in t.axes))})"
        w.lines.append(f"{names[k]} = {text}  # [{', '.join(t.names)}]")
    _bind_results(w, n, names)
    return None


def _carried_start(w: Writer, i: int, over_batch: bool) -> str:
    if over_batch or w.graph[i].batched:
        return w.as_tensor(i) if w.is_number(i) else w.tensor(i)
    sizes = ", ".join([w.batch_text(), *(str(a.size) for a in w.type(i).axes)])
    return (
        w.full(f"({sizes},)" if not w.type(i).axes else f"({sizes})", i)
        if w.is_number(i)
        else f"{w.tensor(i)}.expand({w.with_batch(', '.join(str(a.size) for a in w.type(i).axes))})"
    )


# ---- differential equations ---------------------------------------------------------------------


@emitter("integrate")
def _integrate(w: Writer, n: Node) -> Expr | None:
    """`ode_steps(rates, state, batch, start, stop, steps, method)`, or the adaptive one with its tolerances.

    With a gradient of its own the field takes what else it reads as arguments, so that gradients reach that too.
    """
    x = n.inputs[0]
    traced, timed = bool(n.attrs.get("log_det")), bool(n.attrs.get("timed"))
    along = probes_of(plain_method(n.attrs), w.type(x)) is not None
    rank = w.type(x).rank
    batch = f"{w.variable(x)}.shape[:-{rank}]" if rank else f"{w.variable(x)}.shape"
    others = n.inputs[1 : len(n.inputs) - timed]
    outside = [w.variable(i) if not w.is_number(i) else w.as_tensor(i) for i in others]
    gradient = n.attrs.get("gradient", "through")
    known = outside if gradient == "through" else [w.names.fresh("held") for _ in outside]
    state_, t = (name + "_" * (name in outside) for name in ("state", "t"))  # what is read from outside keeps its name
    arguments = ", ".join([f"{state_}[0]", *known[:along], t, *known[along:]])
    child = f"self.{w.scope.children[n.attrs['child']]}"
    call = f"{child}{_method(n)}({arguments})"
    start_value = w.variable(x)
    state = f"({start_value}, {start_value}.new_zeros({batch}))" if traced else f"({start_value},)"
    inputs = ", ".join([state_, t, *(known if gradient != "through" else [])])
    rates = f"lambda {inputs}: {call}" if traced else f"lambda {inputs}: ({call},)"
    made = {}
    for name in w.scope.generator.solved_with(n):
        call = f"{child}.{name}({', '.join(outside[along:])})"
        made["each" if name.endswith(called(n)[1]) else "together"] = (
            f"{w.scope.use('as_rates')}({', '.join([call, *outside[:along]])})"
        )
    later = [f"{k}=lambda: {text}" for k, text in made.items()]
    together = [f"together={made['together']}"] if made else []
    ends = f"{n.attrs['start']!r}, {n.attrs['stop']!r}"
    steps = n.attrs.get("times", n.attrs.get("steps"))
    if "rule" in n.attrs:
        rules = [f"self.{w.scope.children[c]}" for c in n.attrs["rule"]]
        parts = [rates, state, batch, ends, repr(steps), f"[{', '.join(rules)}]", *together]
        text = f"{w.scope.use('ode_rule')}({', '.join(parts)})"
        return _trajectory(w, n, text, traced)
    method = w.scope.tableau(n.attrs["solver"], n.attrs["tableau"], dense=timed or "at" in n.attrs)
    if not n.attrs["tableau"].explicit:
        plain = f"lambda {state_}, {t}: ({child}({', '.join([f'{state_}[0]', t, *outside[along:]])}),)"
        parts = [rates, plain, state, batch, ends, repr(steps), method]
        return _trajectory(w, n, f"{w.scope.use('ode_implicit')}({', '.join(parts)})", traced)
    at = [f"at={w.tensor(n.inputs[-1])}"] if timed else []
    if "at" in n.attrs:
        at = [f"at={n.attrs['at']!r}"]
    how = {k: n.attrs[k] for k in ("rtol", "atol", "max_steps", "shared") if k in n.attrs}
    if gradient != "through":
        given = repr(steps) if steps is not None else f"dict({', '.join(f'{k}={v!r}' for k, v in how.items())})"
        held = f"({', '.join(outside)}{',' if len(outside) == 1 else ''})"
        text = f"{w.scope.use(f'ode_{gradient}')}({', '.join([rates, state, batch, ends, given, method, held, child, *at])})"
    elif steps is not None:
        text = (
            f"{w.scope.use('ode_steps')}({', '.join([rates, state, batch, ends, repr(steps), method, *at, *together])})"
        )
    else:
        most = [f"{k}={how[k]!r}" for k in ("max_steps", "shared") if k in how]
        free = [] if at or couples_samples(n) or any(w.graph[i].batched for i in others) else ["apart=True"]
        parts = [rates, state, batch, ends, f"{how['rtol']!r}, {how['atol']!r}", method, *at, *most, *later, *free]
        text = f"{w.scope.use('ode_adaptive')}({', '.join(parts)})"
    return _trajectory(w, n, text, traced)


def couples_samples(n: Node) -> bool:
    """Whether a field mixes the samples of a batch, so that none can be left out."""
    region: Region = n.attrs["region"]
    return any(m.op in ("scan", "choose") or OPS[m.op].pools for r in region.walk() for m in r.graph)


def _trajectory(w: Writer, n: Node, text: str, traced: bool) -> Expr | None:
    if isinstance(n.type, TupleType):
        names = _results(w, n)
        w.lines.append(f"{', '.join(names)} = {text}" if traced else f"{names[0]} = {text}[0]")
        _bind_results(w, n, names)
        return None
    return Expr(f"{text}[0]")


@emitter("evaluate")
def _evaluate(w: Writer, n: Node) -> Expr:
    v, x, t = n.inputs
    return Expr(f"{w.env[v].text}({w.tensor(x)}, {w.env[t].text})")


# ---- solvers ------------------------------------------------------------------------------------


def _body(w: Writer, n: Node, outer: Sequence[int], name: str) -> str:
    """A local function for a solver's body; what it captures are variables of the method."""
    body: Program = n.attrs["body"]
    inner = Writer(w.scope, body.graph, Names(w.names.taken))
    inner.batch, inner.generator = w.batch, w.generator
    inner.reference = w.reference
    entry = body.graph[body.inputs[0]]
    var = inner.names.fresh(entry.label or "u")
    inner.env[body.inputs[0]] = Expr(var)
    for i, o in zip(body.inputs[1:], outer, strict=True):
        matrix, _ = matrix_node(w, o)
        if matrix.op == "param":
            inner.alias[i] = matrix
        inner.env[i] = Expr(w.variable(o)) if not w.is_number(o) else w.env[o]
    results = inner.run(body.outputs)
    function = w.names.fresh(name)
    returns = "Tensor" if len(results) == 1 else "tuple[Tensor, Tensor]"
    w.lines.append(f"def {function}({var}: Tensor) -> {returns}:")
    for line in inner.lines:
        w.lines.append(f"    {line}")
    tensors = [inner.as_tensor(o) if inner.is_number(o) else r for o, r in zip(body.outputs, results, strict=True)]
    fixed = []
    for o, r in zip(body.outputs, tensors, strict=True):
        if not body.graph[o].batched or inner.is_number(o):
            r = f"{r}.expand({var}.shape)" if r.isidentifier() else f"({r}).expand({var}.shape)"
        fixed.append(r)
    w.lines.append(f"    return {', '.join(fixed)}")
    w.lines.append("")
    w.names.taken |= inner.names.taken
    return function


@emitter("bracket_solve")
def _bracket(w: Writer, n: Node) -> Expr:
    target, *outer = n.inputs
    f = _body(w, n, outer, "monotone")
    lo, hi = literal(float(n.attrs["lo"])), literal(float(n.attrs["hi"]))
    return Expr(f"{w.scope.use('bracket_solve')}({f}, {w.tensor(target)}, {lo}, {hi}, {bool(n.attrs['increasing'])})")


def stage_list(n: Node) -> str:
    """The rounds of a scan in which its slices become right: their number if that is their order, else one of each."""
    levels = n.attrs["levels"]
    size = len(levels)
    if levels == tuple(range(size)):
        return str(size)
    if levels == tuple(reversed(range(size))):
        return f"-{size}"
    return repr(levels)


@emitter("scan_solve")
def _scan(w: Writer, n: Node) -> Expr:
    target, *outer = n.inputs
    body: Program = n.attrs["body"]
    captured = [target, *outer] if len(body.inputs) == len(n.inputs) + 1 else outer
    f = _body(w, n, captured, "step")
    d = n.tensor.position(n.attrs["axis"]) - n.tensor.rank
    plan = schedule(body, n.attrs["axis"], bool(n.attrs["reverse"]))
    if plan is None:
        return Expr(
            f"{w.scope.use('scan_solve')}({f}, {w.tensor(target)}, {d}, {stage_list(n)}, {n.attrs['placeholder']!r})"
        )
    from flowlang.backends.torch.incremental import write_loop

    outside = Writer(w.scope, plan.body.graph, w.names)
    outside.lines, outside.batch, outside.reference = w.lines, w.batch, w.reference
    for i, o in zip(plan.body.inputs[1:], captured, strict=True):
        outside.env[i] = w.env[o]
    solved = write_loop(w, outside, plan, w.variable(target))
    return Expr(f"{w.scope.use('implicit_scan')}({f}, {solved}, {plan.stages})")


@emitter("fixed_point_solve")
def _fixed_point(w: Writer, n: Node) -> Expr:
    target, *outer = n.inputs
    g = _body(w, n, outer, "residual")
    return Expr(f"{w.scope.use('fixed_point_solve')}({g}, {w.tensor(target)}, {n.attrs['constant']!r})")


@emitter("estimate_log_det")
def _estimate(w: Writer, n: Node) -> Expr:
    x, *outer = n.inputs
    g = _body(w, n, outer, "residual")
    event = w.type(x).rank
    series: Series = n.attrs["series"]
    if series.law == "exact":
        return Expr(f"{w.scope.use('exact_log_det')}({g}, {w.tensor(x)}, {event})")
    terms = (
        str(series.terms) if series.later == series.terms else f"{series.terms} if self.training else {series.later}"
    )
    told = "" if (series.law, series.rate) == ("geometric", 0.5) else f', law="{series.law}", rate={series.rate!r}'
    told += "" if terms == "10" else f", exact={terms}"
    told += f", samples={series.samples}" if series.samples > 1 else ""
    told += ", surrogate=True" if series.surrogate else ""
    return Expr(f"{w.scope.use('estimate_log_det')}({g}, {w.tensor(x)}, {event}, {w.generator}{told})")
