"""Data for training: `.npy`, `.npz`, `.csv` and Parquet files as arrays, with clear words for what is wrong."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowlang.diagnostics import Diagnostic, FlowError

Array = np.ndarray[Any, np.dtype[np.float64]]


def refuse(code: str, message: str, suggestion: str | None = None) -> FlowError:
    return FlowError(Diagnostic(code, message, suggestion=suggestion))


@dataclass
class Table:
    """Samples in rows: `x` of shape [n, *data], context arrays [n, *shape] by name."""

    x: Array
    given: dict[str, Array] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Any) -> Table:
        return Table(self.x[rows], {k: v[rows] for k, v in self.given.items()}, self.columns, self.notes)


def read_table(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    given: Mapping[str, Sequence[str]] | None = None,
    onehot: Sequence[str] = (),
    dequantise: Mapping[str, float] | Sequence[str] | bool = (),
    seed: int = 0,
) -> Table:
    """Reads a file.

    columns     names of the data columns (all that are not context by default)
    given       context inputs: name -> columns
    onehot      context columns whose values are categories
    dequantise  columns to which uniform noise of their printed step is added: names (the step is inferred),
                a mapping name -> step, or True for all
    """
    path = Path(path)
    if not path.is_file():
        raise refuse("FL0801", f"`{path}` is no file", "check the path given to --data")
    suffix = path.suffix.lower()
    given = dict(given or {})
    if suffix == ".npy":
        return from_array(load_numpy(path), columns, given)
    if suffix == ".npz":
        return from_archive(path, columns, given)
    if suffix == ".csv":
        names, cells = read_csv(path)
    elif suffix in (".parquet", ".pq"):
        names, cells = read_parquet(path)
    else:
        raise refuse("FL0801", f"`{path.suffix}` files are not read", "give a .npy, .npz, .csv or .parquet file")
    return from_columns(path, names, cells, columns, given, onehot, dequantise, seed)


# ---- numpy --------------------------------------------------------------------------------------


def load_numpy(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise refuse(
            "FL0801", f"`{path}` is not a readable NumPy file: {e}", "save it by `numpy.save` without pickled objects"
        ) from None


def numeric(array: Any, what: str) -> Array:
    if array.dtype.kind not in "fiub":
        raise refuse("FL0802", f"{what} holds {array.dtype} and not numbers", "convert it to float first")
    out = np.asarray(array, dtype=np.float64)
    if out.ndim == 0 or len(out) == 0:
        raise refuse("FL0802", f"{what} holds no samples", "the first axis counts the samples")
    bad = ~np.isfinite(out.reshape(len(out), -1)).all(axis=1)
    if bad.any():
        rows = ", ".join(str(i) for i in np.flatnonzero(bad)[:5])
        raise refuse("FL0802", f"{what} has {int(bad.sum())} samples with missing or infinite values, first at rows {rows}",
                     "remove or fill them: a density of missing values is not defined")  # fmt: skip
    return out


def from_array(array: Any, columns: Sequence[str] | None, given: Mapping[str, Sequence[str]]) -> Table:
    if columns or given:
        raise refuse(
            "FL0804", "a .npy file has no named columns", "use a .csv, .parquet or .npz file to choose columns"
        )
    return Table(numeric(array, "the array"))


def from_archive(path: Path, columns: Sequence[str] | None, given: Mapping[str, Sequence[str]]) -> Table:
    archive = load_numpy(path)
    names = list(archive.files)
    key = columns[0] if columns else "x" if "x" in names else names[0] if len(names) == 1 else None
    if key is None or key not in names:
        raise refuse("FL0804", f"`{path.name}` holds {', '.join(f'`{n}`' for n in names)}, and which one is the data is not said",
                     "name the data array `x`, or choose one with --columns")  # fmt: skip
    x = numeric(archive[key], f"`{key}`")
    out: dict[str, Array] = {}
    for name, parts in given.items():
        wanted = parts[0] if parts else name
        if wanted not in names:
            raise refuse(
                "FL0802",
                f"`{path.name}` has no array `{wanted}` for the context `{name}`",
                f"it holds {', '.join(names)}",
            )
        out[name] = numeric(archive[wanted], f"`{wanted}`")
        if len(out[name]) != len(x):
            raise refuse("FL0802", f"`{wanted}` has {len(out[name])} samples, and the data {len(x)}")
    return Table(x, out, [key])


# ---- tables -------------------------------------------------------------------------------------


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = list(csv.reader(f))
    except (UnicodeDecodeError, csv.Error) as e:
        raise refuse("FL0801", f"`{path}` is not readable CSV text: {e}", "save it as UTF-8, with commas") from None
    rows = [r for r in rows if r]
    if len(rows) < 2:
        raise refuse("FL0802", f"`{path}` holds no rows below its header", "the first line names the columns")
    names = [n.strip() for n in rows[0]]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise refuse("FL0802", f"two columns of `{path.name}` are named `{twice}`", "give each column its own name")
    for k, r in enumerate(rows[1:], start=2):
        if len(r) != len(names):
            raise refuse(
                "FL0802",
                f"line {k} of `{path.name}` has {len(r)} cells, and the header {len(names)}",
                "check quotes and commas there",
            )
    return names, [[r[k] for r in rows[1:]] for k in range(len(names))]


def read_parquet(path: Path) -> tuple[list[str], list[list[Any]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise refuse("FL0805", "reading Parquet needs pyarrow", "pip install 'flowlang[parquet]'") from None
    try:
        table = parquet.read_table(path)
    except Exception as e:
        raise refuse("FL0801", f"`{path}` is not a readable Parquet file: {e}") from None
    return list(table.column_names), [table.column(n).to_pylist() for n in table.column_names]


MISSING = {"", "na", "nan", "null", "none", "n/a", "?"}


def to_numbers(name: str, cells: Sequence[Any]) -> Array:
    out = np.empty(len(cells))
    missing: list[int] = []
    for k, c in enumerate(cells):
        if c is None or (isinstance(c, str) and c.strip().lower() in MISSING) or (isinstance(c, float) and c != c):
            missing.append(k)
            out[k] = 0
            continue
        try:
            out[k] = float(c)
        except (TypeError, ValueError):
            raise refuse("FL0802", f"column `{name}` holds the text {str(c)[:40]!r} in row {k + 1}, which is no number",
                         f"leave the column out, or use it as a category: --onehot {name}") from None  # fmt: skip
    if missing:
        rows = ", ".join(str(k + 1) for k in missing[:5])
        raise refuse("FL0802", f"column `{name}` has {len(missing)} missing values, first in rows {rows}",
                     "remove those rows or fill them: a density of missing values is not defined")  # fmt: skip
    if not np.isfinite(out).all():
        k = int(np.flatnonzero(~np.isfinite(out))[0])
        raise refuse("FL0802", f"column `{name}` is infinite in row {k + 1}")
    return out


def printed_step(values: Array) -> float:
    """The smallest difference between distinct values, where all are whole multiples of it; 0 if there is none."""
    distinct = np.unique(values)
    if len(distinct) < 2:
        return 0.0
    gaps = np.diff(distinct)
    step = float(gaps.min())
    ratio = (distinct - distinct[0]) / step
    return step if np.abs(ratio - np.round(ratio)).max() < 1e-3 else 0.0


def from_columns(
    path: Path,
    names: list[str],
    cells: Sequence[Sequence[Any]],
    columns: Sequence[str] | None,
    given: Mapping[str, Sequence[str]],
    onehot: Sequence[str],
    dequantise: Mapping[str, float] | Sequence[str] | bool,
    seed: int,
) -> Table:
    by_name = dict(zip(names, cells, strict=True))
    context = {c for parts in given.values() for c in parts}
    wanted = list(columns) if columns else [n for n in names if n not in context]
    for n in [*wanted, *context, *onehot]:
        if n not in by_name:
            import difflib

            close = difflib.get_close_matches(n, names, 1)
            raise refuse("FL0802", f"`{path.name}` has no column `{n}`",
                         f"did you mean `{close[0]}`?" if close else f"its columns are {', '.join(names[:20])}")  # fmt: skip
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    steps: dict[str, float] = {}
    if dequantise is True:
        steps = dict.fromkeys(wanted, 0.0)
    elif isinstance(dequantise, Mapping):
        steps = {k: float(v) for k, v in dequantise.items()}
    elif dequantise:
        steps = dict.fromkeys(dequantise, 0.0)
    data: list[Array] = []
    for n in wanted:
        if n in onehot:
            raise refuse(
                "FL0804",
                f"`{n}` is a data column, and one-hot numbers have no density",
                f"use it as context, or dequantise it: --dequantise {n}",
            )
        v = to_numbers(n, by_name[n])
        if n in steps:
            step = steps[n] or printed_step(v)
            if step > 0:
                v = v + rng.uniform(-0.5, 0.5, len(v)) * step
                notes.append(f"`{n}` dequantised by its step {step:g}")
        data.append(v)
    out: dict[str, Array] = {}
    for name, parts in given.items():
        blocks: list[Array] = []
        for c in parts:
            if c in onehot:
                values = [str(v) for v in by_name[c]]
                kinds = sorted(set(values))
                blocks.append(np.array([[float(v == k) for k in kinds] for v in values]))
                notes.append(f"`{c}` one-hot: {', '.join(kinds)}")
            else:
                blocks.append(to_numbers(c, by_name[c])[:, None])
        out[name] = np.concatenate(blocks, axis=1)
    return Table(np.stack(data, axis=1), out, wanted, notes)


# ---- standardisation and splits -----------------------------------------------------------------


@dataclass
class Standardiser:
    """x -> (x - mean) / scale for each coordinate; kept with the model."""

    mean: Array
    scale: Array

    @staticmethod
    def fit(x: Array, columns: Sequence[str] = ()) -> Standardiser:
        mean, scale = x.mean(axis=0), x.std(axis=0)
        flat = np.flatnonzero(~(scale.reshape(-1) > 0))
        if len(flat):
            k = int(flat[0])
            name = f"`{columns[k]}`" if k < len(columns) else f"number {k}"
            raise refuse("FL0802", f"column {name} is constant, and has no density", "leave it out")
        return Standardiser(mean, scale)

    @staticmethod
    def fit_context(x: Array) -> Standardiser:
        """For context: columns of zeros and ones, and constant ones, stay as they are."""
        mean, scale = x.mean(axis=0), x.std(axis=0)
        plain = ((x == 0) | (x == 1)).all(axis=0) | (scale == 0)
        return Standardiser(np.where(plain, 0.0, mean), np.where(plain, 1.0, scale))

    @staticmethod
    def identity(shape: tuple[int, ...]) -> Standardiser:
        return Standardiser(np.zeros(shape), np.ones(shape))

    def apply(self, x: Array) -> Array:
        return np.asarray((x - self.mean) / self.scale)

    def undo(self, z: Array) -> Array:
        return np.asarray(z * self.scale + self.mean)

    @property
    def log_det(self) -> float:
        """log|dz/dx|: adds to the log-density of z to give that of x."""
        return -float(np.log(self.scale).sum())

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "scale": self.scale.tolist()}

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> Standardiser:
        return Standardiser(np.asarray(d["mean"], dtype=np.float64), np.asarray(d["scale"], dtype=np.float64))


def split(n: int, fractions: Sequence[float], seed: int) -> list[Any]:
    """Row numbers of each part, shuffled by the seed; the first part gets the rest."""
    order = np.random.default_rng(seed).permutation(n)
    sizes = [round(f * n) for f in fractions]
    cuts = [sum(sizes[k:]) for k in range(len(sizes))]
    parts = [order[: n - (cuts[0] if cuts else 0)]]
    at = len(parts[0])
    for s in sizes:
        parts.append(order[at : at + s])
        at += s
    return parts
