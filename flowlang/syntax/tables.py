"""The Lark parser: built from the grammar, or loaded from the tables that ship with it.

Building the tables costs some tens of milliseconds, which every `flowlang check` would pay. So they are kept in
`grammar/tables.json` beside the grammar, as plain data (Lark's own cache is a pickle in a folder that
others may write to). A grammar or a Lark that differs from what the tables were made from is noticed, and they
are built anew. `make tables` writes the file; a test checks that it is fresh.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from typing import Any

SHIFT = 0  # in Lark's serialised actions
STARTS = ("file", "item", "statement", "row", "expr")


class Token(str):
    """A terminal and where it stands. The parser needs no more of Lark's own token."""

    __slots__ = ("end_pos", "start_pos", "type")
    type: str
    start_pos: int
    end_pos: int

    def __new__(cls, type: str, value: str, start_pos: int, end_pos: int) -> Token:
        made = super().__new__(cls, value)
        made.type, made.start_pos, made.end_pos = type, start_pos, end_pos
        return made

    def update(self, type: str | None = None, value: str | None = None) -> Token:
        return Token(type or self.type, str(self) if value is None else value, self.start_pos, self.end_pos)


class Node:
    """A parse-tree node that knows where it starts and ends."""

    __slots__ = ("children", "data", "end", "start")

    def __init__(self, data: Any, children: list[Any], meta: Any = None):
        self.data = str(data)
        self.children = children
        self.start = self.end = -1
        for c in children:
            if c is not None:
                first = c.start if isinstance(c, Node) else c.start_pos
                if first >= 0:
                    self.start = first
                    break
        for c in reversed(children):
            if c is not None:
                last = c.end if isinstance(c, Node) else c.end_pos
                if last >= 0:
                    self.end = last
                    break


class _Keep:
    """Keeps terminals that no rule uses; decisions come later, in `lexing.shape`."""

    always_accept = ("COMMENT", "NEWLINE", "BADNUMBER", "BAD", "SEMICOLON")

    def process(self, stream: Any) -> Any:
        return stream


def grammar_text() -> str:
    return resources.files("flowlang.grammar").joinpath("flowlang.lark").read_text("utf-8")


def build(*, strict: bool = False) -> Any:
    """The parser made from the grammar. `strict` refuses every conflict and collision (needs `interegular`)."""
    from lark import Lark

    return Lark(
        grammar_text(), parser="lalr", lexer="basic", postlex=_Keep(), tree_class=Node, keep_all_tokens=True,
        maybe_placeholders=True, start=list(STARTS), strict=strict,
    )  # fmt: skip


def fingerprint() -> str:
    import lark

    return hashlib.sha256(f"{lark.__version__}\n{grammar_text()}".encode()).hexdigest()


def _ordered(table: dict[str, Any]) -> dict[str, Any]:
    """The same parse table, its states numbered and its symbols sorted in one way (Lark's order follows sets)."""
    symbols = sorted(table["tokens"].values())
    number = {s: k for k, s in enumerate(symbols)}
    rows = {
        state: sorted(((number[table["tokens"][k]], action) for k, action in actions.items()), key=lambda row: row[0])
        for state, actions in table["states"].items()
    }
    order = dict.fromkeys(table["start_states"][s] for s in STARTS)
    queue = list(order)
    for state in queue:  # grows while it is walked
        for _, (action, target) in rows[state]:
            if action == SHIFT and target not in order:
                order[target] = None
                queue.append(target)
    place = {state: k for k, state in enumerate(order)}
    return {
        "tokens": dict(enumerate(symbols)),
        "states": {
            place[state]: {k: (a, place[t] if a == SHIFT else t) for k, (a, t) in rows[state]} for state in order
        },
        "start_states": {s: place[table["start_states"][s]] for s in STARTS},
        "end_states": {s: place[table["end_states"][s]] for s in STARTS},
    }


def dump() -> str:
    """The tables as JSON: the same bytes for the same grammar and Lark."""
    from lark.grammar import Rule
    from lark.lexer import TerminalDef

    data, memo = build().memo_serialize([TerminalDef, Rule])
    # What only a running program can hold is given again on loading.
    data["parser"]["parser"] = _ordered(data["parser"]["parser"])
    data["options"] = {k: v for k, v in data["options"].items() if isinstance(v, str | int | list)}
    head = json.dumps({"fingerprint": fingerprint()})
    rules = json.dumps({"data": data, "memo": memo}, separators=(",", ":"), ensure_ascii=True)
    return f"[{head},\n{rules}]\n"


def _numbers(found: dict[str, Any]) -> dict[Any, Any]:
    """JSON turns whole-number keys into text; here they become numbers again."""
    return {int(k): v for k, v in found.items()} if found and all(k.isdigit() for k in found) else found


def load(text: str) -> Any | None:
    """The parser from `dump`'s text; None where it was made from another grammar or by another Lark."""
    from lark import Lark

    head, _, rest = text[1:].partition(",\n")
    if json.loads(head)["fingerprint"] != fingerprint():
        return None
    tables = json.loads(rest.rstrip()[:-1], object_hook=_numbers)
    return Lark._load_from_dict(tables["data"], tables["memo"], postlex=_Keep(), tree_class=Node)


@lru_cache(maxsize=1)
def engine() -> Any:
    """The parser of this process."""
    tables = resources.files("flowlang.grammar").joinpath("tables.json")
    found = load(tables.read_text("utf-8")) if tables.is_file() else None
    return found if found is not None else build()


@lru_cache(maxsize=1)
def _scanner() -> tuple[re.Pattern[str], frozenset[str]]:
    """All terminals as one pattern, in the order in which Lark tries them."""
    terminals = sorted(
        engine().lexer_conf.terminals,
        key=lambda t: (-t.priority, -t.pattern.max_width, -len(t.pattern.value), t.name),
    )
    pattern = "|".join(f"(?P<{t.name}>{t.pattern.to_regexp()})" for t in terminals)
    return re.compile(pattern), frozenset(engine().lexer_conf.ignore)


def scan(text: str) -> Iterator[Token]:
    """The raw tokens of a text. Every character belongs to one: what fits nowhere is `BAD`."""
    pattern, ignored = _scanner()
    for found in pattern.finditer(text):
        kind = found.lastgroup
        if kind is not None and kind not in ignored:
            yield Token(kind, found.group(), found.start(), found.end())
