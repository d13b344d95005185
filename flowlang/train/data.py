"""Data for training: `.npy`, `.npz`, `.csv` and Parquet files as arrays, with clear words for what is wrong."""

from __future__ import annotations

import csv
import difflib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowlang.diagnostics import Diagnostic, FlowError

Array = np.ndarray[Any, np.dtype[np.float64]]


def refuse(code: str, message: str, suggestion: str | None = None) -> FlowError:
    return FlowError(Diagnostic(code, message, suggestion=suggestion))


@dataclass(frozen=True)
class Recipe:
    """How a file becomes numbers; kept with the weights, so that other files are read the same way.

    columns     names of the data columns; none for arrays without names
    given       context inputs: name -> columns
    categories  values of categorical columns, in the order of their codes
    onehot      context columns that become one number for each of their categories
    steps       columns to which uniform noise of that width is added
    """

    columns: tuple[str, ...] = ()
    given: dict[str, tuple[str, ...]] = field(default_factory=dict)
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)
    onehot: tuple[str, ...] = ()
    steps: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> Recipe:
        return Recipe(
            tuple(d["columns"]), {k: tuple(v) for k, v in d["given"].items()},
            {k: tuple(v) for k, v in d["categories"].items()}, tuple(d["onehot"]), dict(d["steps"]),
        )  # fmt: skip


@dataclass
class Table:
    """Samples in rows: `x` of shape [n, *data], context arrays [n, *shape] by name.

    Where columns are dequantised, `x` has noise and `rounded` the values before it, so that training can draw the
    noise anew (Theis et al. 2016).
    """

    x: Array
    given: dict[str, Array] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    notes: list[str] = field(default_factory=list)
    rounded: Array | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.recipe.columns

    def take(self, rows: Any) -> Table:
        rounded = self.rounded[rows] if self.rounded is not None else None
        return Table(self.x[rows], {k: v[rows] for k, v in self.given.items()}, self.recipe, self.notes, rounded)

    def widths(self) -> Array:
        """The width of the noise of each column; 0 for none."""
        return np.array([self.recipe.steps.get(c, 0.0) for c in self.columns])


@dataclass(frozen=True)
class Choice:
    """What was asked of a file's columns; see `read_table`."""

    columns: tuple[str, ...] = ()
    given: Mapping[str, Sequence[str]] = field(default_factory=dict)
    onehot: tuple[str, ...] = ()
    dequantise: Mapping[str, float] | bool = False

    def __bool__(self) -> bool:
        """Whether anything was asked at all."""
        return bool(self.columns or self.given or self.onehot or self.dequantise)


def read_table(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    given: Mapping[str, Sequence[str]] | None = None,
    onehot: Sequence[str] = (),
    dequantise: Mapping[str, float] | Sequence[str] | bool = (),
    recipe: Recipe | None = None,
    seed: int = 0,
) -> Table:
    """Reads a file.

    columns     names of the data columns (all that are not context by default)
    given       context inputs: name -> columns
    onehot      context columns whose values are categories
    dequantise  columns to which uniform noise of their step is added: names (the step is the smallest printed
                difference), a mapping name -> step, or True for all. A column of words becomes its codes first
    recipe      that of an earlier table: its columns, categories and steps are used again
    """
    path = Path(path)
    if not path.is_file():
        raise refuse("FL0801", f"`{path}` is no file", "check the path given to --data")
    # Nothing asked is one thing, however it was said: an array without names can be asked nothing.
    steps = (dequantise if isinstance(dequantise, bool | Mapping) else dict.fromkeys(dequantise, 0.0)) or False
    choice = Choice(tuple(columns or ()), dict(given or {}), tuple(onehot), steps)
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return from_array(load_numpy(path), choice)
        if suffix == ".npz":
            return from_archive(path, choice, recipe)
        if suffix == ".csv":
            names, cells = read_csv(path)
        elif suffix in (".parquet", ".pq"):
            names, cells = read_parquet(path)
        else:
            raise refuse("FL0801", f"`{path.suffix}` files are not read", "give a .npy, .npz, .csv or .parquet file")
    except OSError as e:
        raise refuse(
            "FL0801", f"`{path}` cannot be read: {e.strerror or e}", suggestion="check the path and its permissions"
        ) from None
    return from_columns(path, names, cells, choice, recipe, seed)


# ---- numpy --------------------------------------------------------------------------------------


def load_numpy(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError, SyntaxError) as e:
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


def from_array(array: Any, choice: Choice) -> Table:
    if not isinstance(array, np.ndarray):
        raise refuse("FL0801", "this .npy file holds an archive", "name it .npz")
    if choice:
        raise refuse(
            "FL0804", "a .npy file has no named columns", "use a .csv, .parquet or .npz file to choose columns"
        )
    return Table(rows_of(numeric(array, "the array")))


def rows_of(x: Array) -> Array:
    """Samples of one number each are samples of one coordinate."""
    return x[:, None] if x.ndim == 1 else x


def from_archive(path: Path, choice: Choice, recipe: Recipe | None) -> Table:
    """Arrays by name: the data is `x`, the only one, or the one chosen; a context array goes by its own name."""
    archive = load_numpy(path)
    if isinstance(archive, np.ndarray):
        raise refuse("FL0801", f"`{path}` holds a single array", "name it .npy")
    if choice.onehot or choice.dequantise:
        raise refuse(
            "FL0804", "the arrays of an .npz file are taken as they are", "prepare them there, or use a .csv file"
        )
    names = list(archive.files)
    columns = choice.columns or (recipe.columns if recipe is not None else ())
    given = choice.given or (recipe.given if recipe is not None else {})
    rest = [n for n in names if n not in {p for parts in given.values() for p in parts}]
    key = columns[0] if columns else "x" if "x" in names else rest[0] if len(rest) == 1 else None
    if key is None or key not in names or len(columns) > 1:
        raise refuse("FL0804", f"`{path.name}` holds {', '.join(f'`{n}`' for n in names) or 'nothing'}, and which one is the data is not said",
                     "name the data array `x`, or choose one with --columns")  # fmt: skip
    x = rows_of(numeric(read_array(archive, key, path), f"`{key}`"))
    out: dict[str, Array] = {}
    for name, parts in given.items():
        wanted = parts[0] if parts else name
        if wanted not in names:
            raise refuse(
                "FL0802",
                f"`{path.name}` has no array `{wanted}` for the context `{name}`",
                f"it holds {', '.join(names)}",
            )
        out[name] = rows_of(numeric(read_array(archive, wanted, path), f"`{wanted}`"))
        if len(out[name]) != len(x):
            raise refuse(
                "FL0802",
                f"`{wanted}` has {len(out[name])} samples, and the data {len(x)}",
                suggestion="give one row of context for each sample",
            )
    return Table(x, out, Recipe((key,), {k: tuple(v) or (k,) for k, v in given.items()}))


def read_array(archive: Any, name: str, path: Path) -> Any:
    try:
        return archive[name]
    except (ValueError, zipfile.BadZipFile, EOFError, zlib.error) as e:
        raise refuse(
            "FL0801", f"`{name}` in `{path}` is not readable: {e}", "save it without pickled objects"
        ) from None


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
        raise refuse(
            "FL0801",
            f"`{path}` is not a readable Parquet file: {e}",
            suggestion="write it anew, as by `DataFrame.to_parquet`",
        ) from None
    return list(table.column_names), [table.column(n).to_pylist() for n in table.column_names]


MISSING = {"", "na", "nan", "null", "none", "n/a", "?"}


def refuse_missing(by_name: Mapping[str, Sequence[Any]], used: Sequence[str]) -> None:
    """FL0802 for all columns and rows at once: they are mended together."""
    holes = {n: [k + 1 for k, c in enumerate(by_name[n]) if absent(c)] for n in dict.fromkeys(used)}
    names = [f"`{n}`" for n, rows in holes.items() if rows]
    if not names:
        return
    count, rows = sum(map(len, holes.values())), sorted({k for found in holes.values() for k in found})
    shown = ", ".join(str(r) for r in rows[:8]) + (", .." if len(rows) > 8 else "")
    where = f"column {names[0]} has" if len(names) == 1 else f"columns {', '.join(names)} have"
    raise refuse("FL0802", f"{where} {count} missing value{'s' if count > 1 else ''}: row{'s' if len(rows) > 1 else ''} {shown}",
                 "remove those rows or fill them: a density of missing values is not defined")  # fmt: skip


def to_numbers(name: str, cells: Sequence[Any]) -> Array:
    out = np.empty(len(cells))
    for k, c in enumerate(cells):
        try:
            out[k] = float(c)
        except (TypeError, ValueError):
            raise refuse("FL0802", f"column `{name}` holds the text {str(c)[:40]!r} in row {k + 1}, which is no number",
                         f"leave the column out, or use it as a category: --onehot {name}") from None  # fmt: skip
    if not np.isfinite(out).all():
        k = int(np.flatnonzero(~np.isfinite(out))[0])
        raise refuse(
            "FL0802", f"column `{name}` is infinite in row {k + 1}", suggestion="remove that row or correct it"
        )
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


def is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def absent(cell: Any) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and cell.strip().lower() in MISSING)


def need_columns(path: Path, wanted: Sequence[str], names: Sequence[str]) -> None:
    for n in wanted:
        if n not in names:
            close = difflib.get_close_matches(n, names, 1)
            raise refuse("FL0802", f"`{path.name}` has no column `{n}`",
                         f"did you mean `{close[0]}`?" if close else f"its columns are {', '.join(names[:20])}")  # fmt: skip


def plan_columns(names: Sequence[str], by_name: Mapping[str, Sequence[Any]], choice: Choice) -> Recipe:
    """What a choice means for a file: categories are those that occur, steps those that are printed."""
    given = {k: tuple(v) or (k,) for k, v in choice.given.items()}
    context = {c for parts in given.values() for c in parts}
    columns = choice.columns or tuple(n for n in names if n not in context)
    for n in choice.onehot:
        if n in columns:
            raise refuse(
                "FL0804",
                f"`{n}` is a data column, and one-hot numbers have no density",
                f"use it as context, or dequantise it: --dequantise {n}",
            )
        if n not in context:
            raise refuse("FL0804", f"`{n}` is one-hot, and belongs to no context", f"as in `--given c={n}`")
    wanted = dict.fromkeys(columns, 0.0) if choice.dequantise is True else dict(choice.dequantise or {})
    for n in wanted:
        if n not in columns:
            raise refuse("FL0804", f"`{n}` is to be dequantised, and is no data column", "context needs no density")
    categories: dict[str, tuple[str, ...]] = {}
    steps: dict[str, float] = {}
    for n in (*choice.onehot, *wanted):
        words = n in choice.onehot or not all(is_number(c) or absent(c) for c in by_name[n])
        if words:
            categories[n] = tuple(sorted({str(c) for c in by_name[n]}))
        if n in wanted:
            step = 1.0 if words else wanted[n] or printed_step(to_numbers(n, by_name[n]))
            if step > 0:
                steps[n] = step
    return Recipe(columns, given, categories, choice.onehot, steps)


def codes(name: str, cells: Sequence[Any], kinds: Sequence[str]) -> Array:
    """Category numbers; a category that was not there before is refused with its row."""
    number = {k: i for i, k in enumerate(kinds)}
    out = np.empty(len(cells))
    for k, c in enumerate(cells):
        if str(c) not in number:
            raise refuse("FL0802", f"column `{name}` has the new category {str(c)[:40]!r} in row {k + 1}",
                         f"the run knows {', '.join(kinds[:12])}")  # fmt: skip
        out[k] = number[str(c)]
    return out


def from_columns(
    path: Path, names: list[str], cells: Sequence[Sequence[Any]], choice: Choice, recipe: Recipe | None, seed: int
) -> Table:
    by_name = dict(zip(names, cells, strict=True))
    asked = [*choice.columns, *choice.onehot, *(choice.dequantise if isinstance(choice.dequantise, Mapping) else ())]
    need_columns(path, [*asked, *(c for k, parts in choice.given.items() for c in (parts or (k,)))], names)
    if recipe is None or choice:
        context = [c for k, parts in choice.given.items() for c in (tuple(parts) or (k,))]
        refuse_missing(by_name, [*(choice.columns or [n for n in names if n not in context]), *context])
        recipe = plan_columns(names, by_name, choice)
    need_columns(path, [*recipe.columns, *(c for parts in recipe.given.values() for c in parts)], names)
    refuse_missing(by_name, [*recipe.columns, *(c for parts in recipe.given.values() for c in parts)])
    if not recipe.columns:
        raise refuse("FL0804", "no column is left for the data", "name them with --columns")
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    data: list[Array] = []
    rounded: list[Array] = []
    for n in recipe.columns:
        v = codes(n, by_name[n], recipe.categories[n]) if n in recipe.categories else to_numbers(n, by_name[n])
        rounded.append(v)
        if n in recipe.steps:
            v = v + rng.uniform(-0.5, 0.5, len(v)) * recipe.steps[n]
            coded = f" of its categories {', '.join(recipe.categories[n])}" if n in recipe.categories else ""
            notes.append(f"`{n}` dequantised: uniform noise of width {recipe.steps[n]:g}{coded}")
        data.append(v)
    out: dict[str, Array] = {}
    for name, parts in recipe.given.items():
        blocks: list[Array] = []
        for c in parts:
            if c in recipe.onehot:
                kinds = recipe.categories[c]
                blocks.append(np.eye(len(kinds))[codes(c, by_name[c], kinds).astype(int)])
                notes.append(f"`{c}` one-hot: {', '.join(kinds)}")
            else:
                blocks.append(to_numbers(c, by_name[c])[:, None])
        out[name] = np.concatenate(blocks, axis=1)
    before = np.stack(rounded, axis=1) if recipe.steps else None
    return Table(np.stack(data, axis=1), out, recipe, notes, before)


# ---- standardisation and splits -----------------------------------------------------------------


@dataclass
class Standardiser:
    """x -> (x - mean) / scale for each coordinate; kept with the model."""

    mean: Array
    scale: Array

    @staticmethod
    def fit(x: Array, columns: Sequence[str] = ()) -> Standardiser:
        with np.errstate(over="ignore", under="ignore"):  # of squares: told below
            mean, scale = x.mean(axis=0), x.std(axis=0)
        flat = np.flatnonzero(~((scale > 0) & np.isfinite(scale)).reshape(-1))
        if len(flat):
            k = int(flat[0])
            name = f"`{columns[k]}`" if k < len(columns) else f"number {k}"
            column = x.reshape(len(x), -1)[:, k]
            if column.min() == column.max():
                raise refuse("FL0802", f"column {name} is constant, and has no density", "leave it out")
            raise refuse(
                "FL0802", f"the values of column {name} are too large or too close together to be standardised",
                "give it in other units",
            )  # fmt: skip
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
