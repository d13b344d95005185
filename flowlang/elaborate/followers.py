"""`ema(v, 0.999)` and `copy(v)`: networks of a model that are not trained, and take their weights from another.

An average moves a little towards `v` after every step of training. A copy is `v` as training begins; with `every = n` it
is taken anew every n steps. Networks that were given to `v` as arguments are followed with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowlang.elaborate.calls import Arguments
from flowlang.elaborate.values import Absent, Declared, Followed, Instance, Poison, describe

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

EXAMPLES = {"ema": "`slow = ema(v, 0.999)`", "copy": "`start = copy(v)`, or `target = copy(v, every = 100)`"}


def follower(kind: str) -> Any:
    """The builtin of that name."""

    def call(body: Body, args: Arguments) -> Any:
        span = args.span
        assert span is not None
        home = body
        while home.region.kind == "program" and home.parent is not None:
            home = home.parent
        value = args.positional[0] if args.positional else None
        if isinstance(value, Absent | Poison):
            return value
        declared = isinstance(value, Instance) and isinstance(value.target, Declared) and value.kind in ("net", "norm")
        if not isinstance(value, Instance) or not declared or value.owner is not home or value.taps is not None:
            found = f", and this is {describe(value)}" if value is not None else ""
            raise body.fail(
                "FL0211",
                f"`{kind}` takes a network that the model has{found}",
                span,
                suggestion=f"as in {EXAMPLES[kind]}",
            )
        if home.region.kind != "model":
            raise body.fail(
                "FL0106",
                f"`{kind}` belongs in a model, whose training it follows",
                span,
                suggestion="make it there, and give it as an argument",
            )
        return followed(home, value, how(body, kind, args))

    return call


def how(body: Body, kind: str, args: Arguments) -> tuple[float, int]:
    """What is kept of the old weights at an update, and the steps between two (0: none after the first)."""
    span = args.span
    assert span is not None
    word = {"ema": "decay", "copy": "every"}[kind]
    args.only(body, kind, (word,))
    given = {**dict(zip((word,), args.positional[1:], strict=False)), **args.keywords}
    if len(args.positional) > 2:
        raise body.fail("FL0203", f"`{kind}` takes a network and `{word}`", span, suggestion=f"as in {EXAMPLES[kind]}")
    value = given.get(word, 0.999 if kind == "ema" else 0)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "ema":
        if not number or not 0 <= value < 1:
            raise body.fail(
                "FL0306",
                f"`decay` of `ema` lies in [0, 1), and this is {describe(value)}",
                span,
                suggestion=f"as in {EXAMPLES[kind]}",
            )
        return float(value), 1
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise body.fail(
            "FL0306",
            f"`every` of `copy` counts steps, and this is {describe(value)}",
            span,
            suggestion=f"as in {EXAMPLES[kind]}",
        )
    return 0.0, value


def followed(home: Body, value: Instance, rule: tuple[float, int]) -> Instance:
    """A network like this one with weights of its own, which follow; what it was given is followed too."""

    def inner(name: str, v: Any) -> Any:
        if isinstance(v, list):
            return [inner(name, x) for x in v]
        if not isinstance(v, Instance) or v.owner is not home:
            return v
        made = followed(home, v, rule)
        made.owner, made.name = home, home.fresh_child_name(f"{v.name}_{name}")
        return made

    arguments = {k: inner(k, v) for k, v in value.arguments.items()}
    return replace(
        value,
        arguments=arguments,
        owner=None,
        name=None,
        label=None,
        shared=False,
        region=None,
        follows=Followed(value, *rule),
    )
