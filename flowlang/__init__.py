"""FlowLang: write the forward map of a density model; get the inverse, the log-determinant and PyTorch."""

from typing import Any

from flowlang.api import analyse, check, compile, export_onnx, folded, generate, info, load, save
from flowlang.diagnostics import Diagnostic, FlowError, Report
from flowlang.version import __version__

__all__ = [
    "Diagnostic", "FlowError", "Report", "__version__", "analyse", "check", "compile", "export_onnx", "folded",
    "generate", "info", "load", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "NumericalWarning":  # needs torch, which importing this package does not load
        from flowlang.backends.torch.runtime import NumericalWarning

        return NumericalWarning
    raise AttributeError(f"module `flowlang` has no attribute `{name}`")
