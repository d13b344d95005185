"""What the design has and this version does not: names, arguments and parts that are refused as such (FL0902).

An entry stands here until a library entry or an op of that name exists; lookup asks here last, so that an
entry which has come to exist needs no change. Without this, a spec that is ahead of the compiler would be
told that its author cannot spell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from flowlang.syntax import tree

NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("identity", "pool", "chain"),
    "networks": ("cross_attention", "embedding", "gru", "pointconv_encoder", "pyramid_dit", "self_attention", "token_dit"),
    "operations": (
        "argmin", "count", "gather", "kl_normal", "linspace", "product", "scatter", "scatter_sum", "split", "topk",
        "unique_edges", "bilinear", "nearest", "stencil5",
    ),
    "times and schedules": ("cosine_schedule", "shift_time", "time", "trajectory", "adjoint"),
    "distributions": ("geometric", "poisson", "gamma", "beta", "dirichlet"),
    "masks": ("alternate", "checkerboard"),
    "manifolds": ("sphere", "torus", "ball"),
    "values of the mode": ("training",),
}  # fmt: skip

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "attention": ("mask",),
    "affine_coupling": ("mask", "c"),
    "conv": ("weight",),
}

PARTS = (
    "inverse", "lipschitz", "log_prob", "parameters", "rsample", "sample", "sample_and_log_prob", "sample_with_log_ratio",
    "size", "step", "tap", "with",
)  # fmt: skip


def later_family(name: str) -> str | None:
    """The family of a name that a later version brings; None for any other."""
    return next((family for family, names in NAMES.items() if name in names), None)


def is_place(declaration: tree.Declaration, name: str) -> bool:
    """Whether `name` may be read from an instance by the design: every named value is a place."""
    if name in PARTS:
        return True
    parameters = (p.name for ps in declaration.parameters for p in ps)
    return name in parameters or any(
        (isinstance(n, tree.Target | tree.Entry) and n.name == name)
        or (isinstance(n, tree.Item) and name in axis_names(n))
        for n in walk(declaration)
    )


def introduced_axes(node: Any) -> set[str]:
    """The axes named in types and brackets of a tree: unknown as sizes where the tree is in error."""
    return {name for n in walk(node) if isinstance(n, tree.Item) for name in axis_names(n)}


def axis_names(item: tree.Item) -> Iterator[str]:
    for side in (item.left, item.arrow):
        if isinstance(side, tree.Name):
            yield side.id


def walk(node: Any) -> Iterator[Any]:
    """All nodes of a tree, without recursion (trees may be deep)."""
    todo = [node]
    while todo:
        at = todo.pop()
        if isinstance(at, tuple | list):
            todo.extend(at)
        elif is_dataclass(at) and type(at).__module__ == tree.__name__:
            yield at
            todo.extend(getattr(at, f.name) for f in fields(at))
