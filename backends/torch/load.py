"""Generated source becomes live modules."""

from __future__ import annotations

import hashlib
import linecache
import sys
import types
from typing import Any

from torch import nn


def load_module(text: str) -> types.ModuleType:
    """The module of a generated text; equal texts give one module. Classes stay importable for pickle."""
    name = f"flowlang_generated_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    file = f"<{name}>"
    code = compile(text, file, "exec")
    # The text shows up in tracebacks and debuggers.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def rebuild(text: str, cls: str) -> Any:
    """For pickle: makes an empty instance; its state follows."""
    found = getattr(load_module(text), cls)
    made = found.__new__(found)
    nn.Module.__init__(made)
    return made


def instantiate(text: str, cls: str) -> Any:
    """A fresh instance of the root class that can be pickled anywhere FlowLang is installed."""
    module = load_module(text)
    base = getattr(module, cls)
    if "__reduce_ex__" not in base.__dict__:

        def reduce_ex(self: Any, protocol: Any) -> Any:
            return rebuild, (text, cls), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

        base.__reduce_ex__ = reduce_ex
    return base()
