"""What a flow raises when it is called with something that does not fit it."""

from __future__ import annotations

from flowlang.diagnostics import Diagnostic, FlowError


def bad_input(message: str, suggestion: str) -> Exception:
    """FL0702 as an exception."""
    return FlowError(Diagnostic("FL0702", message, suggestion=suggestion))


def no_solution(time: float) -> Exception:
    """What is raised where an adaptive solver's steps become too small to go on."""
    return bad_input(
        f"the differential equation could not be followed beyond t = {time:.4g}: its steps became too small",
        "a field that grows too fast has no solution for all times; wider tolerances may help otherwise",
    )
