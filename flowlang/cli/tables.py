"""What `flowlang info` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: list[str], rows: list[list[str]], numbers: Sequence[int] = ()) -> str:
    """Columns of text, those of `numbers` aligned to the right."""
    widths = [max(len(r[k]) for r in [head, *rows]) for k in range(len(head))]

    def line(cells: list[str]) -> str:
        shown = [c.rjust(w) if k in numbers else c.ljust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(shown).rstrip()

    lines = [line(r) for r in [head, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def info_text(declarations: list[dict[str, Any]]) -> str:
    blocks: list[str] = []
    for d in declarations:
        head = f"{d['kind']} {d['name']}"
        if "inputs" in d:
            given = f" given {', '.join(d['context'])}" if d["context"] else ""
            head += f": {', '.join(d['inputs'])}{given} -> {', '.join(d['outputs'])}"
        lines = [head]
        facts = []
        if d.get("invertible"):
            facts.append(f"inverse {d['inverse']}, log-det {d['log_det']}, {d['exactness']}")
        if "parameters" in d:
            counts = {"": d["parameters"], "stored": d["stored_parameters"], "free": d["free_parameters"]}
            modes = [f"{n:,} {m}".rstrip() for m, n in counts.items() if not m or n != d["parameters"]]
            extra = f" ({', '.join(modes[1:])})" if modes[1:] else ""
            facts.append(f"{modes[0]} parameters{extra}, {d['flops']:,} FLOPs a sample")
        for key, what in (("parameter_formula", "parameters"), ("flop_formula", "FLOPs")):
            if key in d:
                facts.append(f"{what} = {d[key] or 'no polynomial in the sizes of the data'}")
        if "base" in d:
            facts.append(f"base {d['base']}, {d['steps']} steps")
        lines.extend(f"  {f}" for f in facts)
        if d.get("chain"):
            rows = [
                [r["step"] if len(r["step"]) < 60 else r["step"][:57] + "...", f"x{r['count']}" if r["count"] > 1 else "", r["shape"],
                 r["inverse"], r["log_det"], f"{r['parameters']:,}", f"{r['flops']:,}"]
                for r in d["chain"]
            ]  # fmt: skip
            lines.append("")
            lines.append(table(["step", "", "shape", "inverse", "log-det", "parameters", "FLOPs"], rows, numbers=(5, 6)))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
