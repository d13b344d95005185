"""Velocity fields: a note where nothing shows that their solutions exist for all times."""

from __future__ import annotations

from flowlang.analysis.growth import Fields
from flowlang.derive.explain import shown
from flowlang.diagnostics import Diagnostic, Label, Report
from flowlang.ir.graph import Region


def check_fields(root: Region, report: Report) -> None:
    """Warns of each field below a region that may leave every bound in finite time."""
    fields = Fields()
    for region in root.walk():
        for node in region.graph:
            if node.op != "integrate":
                continue
            found = fields.loses(node.attrs["region"])
            if found is None:
                continue
            here = node.span is not None and not node.span.source.library
            span = node.span if here else root.span
            inside = found.span is not None and not found.span.source.library
            report.add(
                Diagnostic(
                    "FL0605", f"nothing shows that this field's solutions exist for all times: `{shown(found.op)}` may grow faster than its argument",
                    found.span if inside else span, "warning",
                    labels=(Label(span, "integrated here"),) if inside and span is not None and here else (),
                    suggestion="use functions of bounded slope, such as `tanh` or `softplus`, and products with what is bounded",
                )
            )  # fmt: skip
