"""What users of Python and PyTorch write out of habit, and what the language has instead."""

from __future__ import annotations

from typing import Any

BRACES = "a body stands in braces: `{ .. }`, without a colon"
NET = "declare a network: `net f(x: R[D]) { .. }`; `def` stands inside a body"
LIBRARY = "functions and networks have no module in front: `tanh(x)`, `linear[D -> E = 4](x)`; `flowlang std` lists the library"

# Names that stand for nothing here.
NAMES = {
    "range": "write `for i in 0..n { .. }`, or `0..n` in a list", "len": "give the length a name, or take a size: `x.D`",
    "print": "a spec has no output: compile it and run the module, or read `flowlang info`", "enumerate": "write `for i in 0..n { .. }`",
    "self": "names of a body need no `self`; parameters are declared, as in `param b: R[D] = 0`", "pass": "an empty body has no value; return the input, as in `{ x }`",
    "torch": LIBRARY, "nn": LIBRARY, "F": LIBRARY, "np": LIBRARY, "numpy": LIBRARY, "math": LIBRARY, "jnp": LIBRARY,
    "float": "the type is `real`", "str": "the type is `text`", "list": "a list's type is written `[int]` or `[real]`",
    "Tensor": "a tensor's type names its axes, as in `R[T, D]`", "dict": "use several parameters", "tuple": "a list's type is written `[int]`",
    "def": NET, "class": NET, "function": NET, "fn": NET, "module": NET, "layer": NET,
    "break": "choose by `where(c, a, b)`; loops run to their end", "continue": "choose by `where(c, a, b)`; loops run to their end",
    "dim": "name the axes in brackets, as in `mean[D](x)`", "axis": "name the axes in brackets, as in `mean[D](x)`",
    "keepdim": "leave it out: values align by the names of their axes", "keepdims": "leave it out: values align by the names of their axes",
    "inplace": "leave it out: `y := f(y)` gives a name a new value", "unbiased": "write `ddof = 1`", "correction": "write `ddof = 1`",
    "in_features": "sizes come from the value and the brackets, as in `linear[D -> E = 4](x)`",
    "out_features": "sizes come from the value and the brackets, as in `linear[D -> E = 4](x)`",
    "shape": "`x.D` is the size along D", "size": "`x.D` is the size along D", "matmul": "write `sum[D](a * b)`", "mm": "write `sum[D](a * b)`",
    "einsum": "write `sum[D](a * b)`: axes align by name", "cat": "write `join[D](a, b)`", "concat": "write `join[D](a, b)`",
    "view": "use brackets: `x[D -> (h = 4, d)]` splits, `x[(h, d) -> D]` merges", "transpose": "axes have names: no order is needed",
    "reshape": "use brackets: `x[D -> (h = 4, d)]` splits, `x[(h, d) -> D]` merges", "flatten": "use brackets: `x[(C, H, W) -> D]` merges",
    "unsqueeze": "leave it out: values align by the names of their axes", "squeeze_": "leave it out: values align by the names of their axes",
    "detach": "write `stop(x)`", "chunk": "use `halves[D](x)`, or split: `x[D -> (k = 2, D)]`", "pow": "write `x ^ 2`",
}  # fmt: skip
# Words before a value or a name that do not parse.
BEFORE = {
    "return": "the last expression of a body is its value: leave `return` out", "yield": "the last expression of a body is its value",
    "lambda": "write a local function: `def g(a) { a * 2 }`", "let": "write `name = value`", "var": "write `name = value`", "const": "write `name = value`",
    "assert": "write `require ..`, which is checked while compiling", "while": "write `repeat n { .. }` or `for i in 0..n { .. }`",
    "del": "leave it out", "global": "leave it out", "with": "leave it out", "raise": "write `require ..`",
    "try": "leave it out: what can fail is found by `flowlang check`", "from": "write `import nets.mine (f)` for a spec beside this one; the library needs no import",
    "def": NET, "class": NET, "function": NET, "self": NAMES["self"],
}  # fmt: skip
GIVEN = "a context stands on a line of its own in a flow, `given c: R[C = 3]`, and behind the inputs elsewhere, `(x: R[D] given c: R[C])`"
# First words of statements of other languages.
FIRST = {"context": GIVEN, "cond": GIVEN, "condition": GIVEN, "conditional": GIVEN}
FAILING = {"elif": "write `else if`", "is": "write `==`, or `present(c)` for an optional value"}
FOREIGN = {"torch", "numpy", "math", "jax", "functools", "typing", "einops"}


def advice(tokens: list[Any], k: int) -> str | None:
    """What to write where the token `k` of a statement or declaration does not parse, if it is a known habit."""
    token = tokens[k] if k < len(tokens) else None
    last = tokens[k - 1] if k else None
    first = str(tokens[0]) if tokens else ""
    text, before = str(token) if token is not None else "", str(last) if last is not None else ""
    touching = token is not None and last is not None and last.end_pos == token.start_pos
    if first in ("from", "class", "def", "function") and getattr(tokens[0], "type", "") != "DEF":
        return BEFORE[first]
    if before in BEFORE and last is not None and last.type in ("NAME", "KIND"):
        return BEFORE[before]
    if first in FIRST and k == 1 and token is not None and token.type == "NAME":
        return FIRST[first]
    if first == "data" and text == "|":
        return GIVEN
    if touching and text == "=" and before in "+-*/":
        name = str(tokens[k - 2]) if k > 1 else "y"
        return f"write `{name} := {name} {before} ..`"
    if touching and text == before == "*":
        return "a power is written `x ^ 2`"
    if touching and text == before == "/":
        return "write `floor(a / b)`; a comment begins with `#`"
    if text == "." and before == "..":
        return "`..` stands for the axes that remain; an index names its axis, as in `x[D = 0]`"
    if text in FAILING:
        return FAILING[text]
    if text == "if" and before != "else" and k:
        return "`where(c, a, b)` chooses between values, and `if c { .. } else { .. }` stands around statements"
    if text == ":":
        open_ = sum(str(t) == "[" for t in tokens[:k]) - sum(str(t) == "]" for t in tokens[:k])
        return "a range is written `a..b`, and names its axis: `x[D = 0..2]`" if open_ > 0 else BRACES
    if token is not None and token.type == "STRING" and before == '""':
        return "lines that begin with `##` above a declaration document it"
    return None
