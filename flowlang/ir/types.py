"""Types of graph values: named axes with concrete sizes.

Sizes are concrete because the analyses run at instantiation. Leading batch dimensions are not part
of a type: every value may carry any number of them, in front; `Node.batched` says whether it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

LIFTED = "~lifted"  # ends the name of a lifted axis at a call whose callee has one of its own by that name


@dataclass(frozen=True, slots=True)
class Axis:
    name: str
    size: int

    def __str__(self) -> str:
        return f"{self.name} = {self.size}"


@dataclass(frozen=True, slots=True)
class TensorType:
    """Real, integer or boolean tensor with named axes, in order."""

    axes: tuple[Axis, ...] = ()
    kind: str = "real"  # real | int | bool

    @staticmethod
    def of(*axes: tuple[str, int], kind: str = "real") -> TensorType:
        return TensorType(tuple(Axis(n, s) for n, s in axes), kind)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(a.size for a in self.axes)

    @property
    def count(self) -> int:
        """Number of elements of one sample."""
        return prod(self.shape)

    @property
    def rank(self) -> int:
        return len(self.axes)

    def has(self, name: str) -> bool:
        return any(a.name == name for a in self.axes)

    def size(self, name: str) -> int:
        for a in self.axes:
            if a.name == name:
                return a.size
        raise KeyError(name)

    def position(self, name: str) -> int:
        return self.names.index(name)

    def without(self, names: Iterable[str]) -> TensorType:
        drop = set(names)
        return TensorType(tuple(a for a in self.axes if a.name not in drop), self.kind)

    def only(self, names: Iterable[str]) -> TensorType:
        keep = set(names)
        return TensorType(tuple(a for a in self.axes if a.name in keep), self.kind)

    def resized(self, name: str, size: int) -> TensorType:
        return TensorType(tuple(Axis(a.name, size) if a.name == name else a for a in self.axes), self.kind)

    def renamed(self, pairs: dict[str, str]) -> TensorType:
        return TensorType(tuple(Axis(pairs.get(a.name, a.name), a.size) for a in self.axes), self.kind)

    def with_axis(self, name: str, size: int, at: int | None = None) -> TensorType:
        axes = list(self.axes)
        axes.insert(len(axes) if at is None else at, Axis(name, size))
        return TensorType(tuple(axes), self.kind)

    def as_kind(self, kind: str) -> TensorType:
        return self if kind == self.kind else TensorType(self.axes, kind)

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes)

    def __str__(self) -> str:
        head = {"real": "R", "int": "Int", "bool": "Bool"}[self.kind]
        return f"{head}[{', '.join(map(str, self.axes))}]" if self.axes else head


SCALAR = TensorType()


def same_axes(a: TensorType, b: TensorType) -> bool:
    """Equal axes and sizes, in any order."""
    return set(a.axes) == set(b.axes)


@dataclass(frozen=True, slots=True)
class TupleType:
    """The results of a call that has several; read with the op `get`."""

    items: tuple[TensorType, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.items))})"


Type = TensorType | TupleType


def result_axes(type: Type, index: int = 0) -> tuple[Axis, ...]:
    """The axes of one result."""
    return type.items[index].axes if isinstance(type, TupleType) else type.axes
