"""A static `if`: the branch that is not taken is not evaluated, and its names are looked up all the same."""

from __future__ import annotations

import pytest

from flowlang.compiler import compile_source
from flowlang.source import Source


def told(text: str) -> list[tuple[str, str]]:
    return [(d.code, d.span.text if d.span else "") for d in compile_source(Source("spec.flow", text)).report]


@pytest.mark.parametrize(
    ("branch", "unknown"),
    [
        ("y := tanhh(y)", "tanhh"),
        ("y := y * (1 + typo)", "typo"),
        ("y := linear[D -> D](y, bias = tru)", "tru"),
        ("y := y[D -> (h = headz, d)][(h, d) -> D]", "headz"),
        ("for w in widhts { y := y * w }", "widhts"),
        ("y := sum([v * missing for v in [1, 2]]) * y", "missing"),
    ],
)
def test_an_unknown_name_is_one_error_though_the_branch_is_not_taken(branch: str, unknown: str) -> None:
    text = f"net f(deep: bool = false) (x: R[D]) {{\n  y = x\n  if deep {{ {branch} }}\n  y\n}}"
    assert told(text) == [("FL0201", unknown)]
    assert told(text.replace("if deep", "if not deep {} else")) == [("FL0201", unknown)]


@pytest.mark.parametrize(
    "branch",
    [
        "param label: R[K = 10, E] ~ normal(0, 0.01);  y := y + mean[K](label)[E -> D]",
        "h = linear[D -> H = 8](y);  y := linear[H -> D](tanh(h))",
        "y := attention[T](y, heads = 2, causal = true)",
        "def g(v) { v * 2 };  y := g(y)",
        "y := y * b;  b := 3",
        "y, z = y, y;  y := y + z",
        "y := integrate(mlp(8), y, t = 0 -> 1, rk4(steps = 2), trace = hutchinson)",
        "y := sum([v for v in [1, 2] if v > 1]) * y",
    ],
)  # fmt: skip
def test_what_makes_sense_only_where_it_is_taken_is_no_error(branch: str) -> None:
    text = f"net f(deep: bool = false) (x: R[D]) {{\n  y = x;  b = 2\n  if deep {{ {branch} }}\n  y * b\n}}"
    assert told(text) == []


def test_a_name_that_only_the_other_branch_reads_is_read() -> None:
    text = "net f(deep: bool = false) (x: R[D]) {\n  y = x * 2\n  if deep { y } else { x }\n}"
    assert told(text) == []
