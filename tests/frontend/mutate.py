"""Damaged specs: what a slip of the hand, a bad merge or an adversary makes of a good one. Deterministic by seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests/acceptance/good", "tests/acceptance/bad", "tests/drafts", "specs", "stdlib")

TOKEN = re.compile(r'#[^\n]*|"[^"\n]*"|[^\W\d]\w*\'*|\d[\w.]*|\|>|\.\.|->|:=|==|!=|<=|>=|\n|[ \t]+|.')
SIGNS = [
    "(", ")", "[", "]", "{", "}", ",", ";", ":", ":=", "=", "==", "->", "..", "|>", "|", "~", "?", ".", "+", "-", "*",
    "/", "^", "<", ">=", "!=", "'", "#", "\n",
]  # fmt: skip
WORDS = [
    "if", "else", "for", "in", "until", "repeat", "and", "or", "not", "import", "data", "given", "param", "state",
    "base", "emit", "def", "scan", "reverse", "require", "edition", "tableau", "bijector", "net", "norm", "flow",
    "const", "model", "x", "D", "C", "B", "R", "Positive", "Int", "Simplex", "Invertible", "none", "true", "inf", "exp",
    "log", "sum", "mean", "halves", "join", "mlp", "linear", "conv", "normal", "uniform", "mixture", "inverse",
    "elementwise", "permute", "stack", "where", "present", "shift", "softmax", "rqs", "index", "zeros", "lipschitz",
    "like", "one_of", "ragged", "running", "affine_coupling", "actnorm", "squeeze", "factor_out", "training", "size",
]  # fmt: skip
NUMBERS = [
    "0", "1", "-1", "2", "3", "7", "0.5", "1e-5", "1e300", "1e999", "65", "100000", "99999999999999999999", "1.5x",
]  # fmt: skip
STRANGE = [
    "²", "é", "ﬁ", "Ａ", "\u200b", "\u202e", "\ufeff", "\x00", "\x0b", "\u2028", "\r", "\t", "🙂", "λ", "µ", '"', "\\",
    "@", "%", "&", "!", "$",
]  # fmt: skip


def texts() -> list[str]:
    """The specs that are damaged: acceptance, drafts, shipped specs, and the library item by item."""
    found: list[str] = []
    for file in sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.flow")):
        text = file.read_text("utf-8")
        found.extend(re.split(r"\n\n(?=##)", text) if "stdlib" in file.parts else [text])
    return found


def tokens(text: str) -> list[str]:
    return TOKEN.findall(text)


def _places(parts: Sequence[str]) -> list[int]:
    return [k for k, t in enumerate(parts) if not t.isspace() and not t.startswith("#")] or [0]


def _word(r: random.Random) -> str:
    return r.choice(r.choice([SIGNS, WORDS, WORDS, NUMBERS]))


def token_edit(text: str, r: random.Random) -> str:
    parts = tokens(text) or [""]
    k = r.choice(_places(parts))
    match r.randrange(6):
        case 0:
            del parts[k]
        case 1:
            parts.insert(k, parts[k] + " ")
        case 2:
            j = r.choice(_places(parts))
            parts[k], parts[j] = parts[j], parts[k]
        case 3:
            parts.insert(k, f" {_word(r)} ")
        case 4:
            parts[k] = _word(r)
        case _:
            same = [t for t in parts if t[:1].isalnum() == parts[k][:1].isalnum() and not t.isspace()]
            parts[k] = r.choice(same or [parts[k]])
    return "".join(parts)


def name_edit(text: str, r: random.Random) -> str:
    """One name or number becomes another one: the text still parses, its meaning is damaged."""
    parts = tokens(text)
    places = [k for k, t in enumerate(parts) if re.match(r"\w", t)]
    if not places:
        return text
    k = r.choice(places)
    if parts[k][0].isdigit():
        parts[k] = r.choice(NUMBERS[:-2])
    elif r.random() < 0.5:
        parts[k] = r.choice([t for t in parts if re.match(r"[^\W\d]", t)])
    else:
        parts[k] = r.choice(WORDS[16:])
    return "".join(parts)


def expression_edit(text: str, r: random.Random) -> str:
    """A bracketed group is wrapped, emptied, doubled or moved elsewhere."""
    groups = [m.span() for m in re.finditer(r"\([^()\n]*\)|\[[^\[\]\n]*\]|\{[^{}]*\}", text)]
    if not groups:
        return text
    start, end = r.choice(groups)
    group = text[start:end]
    match r.randrange(5):
        case 0:
            new = group[0] + group[-1]
        case 1:
            new = group * 2
        case 2:
            new = f"{r.choice(WORDS)}({group})"
        case 3:
            a, b = r.choice(groups)
            new = text[a:b]
        case _:
            new = group[1:-1]
    return text[:start] + new + text[end:]


def character_edit(text: str, r: random.Random) -> str:
    k = r.randrange(len(text) + 1)
    match r.randrange(4):
        case 0:
            return text[:k] + text[k + 1 :]
        case 1:
            return text[:k] + text[max(k - 1, 0) : k] + text[k:]
        case 2:
            return text[:k] + r.choice(STRANGE) + text[k:]
        case _:
            return text[:k] + chr(r.randrange(32, 127)) + text[k + 1 :]


def line_edit(text: str, r: random.Random) -> str:
    lines = text.split("\n")
    k, j = r.randrange(len(lines)), r.randrange(len(lines))
    match r.randrange(5):
        case 0:
            del lines[k]
        case 1:
            lines.insert(j, lines[k])
        case 2:
            lines[k], lines[j] = lines[j], lines[k]
        case 3:
            lines[k : k + 2] = [" ".join(lines[k : k + 2])]
        case _:
            lines.insert(
                k,
                r.choice(
                    ["{", "}", "repeat 3 {", "if true {", ")", "base normal", "-x", "x := x", "param w: R[D] = 0"]
                ),
            )
    return "\n".join(lines)


def cut(text: str, r: random.Random) -> str:
    k = r.randrange(len(text) + 1)
    return text[:k] if r.random() < 0.5 else text[k:]


def brackets(text: str, r: random.Random) -> str:
    places = [k for k, c in enumerate(text) if c in "()[]{}"]
    if not places:
        return text
    k = r.choice(places)
    return text[:k] + r.choice(["", "(", ")", "[", "]", "{", "}", "((", "]]"]) + text[k + 1 :]


def splice(text: str, other: str, r: random.Random) -> str:
    """A piece of another spec, cut at line ends, in the middle of this one."""
    lines, others = text.split("\n"), other.split("\n")
    k = r.randrange(len(lines) + 1)
    a = r.randrange(len(others))
    return "\n".join([*lines[:k], *others[a : a + r.randrange(1, 6)], *lines[k:]])


EDITS: list[Callable[[str, random.Random], str]] = [
    token_edit, token_edit, name_edit, name_edit, name_edit, expression_edit, character_edit, line_edit, cut, brackets,
]  # fmt: skip


def mutants(count: int, seed: int) -> Iterator[str]:
    """`count` damaged specs. One to three edits each; most die early, many reach the analyses."""
    sources = texts()
    r = random.Random(seed)
    for _ in range(count):
        text = r.choice(sources)
        if r.random() < 0.1:
            text = splice(text, r.choice(sources), r)
        for _ in range(r.choice([1, 1, 1, 2, 3])):
            text = r.choice(EDITS)(text, r)
        yield text
