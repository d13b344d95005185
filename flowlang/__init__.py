"""FlowLang: write the forward map of a density model; get the inverse, the log-determinant and PyTorch."""

from typing import TYPE_CHECKING, Any

from flowlang.version import __version__

if TYPE_CHECKING:
    from flowlang.api import (
        analyse,
        certificate,
        check,
        compare_onnx,
        compile,
        export_onnx,
        folded,
        generate,
        info,
        load,
        save,
    )
    from flowlang.diagnostics import Diagnostic, FlowError, Report
    from flowlang.library import library_folders

__all__ = [
    "Diagnostic", "FlowError", "Report", "__version__", "analyse", "certificate", "check", "compare_onnx", "compile", "export_onnx",
    "folded", "generate", "info", "library_folders", "load", "save",
]  # fmt: skip

# Where each name comes from: importing the package loads none of it, and torch least of all.
HOMES = {
    "flowlang.api": (
        "analyse",
        "certificate",
        "check",
        "compare_onnx",
        "compile",
        "export_onnx",
        "folded",
        "generate",
        "info",
        "load",
        "save",
    ),
    "flowlang.library": ("library_folders",),
    "flowlang.diagnostics": ("Diagnostic", "FlowError", "Report"),
    "flowlang.backends.torch.runtime": ("NumericalWarning", "count_steps", "record_paths"),
}


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            import importlib

            globals()[name] = found = getattr(importlib.import_module(home), name)
            return found
    raise AttributeError(f"module `flowlang` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted({*globals(), *(n for names in HOMES.values() for n in names)})
