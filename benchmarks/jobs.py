"""Quality of the trained specs: digits by label and guidance, a series beside simple forecasts, text beside n-grams.

Each command takes the folder that `flowlang train` left (the header of the spec says how), prints figures, one JSON line for
each method, and draws a picture.

    python benchmarks/jobs.py digits out/guided_digits -o digits.png
    python benchmarks/jobs.py series out/carbon -o series.png
    python benchmarks/jobs.py text out/topics
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import flowlang as fl
from flowlang.train import datasets
from flowlang.train.data import split


def say(**facts: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}), flush=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@click.group()
def cli() -> None:
    """Quality of the trained specs."""


# ---- digits -------------------------------------------------------------------------------------


def frechet(a: Any, b: Any) -> float:
    """Fréchet distance of two Gaussians with the moments of a and b."""
    from scipy.linalg import sqrtm

    ca, cb = np.cov(a.T), np.cov(b.T)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(sqrtm(ca @ cb))))


@cli.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--spec", default="specs/guided_digits.flow", show_default=True)
@click.option(
    "--data", "name", default="digits_labelled", show_default=True, help="A data set of flowlang.train.datasets."
)
@click.option("--guidance", multiple=True, type=float, default=(0.0, 1.0, 2.0, 4.0), show_default=True)
@click.option("-n", "--count", default=60, show_default=True, help="Samples of each label.")
@click.option("-o", "--out", type=click.Path(path_type=Path))
def digits(run: Path, spec: str, name: str, guidance: tuple[float, ...], count: int, out: Path | None) -> None:
    """Accuracy: samples whose label a support vector machine, fitted to the training rows, tells. Fréchet distance: to the
    held-out rows, in the first 16 principal components of the training rows. Coverage: held-out rows that have a sample nearer than
    their fifth nearest training row."""
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors
    from sklearn.svm import SVC

    columns = datasets.load(name).columns
    labels = columns["label"].astype(int)
    x = np.stack([v for k, v in columns.items() if k != "label"], 1)
    kept, held = split(len(x), [0.1], 0)  # as `flowlang train` cut them
    judge = SVC(C=10).fit(x[kept], labels[kept])
    short = PCA(16, random_state=0).fit(x[kept])
    radius = NearestNeighbors(n_neighbors=5).fit(x[kept]).kneighbors(x[held])[0][:, -1]
    side = round(x.shape[1] ** 0.5)

    def told(found: Any, wanted: Any) -> dict[str, float]:
        nearest = NearestNeighbors(n_neighbors=1).fit(found).kneighbors(x[held])[0][:, 0]
        return {
            "accuracy": float(judge.score(found, wanted)),
            "frechet": frechet(short.transform(found), short.transform(x[held])),
            "coverage": float((nearest < radius).mean()),
        }

    some = np.random.default_rng(0).permutation(kept)[: 10 * count]
    say(method="training rows", **told(x[some], labels[some]))
    say(method="held-out rows", accuracy=float(judge.score(x[held], labels[held])))
    rows = []
    wanted = np.tile(np.arange(10), count)
    for w in guidance:
        model: Any = fl.load(run, spec, guidance=w).eval()
        with torch.no_grad():
            drawn = model.sample(torch.as_tensor(wanted), generator=generator(0)).numpy()
        say(method=f"guidance {w:g}", **told(drawn.reshape(len(drawn), -1), wanted))
        rows.append(drawn.reshape(-1, side, side)[:20])
    if out is not None:
        from flowlang.plots import image_grid

        image_grid(np.clip(np.concatenate(rows), -1, 1), out, columns=10)


# ---- series -------------------------------------------------------------------------------------


def carried(s: Any, x: Any, at: Any) -> Any:
    return np.full_like(at, x[-1])


def year_before(s: Any, x: Any, at: Any) -> Any:
    """The value a year earlier (a quarter of the window), between the known ones, and the growth of a year."""
    grown = np.mean([v - np.interp(t - 0.25, s, x) for t, v in zip(s, x, strict=True) if t > 0.25 + s[0]])
    back = np.where(at - 0.25 > s[-1], at - 0.5, at - 0.25)
    return np.interp(back, s, x) + grown * np.round((at - back) / 0.25)


def harmonics(s: Any, x: Any, at: Any) -> Any:
    """Least squares of a line and two waves of a year and half a year: what is known of the series, told to the method."""

    def basis(t: Any) -> Any:
        return np.stack([np.ones_like(t), t, *(f(2 * np.pi * k * t) for k in (4, 8) for f in (np.sin, np.cos))], 1)

    return basis(at) @ np.linalg.lstsq(basis(s), x, rcond=None)[0]


@cli.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path))
def series(run: Path, out: Path | None) -> None:
    """Root mean square errors in ppm on windows of years after the training's: of the forecast, and of known values between that were
    hidden one in four."""
    model: Any = fl.load(run).eval()
    table = datasets.load("co2_later").columns
    x, s = (torch.as_tensor(table[k], dtype=torch.float32) for k in ("x", "s"))
    seen = s < datasets.SEEN
    hidden = seen & (torch.rand(s.shape, generator=generator(0)) < 0.25)
    # What is hidden is moved beyond what the encoder reads.
    masked = torch.where(hidden, datasets.SEEN + 0.001 + 0 * s, s)
    order = masked.argsort(dim=1, stable=True)
    times = torch.nn.functional.pad(s, (0, 200 - s.shape[1]))  # the program takes 200
    with torch.no_grad():
        ahead = model.predict(x, s, times)[:, : s.shape[1]]
        between = model.predict(x.gather(1, order), masked.gather(1, order), times)[:, : s.shape[1]]
    errors: dict[str, list[Any]] = {}

    def add(name: str, kind: Any, off: Any) -> None:
        errors.setdefault(f"{name}|{kind}", []).append(off)

    for k in range(len(x)):
        known, later, gaps = seen[k].numpy(), ~seen[k].numpy(), hidden[k].numpy()
        xs, ss = x[k].numpy().astype(float), s[k].numpy().astype(float)
        add("latent ODE", "ahead", ahead[k].numpy()[later] - xs[later])
        add("latent ODE", "between", between[k].numpy()[gaps] - xs[gaps])
        for method in (carried, year_before, harmonics):
            add(method.__name__, "ahead", method(ss[known], xs[known], ss[later]) - xs[later])
        left = known & ~gaps
        add("line between neighbours", "between", np.interp(ss[gaps], ss[left], xs[left]) - xs[gaps])
        add("harmonics", "between", harmonics(ss[left], xs[left], ss[gaps]) - xs[gaps])
    for name, offs in errors.items():
        method, kind = name.split("|")
        say(method=method, kind=kind, rmse_ppm=3 * float(np.sqrt((np.concatenate(offs) ** 2).mean())))
    if out is not None:
        picture(model, x, s, out)


def picture(model: Any, x: Any, s: Any, out: Path) -> None:
    from flowlang.plots import DATA, SAMPLES, figure, plain, write

    fig = figure(10, 5.4)
    times = torch.linspace(0, 1, 200).expand(1, 200)
    for ax, k in zip(fig.subplots(2, 2).reshape(-1), (3, 40, 120, 333), strict=True):
        one, at = x[k : k + 1], s[k : k + 1]
        with torch.no_grad():
            middle = model.predict(one, at, times)[0]
            drawn = [model.predict_drawn(one, at, times, generator=generator(j))[0] for j in range(12)]
        years, known = 4 * times[0], (at < datasets.SEEN)[0]
        for y in drawn:
            ax.plot(years, 3 * y, color=SAMPLES, lw=0.5, alpha=0.35)
        ax.plot(years, 3 * middle, color=SAMPLES, lw=1.4, label="latent ODE")
        t = at[0].numpy().astype(float)
        v = one[0].numpy().astype(float)
        known = known.numpy()
        ahead = np.linspace(datasets.SEEN, 1, 80)
        ax.plot(
            4 * ahead,
            3 * year_before(t[known], v[known], ahead),
            color="#8a8a8a",
            lw=1,
            ls="--",
            label="a year before, and growth",
        )
        ax.plot(4 * t[known], 3 * v[known], "o", ms=3, color=DATA, label="read")
        ax.plot(4 * t[~known], 3 * v[~known], "o", ms=3, mfc="white", color=DATA, label="to be told")
        ax.axvline(4 * datasets.SEEN, color="#cccccc", lw=0.8)
        ax.set_xlabel("years", fontsize=8)
        ax.set_ylabel("ppm from the mean", fontsize=8)
        plain(ax)
    fig.axes[0].legend(fontsize=7, frameon=False)
    write(fig, out)


# ---- text ---------------------------------------------------------------------------------------


class Ngrams:
    """Letters by the n - 1 before them, each order mixed with the lower one (Witten & Bell 1991)."""

    def __init__(self, rows: Any, n: int, letters: int = 30):
        self.n, self.letters = n, letters
        self.counts: dict[tuple[int, ...], Any] = {}
        for row in rows:
            for i in range(len(row)):
                for k in range(min(n, i + 1)):
                    before = tuple(row[i - k : i])
                    self.counts.setdefault(before, np.zeros(letters))[row[i]] += 1

    def law(self, before: tuple[int, ...]) -> Any:
        low = np.full(self.letters, 1 / self.letters) if not before else self.law(before[1:])
        found = self.counts.get(before)
        if found is None:
            return low
        kinds = (found > 0).sum()
        return (found + kinds * low) / (found.sum() + kinds)

    def bits(self, rows: Any) -> float:
        """Mean bits for each letter, given up to n - 1 letters before."""
        laws: dict[tuple[int, ...], Any] = {}
        total = 0.0
        for row in rows:
            for i, letter in enumerate(row):
                before = tuple(row[max(0, i - self.n + 1) : i])
                if before not in laws:
                    laws[before] = self.law(before)
                total -= np.log2(laws[before][letter])
        return float(total / np.size(rows))

    def drawn(self, n: int, length: int, rng: np.random.Generator) -> Any:
        out = []
        for _ in range(n):
            row: list[int] = []
            for _ in range(length):
                law = self.law(tuple(row[max(0, len(row) - self.n + 1) :]))
                row.append(int(rng.choice(self.letters, p=law / law.sum())))
            out.append(row)
        return np.array(out)


@cli.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("-n", "--count", default=400, show_default=True)
def text(run: Path, count: int) -> None:
    """Of samples: bits for each letter under an interpolated 5-gram of the training rows (the text's own is the floor), and the share of
    whole words that the text has. Beside samples of 1-, 2- and 3-grams."""
    rows = np.stack(list(datasets.load("topics").columns.values()), 1).astype(int)
    kept, held = split(len(rows), [0.1], 0)
    some = kept[:8000]  # windows overlap
    judge = Ngrams(rows[some], 5)
    spell = "".join(datasets.LETTERS[k] for k in range(30))

    def words(found: Any) -> list[str]:
        return [
            w for row in found for w in "".join(spell[k] for k in row).strip(".,'").split(" ")[1:-1] if w.strip(".,'")
        ]

    known = {w.strip(".,'") for w in words(rows[kept])}

    def told(found: Any) -> dict[str, float]:
        said = [w.strip(".,'") for w in words(found)]
        return {"bits": judge.bits(found), "known_words": float(np.mean([w in known for w in said]))}

    say(method="held-out text", **told(rows[held][:count]))
    for n in (1, 2, 3):
        say(method=f"{n}-gram", **told(Ngrams(rows[some], n).drawn(count, rows.shape[1], np.random.default_rng(0))))
    model: Any = fl.load(run).eval()
    with torch.no_grad():
        found = model.sample((count,), generator=generator(0)).long().numpy()
    say(method="discrete flow matching", **told(found))
    for row in found[:8]:
        print("  ", "".join(spell[k] for k in row))


if __name__ == "__main__":
    cli()
