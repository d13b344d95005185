"""What a flow raises when it is called with something that does not fit it."""

from __future__ import annotations

from flowlang.diagnostics import Diagnostic, FlowError


def bad_input(message: str, suggestion: str) -> Exception:
    """FL0702 as an exception."""
    return FlowError(Diagnostic("FL0702", message, suggestion=suggestion))
