"""Diagnostics as values: codes, labels, notes, suggestions, and their rendering."""

from flowlang.diagnostics.model import Diagnostic, FlowError, Label, Report, Severity

__all__ = ["Diagnostic", "FlowError", "Label", "Report", "Severity"]
