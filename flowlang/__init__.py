"""FlowLang: write the forward map of a density model; get the inverse, the log-determinant and PyTorch."""

from flowlang.api import analyse, check, compile, generate, info
from flowlang.diagnostics import Diagnostic, FlowError, Report

__version__ = "0.1.0"
__all__ = ["Diagnostic", "FlowError", "Report", "__version__", "analyse", "check", "compile", "generate", "info"]
