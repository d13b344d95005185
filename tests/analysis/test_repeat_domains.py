"""A chain or the body of a `repeat` declares no domain: it has that of what arrives, if a round keeps it."""

from __future__ import annotations

import pytest
import torch

import flowlang as fl
from flowlang.compiler import compile_source
from flowlang.source import Source


def errors(text: str) -> list[tuple[str, str]]:
    report = compile_source(Source("spec.flow", text)).report
    return [(d.code, d.span.text if d.span else "") for d in report.errors]


@pytest.mark.parametrize(
    "text",
    [
        "flow f { data x: Positive[D = 2];  repeat 3 { elementwise(sqrt) };  elementwise(log);  base normal }",
        "flow f { data x: Unit[D = 2];  repeat 2 { elementwise(square) };  base uniform }",
        "bijector roots { elementwise(sqrt);  elementwise(sqrt) }\n"
        "flow f { data x: Positive[D = 2];  roots;  elementwise(log);  base normal }",
        "bijector b(x: Positive[D]) { x + log(x) }\n"
        "flow f { data x: R[D = 2];  repeat 2 { elementwise(exp);  b };  base normal }",
        "net n(x: R[D]) -> R[D] {\n  y = x ^ 2\n  repeat 3 { y := sqrt(y + 1) }\n  linear[D -> D](y)\n}",
    ],
    ids=["roots", "squares", "chain", "back and forth", "net"],
)
def test_what_every_round_keeps_is_no_error(text: str) -> None:
    assert errors(text) == []


@pytest.mark.parametrize(
    ("text", "code", "at"),
    [
        ("flow f { data x: Positive[D = 2];  repeat 3 { elementwise(log) };  base normal }", "FL0409", "elementwise(log)"),
        ("flow f { data x: R[D = 2];  repeat 3 { elementwise(square) };  base normal }", "FL0404", "elementwise(square)"),
    ],
    ids=["left after a round", "never there"],
)  # fmt: skip
def test_what_a_round_does_not_keep_is_an_error(text: str, code: str, at: str) -> None:
    assert errors(text) == [(code, at)]


def test_a_chain_used_in_two_places_is_judged_for_both() -> None:
    text = (
        "bijector roots { elementwise(sqrt) }\n"
        "flow f { data x: Positive[D = 2];  roots;  elementwise(log);  base normal }\n"
        "flow g { data x: R[D = 2];  affine_elementwise;  roots;  base normal }"
    )
    assert errors(text) == [("FL0409", "elementwise(sqrt)")]


def test_numbers_of_a_repeat_on_positive_data() -> None:
    flow = fl.compile(
        "bijector b(x: Positive[D]) { x + x ^ 2 / 2 }\n"
        "flow f { data x: Positive[D = 3];  repeat 3 { b };  elementwise(log);  base normal }",
        dtype=torch.float64,
    )
    x = torch.linspace(0.05, 4.0, 30, dtype=torch.float64).reshape(10, 3)
    z, log_det = flow(x)
    back, _ = flow.inverse(z)
    assert torch.allclose(back, x, rtol=1e-9, atol=1e-9)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: flow(v)[0], row) for row in x])
    assert torch.allclose(log_det, torch.linalg.slogdet(jacobian)[1], atol=1e-9)
