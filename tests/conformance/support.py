"""What the tests of LANGUAGE.md share: what a spec is told, and what it computes."""

from __future__ import annotations

from typing import Any

import torch

import flowlang as fl
from flowlang.compiler import compile_source
from flowlang.source import Source


def told(text: str) -> list[str]:
    """Codes with the text they point at, as `FL0201 tanhh`; notes left out."""
    found = compile_source(Source("spec.flow", text)).report
    return [f"{d.code} {d.span.text if d.span else ''}".strip() for d in found if d.severity != "note"]


def codes(text: str) -> list[str]:
    return [t.split()[0] for t in told(text)]


def made(text: str, name: str = "f", **sizes: Any) -> Any:
    return fl.compile(text, flow=name, seed=0, dtype=torch.float64, **sizes)


def value(text: str, *inputs: Any, **sizes: Any) -> Any:
    """The result of the net `f` of a spec."""
    tensors = [torch.as_tensor(i, dtype=torch.float64) for i in inputs]
    with torch.no_grad():
        return made(text, **sizes)(*tensors)


def parameters(text: str, name: str = "f", **sizes: Any) -> int:
    return sum(p.numel() for p in made(text, name, **sizes).parameters())


def same(found: Any, wanted: Any) -> bool:
    return torch.allclose(found, torch.as_tensor(wanted, dtype=torch.float64), atol=1e-12)
