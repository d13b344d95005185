"""Equivalent architectures: networks rewritten with their weights, and the proof that results are equal."""

from flowlang.rewrite.commands import TARGETS, Rewritten, rewrite
from flowlang.rewrite.prenorm import equivalent, forgets_shift, pre_crmsnorm, pre_rmsnorm
from flowlang.rewrite.thresholds import fold_thresholds

__all__ = [
    "TARGETS", "Rewritten", "equivalent", "fold_thresholds", "forgets_shift", "pre_crmsnorm", "pre_rmsnorm", "rewrite",
]  # fmt: skip
