"""Equations with noise: the solver's sense is the equation's, and what it takes for granted of the noise holds."""

from __future__ import annotations

from collections.abc import Iterable

from flowlang.analysis.dependence import Summaries
from flowlang.checks.solvers import stochastic_facts
from flowlang.diagnostics import Diagnostic, Report
from flowlang.elaborate.stochastic import NoiseUse


def check_noise(uses: Iterable[NoiseUse], report: Report) -> None:
    summaries = Summaries()
    for use in uses:
        relation = summaries.of(use.noise)[0][0]  # of the noise on x
        if relation is None or use.region.broken:
            continue  # noise that does not depend on x has one sense, and no slope
        facts = stochastic_facts(use.solver, Report())
        name, sense = use.solver.name, facts.get("sense")
        if sense is not None and sense != use.sense:
            theirs, own = ("Ito's", "Stratonovich's") if sense == "ito" else ("Stratonovich's", "Ito's")
            report.add(
                Diagnostic(
                    "FL0608", f"`{name}` solves equations in {theirs} sense, and this one is in {own}: its noise depends on x", use.span,
                    suggestion=f"say `sense = {sense}` if the equation is meant so, or use {'`euler_maruyama` or `milstein`' if sense != 'ito' else '`stochastic_heun`'}",
                )
            )  # fmt: skip
        elif use.steep and not relation.pointwise():
            report.add(
                Diagnostic(
                    "FL0608", f"`{name}` needs noise of each entry of x that depends on that entry alone, and this one depends on others", use.span,
                    notes=("the missing terms are iterated integrals of two noises, which a step's increment does not tell",),
                    suggestion="use `euler_maruyama`, whose order needs no more, or a noise that is written entry by entry",
                )
            )  # fmt: skip
