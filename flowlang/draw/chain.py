"""Pictures of a flow's chain: Mermaid text and SVG. Data on top, base below; a repeated block stands in a frame."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from flowlang.compiler import Compilation, bases, chain_rows

WIDEST = 56  # characters of a step's text
COLORS = {"O(1)": "#3f8f5f", "O(D)": "#33659b", "O(D²)": "#8a6d1d", "O(D³)": "#a8481f"}
OTHER = "#7a4a9c"  # estimators and integrals
FONT = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class Block:
    """Steps that follow each other `count` times."""

    count: int
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Chain:
    """What is drawn of a flow."""

    data: str
    given: tuple[str, ...]
    blocks: list[Block]
    base: str


def chain_of(comp: Compilation, name: str) -> Chain:
    region = comp.regions[name]
    count = sum(t.count for t in region.input_types())
    blocks: list[Block] = []
    for row in chain_rows(comp, region, count):
        if blocks and blocks[-1].count == row["count"]:
            blocks[-1].rows.append(row)
        else:
            blocks.append(Block(row["count"], [row]))
    given = tuple(f"{region.graph[c].label}: {region.graph[c].type}" for c in region.context)
    base = f"base {', '.join(str(law) for law in bases(region))}" if region.base is not None else "base"
    return Chain(f"data {', '.join(map(str, region.input_types()))}", given, blocks, base)


def shortened(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 2] + ".."


def details(row: dict[str, Any]) -> str:
    size = f"{row['parameters']:,} parameters" if row["parameters"] else ""
    return ", ".join(x for x in (row["shape"], f"inverse {row['inverse']}", f"log-det {row['log_det']}", size) if x)


# ---- Mermaid --------------------------------------------------------------------------------------


def safe(text: str) -> str:
    """Text for a quoted Mermaid label: its own marks as entities."""
    return "".join(f"#{ord(c)};" if c in '"#&<>[]{}|`' else c for c in text)


def mermaid(comp: Compilation, name: str) -> str:
    """A Mermaid flowchart; GitHub and most Markdown viewers draw it."""
    chain = chain_of(comp, name)
    lines = ["flowchart TD", f'  data(["{safe(chain.data)}"])']
    last, number = "data", 0
    edges: list[str] = []
    for k, block in enumerate(chain.blocks, start=1):
        indent = "  "
        if block.count > 1:
            lines.append(f'  subgraph b{k}["repeat {block.count}"]')
            indent = "    "
        for row in block.rows:
            number += 1
            lines.append(f'{indent}s{number}["{safe(shortened(row["step"]))}<br/>{safe(details(row))}"]')
            edges.append(f"  {last} --> s{number}")
            last = f"s{number}"
        if block.count > 1:
            lines.append("  end")
    lines.append(f'  base(["{safe(chain.base)}"])')
    edges.append(f"  {last} --> base")
    for k, given in enumerate(chain.given, start=1):
        lines.append(f'  given{k}[/"given {safe(given)}"/]')
    return "\n".join([*lines, *edges]) + "\n"


# ---- SVG ------------------------------------------------------------------------------------------

HEAD, SUB = 13, 11  # font sizes; a character of a monospace font is about 0.602 of its size wide
CHARACTER = 0.602
BOX, SMALL, GAP, PAD, MARGIN = 48, 34, 18, 14, 18


def width_of(text: str, size: int) -> float:
    return len(text) * size * CHARACTER


class Drawing:
    """Collects shapes from top to bottom."""

    def __init__(self, width: float):
        self.width, self.y = width, float(MARGIN)
        self.shapes: list[str] = []
        self.center = MARGIN + PAD + width / 2

    def text(self, x: float, y: float, size: int, color: str, text: str, anchor: str = "start") -> None:
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def end(self, text: str, fill: str) -> None:
        """A rounded box for data or base."""
        w = width_of(text, HEAD) + 36
        self.shapes.append(
            f'<rect x="{self.center - w / 2:g}" y="{self.y:g}" width="{w:g}" height="{SMALL}" rx="17" fill="{fill}" stroke="#5a6472"/>'
        )
        self.text(self.center, self.y + 22, HEAD, "#1d2530", text, "middle")
        self.y += SMALL

    def step(self, row: dict[str, Any]) -> None:
        x = MARGIN + PAD
        color = COLORS.get(row["log_det"], OTHER)
        self.shapes.append(
            f'<rect x="{x:g}" y="{self.y:g}" width="{self.width:g}" height="{BOX}" rx="5" fill="#ffffff" stroke="#b4bcc8"/>'
        )
        self.shapes.append(f'<rect x="{x:g}" y="{self.y:g}" width="5" height="{BOX}" rx="2" fill="{color}"/>')
        self.text(x + 18, self.y + 20, HEAD, "#1d2530", shortened(row["step"]))
        self.text(x + 18, self.y + 38, SUB, "#56606e", details(row))
        self.y += BOX

    def arrow(self) -> None:
        x, y = self.center, self.y
        self.shapes.append(f'<path d="M{x:g} {y + 2:g} V{y + GAP - 3:g}" stroke="#5a6472" fill="none"/>')
        self.shapes.append(f'<path d="M{x - 4:g} {y + GAP - 7:g} l4 6 l4 -6 z" fill="#5a6472"/>')
        self.y += GAP

    def frame(self, top: float, count: int) -> None:
        """Around a repeated block; goes below what it frames."""
        shape = (
            f'<rect x="{MARGIN:g}" y="{top:g}" width="{self.width + 2 * PAD:g}" height="{self.y - top:g}" rx="8" '
            f'fill="#eef1f6" stroke="#c3cad6" stroke-dasharray="4 3"/>'
        )
        self.shapes.insert(0, shape)
        self.text(MARGIN + self.width + 2 * PAD - 8, top + 15, SUB, "#56606e", f"repeat {count}", "end")


def svg(comp: Compilation, name: str) -> str:
    """The same as a drawing that needs no other tool. The bar at the left of a step tells its log-det's cost."""
    chain = chain_of(comp, name)
    rows = [r for b in chain.blocks for r in b.rows]
    widths = [max(width_of(shortened(r["step"]), HEAD), width_of(details(r), SUB)) + 36 for r in rows]
    given = f"given {', '.join(chain.given)}" if chain.given else ""
    drawing = Drawing(max([320.0, *widths, width_of(given, SUB)]))
    drawing.end(chain.data, "#e4efe6")
    if given:
        drawing.y += 16
        drawing.text(drawing.center, drawing.y, SUB, "#56606e", given, "middle")
    for block in chain.blocks:
        drawing.arrow()
        top = drawing.y
        if block.count > 1:
            drawing.y += 22
        for k, row in enumerate(block.rows):
            if k:
                drawing.arrow()
            drawing.step(row)
        if block.count > 1:
            drawing.y += 12
            drawing.frame(top, block.count)
    drawing.arrow()
    drawing.end(chain.base, "#f5e9dc")
    drawing.y += 22
    x = float(MARGIN + PAD)
    for cost in dict.fromkeys(r["log_det"] for r in rows):
        drawing.shapes.append(
            f'<rect x="{x:g}" y="{drawing.y - 9:g}" width="5" height="11" rx="2" fill="{COLORS.get(cost, OTHER)}"/>'
        )
        drawing.text(x + 11, drawing.y, SUB, "#56606e", f"log-det {cost}")
        x += width_of(f"log-det {cost}", SUB) + 30
    w, h = drawing.width + 2 * (PAD + MARGIN), drawing.y + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w:g}" height="{h:g}" viewBox="0 0 {w:g} {h:g}" '
        f'font-family="{escape(FONT, quote=True)}">\n<title>{escape(name)}</title>\n'
        f'<rect width="{w:g}" height="{h:g}" fill="#fbfcfd"/>\n' + "\n".join(drawing.shapes) + "\n</svg>\n"
    )
