"""The registry of ops: every op of the language is one record in one file of this package."""

from __future__ import annotations

from flowlang.ir.ops import control, conv, elementwise, linear, mixtures, reduce, shape, splines
from flowlang.ir.ops.base import Op

OPS: dict[str, Op] = {}
for _module in (elementwise, shape, reduce, linear, conv, splines, mixtures, control):
    for _op in _module.OPS:
        assert _op.name not in OPS, _op.name
        OPS[_op.name] = _op

__all__ = ["OPS", "Op"]
