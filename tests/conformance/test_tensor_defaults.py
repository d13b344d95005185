"""A tensor parameter with a default: what it is where nothing is given, at calls and for a network by itself."""

from __future__ import annotations

import pytest
import torch

import flowlang as fl

ONES = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(("text", "expected"), [
    ("net f(x: R[D = 3], c: R[D] = 2) { x + c }", 3.0), ("net f(x: R[D = 3], t: R = 1) { x + t }", 2.0),
    ("net g(x: R[D], c: R[D] = 2) { x + c }\nnet f(x: R[D = 3]) { g(x) + g(x, c = x) }", 5.0),
    ("net g(x: R[D], c: R[D]? = 1) { if present(c) { y = x + c } else { y = x }; y }\nnet f(x: R[D = 3]) { g(x) }", 2.0),
    ("net g(x: R[D], c: R[D]? = none) { if present(c) { y = x + c } else { y = x }; y }\nnet f(x: R[D = 3]) { g(x) }", 1.0),
])  # fmt: skip
def test_the_default_stands_for_what_is_not_given(text: str, expected: float) -> None:
    module = fl.compile(text, flow="f", dtype=torch.float64)
    assert list(module.inputs) == ["x"]
    assert torch.equal(module(ONES), expected * ONES)


@pytest.mark.parametrize(("text", "code"), [
    ("net f(x: R[D = 3], c: R[D]? = None) { x }", "FL0201"), ("net f(x: R[D = 3], c: R[E] = 1) { x + sum(c) }", "FL0310"),
])  # fmt: skip
def test_a_default_without_meaning_is_refused(text: str, code: str) -> None:
    assert [d.code for d in fl.check(text)] == [code]
