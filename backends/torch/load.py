"""Generated source becomes live modules."""

from __future__ import annotations

import hashlib
import linecache
import sys
import types
from typing import Any

from torch import nn


def load_module(text: str) -> types.ModuleType:
    """The module of a generated text; equal texts give one module."""
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
    for cls in vars(module).values():
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == name:
            carry(cls, text)
    return module


def carry(cls: type[nn.Module], text: str) -> None:
    """Pickles of a class's instances carry the text that defines it, for processes that have not seen it."""

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        return rebuild, (text, cls.__name__), self.__dict__

    cls.__reduce_ex__ = reduce_ex  # type: ignore[method-assign, assignment]


def rebuild(text: str, cls: str) -> nn.Module:
    """For pickle: an empty instance; its state follows."""
    found = getattr(load_module(text), cls)
    made: nn.Module = found.__new__(found)
    nn.Module.__init__(made)
    return made


def instantiate(text: str, cls: str) -> Any:
    """A fresh instance of a generated class."""
    return getattr(load_module(text), cls)()
