"""Which indices of an entry value a value depends on, and where a value is exactly zero (A1, A2).

A relation is a union of conjunctions. A conjunction holds boolean matrices on pairs (axis of the
value, axis of the entry); a pair that is not mentioned is unconstrained. Every operation may only
enlarge a relation: that is the safe direction for every use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from flowlang.ir.types import Axis

MAX_CONJUNCTIONS = 48
MAX_BITS = 1 << 25  # larger matrices that are not the identity count as unconstrained

Key = tuple[str | None, str | None]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A boolean matrix; `rows` holds bit sets of columns, None stands for the identity."""

    n: int
    m: int
    rows: tuple[int, ...] | None

    @property
    def empty(self) -> bool:
        return self.rows is not None and not any(self.rows)

    @property
    def is_full(self) -> bool:
        if self.rows is None:
            return self.n == 1
        top = (1 << self.m) - 1
        return all(r == top for r in self.rows)

    def bits(self) -> tuple[int, ...]:
        return self.rows if self.rows is not None else identity_rows(self.n)

    def has(self, i: int, j: int) -> bool:
        return i == j if self.rows is None else bool(self.rows[i] >> j & 1)


@lru_cache(maxsize=64)
def identity_rows(n: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(n))


def matrix(n: int, m: int, rows: Iterable[int]) -> Matrix:
    found = tuple(rows)
    if n == m and found == identity_rows(n):
        return Matrix(n, n, None)
    return Matrix(n, m, found)


def eye(n: int) -> Matrix:
    return Matrix(n, n, None)


@lru_cache(maxsize=64)
def full(n: int, m: int) -> Matrix:
    return Matrix(n, m, ((1 << m) - 1,) * n)


def too_large(n: int, m: int) -> bool:
    return n * m > MAX_BITS


def compare(n: int, cmp: str) -> Matrix | None:
    """Row index `cmp` column index, for == <= < >= >; None when too large to hold."""
    if cmp == "==":
        return eye(n)
    if too_large(n, n):
        return None
    return _compare(n, cmp)


@lru_cache(maxsize=256)
def _compare(n: int, cmp: str) -> Matrix:
    top = (1 << n) - 1
    match cmp:
        case ">=":  # columns up to the row
            return matrix(n, n, ((1 << (i + 1)) - 1 for i in range(n)))
        case ">":
            return matrix(n, n, ((1 << i) - 1 for i in range(n)))
        case "<=":
            return matrix(n, n, (top & ~((1 << i) - 1) for i in range(n)))
        case "<":
            return matrix(n, n, (top & ~((1 << (i + 1)) - 1) for i in range(n)))
    raise ValueError(cmp)


@lru_cache(maxsize=4096)
def meet(a: Matrix, b: Matrix) -> Matrix:
    if a == b:
        return a
    return matrix(a.n, a.m, (x & y for x, y in zip(a.bits(), b.bits(), strict=True)))


@lru_cache(maxsize=4096)
def join(a: Matrix, b: Matrix) -> Matrix:
    if a == b:
        return a
    return matrix(a.n, a.m, (x | y for x, y in zip(a.bits(), b.bits(), strict=True)))


def subset(a: Matrix, b: Matrix) -> bool:
    return a == b or all(x & ~y == 0 for x, y in zip(a.bits(), b.bits(), strict=True))


@lru_cache(maxsize=4096)
def product(a: Matrix, b: Matrix) -> Matrix:
    """Boolean product: row i relates to column k when some j links them."""
    if a.rows is None:
        return b
    if b.rows is None:
        return a
    memo: dict[int, int] = {}
    out = []
    for r in a.rows:
        if r not in memo:
            total, bits = 0, r
            while bits:
                low = bits & -bits
                total |= b.rows[low.bit_length() - 1]
                bits ^= low
            memo[r] = total
        out.append(memo[r])
    return matrix(a.n, b.m, out)


@lru_cache(maxsize=1024)
def transpose(a: Matrix) -> Matrix:
    if a.rows is None:
        return a
    out = [0] * a.m
    for i, r in enumerate(a.rows):
        while r:
            low = r & -r
            out[low.bit_length() - 1] |= 1 << i
            r ^= low
    return matrix(a.m, a.n, out)


def mask_columns(a: Matrix, keep: int) -> Matrix:
    return matrix(a.n, a.m, (r & keep for r in a.bits()))


Conjunction = tuple[tuple[Key, Matrix], ...]  # sorted by key


def _sorted(parts: Mapping[Key, Matrix]) -> Conjunction:
    return tuple(
        sorted(((k, v) for k, v in parts.items() if not v.is_full), key=lambda p: (p[0][0] or "", p[0][1] or ""))
    )


def _conjoin(parts: dict[Key, Matrix], key: Key, found: Matrix) -> None:
    parts[key] = meet(parts[key], found) if key in parts else found


@dataclass(frozen=True, slots=True)
class Relation:
    """Indices of a value (rows) against indices of an entry (cols)."""

    rows: tuple[Axis, ...]
    cols: tuple[Axis, ...]
    parts: tuple[Conjunction, ...]

    # ---- making ---------------------------------------------------------------------------------

    @staticmethod
    def empty(rows: tuple[Axis, ...], cols: tuple[Axis, ...]) -> Relation:
        return Relation(rows, cols, ())

    @staticmethod
    def full(rows: tuple[Axis, ...], cols: tuple[Axis, ...]) -> Relation:
        return Relation(rows, cols, ((),))

    @staticmethod
    def of(rows: tuple[Axis, ...], cols: tuple[Axis, ...], parts: Mapping[Key, Matrix | None]) -> Relation:
        """One conjunction; None stands for no constraint."""
        known = {k: v for k, v in parts.items() if v is not None}
        if any(v.empty for v in known.values()):
            return Relation.empty(rows, cols)
        return Relation(rows, cols, (_sorted(known),))

    @staticmethod
    def equal(
        rows: tuple[Axis, ...],
        cols: tuple[Axis, ...],
        but: Iterable[str] = (),
        extra: Mapping[Key, Matrix | None] | None = None,
    ) -> Relation:
        """Equality along every axis that both have (but those named), and more constraints."""
        skip = set(but)
        have = {a.name: a.size for a in cols}
        parts: dict[Key, Matrix | None] = {
            (a.name, a.name): eye(a.size)
            for a in rows
            if a.name in have and a.name not in skip and have[a.name] == a.size
        }
        for k, v in (extra or {}).items():
            old = parts.get(k)
            parts[k] = v if old is None or v is None else meet(old, v)
        return Relation.of(rows, cols, parts)

    # ---- asking ---------------------------------------------------------------------------------

    def is_empty(self) -> bool:
        return not self.parts

    def matrix(self, part: Conjunction, row: str | None, col: str | None) -> Matrix | None:
        for key, found in part:
            if key == (row, col):
                return found
        return None

    def pairs(self, part: Conjunction, row: str, col: str, size: int) -> Matrix | None:
        """What a conjunction says of two axes of one size, by what it says of either alone too."""
        found = self.matrix(part, row, col)
        alone, other = self.matrix(part, row, None), self.matrix(part, None, col)
        if alone is not None or other is not None:
            keep = other.bits()[0] if other is not None else (1 << size) - 1
            rows = alone.bits() if alone is not None else (1,) * size
            bits = found.bits() if found is not None else ((1 << size) - 1,) * size
            found = matrix(size, size, (b & keep if r else 0 for b, r in zip(bits, rows, strict=True)))
        return found

    def within(self, row: str, col: str, cmp: str) -> bool:
        """Whether row index `cmp` column index holds wherever the relation does."""
        size = next((a.size for a in self.rows if a.name == row), None)
        other = next((a.size for a in self.cols if a.name == col), None)
        if size is None or size != other:
            return not self.parts
        wanted = compare(size, cmp)
        for part in self.parts:
            found = self.pairs(part, row, col, size)
            if found is None:
                if wanted is None or not wanted.is_full:
                    return False
            elif wanted is None or not subset(found, wanted):
                return False
        return True

    def pointwise(self) -> bool:
        """Equality along every axis of the entry, under the same name or another."""
        free = [a.name for a in self.rows]
        for c in self.cols:
            names = sorted(free, key=lambda n: n != c.name)
            found = next((n for n in names if self.equates(n, c)), None)
            if found is None:
                return False
            free.remove(found)
        return True

    def equates(self, row: str, col: Axis) -> bool:
        return any(a == Axis(row, col.size) for a in self.rows) and self.within(row, col.name, "==")

    # ---- combining ------------------------------------------------------------------------------

    def union(self, other: Relation) -> Relation:
        return Relation(self.rows, self.cols, simplify((*self.parts, *other.parts)))

    def meet(self, parts: Mapping[Key, Matrix]) -> Relation:
        """The relation with more constraints on every conjunction."""
        out = []
        for part in self.parts:
            now = dict(part)
            for k, v in parts.items():
                _conjoin(now, k, v)
            if not any(v.empty for v in now.values()):
                out.append(_sorted(now))
        return Relation(self.rows, self.cols, simplify(tuple(out)))

    def restrict_equal(self, row: str, col: str) -> Relation:
        """What is left when the row index equals the column index (A5: dropping the strict part)."""
        size = next((a.size for a in self.rows if a.name == row), None)
        if size is None:
            return self
        found = self.meet({(row, col): eye(size)})
        # What either index alone is held to may leave no pair of equal ones.
        kept = tuple(p for p in found.parts if not (m := self.pairs(p, row, col, size)) or not m.empty)
        return Relation(self.rows, self.cols, kept)

    def compose(self, inner: Relation) -> Relation:
        """self: result on operand; inner: operand on entry; the result on the entry."""
        out: list[Conjunction] = []
        for a in self.parts:
            for b in inner.parts:
                out.extend(compose_parts(a, b))
        return Relation(self.rows, inner.cols, simplify(tuple(out)))

    def lifted(self, rows: tuple[Axis, ...], cols: tuple[Axis, ...], names: Iterable[str]) -> Relation:
        """The same relation between wider values, equal along the lifted axes."""
        extra: dict[Key, Matrix] = {}
        sizes = {a.name: a.size for a in cols}
        for n in names:
            if n in sizes:
                extra[(n, n)] = eye(sizes[n])
        return Relation(rows, cols, self.parts).meet(extra)

    def renamed_rows(self, rows: tuple[Axis, ...], pairs: Mapping[str, str]) -> Relation:
        parts = tuple(_sorted({(pairs.get(k[0], k[0]) if k[0] else None, k[1]): v for k, v in p}) for p in self.parts)
        return Relation(rows, self.cols, parts)


def compose_parts(a: Conjunction, b: Conjunction) -> list[Conjunction]:
    """Eliminates the operand's indices between two conjunctions."""
    middle: dict[str, tuple[dict[str | None, Matrix], dict[str | None, Matrix]]] = {}
    start: dict[Key, Matrix] = {}
    for (r, o), found in a:
        if o is None:
            _conjoin(start, (r, None), found)
        else:
            middle.setdefault(o, ({}, {}))[0][r] = found
    for (o, e), found in b:
        if o is None:
            _conjoin(start, (None, e), found)
        else:
            middle.setdefault(o, ({}, {}))[1][e] = found
    results: list[dict[Key, Matrix]] = [start]
    for o in sorted(middle):
        options = eliminate(*middle[o])
        merged: list[dict[Key, Matrix]] = []
        for base in results:
            for option in options:
                now = dict(base)
                for k, v in option.items():
                    _conjoin(now, k, v)
                if not any(v.empty for v in now.values()):
                    merged.append(now)
        results = merged
        if len(results) > MAX_CONJUNCTIONS:
            results = [dict(p) for p in simplify(tuple(_sorted(r) for r in results))]
    return [_sorted(r) for r in results]


def eliminate(left: dict[str | None, Matrix], right: dict[str | None, Matrix]) -> list[dict[Key, Matrix]]:
    """Pairs (r, e) linked through one operand axis, as a union of conjunctions."""
    left, right = dict(left), dict(right)
    # One-sided constraints narrow the operand's index.
    keep: int | None = None
    if None in left:
        keep = left.pop(None).bits()[0]
    if None in right:
        narrow = transpose(right.pop(None)).bits()[0]
        keep = narrow if keep is None else keep & narrow
    if keep is not None:
        if keep == 0:
            return []
        left = {k: mask_columns(v, keep) for k, v in left.items()}
        right = {k: transpose(mask_columns(transpose(v), keep)) for k, v in right.items()}
    if any(v.empty for v in (*left.values(), *right.values())):
        return []
    if not left and not right:
        return [{}]
    if not right:
        return [{(r, None): nonempty_rows(v) for r, v in left.items()}]
    if not left:
        return [{(None, e): transpose(nonempty_rows(transpose(v))) for e, v in right.items()}]
    if len(left) == 2 and len(right) == 1:
        (r1, m1), (r2, m2) = sorted(left.items(), key=lambda p: p[0] or "")
        ((e, inner),) = right.items()
        found = lexicographic(transpose(inner), transpose(m1), transpose(m2))
        return [{((r1, r2)[k], e): transpose(f) for k, f in part} for part in found]
    if len(left) == 1 and len(right) == 2:
        ((r, outer),) = left.items()
        (e1, m1), (e2, m2) = sorted(right.items(), key=lambda p: p[0] or "")
        return [{(r, (e1, e2)[k]): f for k, f in part} for part in lexicographic(outer, m1, m2)]
    return [{(r, e): product(a, b) for r, a in left.items() for e, b in right.items()}]


def nonempty_rows(a: Matrix) -> Matrix:
    return matrix(a.n, 1, (1 if r else 0 for r in a.bits()))


@lru_cache(maxsize=512)
def lexicographic(outer: Matrix, first: Matrix, second: Matrix) -> tuple[tuple[tuple[int, Matrix], ...], ...]:
    """`blocks` with the better of the two as the slow axis; matrices with the number of their axis."""
    choices = []
    for order, found in (((0, 1), blocks(outer, first, second)), ((1, 0), blocks(outer, second, first))):
        parts = [[(order[0], f)] + ([(order[1], g)] if g is not None else []) for f, g in found]
        width = (second if order == (0, 1) else first).m
        volume = 0
        for f, g in found:
            inner = [r.bit_count() for r in g.bits()] if g is not None else [width] * f.n
            volume += sum(r.bit_count() * n for r, n in zip(f.bits(), inner, strict=True))
        choices.append((volume, order, tuple(tuple(p) for p in parts)))
    return min(choices, key=lambda c: c[:2])[2]


@lru_cache(maxsize=512)
def blocks(outer: Matrix, first: Matrix, second: Matrix) -> tuple[tuple[Matrix, Matrix | None], ...]:
    """Splits `some m: outer(i, m), first(m, a), second(m, b)` into conjunctions on (i, a) and (i, b).

    For each (i, a) the set of b is either everything (first conjunction) or a part (second), as in
    lexicographic orders of a split axis; different parts for one i are joined.
    """
    top = (1 << second.m) - 1
    whole, part, seen = [], [], []
    second_rows, first_rows = second.bits(), first.bits()
    for r in outer.bits():
        sets: dict[int, int] = {}
        bits = r
        while bits:
            low = bits & -bits
            m = low.bit_length() - 1
            bits ^= low
            a = first_rows[m]
            while a:
                one = a & -a
                j = one.bit_length() - 1
                sets[j] = sets.get(j, 0) | second_rows[m]
                a ^= one
        full_a = part_a = union_b = 0
        for j, b in sets.items():
            if b == top:
                full_a |= 1 << j
            elif b:
                part_a |= 1 << j
                union_b |= b
        whole.append(full_a)
        part.append(part_a)
        seen.append(union_b)
    out: list[tuple[Matrix, Matrix | None]] = []
    if any(whole):
        out.append((matrix(outer.n, first.m, whole), None))
    if any(part):
        out.append((matrix(outer.n, first.m, part), matrix(outer.n, second.m, seen)))
    return tuple(out)


def simplify(parts: tuple[Conjunction, ...]) -> tuple[Conjunction, ...]:
    """Drops conjunctions that others hold; beyond the cap, one that holds them all."""
    unique = list(dict.fromkeys(parts))
    if len(unique) == 1:
        return tuple(unique)
    kept: list[Conjunction] = []
    for k, p in enumerate(unique):
        if not any(implies(p, q) and (j < k or not implies(q, p)) for j, q in enumerate(unique) if j != k):
            kept.append(p)
    if len(kept) > MAX_CONJUNCTIONS:
        common: dict[Key, Matrix] = dict(kept[0])
        for p in kept[1:]:
            other = dict(p)
            common = {k: join(v, other[k]) for k, v in common.items() if k in other}
        return (_sorted(common),)
    return tuple(sorted(kept, key=_order))


def _order(p: Conjunction) -> tuple[object, ...]:
    return (len(p), tuple((k[0] or "", k[1] or "", v.bits() if v.n <= 64 else ()) for k, v in p))


def implies(p: Conjunction, q: Conjunction) -> bool:
    """Whether p lies inside q."""
    have = dict(p)
    return all(k in have and subset(have[k], v) for k, v in q)


# ---- supports -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Support:
    """The index set outside which a value is exactly 0: matrices on pairs of its own axes (or one axis)."""

    parts: tuple[tuple[Key, Matrix], ...]

    @staticmethod
    def of(parts: Mapping[Key, Matrix]) -> Support:
        return Support(_sorted(parts))

    def meet(self, other: Support | None) -> Support:
        if other is None:
            return self
        now = dict(self.parts)
        for k, v in other.parts:
            _conjoin(now, k, v)
        return Support(_sorted(now))

    def renamed(self, pairs: Mapping[str, str]) -> Support:
        return Support.of(
            {(pairs.get(a or "", a or ""), pairs.get(b, b) if b else None): v for (a, b), v in self.parts}
        )

    def without(self, axes: Iterable[str]) -> Support | None:
        drop = set(axes)
        kept = {k: v for k, v in self.parts if k[0] not in drop and k[1] not in drop}
        return Support.of(kept) if kept else None

    def constraints(self, rows: Iterable[str], cols: Iterable[str]) -> dict[Key, Matrix]:
        """What it says of a product: pairs of one result index and one index of the other factor."""
        row_set, col_set = set(rows), set(cols)
        out: dict[Key, Matrix] = {}
        for (a, b), found in self.parts:
            if b is None:
                if a in row_set:
                    _conjoin(out, (a, None), found)
                if a in col_set:
                    _conjoin(out, (None, a), transpose(found))
                continue
            if a in row_set and b in col_set:
                _conjoin(out, (a, b), found)
            if b in row_set and a in col_set:
                _conjoin(out, (b, a), transpose(found))
        return out
