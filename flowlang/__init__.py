"""FlowLang: write the forward map of a density model; get the inverse, the log-determinant and PyTorch."""

from flowlang.api import analyse, check, compile, export_onnx, generate, info, load, save
from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.version import __version__

__all__ = [
    "Diagnostic", "FlowError", "Report", "__version__", "analyse", "check", "compile", "export_onnx", "generate",
    "info", "load", "save",
]  # fmt: skip
