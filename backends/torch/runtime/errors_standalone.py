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


def too_many_steps(most: int, time: float) -> Exception:
    """What is raised where an adaptive solver reaches its limit of steps."""
    return bad_input(
        f"the differential equation took {most} steps and came to t = {time:.4g} only",
        "wider tolerances need fewer steps, an implicit solver suits stiff fields, and `max_steps` sets the limit",
    )


def no_stages(time: float) -> Exception:
    """What is raised where the equations of an implicit solver's step are not solved."""
    return bad_input(
        f"the stages of the implicit step at t = {time:.4g} were not found",
        "more steps make its equations easier to solve",
    )
