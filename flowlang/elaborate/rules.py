"""Hand-given rules of a bijector: `def inverse(y) {..}` and `def log_det(x) {..}` (LANGUAGE §2, DESIGN §5).

Their bodies become part of the region's graph: the inverse reads leaves that stand for the outputs, the
log-det reads the mapped inputs. Both close over the owner's parameters and context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flowlang.elaborate import axes as axis_rules
from flowlang.elaborate.calls import Arguments, call_local
from flowlang.elaborate.scans import conform, state_updates
from flowlang.elaborate.scope import did_you_mean
from flowlang.elaborate.types import evaluate_type
from flowlang.elaborate.values import Local, Poison, Tensor, Tuple, TypeSpec
from flowlang.ir.graph import Rule, Update
from flowlang.ir.types import TensorType, same_axes
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.elaborate.body import Body

EXACTNESS = {"estimate": "unbiased", "bound": "lower bound", "ratio": "ratio"}


RULES = {"inverse": ("bijector",), "log_det": ("bijector",), "backward": ("net", "norm")}


def explicit_rules(body: Body) -> None:
    """Adds the rules that a body defines to its region; reports what does not fit."""
    for name, kinds in RULES.items():
        local = body.names.get(name)
        if isinstance(local, Local) and local.body is body:
            from flowlang.elaborate.body import Fail, Poisoned

            try:
                if body.region.kind not in kinds:
                    raise body.fail(
                        "FL0106", f"`def {name}` belongs in a {kinds[0]}, and this is a {body.region.kind}",
                        local.declaration.span, suggestion=f"move it into a {kinds[0]}, or give it another name"
                    )  # fmt: skip
                if any(r.draws or r.emissions for r in body.region.walk()):
                    raise body.fail(
                        "FL0902", f"`def {name}` beside draws or emissions has no meaning yet", local.declaration.span,
                        suggestion="draw and emit in a bijector of its own",
                    )  # fmt: skip
                body.region.rules[name] = MAKE[name](body, local)
            except Fail as e:
                body.report(e.diagnostic)
            except Poisoned:
                body.region.broken = True


def chain_without_rules(body: Body) -> None:
    """A chain's inverse follows from its steps: a rule would belong to one of them."""
    for name in ("inverse", "log_det"):
        local = body.names.get(name)
        if isinstance(local, Local) and local.body is body:
            raise body.fail(
                "FL0106",
                f"`def {name}` belongs in a bijector with a tensor parameter; a chain is inverted step by step",
                local.declaration.span,
                suggestion="move it into the bijector that needs it",
            )


def inverse(body: Body, local: Local) -> Rule:
    declaration, region = local.declaration, body.region
    if declaration.results:
        raise body.fail(
            "FL0306",
            "an inverse is exact: `-> ..` belongs to `def log_det`",
            declaration.results[0].span,
            suggestion="leave the arrow out",
        )
    known = set(region.inputs)
    leaves = [
        body.b.leaf("input", t, batched=True, span=declaration.span, label=p.name, name=p.name, role="result")
        for t, p in zip(region.output_types(), parameters(body, declaration, len(region.outputs)), strict=True)
    ]
    values = evaluate(body, local, leaves)
    wanted = region.input_types()
    if len(values) != len(wanted):
        raise body.fail(
            "FL0308",
            f"`inverse` gives {len(values)} values, and `{region.name}` maps {len(wanted)}",
            declaration.span,
            suggestion="give one value for each that is mapped, in their order",
        )
    outputs = []
    for v, t in zip(values, wanted, strict=True):
        have = body.b.type(v)
        if not set(have.axes) <= set(t.axes):
            raise body.fail(
                "FL0308", f"`inverse` gives `{have}`, and `{region.name}` maps `{t}`", declaration.span,
                suggestion="an inverse gives back the types that the bijector takes",
            )  # fmt: skip
        v = body.b.expand(v, t)
        outputs.append(v if same_axes(have, t) else body.b.op("order", v, names=t.names))
    read = body.graph.reachable(outputs) & known
    if read:
        name = body.graph[min(read)].label
        raise body.fail(
            "FL0201", f"`inverse` reads `{name}`, which it is to give", declaration.span,
            suggestion="write it in terms of its own arguments, the parameters and the context",
        )  # fmt: skip
    return Rule(tuple(leaves), tuple(outputs), span=header(declaration))


def log_det(body: Body, local: Local) -> Rule:
    declaration, region = local.declaration, body.region
    exactness = "exact"
    for result in declaration.results:
        word = result.type.id if isinstance(result.type, tree.Name) else None
        if len(declaration.results) > 1 or word not in EXACTNESS:
            raise body.fail(
                "FL0306", "what `log_det` gives is exact, or an `estimate`, a `bound` or a `ratio`", result.span,
                suggestion=did_you_mean(word or "", EXACTNESS) or "as in `def log_det(x) -> bound { .. }`",
            )  # fmt: skip
        exactness = EXACTNESS[word or ""]
    parameters(body, declaration, len(region.inputs))
    values = evaluate(body, local, region.inputs)
    have = body.b.type(values[0]) if len(values) == 1 else None
    if have is None or have.axes:
        what = f"`{have}`" if have is not None else f"{len(values)} values"
        raise body.fail(
            "FL0308", f"`log_det` gives {what}, and one number for each sample is needed", declaration.span,
            suggestion=f"sum it, as in `sum[{have.names[0]}](..)`" if have is not None else "end it with the estimate",
        )  # fmt: skip
    return Rule(tuple(region.inputs), (values[0],), exactness, header(declaration))


def backward(body: Body, local: Local) -> Rule:
    """`def backward(dy) {..}`: the gradient of each tensor parameter from that of each result, while training.

    It sees the forward pass's names and may update states, which it reads as they are when it runs.
    """
    declaration, region = local.declaration, body.region
    lent = any(r in body.elab.needs for r in region.walk())
    owner = region if lent else next((r for r in region.walk() if any(n.op == "param" for n in r.graph)), None)
    if owner is not None:
        raise body.fail(
            "FL0902", f"`def backward` gives no gradient to the parameters of `{owner.name}`", declaration.span,
            suggestion="keep parameters in a net around this one",
        )  # fmt: skip
    leaves = [
        body.b.leaf("input", t, batched=True, span=declaration.span, label=p.name, name=p.name, role="result")
        for t, p in zip(region.output_types(), parameters(body, declaration, len(region.outputs)), strict=True)
    ]
    before = {n: v for n in body.states if isinstance(v := body.names[n], Tensor)}
    updates: list[Update] = []
    values = evaluate(body, local, leaves, lambda: updates.extend(state_updates(body, before)))
    if len(values) != len(region.inputs):
        raise body.fail(
            "FL0308",
            f"`backward` gives {len(values)} values, and `{region.name}` takes {len(region.inputs)}",
            declaration.span,
            suggestion="give one gradient for each input, in their order",
        )
    outputs = []
    for v, t in zip(values, region.input_types(), strict=True):
        have = body.b.type(v)
        if not set(have.axes) <= set(t.axes):
            raise body.fail(
                "FL0308",
                f"`backward` gives `{have}`, and the value is `{t}`",
                declaration.span,
                suggestion="a gradient has the type of its value",
            )
        outputs.append(conform(body, v, t))
    return Rule(tuple(leaves), tuple(outputs), span=header(declaration), updates=tuple(updates))


MAKE = {"inverse": inverse, "log_det": log_det, "backward": backward}


def parameters(body: Body, declaration: tree.Declaration, count: int) -> list[tree.Parameter]:
    """The parameters that stand for values; those with a context's name are the context."""
    context = {body.graph[c].label for c in body.region.context}
    found = [p for ps in declaration.parameters for p in ps if p.name not in context]
    if len(found) != count:
        raise body.fail(
            "FL0202", f"`{declaration.name}` of `{body.region.name}` takes {count} values, and names {len(found)}",
            declaration.span, suggestion="parameters and context of the bijector are in sight without being named",
        )  # fmt: skip
    return found


def evaluate(body: Body, local: Local, arguments: list[int], finish: Callable[[], None] | None = None) -> list[int]:
    """The values of a rule's body; `finish` is run while its names are in sight."""
    declaration = local.declaration
    named = iter(arguments)
    context = {body.graph[c].label: c for c in body.region.context}
    values: dict[str, Any] = {}
    for p in (p for ps in declaration.parameters for p in ps):
        value = Tensor(context[p.name], body) if p.name in context else Tensor(next(named), body)
        spec = evaluate_type(body, p.type) if p.type is not None else None
        values[p.name] = axis_rules.conform(body, value, spec, p.span) if isinstance(spec, TypeSpec) else value
    body.b.span = declaration.span
    found = call_local(body, local, Arguments(keywords=values, span=declaration.span), finish)
    if isinstance(found, Poison):
        from flowlang.elaborate.body import Poisoned

        raise Poisoned
    if body.region.draws or body.region.emissions:
        raise body.fail(
            "FL0902",
            "a draw inside a hand-given rule has no meaning yet",
            declaration.span,
            suggestion="draw in the forward body and emit, as in `u: R[D] ~ normal`",
        )
    items = list(found.items) if isinstance(found, Tuple) else [found]
    out = [body.tensor(v, declaration.span) for v in items]
    for v in out:
        t: TensorType = body.b.type(v)
        if t.kind != "real":
            raise body.fail(
                "FL0306",
                f"`{declaration.name}` gives `{t}`, and real numbers are needed",
                declaration.span,
                suggestion="compute it from real values",
            )
    return out


def header(declaration: tree.Declaration) -> Any:
    return declaration.name_span or declaration.span
