"""Pictures of a flow's chain: Mermaid text and SVG."""

from __future__ import annotations

from html import escape
from typing import Any

from flowlang.compiler import Compilation, chain_rows


def rows_of(comp: Compilation, name: str) -> tuple[str, list[dict[str, Any]], str]:
    region = comp.regions[name]
    count = region.graph[region.inputs[0]].tensor.count
    data = f"data {region.graph[region.inputs[0]].type}"
    base = f"base {region.base.distribution}" if region.base is not None else "base"
    return data, list(chain_rows(comp, region, count)), base


def title(row: dict[str, Any]) -> str:
    text = row["step"] if len(row["step"]) < 48 else row["step"][:45] + "..."
    return f"{text} x{row['count']}" if row["count"] > 1 else text


def detail(row: dict[str, Any]) -> str:
    return f"{row['shape']}, inverse {row['inverse']}, log-det {row['log_det']}"


def mermaid(comp: Compilation, name: str) -> str:
    """A Mermaid flowchart, data at the top and base at the bottom."""
    data, rows, base = rows_of(comp, name)

    def safe(text: str) -> str:
        return text.replace('"', "#quot;").replace("[", "#91;").replace("]", "#93;")

    lines = ["flowchart TD", f'  n0(["{safe(data)}"])']
    for k, row in enumerate(rows, start=1):
        lines.append(f'  n{k}["{safe(title(row))}<br/>{safe(detail(row))}"]')
    lines.append(f'  n{len(rows) + 1}(["{safe(base)}"])')
    lines += [f"  n{k} --> n{k + 1}" for k in range(len(rows) + 1)]
    return "\n".join(lines) + "\n"


def svg(comp: Compilation, name: str) -> str:
    """The same as a drawing that needs no other tool."""
    data, rows, base = rows_of(comp, name)
    boxes = [(data, "", "#e8f0e4"), *((title(r), detail(r), "#eef2f8") for r in rows), (base, "", "#f6ece2")]
    width = max(360, 24 + max(max(7.4 * len(a), 6.2 * len(b)) for a, b, _ in boxes))
    parts: list[str] = []
    y = 16.0
    for k, (head, sub, color) in enumerate(boxes):
        height = 46 if sub else 32
        parts.append(
            f'<rect x="16" y="{y:g}" width="{width:g}" height="{height}" rx="6" fill="{color}" stroke="#8894a8"/>'
        )
        parts.append(f'<text x="28" y="{y + 20:g}" font-size="13">{escape(head)}</text>')
        if sub:
            parts.append(f'<text x="28" y="{y + 37:g}" font-size="11" fill="#51607a">{escape(sub)}</text>')
        y += height
        if k < len(boxes) - 1:
            x = 16 + width / 2
            parts.append(f'<path d="M{x:g} {y:g} v14 m-4 -5 l4 5 l4 -5" fill="none" stroke="#51607a"/>')
            y += 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 32:g}" height="{y + 16:g}" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace">\n<title>{escape(name)}</title>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
