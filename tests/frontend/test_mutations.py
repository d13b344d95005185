"""Damaged specs give diagnostics and nothing else: 20,000 in a CI run, 2,000 of them in `make test`."""

from __future__ import annotations

import re

import pytest

from flowlang.compiler import compile_source, info
from flowlang.diagnostics import Diagnostic
from flowlang.diagnostics.codes import CODES
from flowlang.diagnostics.render import render_report, to_json
from flowlang.source import Source
from tests.frontend.mutate import mutants

# Words of the implementation, which no user should meet.
INTERNAL = re.compile(
    r"NoneType|\bNone\b|\bnode \d|object at 0x|<class|<error>|Traceback|TensorType|Poison|\bPending\b|flowlang\."
)


def judge(d: Diagnostic) -> None:
    assert d.code in CODES
    assert d.span is not None, d
    assert 0 <= d.span.start <= d.span.end <= len(d.span.source.text)
    said = [d.message, *d.notes, *(x.text for x in d.labels), d.suggestion or ""]
    assert d.message.strip()
    assert d.suggestion or d.severity == "note", f"{d.code} {d.message}: no suggestion"
    assert not INTERNAL.search(" ".join(said)), said
    assert not d.span.source.library, d


def survive(text: str) -> None:
    """The whole of `check --json`, `check` and `info` on one text."""
    try:
        comp = compile_source(Source.of("damaged.flow", text))
        found = list(comp.report)
        for d in found:
            judge(d)
            to_json(d)
        render_report(found)
        if comp.ok:
            info(comp)
    except AssertionError as e:
        raise AssertionError(f"{e}\n--- the spec ---\n{text}") from e
    except Exception as e:
        raise AssertionError(f"{type(e).__name__}: {e}\n--- the spec ---\n{text}") from e


@pytest.mark.parametrize("seed", range(4))
def test_damaged_specs(seed: int) -> None:
    for text in mutants(500, seed):
        survive(text)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 118))
def test_many_damaged_specs(seed: int) -> None:
    for text in mutants(1000, seed):
        survive(text)


def test_layers_of_a_network_are_counted() -> None:
    """Found by a mutant: a hundred thousand layers took minutes and gigabytes."""
    spec = "flow f {\n  data x: R[D = 3]\n  affine_autoregressive(blocks = 100000)\n  base normal\n}\n"
    assert [d.code for d in compile_source(Source.of("deep.flow", spec)).report.errors] == ["FL0901"]


@pytest.mark.parametrize("option", ["groups", "kernel", "stride", "dilation", "padding", "out"])
def test_options_of_a_convolution_are_whole_numbers(option: str) -> None:
    """Found by a mutant: `groups` was read as a number before it was known to be one."""
    spec = f"net n(x: R[C = 4, H = 4, W = 4]) {{ conv(x, {'' if option == 'out' else 'out = 4, '}{option} = tanh) }}\n"
    assert [d.code for d in compile_source(Source.of("conv.flow", spec)).report.errors] == ["FL0306"]


def test_ddof_is_a_whole_number() -> None:
    spec = "norm n(x: R[C = 4]) { x / std[C](x, ddof = tanh) }\n"
    assert len(compile_source(Source.of("std.flow", spec)).report.errors) == 1


@pytest.mark.parametrize(
    "text",
    [
        "path p(t, x0, x1) { x_t = x1 + 1 == (2 ^ (1 - t)) * x0 }\n",
        "path p(t, x0, x1) { x_t = x1 + sqrt(1 != -exp(-t)) * x0 }\n",
        "path p(t, x0, x1) { x_t = x0 < x1 }\n",
        "path p(t, x0, x1) { x_t = (x0, x1) }\n",
        "solver s (v, g, x, t, h, dw) { x + h * v(x, t) + g(x, x, dw) }\n",
    ],
)
def test_specs_that_once_broke_the_checks_of_paths_and_solvers(text: str) -> None:
    survive(text)
