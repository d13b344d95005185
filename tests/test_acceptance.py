"""The acceptance specs: what `check` and `info` must say of each, as its header states (see tests/acceptance)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import flowlang as fl
from flowlang.api import analyse
from flowlang.diagnostics import Diagnostic
from flowlang.diagnostics.render import to_json
from flowlang.verify import verify

FOLDER = Path(__file__).parent / "acceptance"
GOOD = sorted((FOLDER / "good").glob("*.flow"))
BAD = sorted((FOLDER / "bad").glob("*.flow"))


def says(diagnostic: Diagnostic, alternative: str) -> bool:
    found = to_json(diagnostic)
    text = " ".join([found["message"], *found["notes"], found["suggestion"] or ""])
    if alternative.startswith("`") or alternative.isdigit():
        return re.search(rf"(?<!\w){re.escape(alternative.strip('`'))}(?!\w)", text) is not None
    return alternative.lower() in text.lower()


@pytest.mark.parametrize("spec", BAD, ids=lambda p: p.stem)
def test_bad_spec_is_refused_as_its_header_says(spec: Path) -> None:
    wanted = [
        ({int(n) for n in m[1].split("|")}, [w.strip() for w in m[2].split(";") if w.strip()])
        for m in re.finditer(r"#\s*expect error line ([\d|]+):\s*(.*)", spec.read_text("utf-8"))
    ]
    errors = fl.check(spec).errors
    assert len(errors) == len(wanted) > 0
    for lines, words in wanted:
        assert any(
            to_json(d)["line"] in lines and all(any(says(d, a.strip()) for a in w.split("|")) for w in words)
            for d in errors
        ), f"line {lines} {words}: {[(to_json(d)['line'], d.message) for d in errors]}"


@pytest.mark.parametrize("spec", GOOD, ids=lambda p: p.stem)
def test_good_spec_is_reported_as_its_header_says(spec: Path) -> None:
    header = re.search(r"#\s*expect:\s*(.*)", spec.read_text("utf-8"))
    assert header is not None
    wanted = dict(w.strip().split(" ", 1) for w in header[1].split(";") if w.strip())
    said = {d["name"]: d for d in fl.info(spec)}
    entry = said.get(wanted.pop("of", "")) or next(d for d in said.values() if d["kind"] == "flow")
    for key, value in wanted.items():
        if key != "export":
            assert str(entry.get(key)).lower() in [a.strip().lower() for a in value.split("|")], key


@pytest.mark.parametrize("spec", GOOD, ids=lambda p: p.stem)
def test_good_spec_verifies_and_trains_a_step(spec: Path) -> None:
    comp = analyse(spec, sized=True)
    for name in comp.flows():
        failed = [c for c in verify(comp, name) if not c.ok]
        assert not failed
        flow = fl.compile(spec, flow=name, seed=0)
        x = flow.sample((16,), generator=torch.Generator().manual_seed(0)).detach() if not flow.given_shapes else None
        if x is None:
            given = {k: torch.zeros(16, *s) for k, s in flow.given_shapes.items()}
            x = flow.sample((16,), generator=torch.Generator().manual_seed(0), **given).detach()
        else:
            given = {}
        optimizer = torch.optim.SGD(flow.parameters(), lr=1e-3)
        before = -flow.log_prob(x, **given).mean()
        before.backward()
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in flow.parameters())
        assert torch.isfinite(-flow.log_prob(x, **given).mean())
