"""Texts that would eat a machine: each a function, so that nobody holds them all."""

from __future__ import annotations

from collections.abc import Callable

FLOW = "flow f {{\n  data x: R[D = 2]\n  {}\n  base normal\n}}\n"


def flow(step: str, before: str = "") -> str:
    return before + FLOW.format(step)


def nested_repeats(depth: int) -> str:
    return "repeat 10 { " * depth + "reverse" + " }" * depth


def doubling(levels: int, kind: str) -> str:
    """Each declaration uses the one before twice: 2^levels copies if they were written out."""
    if kind == "chain":
        first = "bijector b0 { reverse }\n"
        rest = "".join(f"bijector b{k} {{ b{k - 1}\n  b{k - 1} }}\n" for k in range(1, levels))
    else:  # other arguments at every level, so that no two instances are equal
        first = "bijector b0(s: int) (x: R[D]) { x + s }\n"
        rest = "".join(
            f"bijector b{k}(s: int) {{ b{k - 1}(2 * s)\n  b{k - 1}(2 * s + 1) }}\n" for k in range(1, levels)
        )
    return first + rest


def nested_declarations(levels: int, body: str, *, backwards: bool = False) -> str:
    """Each declaration uses the one before; `backwards`, the first in the text uses the second."""
    lines = ["bijector b0 { reverse }\n"]
    lines += [f"bijector b{k} {body.replace('BEFORE', f'b{k - 1}')}\n" for k in range(1, levels)]
    return "".join(lines[::-1] if backwards else lines)


BOMBS: dict[str, Callable[[], str]] = {
    "repeat": lambda: flow("repeat 100000000000 { reverse }"),
    "nested repeats": lambda: flow(nested_repeats(12)),
    "steps written out": lambda: flow("for i in 0..90000 { affine_coupling(net = mlp(8)) }"),
    "recursion": lambda: flow("a", "bijector a { a }\n"),
    "mutual recursion": lambda: flow("a", "bijector a { b }\nbijector b { c }\nbijector c { a }\n"),
    "recursion through a parameter": lambda: flow("a(f = a)", "bijector a(f: bijector) { f(f = f) }\n"),
    "recursion that grows": lambda: flow("a(1)", "bijector a(n: int) { a(n + 1) }\n"),
    "recursive net": lambda: (
        "net n(x: R[D]) -> R[D] { n(x) }\nflow f { data x: R[D = 2];  affine_coupling(net = n);  base normal }\n"
    ),
    "recursive const": lambda: "const a = b + 1\nconst b = a + 1\nflow f { data x: R[D = a];  base normal }\n",
    "recursive def": lambda: "net n(x: R[D]) {\n  def g(a) { g(a + 1) }\n  g(x)\n}\n",
    "doubling local functions": lambda: (
        "net n(x: R[D]) {\n  def g0(a) { a + 1 }\n"
        + "".join(f"  def g{k}(a) {{ g{k - 1}(g{k - 1}(a)) }}\n" for k in range(1, 40))
        + "  g39(x)\n}\n"
    ),
    "giant number": lambda: f"const a = {'9' * 100_000}\n",
    "giant power": lambda: "const a = 9 ^ 9 ^ 9 ^ 9\n",
    "giant shift of powers": lambda: "const a = ((2 ^ 62) ^ 62) ^ 62\n",
    "10^12 parameters": lambda: "net n(x: R[D]) {\n  param w: R[H = 1000000, K = 1000000] = 0\n  x\n}\n",
    "10^12 parameters in a layer": lambda: flow("affine_coupling(net = mlp(1000000, 1000000))"),
    "axis beyond 2^31": lambda: "flow f { data x: R[D = 99999999999];  base normal }\n",
    "huge axis with masks": lambda: "flow f { data x: R[D = 2000000000];  affine_autoregressive;  base normal }\n",
    "huge axis permuted": lambda: "flow f { data x: R[D = 2000000000];  permute(seed = 1);  base normal }\n",
    "comprehension": lambda: "const a = [i for i in 0..1000000000]\n",
    "nested comprehensions": lambda: "const a = [[[i * j for i in 0..90000] for j in 0..90000] for k in 0..90000]\n",
    "doubling lists": lambda: "net n(x: R[D]) {\n  a = [1, 2]\n" + "  a := a + a\n" * 60 + "  x\n}\n",
    "doubling lists in a loop": lambda: "net n(x: R[D]) {\n  a = [1, 2]\n  repeat 60 { a := a + a }\n  x\n}\n",
    "for without end": lambda: "net n(x: R[D]) {\n  for i in 0..99999999 { y = x + i }\n  x\n}\n",
    "nested fors": lambda: (
        "net n(x: R[D]) {\n  y = x\n  for i in 0..1000 { for j in 0..1000 { y := y + exp(x) } }\n  y\n}\n"
    ),
    "doubling distinct regions": lambda: doubling(30, "distinct") + flow("b29(1)"),
    "deep brackets": lambda: "const a = " + "(" * 100_000 + ")" * 100_000 + "\n",
    "megabytes of brackets": lambda: "[" * 3_000_000,
    "a megabyte of brackets": lambda: "flow f {\n" + "(" * 1_000_000,
    "a megabyte of closing brackets": lambda: ")" * 1_000_000,
    "megabytes of words": lambda: "const a = 1\n" * 160_000,
    "a long sum": lambda: "const a = 1" + " + 1" * 100_000 + "\n",
    "many blocks": lambda: "net n(x: R[D]) " + "{ if true " * 5_000 + "{ x }" + "}" * 5_000,
    "many axes": lambda: f"flow f {{ data x: R[{', '.join(f'A{k} = 2' for k in range(5000))}];  base normal }}\n",
    "many parameters": lambda: f"net n({', '.join(f'p{k}: R[D]' for k in range(60_000))}) {{ p0 }}\n" * 2,
    "deep declarations": lambda: nested_declarations(3000, "{ BEFORE }") + flow("b2999"),
    "deep declarations that nothing uses": lambda: nested_declarations(3000, "{ BEFORE }"),
    "deep declarations from the top": lambda: nested_declarations(3000, "{ BEFORE }", backwards=True),
    "inverses of inverses": lambda: flow("b99") + nested_declarations(100, "{ inverse(BEFORE) }"),
    "inverses and what they undo": lambda: flow("b99") + nested_declarations(100, "{ inverse(BEFORE)\n  BEFORE }"),
    "brackets in deep declarations": lambda: (
        flow("b59") + nested_declarations(60, "(x: R[D]) { " + "-(" * 40 + "BEFORE(x)" + ")" * 40 + " }")
    ),
    "for in what nothing uses": lambda: "bijector b {\n  for i in 0..3000 { reverse }\n}\n",
    "deep aliases": lambda: (
        "const z = a4999\nconst a0 = 1\n" + "".join(f"const a{k} = a{k - 1} + 1\n" for k in range(1, 5000))
    ),
}
