"""Paths: ends, velocity, conversions and smoothness, against finite differences and closed forms."""

from __future__ import annotations

import pytest
import sympy as sp

from flowlang.analysis.paths import SymbolicPath, conversions
from flowlang.checks.paths import check_path
from flowlang.diagnostics import Report
from flowlang.elaborate.paths import read_path
from flowlang.library import standard_library
from flowlang.source import Source
from flowlang.syntax import tree
from flowlang.syntax.parser import parse


def declaration(text: str) -> tree.Declaration:
    found = parse(Source.of("path", text), Report()).module.items[0]
    assert isinstance(found, tree.Declaration)
    return found


def library_paths() -> dict[str, tree.Declaration]:
    source = standard_library().source("std.paths.affine")
    assert source is not None
    module = parse(source, Report()).module
    return {d.name: d for d in module.items if isinstance(d, tree.Declaration) and d.kind == "path"}


LIBRARY = library_paths()


@pytest.mark.parametrize("name", LIBRARY)
def test_library_path_passes_and_has_the_velocity_of_finite_differences(name: str) -> None:
    report = Report()
    facts = check_path(LIBRARY[name], report)
    assert not list(report)
    assert facts["affine"]
    assert facts["snr_monotone"]
    path = SymbolicPath(read_path(LIBRARY[name]).place)
    f = sp.lambdify(sp.symbols("t x0 x1", real=True), path.expression)
    v = sp.lambdify(sp.symbols("t x0 x1", real=True), path.velocity)
    for time in (0.1, 0.37, 0.8):
        numeric = (f(time + 1e-6, 0.7, -1.2) - f(time - 1e-6, 0.7, -1.2)) / 2e-6
        assert abs(numeric - v(time, 0.7, -1.2)) < 1e-6 * (1 + abs(numeric))


# α, σ, α', σ' of the guide (arXiv 2412.06264, section 4.8), as numbers
CLOSED = {
    "cond_ot": lambda t: (t, 1 - t, 1.0, -1.0),
    "polynomial": lambda t: (t**2, 1 - t**2, 2 * t, -2 * t),
    "cosine": lambda t: (sp.sin(sp.pi * t / 2), sp.cos(sp.pi * t / 2), sp.pi / 2 * sp.cos(sp.pi * t / 2), -sp.pi / 2 * sp.sin(sp.pi * t / 2)),
    "linear_vp": lambda t: (t, sp.sqrt(1 - t**2), 1.0, -t / sp.sqrt(1 - t**2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_signal_and_noise_levels_are_the_published_ones(name: str) -> None:
    affine = SymbolicPath(read_path(LIBRARY[name]).place).affine
    assert affine is not None
    t = sp.Symbol("t", real=True)
    for time in (0.2, 0.5, 0.9):
        wanted = [float(w) for w in CLOSED[name](time)]
        have = [float(e.subs(t, time)) for e in (*affine, *(sp.diff(e, t) for e in affine))]
        assert have == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", LIBRARY)
def test_conversions_agree_on_points_of_the_path(name: str) -> None:
    path = SymbolicPath(read_path(LIBRARY[name]).place)
    assert path.affine is not None
    table = conversions(path)
    names = {n: sp.Symbol(n, real=True) for n in ("t", "x", "x0", "x1", "v", "s")}
    for time in (sp.Rational(1, 5), sp.Rational(4, 5)):
        at = {names["t"]: time, names["x0"]: sp.Rational(7, 10), names["x1"]: sp.Rational(-6, 5)}
        sigma = path.affine[1].subs(names["t"], time)
        at[names["x"]] = path.expression.subs(at)
        at[names["v"]] = path.velocity.subs(at)
        at[names["s"]] = -at[names["x0"]] / sigma
        truth = {"data": at[names["x1"]], "noise": at[names["x0"]], "velocity": at[names["v"]], "score": at[names["s"]]}
        for key, expression in table.items():
            want = truth[key.split("_from_")[0]]
            if not expression.has(sp.zoo, sp.nan):  # α' = 0 (ve) leaves no way from noise to velocity
                assert float(expression.subs(at)) == pytest.approx(float(want), rel=1e-9), key


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("path p (t, x0, x1) { x_t = (1 - t) * x0 + 0.9 * t * x1 }", "FL0603", "t = 1"),
        ("path p (t, x0, x1) { x_t = (1.1 - t) * x0 + t * x1 }", "FL0603", "t = 0"),
        ("path p (t, x0, x1) { require endpoint <= 1e-4\n x_t = (1 - 0.99 * t) * x0 + t * x1 }", "FL0603", "endpoint"),
        ("path p (t, x0, x1) { require prior == normal(0, 2)\n x_t = (1 - t) * x0 + t * x1 }", "FL0603", "scale 1"),
        ("path p (t, x0, x1) { require prior == normal\n x_t = x1 + (1 - t) * x0 }", "FL0603", "still holds"),
        ("path p (t, x0, x1) { x_t = (1 - t) * x0 + t * x1 + (t - t ^ 2) / (t - 1/2) * x0 }", "FL0604", "t = 0.5"),
        ("path p (t, x0, x1) { x_t = (1 - t) * x0 + t * x1 + (sqrt(t - 0.3) - sqrt(t - 0.3)) * 0 + t * (1 - t) * sqrt(t - 0.3) }",
         "FL0604", "t = "),
        ("path p (t, x0, x1) { }", "FL0308", "no value"),
    ],
)  # fmt: skip
def test_wrong_paths_are_refused(text: str, code: str, words: str) -> None:
    report = Report()
    check_path(declaration(text), report)
    (error,) = report.errors
    assert error.code == code
    assert words in error.message


def test_a_ratio_that_falls_is_a_warning() -> None:
    report = Report()
    check_path(declaration("path p (t, x0, x1) { x_t = (1 - t) * x0 + (2 * t - 1) ^ 2 * t * x1 }"), report)
    assert report.ok
    assert [d.code for d in report] == ["FL0604"]
