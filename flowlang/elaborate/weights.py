"""Weights of networks: how they start, and what stands in their place.

`start = kaiming_normal(gain = 1)` names a scheme; `weight = weight_norm` (any net or norm of one value whose first
axis is the unit's) makes the weight that is used from the one that is trained, one instance for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowlang.elaborate.values import (
    Absent,
    AppliedBuiltin,
    Bracketed,
    Builtin,
    Declared,
    DistributionValue,
    Instance,
    StartValue,
    Tensor,
    describe,
)
from flowlang.ir.domains import R
from flowlang.ir.types import TensorType
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body
    from flowlang.elaborate.calls import Arguments
    from flowlang.ir.graph import Region

# Gains by default; He et al. 2015 (kaiming: √2 for relu), LeCun et al. 1998, Glorot & Bengio 2010, Saxe et al. 2014.
SCHEMES = {
    "kaiming_uniform": math.sqrt(2), "kaiming_normal": math.sqrt(2), "lecun_uniform": 1.0, "lecun_normal": 1.0,
    "xavier_uniform": 1.0, "xavier_normal": 1.0, "orthogonal": 1.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fans:
    """How many numbers a unit of a weight reads, and how many read one of its inputs."""

    into: int
    out: int


def scheme(name: str) -> Any:
    def call(body: Body, args: Arguments) -> StartValue:
        assert args.span is not None
        values = [*args.positional, *args.keywords.values()]
        known = all(k == "gain" for k in args.keywords)
        if not known or len(values) > 1 or not all(isinstance(v, int | float) and v > 0 for v in values):
            raise body.fail(
                "FL0305", f"`{name}` takes its gain, a number above 0", args.span, suggestion="as in `orthogonal(1)`"
            )
        return StartValue(name, float(values[0]) if values else SCHEMES[name])

    return call


def scheme_start(name: str, gain: float, fans: Fans) -> tuple[Any, ...]:
    """A scheme as a distribution of the weight's entries."""
    if name == "orthogonal":
        return ("orthogonal_rows", gain)
    scale = gain / math.sqrt(max((fans.into + fans.out) / 2 if name.startswith("xavier") else fans.into, 1))
    if name.endswith("uniform"):
        return ("uniform", -math.sqrt(3) * scale, math.sqrt(3) * scale)
    return ("normal", 0.0, scale)


def start_of(body: Body, value: Any, fans: Fans, span: Span) -> Any:
    """The start of a weight: `zeros`, a number (its scale relative to the usual), a scheme, a distribution, the usual."""
    bound = 1 / math.sqrt(max(fans.into, 1))
    if isinstance(value, Builtin) and value.name in SCHEMES:
        value = StartValue(value.name, SCHEMES[value.name])
    match value:
        case None:
            return ("uniform", -bound, bound)
        case Builtin(name="zeros"):
            return 0.0
        case Builtin(name="normal" | "uniform"):
            return (value.name, 0.0, 1.0)
        case StartValue():
            return scheme_start(value.name, value.gain, fans)
        case DistributionValue(name="normal" | "uniform"):
            words = ("mean", "scale") if value.name == "normal" else ("lo", "hi")
            given = dict(value.arguments)
            numbers = [given.get(k, default) for k, default in zip(words, (0.0, 1.0), strict=True)]
            found = [v if isinstance(v, int | float) else body.b.const_value(v.id) for v in numbers]
            if set(given) <= set(words) and all(v is not None for v in found):
                return (value.name, *(float(v) for v in found if v is not None))
        case int() | float() if not isinstance(value, bool):
            return ("uniform", -bound * value, bound * value) if value else 0.0
    raise body.fail(
        "FL0306", f"a start is `zeros`, a scheme or a number that scales the usual start, and this is {describe(value)}", span,
        suggestion=f"schemes are {', '.join(f'`{s}`' for s in SCHEMES)}, `normal(0, 0.1)`, `uniform(-1, 1)`",
    )  # fmt: skip


def make_param(body: Body, name: str, axes: tuple[tuple[str, int], ...], init: Any, span: Span) -> int:
    type_ = TensorType.of(*axes)
    if type_.count > body.elab.parameter_limit:
        raise body.fail(
            "FL0901",
            f"{type_.count:,} parameters exceed the limit of {body.elab.parameter_limit:,}",
            span,
            suggestion="choose smaller sizes, or raise `max_parameters`",
        )
    return body.b.leaf("param", type_, batched=False, span=span, label=name, name=name, domain=R, init=init)


def is_map(value: Any) -> bool:
    """Whether a weight option is a map of the weight, and not its start."""
    if isinstance(value, Bracketed):
        return is_map(value.fn)
    return isinstance(value, Declared | Instance | AppliedBuiltin)


def starts_small(options: dict[str, Any]) -> bool:
    """Whether the author chose the start of a weight; its bias starts at 0 then."""
    weight = options.get("weight")
    return options.get("start") is not None or not (
        weight is None or is_map(weight) or isinstance(weight, Absent | Tensor)
    )


# ---- where weights stand ------------------------------------------------------------------------

Axes = tuple[tuple[str, int], ...]
Make = Callable[["Body", str], int]  # makes a weight in the body that owns it, for the network of this name


@dataclass(frozen=True, slots=True)
class Need:
    """A weight that a region takes from its caller: of the network given as `argument` (or of one given to that)."""

    argument: str
    part: tuple[str, ...]
    axes: Axes
    make: Make


class Holder:
    """One network at one use. Its weights are made where it is bound, once, and handed from there to every use."""

    def __init__(self, body: Body, inst: Instance, kind: str, span: Span):
        self.body, self.inst, self.span = body, inst, span
        self.name = inst.name or body.fresh_child_name(kind)

    def weight(self, part: str, axes: Axes, make: Make) -> int:
        body, inst = self.body, self.inst
        if inst.owner is None:  # written where it is used, and used there alone
            return make(body, self.name)
        id = frozen_or_not(body, inst, body.bring(take(inst, (part,), axes, make)).id)
        type_ = body.b.type(id)
        if type_.shape != tuple(size for _, size in axes):
            raise body.fail(
                "FL0301", f"`{inst.label or self.name}` is one network, and is used here with other sizes than before", self.span,
                suggestion=f"make a second one, as in `{inst.target.name}(..)`, for the other sizes",
            )  # fmt: skip
        pairs = [(old, new) for old, (new, _) in zip(type_.names, axes, strict=True)]
        if any(old != new for old, new in pairs):  # it was made for axes of other names
            middle = tuple((old, f"{new}~") for old, new in pairs)
            id = body.b.op("rename", id, pairs=middle, span=self.span)
            id = body.b.op("rename", id, pairs=tuple((f"{new}~", new) for _, new in pairs), span=self.span)
        return id


def take(inst: Instance, part: tuple[str, ...], axes: Axes, make: Make) -> Tensor:
    """A weight of a network, as the body that holds the instance sees it."""
    home = inst.owner
    assert home is not None
    assert inst.name is not None
    key = (inst.name, *part)
    if key not in home.weights:
        around = home.outer_instance(inst)
        if around is not None:  # bound around a `repeat` or `scan`
            home.weights[key] = home.bring(take(around, part, axes, make))
        elif inst.shared:  # handed in by the caller
            home.weights[key] = ask(home, Need(home.imported[inst.name], part, axes, make))
        elif len(part) > 1:  # of a network that was given to this one
            other = home.elab.shared_arguments(inst)[part[0]]
            home.weights[key] = home.bring(take(other, part[1:], axes, make))
        else:
            home.weights[key] = Tensor(make(home, inst.name), home)
    return home.weights[key]


def ask(home: Body, need: Need) -> Tensor:
    """A weight as an input of the region under construction, which every caller gives."""
    name = "_".join((need.argument, *need.part))
    type_ = TensorType.of(*need.axes)
    id = home.b.leaf("input", type_, batched=False, span=home.region.span, label=name, name=name, role="context")
    home.region.context.append(id)
    home.elab.needs.setdefault(home.region, []).append(need)
    return Tensor(id, home)


def lend(body: Body, inst: Instance, region: Region) -> tuple[int, ...]:
    """The weights that a region asks of its caller, `inst` being the network called."""
    needs = body.elab.needs.get(region, ())
    found = (body.bring(take(inst, (n.argument, *n.part), n.axes, n.make)).id for n in needs)
    return tuple(frozen_or_not(body, inst, id) for id in found)


def frozen_or_not(body: Body, inst: Instance, id: int) -> int:
    """A weight as `frozen(f)` reads it: no gradient reaches it from there."""
    return body.b.op("stop", id) if inst.frozen else id


# ---- the weight as used -------------------------------------------------------------------------


def net_weight(holder: Holder, axes: Axes, unit: str, fans: Fans, options: dict[str, Any]) -> int:
    """The weight as used: its parameter, or what `weight = f` makes of it, f's first axis being `unit`."""
    body, span = holder.body, holder.span
    weight, start = options.get("weight"), options.get("start")
    if isinstance(weight, Absent):
        weight = None
    if isinstance(start, Absent):
        start = None
    if weight is not None and not is_map(weight):
        if start is not None:
            raise body.fail(
                "FL0306", "`weight` is a start here, and so is `start`", span, suggestion="keep one of them"
            )
        start, weight = weight, None
    init = start_of(body, start, fans, span)

    def make(home: Body, name: str) -> int:
        w = make_param(home, f"{name}_weight", axes, init, span)
        return w if weight is None else reparametrised(home, weight, w, unit, span)

    return holder.weight("weight", axes, make)


def net_bias(holder: Holder, axes: Axes, fans: Fans, options: dict[str, Any]) -> int:
    start = 0.0 if starts_small(options) else start_of(holder.body, None, fans, holder.span)
    return holder.weight("bias", axes, lambda home, name: make_param(home, f"{name}_bias", axes, start, holder.span))


def reparametrised(body: Body, weight: Any, w: int, unit: str, span: Span) -> int:
    from flowlang.elaborate.calls import apply

    fn = weight.fn if isinstance(weight, Bracketed) else weight
    if isinstance(fn, Instance):  # every weight has its own numbers
        fn = Instance(fn.target, fn.arguments, fn.span, fn.axes, inverted=fn.inverted, lipschitz=fn.lipschitz)
    axes = weight.items if isinstance(weight, Bracketed) else (tree.Item(tree.Name(unit, span=span), span=span),)
    made = body.tensor(apply(body, Bracketed(fn, axes, span), [Tensor(w, body)], {}, span), span)
    before, after = body.b.type(w), body.b.type(made)
    if set(before.axes) != set(after.axes):
        raise body.fail("FL0301", f"`weight` makes `{after}` of a weight `{before}`", span,
                        suggestion="it takes `(W: R[O, ..])` and gives a value of the same axes")  # fmt: skip
    return made if before.names == after.names else body.b.op("order", made, names=before.names, span=span)
