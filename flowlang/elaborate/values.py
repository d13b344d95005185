"""What names stand for while a spec is elaborated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowlang.ir.distributions import Distribution
from flowlang.ir.domains import Domain
from flowlang.ir.graph import Region
from flowlang.ir.types import Axis, TensorType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body
    from flowlang.elaborate.scope import ModuleScope


class Poison:
    """Stands for a value whose making was reported as an error; whatever touches it becomes it."""

    def __repr__(self) -> str:
        return "<error>"


POISON = Poison()
WITNESS = "some network"  # stands for a network parameter where a declaration is judged by itself
LATER = Poison()  # in error because a later version brings its meaning: what is given to it is not read


class Poisoned(Exception):
    """A value that is already in error was needed."""


class Later(Poisoned):
    """The same for a value that a later version brings, once that is told."""


class Absent:
    """`none`: an optional argument that was not given."""

    def __repr__(self) -> str:
        return "none"


ABSENT = Absent()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A node of the region under construction (`body` owns it; inner bodies capture it)."""

    id: int
    body: Body = field(compare=False, repr=False)

    @property
    def type(self) -> TensorType:
        return self.body.b.type(self.id)


@dataclass(frozen=True, slots=True)
class Tuple:
    """Several values: the result of a call with several results."""

    items: tuple[Value, ...]


@dataclass(eq=False)
class Declared:
    """A declaration seen through its module: not yet an instance."""

    declaration: tree.Declaration
    module: ModuleScope

    @property
    def name(self) -> str:
        return self.declaration.name

    @property
    def kind(self) -> str:
        return self.declaration.kind


@dataclass(eq=False)
class Instance:
    """A declaration (or builtin network) with its static arguments: a place that owns parameters.

    `owner` is the body whose child it is once it has a name there or is used there; None while it is
    a fresh argument, which the callee will own. The region is fixed by the first use with tensors.
    """

    target: Declared | BuiltinNet
    arguments: dict[str, Any]
    span: Span
    axes: tuple[tree.Item, ...] = ()
    bracket_axes: tuple[Any, ...] = ()
    owner: Body | None = None
    name: str | None = None  # the child's name in the owner
    label: str | None = None  # the name the spec binds it to
    region: Region | None = None
    region_key: Any = None
    inverted: bool = False  # the instance is `inverse(b)`
    shared: bool = False  # handed in by the caller, not owned here
    lipschitz: float | None = None  # `lipschitz(f, c)`: weights are scaled so that the constant is at most c
    frozen: bool = False  # `frozen(f)`: its parameters get no gradient here
    follows: Followed | None = None  # `ema(f)`, `copy(f)`: its weights come from another network
    taps: TapRequest | None = None  # `f.tap(..)`, `f.with(..)`: inner values that a call reads or replaces

    @property
    def kind(self) -> str:
        return self.target.kind


@dataclass(frozen=True, slots=True)
class Followed:
    """The network that another takes its weights from: how much it keeps of its own, every so many steps (0: at the start alone)."""

    source: Instance
    decay: float
    every: int


@dataclass(frozen=True, slots=True)
class TapRequest:
    """Places as they are written, which mean something once the network has a region; replacements with their values."""

    reads: tuple[tree.Expr, ...] = ()
    writes: tuple[tuple[tree.Expr, Any], ...] = ()


@dataclass(frozen=True)
class Builtin:
    """A function of the language written in Python: structure, reductions, elementwise, domains."""

    name: str
    fn: Callable[..., Any]
    kind: str = "function"
    step: bool = False  # may stand alone in a chain and is applied to the chain's value
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()  # keyword arguments that take a word of a list
    each: bool = False  # takes one tensor, each of its entries by itself


@dataclass(frozen=True)
class BuiltinNet:
    """A network that only Python can write: it makes parameters (`linear`, `conv`)."""

    name: str
    parameters: tuple[str, ...]
    build: Callable[..., Any]
    kind: str = "net"


@dataclass(frozen=True, slots=True)
class Bracketed:
    """A callee with axes: `halves[D]`, `linear[D -> E]`."""

    fn: Any
    items: tuple[tree.Item, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class AppliedBuiltin:
    """A builtin with static arguments only, waiting for its tensor: `squeeze(2)`, `leaky_relu(0.1)`."""

    builtin: Builtin
    positional: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    items: tuple[tree.Item, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Local:
    """A `def` inside a body: evaluated inline where it is called."""

    declaration: tree.Declaration
    body: Body


@dataclass(frozen=True, slots=True)
class DistributionValue:
    """A distribution with its arguments, tensors or numbers."""

    law: Distribution
    arguments: tuple[tuple[str, Any], ...]
    span: Span

    @property
    def name(self) -> str:
        return self.law.name


@dataclass(frozen=True, slots=True)
class StartValue:
    """A scheme by which a weight starts, with its gain: `kaiming_normal(gain = 1)`."""

    name: str
    gain: float


@dataclass(frozen=True, slots=True)
class FirstBatch:
    """Where a parameter goes when the first batch comes, and what it is before."""

    value: Tensor
    before: float | None  # None: what the parameter's own start made it


@dataclass(frozen=True, slots=True)
class TypeSpec:
    """An evaluated type: a domain with axes; a size is None where the type leaves it open."""

    domain: Domain
    axes: tuple[tuple[str, int | None], ...] = ()
    rest: bool = False
    optional: bool = False
    rest_at: int = 0

    @property
    def sized(self) -> bool:
        return not self.rest and all(size is not None for _, size in self.axes)

    def tensor(self) -> TensorType:
        return TensorType(tuple(Axis(n, s or 0) for n, s in self.axes), self.domain.kind)


@dataclass(frozen=True, slots=True)
class Static:
    """A static type: `int`, `real`, `bool`, `net`, `[int]`, `one_of(..)`, ..."""

    name: str
    options: tuple[str, ...] = ()
    element: Static | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """A word of an enumeration (`exact`), and the words that may stand there."""

    word: str
    among: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class PathFunction:
    """`path.velocity`: a function that follows from a path."""

    path: Declared
    arguments: tuple[tuple[str, Any], ...]
    name: str


@dataclass(frozen=True, slots=True)
class Derivative:
    """`grad(f)` and its like: a function that follows from another by differentiation in its first argument."""

    kind: str  # grad | jvp | vjp | divergence | derivative
    fn: Any
    span: Span


@dataclass(frozen=True, slots=True)
class LogProb:
    """`normal.log_prob`: the log-density of a distribution, summed over a sample."""

    distribution: DistributionValue


@dataclass(frozen=True, slots=True)
class Transition:
    """`t = 0 -> 1`: from one value to another."""

    start: Value
    stop: Value


@dataclass(frozen=True, slots=True)
class RangeValue:
    start: int | None
    stop: int | None


@dataclass(eq=False)
class Pending:
    """A network call whose result size waits for its use: a declared output or the other operand of a sum."""

    resolve: Callable[[list[TypeSpec | TensorType]], list[Any]]
    span: Span
    name: str
    fallback: Callable[[], Any] | None = None


Value = Any


def describe(value: Value) -> str:
    """The value in the spec's words, for messages."""
    match value:
        case Tensor():
            return f"a tensor `{value.type}`"
        case bool():
            return f"`{str(value).lower()}`"
        case int() | float():
            return f"the number {value:g}" if isinstance(value, float) else f"the number {value}"
        case str():
            return f'the text "{value}"'
        case list():
            return "a list"
        case Declared():
            return f"the {value.kind} `{value.name}`"
        case Instance():
            target = value.target
            return f"the {target.kind} `{target.name}`"
        case Builtin():
            return f"the function `{value.name}`"
        case BuiltinNet():
            return f"the network `{value.name}`"
        case AppliedBuiltin():
            return f"the function `{value.builtin.name}`"
        case Bracketed():
            return describe(value.fn)
        case DistributionValue():
            return f"the distribution `{value.name}`"
        case Tuple():
            return f"{len(value.items)} values"
        case Absent():
            return "`none`"
        case Pending():
            return f"the result of `{value.name}`, whose size is open"
        case Derivative():
            return f"the function `{value.kind}(..)`"
        case Local():
            return f"the local function `{value.declaration.name}`"
        case StartValue():
            return f"the start `{value.name}`"
        case Option():
            return f"the word `{value.word}`"
        case RangeValue():
            return "a range"
        case Transition():
            return "a transition `a -> b`"
        case _:
            return "a value"


def hint_for(value: Any) -> str:
    """What to write where a tensor is needed and this stands."""
    match value:
        case Tuple():
            return "bind its parts first, as in `a, b = ..`, and use one of them"
        case list():
            return "take one item, as in `xs[0]`, or put them together, as in `stack[K](xs)`"
        case Declared() | Instance() | Builtin() | BuiltinNet() | AppliedBuiltin():
            name = value.target.name if isinstance(value, Instance) else getattr(value, "name", "f")
            return f"apply it to a tensor, as in `{name}(x)`"
        case Option() | str():
            return "words are given to arguments by name"
    return "a number, a parameter, or what an operation gives"


def part_hint(value: Any, name: str) -> str:
    """What can be read from a value after a dot."""
    if isinstance(value, Tuple | list):
        return "take its parts by position, as in `a, b = ..` or `xs[0]`"
    if isinstance(value, bool | int | float):
        return "only tensors have sizes, as in `x.D`"
    return "a tensor has its sizes (`x.D`), a path `at` and `velocity`, a distribution `log_prob`"
