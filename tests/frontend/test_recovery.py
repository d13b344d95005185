"""Recovery by item and by statement: every mistake of a file is told once, and nothing else is."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowlang as fl
from flowlang.diagnostics import Diagnostic, Report
from flowlang.source import Source
from flowlang.syntax import tree
from flowlang.syntax.parser import parse

# A good file. Mistakes are planted at `@b` (a body), `@c` (a chain) and `@t` (the top level).
GOOD = """\
edition 1

net skip(width: int = 16) (x: R[D], c: R[E]?) -> R[O] {
  @b
  h: R[H = width] = linear(x, c)
  @b
  h := silu(h)
  if width == 16 {
    @b
    h := h + mlp(8)(h)
  } else {
    @e
    h := -h
  }
  linear(h)
}
@t
bijector scale(bound: real = 2.0) (x: R[D, ..] given c: R[..]?) {
  a, b = halves[D](x)
  @b
  shift: R[b.D, ..], raw: R[b.D, ..] = mlp(16)(a, c)
  join[D](a, b * exp(bound * tanh(raw / bound)) + shift)
}

flow first {
  data x: R[D = 4]
  @c
  given c: R[E = 3]
  repeat 3 {
    scale(bound = 1.5)
    @c
    reverse
  }
  @c
  base normal
}
@t
bijector pair {
  scale
  @c
  reverse
}

flow second {
  data x: R[D = 2]
  @c
  repeat 2 { pair
    repeat 2 {
      @c
      affine_coupling(net = mlp(8))
    }
  }
  base normal
}
@t
"""

BODY = {  # planted line: the code of its one error
    "m1 = ": "FL0101", "m1 = x + + ": "FL0101", "m1 = 2x": "FL0104", "m1 = (1, 2": "FL0102", "m1 = 1)": "FL0102",
    "m1 = [1, 2)": "FL0102", "m1 = x²": "FL0103", "m1 = 3 = 4": "FL0101", "x y": "FL0101", "if { 1 }": "FL0101",
    "for in [1] { x }": "FL0101", "m1 = unknwn": "FL0201", "m1 = tanhh(1)": "FL0201", "m1 = exp(1, 2)": "FL0203",
    "m1 = 99999999999999999999": "FL0901", "m1 = mlp(widths = 3)": "FL0202", "repeat 2 { m1 = }": "FL0101",
    "repeat 2 {\n      m1 = nothere\n    }": "FL0201", "m1 = 1 / 0": "FL0305", "m1 = [1, 2][5]": "FL0307",
    "param w: R[D]] = 0": "FL0102", "m1 := 2": "FL0201", "m1: R = 3 and": "FL0101", 'm1 = "text': "FL0103",
    "base normal": "FL0106", "data q: R[D]": "FL0106", "m1 = f(;)": "FL0101",
}  # fmt: skip
CHAIN = {
    "couplng(net = mlp(8))": "FL0201", "affine_coupling(net = mlp(8)": "FL0102", "affine_coupling(nt = mlp(8))": "FL0202",
    "mlp(8)": "FL0211", "scale(bound = )": "FL0101", "scale)": "FL0102", "exp": "FL0211", "scale(bound = tru)": "FL0201",
    "elementwise(tanhh)": "FL0201", "3": "FL0211", "reverse reverse": "FL0101", "repeat 2 { revers }": "FL0201",
    "affine_coupling(net = [1, 2])": "FL0306",
}  # fmt: skip
TOP = {
    "x = 1": "FL0106", "flow { data x: R[D = 2] }": "FL0106", "net n(x: R[D] { x }": "FL0102", "net n(x: R[D]) { x + }": "FL0101",
    "bijecter n(x: R[D]) { x }": "FL0211", "import nowhere.at.all": "FL0207", "edition 1": "FL0106", "const k =": "FL0101",
    "net n(x: ) { x }": "FL0101", "require 1 == 2": "FL0502", "const k = tanhh": "FL0201", "}": "FL0102",
    "norm n(x: R[D]) { x * missing }": "FL0201", "flow n { data x: R[D = 2] }": "FL0212", "net skip(x: R[D]) { x }": "FL0204",
}  # fmt: skip
# A branch that is not taken is parsed, and not elaborated: `@e`.
ELSE = {t: c for t, c in BODY.items() if c in ("FL0101", "FL0102", "FL0103", "FL0104")}
PLACES = {"@b": BODY, "@e": ELSE, "@c": CHAIN, "@t": TOP}


def plant(seed: int, count: int) -> tuple[str, list[tuple[int, str]]]:
    """The good file with `count` mistakes, each of its own kind, and the (first line, code) of each."""
    r = random.Random(seed)
    lines = GOOD.split("\n")
    places = [k for k, line in enumerate(lines) if line.strip() in PLACES]
    chosen: dict[int, tuple[str, str]] = {}
    used: set[str] = set()
    for k in r.sample(places, count):
        found = PLACES[lines[k].strip()]
        text = r.choice([t for t in found if t not in used])
        used.add(text)
        chosen[k] = (text, found[text])
    out: list[str] = []
    wanted: list[tuple[int, str]] = []
    for k, line in enumerate(lines):
        if k in chosen:
            text, code = chosen[k]
            wanted.append((len(out) + 1, code))
            text = re.sub(r"\bm1\b", f"m{k}", text)  # names of its own: a second binding of one is no mistake
            text = re.sub(r"\bn\b", f"n{k}", text)
            out.extend((line[: len(line) - 2] + text).split("\n"))
        elif k not in places:
            out.append(line)
    return "\n".join(out), wanted


def told(text: str) -> list[Diagnostic]:
    return fl.check(text).errors


def test_the_good_file_is_good() -> None:
    assert told(plant(0, 0)[0]) == []


SINGLE = [(p, t) for p, found in PLACES.items() for t in found]


@pytest.mark.parametrize(("place", "mistake"), SINGLE, ids=[f"{p}: {t}" for p, t in SINGLE])
def test_one_mistake_is_one_error_at_every_place(place: str, mistake: str) -> None:
    lines = GOOD.split("\n")
    places = [k for k, line in enumerate(lines) if line.strip() == place]
    for at in places:
        before = [line for line in lines[:at] if line.strip() not in PLACES]
        after = [line for line in lines[at + 1 :] if line.strip() not in PLACES]
        text = "\n".join([*before, lines[at].replace(place, mistake), *after])
        errors = told(text)
        assert [d.code for d in errors] == [PLACES[place][mistake]], [(str(d.span), d.message) for d in errors]
        (found,) = errors
        assert found.span is not None
        last = len(before) + 1 + mistake.count("\n")
        assert len(before) + 1 <= found.span.line <= last + 1


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_several_mistakes_are_as_many_errors(seed: int, count: int) -> None:
    text, wanted = plant(seed, count)
    errors = told(text)
    found = sorted((d.span.line if d.span else 0, d.code) for d in errors)
    assert len(found) == len(wanted), (text, [(str(d.span), d.code, d.message) for d in errors])
    for (line, code), (wanted_line, wanted_code) in zip(found, sorted(wanted), strict=True):
        assert code == wanted_code
        assert wanted_line <= line <= wanted_line + 3


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_what_is_good_stays(count: int) -> None:
    """The items without a mistake parse as they do alone."""
    text, _ = plant(count, count)
    report = Report()
    found = {i.name: i for i in parse(Source.of("bad", text), report).module.items if isinstance(i, tree.Declaration)}
    whole = {
        i.name: i
        for i in parse(Source.of("good", plant(0, 0)[0]), Report()).module.items
        if isinstance(i, tree.Declaration)
    }
    assert any(found.get(n) == i for n, i in whole.items())


UNCLOSED = [
    ("flow f {\n  data x: R[D = 2]\n  repeat 2 {\n    reverse\n  base normal\n}\n", "}"),
    ("flow f {\n  data x: R[D = 2]\n  base normal\n", "}"),
    ("flow f {\n  data x: R[D = 2]\n  base normal\n\nflow g { data x: R[D = 2];  base normal }\n", "}"),
    ("net n(x: R[D]) {\n  y = exp(x\n  z = log(y)\n  y\n}\n", ")"),
    ("net n(x: R[D]) {\n  y = exp(\n    x\n  y\n}\n", ")"),
    ("net n(x: R[D]) {\n  y = [x, x\n  y\n}\n", "]"),
    ("net n(x: R[D {\n  x\n}\n", "]"),
    ("net n(x: R[D]) {\n  exp(x\n}\n", ")"),
]


@pytest.mark.parametrize(("text", "closer"), UNCLOSED)
def test_a_bracket_left_open_is_one_error(text: str, closer: str) -> None:
    errors = told(text)
    assert [d.code for d in errors] == ["FL0102"]
    assert f"`{closer}`" in errors[0].message
    assert errors[0].labels
