"""Paths: they leave x0 at t = 0, arrive at x1 at t = 1, and are smooth between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from flowlang.checks.claims import Claims, claim_on, static_value
from flowlang.diagnostics import Diagnostic, Report
from flowlang.elaborate.arithmetic import NotPlain
from flowlang.elaborate.paths import DrawnUse, PathForm, read_path
from flowlang.source import Span
from flowlang.syntax import tree

if TYPE_CHECKING:
    from flowlang.analysis.paths import SymbolicPath


def check_path(declaration: tree.Declaration, report: Report, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reports what is wrong with a path; returns its facts (α, σ, velocity, ...)."""
    try:
        form = read_path(declaration, given)
    except NotPlain as stop:
        report.add(
            Diagnostic(
                "FL0902", f"the path `{declaration.name}` is not followed: {stop.what} is more than a formula in t, x0 and x1",
                stop.span, severity="warning", suggestion="write it as a formula in t, x0 and x1, or give the velocity by hand"
            )
        )  # fmt: skip
        return {}
    if form.weights is not None:
        return check_mixture(form, declaration, report)
    if form.place is None:
        report.add(
            Diagnostic("FL0308", f"the path `{declaration.name}` has no value", declaration.name_span or declaration.span,
                       suggestion="as in `x_t = (1 - t) * x0 + t * x1`")
        )  # fmt: skip
        return {}
    from flowlang.analysis.paths import SymbolicPath, text

    path = SymbolicPath(form.place, form.identities)
    where = formula_span(declaration)
    prior, stated = claim_on(declaration, "prior"), claim_on(declaration, "endpoint") is not None
    if path.networks:
        facts: dict[str, Any] = {
            "velocity": "x_t differentiated in t, by forward mode",
            "affine": path.affine is not None,
            "networks": list(form.nets),
        }
        if form.identities:
            facts["assumes"] = [f"{text(a)} = {text(b)}" for a, b in form.identities]
    else:
        facts = {"velocity": text(path.velocity), "affine": path.affine is not None}
    if path.affine is None and path.gaussian is not None:
        facts["scale"], facts["mean"] = (text(e) for e in path.gaussian)
    if path.affine is not None:
        facts["alpha"], facts["sigma"] = (text(e) for e in path.affine)
    facts["endpoint"] = max(end_error(path, time) for time in ((1,) if prior is not None else (0, 1)))
    if not stated:
        check_ends(path, where, report, (1,) if prior is not None else (0, 1))
    if prior is not None:
        check_prior(path, declaration, prior, report)
    rough, jump = path.irregular(), path.jump()
    if jump is not None:
        report.add(
            Diagnostic("FL0604", f"the path jumps at t = {float(jump):g}", where,
                       suggestion="let its pieces meet: only the velocity may jump")
        )  # fmt: skip
    elif rough is not None:
        time, what = rough
        report.add(
            Diagnostic("FL0604", f"{what} is not a finite real number at t = {time:g}", where,
                       suggestion="a path is smooth for 0 < t < 1")
        )  # fmt: skip
    else:
        facts["stays"] = "convex" if path.convex else "nowhere"
        turn = path.snr_turns()
        facts["snr_monotone"] = turn is None
        if turn is not None:
            report.add(
                Diagnostic(
                    "FL0604", f"the signal-to-noise ratio falls near t = {turn:g}", where, severity="warning",
                    notes=("conversions between predictions and changes of schedule need it to grow",), suggestion="let the noise fall and the signal rise all the way"
                )
            )  # fmt: skip
    if not report.errors:
        known = {k: facts[k] for k in ("endpoint", "stays")}
        Claims(declaration, known, report, "FL0603").check(besides=("prior", *form.nets))
    return facts


def check_mixture(form: PathForm, declaration: tree.Declaration, report: Report) -> dict[str, Any]:
    """A path that draws x_t: its weights are probabilities, all on x0 at t = 0 and on x1 at t = 1, and x1's does not fall."""
    from flowlang.analysis.paths import MixturePath, t, text

    assert form.weights is not None
    path, where = MixturePath(*form.weights, form.rest), formula_span(declaration)
    if path.rest != 0:
        report.add(
            Diagnostic("FL0609", f"x_t is drawn among x0 and x1, and `{text(path.rest)}` stands at neither", where,
                       suggestion="as in `x_t ~ (1 - t) * delta(x0) + t * delta(x1)`")
        )  # fmt: skip
    elif path.missing != 0:
        report.add(
            Diagnostic("FL0609", f"the weights of x0 and x1 sum to `{text(1 - path.missing)}`, and those of a draw sum to 1", where,
                       notes=(f"what is missing is `{text(path.missing)}`",), suggestion=f"give x0 the weight `{text(1 - path.b)}`")
        )  # fmt: skip
    if path.rest != 0 or path.missing != 0:
        return {}
    stated = claim_on(declaration, "endpoint") is not None
    for time in () if stated else (0, 1):
        if path.residual(time) != 0:
            report.add(
                Diagnostic("FL0603", f"at t = {time} x1 has the weight `{text(path.b.subs(t, time))}`, and must have {time}", where,
                           notes=(f"it is off by `{text(path.residual(time))}`",),
                           suggestion="correct it, or state how near it comes, as in `require endpoint <= 1e-4`")
            )  # fmt: skip
    beyond = path.beyond()
    if beyond is not None:
        report.add(
            Diagnostic("FL0609", f"near t = {beyond[0]:.3g} {beyond[1]}", where,
                       suggestion="let the weight of x1 rise from 0 to 1, as `t ^ 2` does")
        )  # fmt: skip
    import sympy as sp

    facts: dict[str, Any] = {
        "drawn": True, "alpha": text(path.b), "sigma": text(path.a), "pace": text(path.pace),
        "endpoint": max(abs(float(sp.N(path.residual(time)))) for time in (0, 1)),
    }  # fmt: skip
    if not report.errors:
        Claims(declaration, {"endpoint": facts["endpoint"]}, report, "FL0603").check()
    return facts


def check_drawn(uses: Iterable[DrawnUse], report: Report) -> None:
    """Paths that draw are judged again for the numbers they are given: their weights give the rates of jumps."""
    seen: set[Any] = set()
    for use in uses:
        key = (id(use.path), tuple(sorted(use.given.items())))
        if not use.given or use.region.broken or key in seen:
            continue
        seen.add(key)
        own = Report()
        check_path(use.path, own, use.given)
        said = ", ".join(f"{k} = {v:g}" for k, v in use.given.items())
        for d in own.errors:
            report.add(replace(d, message=f"with {said} of `{use.path.name}`: {d.message}", span=use.span))


def end_error(path: SymbolicPath, time: int) -> float:
    """The largest coefficient by which an end is missed."""
    import sympy as sp

    from flowlang.analysis.paths import x0, x1

    residual = path.residual(time)
    if any(residual.has(f.func) for f in path.networks):
        return inf  # a network may give anything
    return max(abs(complex(sp.N(sp.diff(residual, s).subs({x0: 1, x1: 1})))) for s in (x0, x1))


def check_ends(path: SymbolicPath, where: Span, report: Report, times: tuple[int, ...]) -> None:
    from flowlang.analysis.paths import text

    for time in times:
        residual, end = path.residual(time), ("x0", "x1")[time]
        if residual != 0:
            report.add(
                Diagnostic(
                    "FL0603", f"at t = {time} the path is at `{text(path.at(time))}`, and must be at `{end}`", where,
                    notes=(f"it is off by `{text(residual)}`",),
                    suggestion="correct it, or state how near it comes, as in `require endpoint <= 1e-4`",
                )
            )  # fmt: skip


PRIOR_TOLERANCE = 0.05  # what of the data, in units of the prior's scale, may be left at t = 0
SCALE_TOLERANCE = 1e-3


def check_prior(path: SymbolicPath, declaration: tree.Declaration, claim: tree.Binary, report: Report) -> None:
    """`require prior == normal(0, s)`: at t = 0 the path is s·x0, nearly whatever x1 is."""
    import sympy as sp

    from flowlang.analysis.paths import text, x0, x1

    scale = prior_scale(declaration, claim.right)
    if scale is None or claim.op != "==":
        report.add(
            Diagnostic("FL0306", "a claim on the prior is `prior == normal(0, s)`", claim.span,
                       suggestion="`s` is a number or a static parameter")
        )  # fmt: skip
        return
    start = path.at(0)
    sigma, left = (abs(complex(sp.N(sp.diff(start, s).subs({x0: 1, x1: 1})))) for s in (x0, x1))
    if abs(sigma - scale) > SCALE_TOLERANCE * scale:
        report.add(
            Diagnostic("FL0603", f"at t = 0 the path has scale {sigma:g}, and `normal(0, {scale:g})` is required", claim.span,
                       notes=(f"it is at `{text(start)}`",), suggestion=f"write `normal(0, {sigma:g})`, or change the path's start")
        )  # fmt: skip
    elif left > PRIOR_TOLERANCE * scale:
        report.add(
            Diagnostic("FL0603", f"at t = 0 the path still holds {left:.2g} of x1", claim.span,
                       suggestion="let the signal vanish at t = 0, or take a wider prior")
        )  # fmt: skip


def prior_scale(declaration: tree.Declaration, e: tree.Expr) -> float | None:
    """s of `normal(0, s)`; 1 for `normal`."""
    if isinstance(e, tree.Name) and e.id == "normal":
        return 1.0
    if not (isinstance(e, tree.Call) and isinstance(e.fn, tree.Name) and e.fn.id == "normal" and len(e.items) == 2):
        return None
    mean, scale = (i.eq if i.eq is not None else i.left for i in e.items)
    if mean is None or scale is None or static_value(declaration, mean) != 0:
        return None
    found = static_value(declaration, scale)
    return found if found is not None and found > 0 else None


def formula_span(declaration: tree.Declaration) -> Span:
    last = [s for s in declaration.body or () if isinstance(s, tree.Bind | tree.ExprStatement)]
    return last[-1].span if last else declaration.span
