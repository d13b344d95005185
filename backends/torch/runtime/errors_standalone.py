"""The same as `errors`, for files that carry their runtime and need torch alone."""

from __future__ import annotations


def bad_input(message: str, suggestion: str) -> Exception:
    """What is raised when an input does not fit the flow."""
    return ValueError(f"{message}; {suggestion}")


def no_solution(time: float) -> Exception:
    """What is raised where an adaptive solver's steps become too small to go on."""
    return bad_input(
        f"the differential equation could not be followed beyond t = {time:.4g}: its steps became too small",
        "a field that grows too fast has no solution for all times; wider tolerances may help otherwise",
    )
