"""Specs rewritten as text: other arguments in a call, norms taken out of expressions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowlang.compiler import Compilation
from flowlang.derive.folding import Verdict
from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.elaborate.later import walk
from flowlang.elaborate.types import is_tensor_type
from flowlang.ir.graph import Region
from flowlang.source import Source, Span
from flowlang.syntax import tree
from flowlang.syntax.parser import parse


@dataclass(frozen=True)
class Edit:
    """`text` in the place of what stands from `start` to `end`."""

    start: int
    end: int
    text: str = ""


def edited(span: Span, edits: Iterable[Edit]) -> str:
    """The text of a span with the edits in it, which do not overlap."""
    out, at = [], span.start
    for e in sorted(edits, key=lambda e: (e.start, e.end)):
        if e.start < at or e.end > span.end:
            continue
        out += [span.source.text[at : e.start], e.text]
        at = e.end
    return "".join([*out, span.source.text[at : span.end]])


def declarations(source: Source) -> list[tree.Declaration]:
    return [i for i in parse(source, Report()).module.items if isinstance(i, tree.Declaration)]


def static_names(declaration: tree.Declaration) -> list[str]:
    return [p.name for ps in declaration.parameters for p in ps]


# ---- arguments ----------------------------------------------------------------------------------


def with_arguments(comp: Compilation, name: str, arguments: Mapping[str, str], new: str) -> str:
    """The spec with a net `new` beside `name`: the same one with other static arguments.

    They are those of `name` where its declaration has parameters of these names, else those of the call in it whose
    declaration has them.
    """
    declared = {d.name: d for d in declarations(comp.source)}
    own = declared.get(name)
    region = comp.regions[name]
    if own is not None and set(arguments) <= set(static_names(own)):
        inputs = [region.graph[i] for i in region.inputs]
        head, values = ", ".join(f"{n.label}: {n.tensor}" for n in inputs), ", ".join(str(n.label) for n in inputs)
        results = ", ".join(str(region.graph[o].type) for o in region.outputs)
        given = ", ".join(f"{k} = {v}" for k, v in arguments.items())
        return f"{comp.source.text.rstrip()}\n\nnet {new}({head}) -> {results} {{ {name}({given})({values}) }}\n"
    calls = (
        []
        if own is None
        else [c for c in walk(own) if isinstance(c, tree.Call) and takes(comp, declared, c, arguments)]
    )
    if own is None or own.name_span is None or not calls:
        words = ", ".join(f"`{k}`" for k in arguments)
        raise FlowError(
            Diagnostic("FL0804", f"`{name}` has no parameters {words}, and calls nothing that has them", region.span,
                       suggestion=f"declare them, as in `net {name}({', '.join(f'{k}: ..' for k in arguments)}) (x: ..)`, and hand them on")
        )  # fmt: skip
    applied = {
        id(c.fn) for c in walk(own) if isinstance(c, tree.Call)
    }  # calls whose result is called: all of their values are static
    edits = [
        Edit(own.name_span.start, own.name_span.end, new),
        *(e for c in calls for e in argument_edits(c, called(comp, declared, c), arguments, id(c) in applied)),
    ]
    return f"{comp.source.text.rstrip()}\n\n{edited(own.span, edits)}\n"


def called(comp: Compilation, declared: Mapping[str, tree.Declaration], call: tree.Call) -> tree.Declaration | None:
    """The declaration that a call names: the spec's own, or the library's."""
    fn = call.fn.value if isinstance(call.fn, tree.Brackets) else call.fn
    if not isinstance(fn, tree.Name):
        return None
    if fn.id in declared:
        return declared[fn.id]
    source = comp.elab.library.find(fn.id)
    return next((d for d in declarations(source) if d.name == fn.id), None) if source is not None else None


def takes(
    comp: Compilation, declared: Mapping[str, tree.Declaration], call: tree.Call, arguments: Mapping[str, str]
) -> bool:
    found = called(comp, declared, call)
    return found is not None and set(arguments) <= set(static_names(found))


def argument_edits(
    call: tree.Call, declaration: tree.Declaration | None, arguments: Mapping[str, str], applied: bool
) -> Iterator[Edit]:
    """New values in the places of those given by name or by position; the others are added by name."""
    given = {i.left.id: i for i in call.items if i.eq is not None and isinstance(i.left, tree.Name)}
    values = {name: (item, f"{name} = ") for name, item in given.items()}
    if declaration is not None:
        free = [
            p.name for ps in declaration.parameters for p in ps if not is_tensor_type(p.type) and p.name not in given
        ]
        positions = [
            i for i in call.items if i.eq is None and (applied or isinstance(i.left, tree.Number | tree.ListExpr))
        ]
        values |= {name: (item, "") for name, item in zip(free, positions, strict=False)}
    for name, value in arguments.items():
        if name in values:
            item, word = values[name]
            yield Edit(item.span.start, item.span.end, f"{word}{value}")
    missing = ", ".join(f"{k} = {v}" for k, v in arguments.items() if k not in values)
    if missing:
        at = call.span.end - 1
        yield Edit(at, at, f", {missing}" if call.items else missing)


# ---- norms --------------------------------------------------------------------------------------

REPLACED = ("bias", "weight", "start")  # what the new weights make idle


def without_norms(comp: Compilation, name: str, verdicts: Sequence[Verdict]) -> str:
    """The spec with the norms that folded taken out of `name` and of what it calls; library entries on the way are copied."""
    folded = [v for v in verdicts if v.folds and v.span is not None and v.linear is not None]
    kept = {(id(v.span.source), v.span.start) for v in verdicts if not v.folds and v.span is not None}
    edits: dict[Source, set[Edit]] = {}
    for v in folded:
        assert v.span is not None
        assert v.linear is not None
        if (id(v.span.source), v.span.start) in kept or v.span.source is not v.linear.source:
            raise refused(v, "it folds in one use of this text and not in another")
        edits.setdefault(v.span.source, set()).update(norm_edits(v))
    copied: dict[str, str] = {}
    needed = [(s, d) for s, d in on_the_way(comp.regions[name], edits)]
    for source, d in needed:
        if source.library:
            copied[d.name] = edited(d.span, edits.get(source, ()))
    whole = edited(Span(comp.source, 0, len(comp.source.text)), edits.get(comp.source, ()))
    others = [s for s, _ in needed if not s.library and s is not comp.source]
    if others:
        raise FlowError(Diagnostic("FL0902", f"norms in the imported file `{others[0].name}` cannot be taken out yet",
                                   suggestion="put the networks into one file"))  # fmt: skip
    return "\n\n".join([whole.rstrip(), *copied.values()]) + "\n"


def refused(v: Verdict, reason: str) -> FlowError:
    return FlowError(Diagnostic("FL0412", f"`{v.name}` cannot be taken out of the text: {reason}", v.span,
                                suggestion="`fl.compile(.., fold=True)` folds the graph, whatever the text"))  # fmt: skip


def norm_edits(v: Verdict) -> Iterator[Edit]:
    assert v.span is not None
    assert v.linear is not None
    at: dict[tuple[int, int], tree.Call | tree.Binary] = {}
    for d in declarations(v.span.source):
        if d.span.start <= v.span.start < d.span.end:
            for node in walk(d):
                if isinstance(node, tree.Call | tree.Binary):
                    at.setdefault((node.span.start, node.span.end), node)
    call, line = at.get((v.span.start, v.span.end)), at.get((v.linear.start, v.linear.end))
    inner: tree.Expr | None = None
    if isinstance(call, tree.Call) and len(call.items) == 1:
        inner = call.items[0].left
    elif isinstance(call, tree.Binary) and call.op == "|>":
        inner = call.left
    if inner is None or not isinstance(line, tree.Call):
        raise refused(v, "its text is no call")
    plain = isinstance(inner, tree.Name | tree.Call | tree.Brackets | tree.Paren)
    yield Edit(v.span.start, inner.span.start, "" if plain else "(")
    yield Edit(inner.span.end, v.span.end, "" if plain else ")")
    for before, item in zip(line.items, line.items[1:], strict=False):
        if isinstance(item.left, tree.Name) and item.eq is not None and item.left.id in REPLACED:
            yield Edit(before.span.end, item.span.end)


def on_the_way(root: Region, edits: Mapping[Source, Any]) -> list[tuple[Source, tree.Declaration]]:
    """The declarations with an edit, and those that call them, callees first."""
    known: dict[Source, list[tree.Declaration]] = {}
    out: dict[tuple[str, str], tuple[Source, tree.Declaration]] = {}
    changed: dict[int, bool] = {}
    for r in root.walk():
        if r.span is None:
            continue
        source = r.span.source
        ds = known.setdefault(source, declarations(source))
        d = next((d for d in ds if d.span.start <= r.span.start < d.span.end), None)
        own = d is not None and any(d.span.start <= e.start < d.span.end for e in edits.get(source, ()))
        changed[id(r)] = own or any(changed.get(id(c.region), False) for c in r.children.values())
        if changed[id(r)] and d is not None:
            out.setdefault((source.name, d.name), (source, d))
    return list(out.values())


__all__ = ["with_arguments", "without_norms"]
