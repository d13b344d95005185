"""The same as `errors`, for files that carry their runtime and need torch alone."""

from __future__ import annotations


def bad_input(message: str, suggestion: str) -> Exception:
    """What is raised when an input does not fit the flow."""
    return ValueError(f"{message}; {suggestion}")
