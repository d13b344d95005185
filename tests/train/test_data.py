"""Files of samples: what is read, how columns are chosen, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowlang as fl
from flowlang.train.data import Recipe, Standardiser, printed_step, read_table

ROWS = "a,b,kind,c\n1.5,2,red,0\n2.5,3,blue,1\n0.5,5,red,1\n3.5,4,green,0\n"


def csv(folder: Path, text: str = ROWS) -> Path:
    path = folder / "data.csv"
    path.write_text(text, "utf-8")
    return path


def refused(code: str, *words: str, path: Path, **options: Any) -> None:
    with pytest.raises(fl.FlowError) as e:
        read_table(path, **options)
    d = e.value.diagnostics[0]
    assert d.code == code
    text = f"{d.message} {d.suggestion or ''}"
    for w in words:
        assert w in text, text


def test_columns_by_name_for_data_and_context(tmp_path: Path) -> None:
    t = read_table(csv(tmp_path), columns=["b", "a"], given={"g": ["c", "kind"]}, onehot=["kind"])
    assert t.x.tolist() == [[2, 1.5], [3, 2.5], [5, 0.5], [4, 3.5]]
    assert t.given["g"].tolist() == [[0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]]
    assert t.recipe.categories == {"kind": ("blue", "green", "red")}


def test_the_rest_is_data_when_only_context_is_named(tmp_path: Path) -> None:
    t = read_table(csv(tmp_path), given={"g": ["kind"]}, onehot=["kind"])
    assert t.columns == ("a", "b", "c")


def test_categories_and_rounded_numbers_are_dequantised_by_their_step(tmp_path: Path) -> None:
    t = read_table(csv(tmp_path), columns=["a", "b", "kind"], dequantise=["b", "kind"], seed=3)
    assert t.x[:, 0].tolist() == [1.5, 2.5, 0.5, 3.5]
    assert np.abs(t.x[:, 1] - [2, 3, 5, 4]).max() <= 0.5
    assert np.round(t.x[:, 2]).tolist() == [2, 0, 2, 1]
    assert t.recipe.steps == {"b": 1.0, "kind": 1.0}
    again = read_table(tmp_path / "data.csv", columns=["a", "b", "kind"], dequantise=["b", "kind"], seed=3)
    assert np.array_equal(t.x, again.x)


def test_a_recipe_reads_other_files_the_same_way(tmp_path: Path) -> None:
    first = read_table(csv(tmp_path), columns=["a"], given={"g": ["kind"]}, onehot=["kind"])
    other = tmp_path / "other.csv"
    other.write_text("kind,z,a\ngreen,9,7\n", "utf-8")
    recipe = Recipe.from_dict(vars(first.recipe))
    assert read_table(other, recipe=recipe).given["g"].tolist() == [[0, 1, 0]]
    other.write_text("kind,a\npink,7\n", "utf-8")
    refused("FL0802", "new category 'pink' in row 1", "blue, green, red", path=other, recipe=recipe)


def test_parquet_npz_and_npy_hold_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    x, g = np.arange(6.0).reshape(3, 2), np.array([[1.0], [0.0], [2.0]])
    np.save(tmp_path / "d.npy", x)
    np.savez(tmp_path / "d.npz", x=x, g=g)
    parquet.write_table(pa.table({"u": x[:, 0], "v": x[:, 1], "g": g[:, 0]}), tmp_path / "d.parquet")
    assert np.array_equal(read_table(tmp_path / "d.npy").x, x)
    for name in ("d.npz", "d.parquet"):
        t = read_table(tmp_path / name, given={"g": ["g"]})
        assert np.array_equal(t.x, x)
        assert np.array_equal(t.given["g"], g)


@pytest.mark.parametrize("hole", ["", "NA", "nan", "?", "null", "N/A"])
def test_missing_values_are_refused_with_their_rows(tmp_path: Path, hole: str) -> None:
    path = csv(tmp_path, f"a,b\n1,2\n{hole},3\n4,5\n{hole},6\n")
    refused("FL0802", "column `a` has 2 missing values: rows 2, 4", path=path)


def test_missing_values_of_all_columns_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "holes.csv"
    path.write_text("a,b,c\n1,,x\n,2,\n3,4,y\n", "utf-8")
    refused(
        "FL0802",
        "columns `a`, `b`, `c` have 3 missing values: rows 1, 2",
        path=path,
        given={"k": ("c",)},
        onehot=("c",),
    )


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path) -> None:
    refused("FL0802", "no column `bb`", "did you mean `b`?", path=csv(tmp_path), columns=["bb"])
    refused("FL0802", "column `kind` holds the text 'red' in row 1", "--onehot kind", path=csv(tmp_path))
    refused("FL0804", "one-hot numbers have no density", path=csv(tmp_path), columns=["kind"], onehot=["kind"])
    refused("FL0802", "line 3", "has 1 cells", path=csv(tmp_path, "a,b\n1,2\n3\n"))
    refused("FL0802", "two columns", path=csv(tmp_path, "a,a\n1,2\n"))
    refused("FL0802", "no rows", path=csv(tmp_path, "a,b\n"))
    refused("FL0802", "no rows", path=csv(tmp_path, ""))
    refused("FL0802", "infinite in row 1", path=csv(tmp_path, "a\ninf\n"))
    refused("FL0804", "no column is left", path=csv(tmp_path, "a\n1\n"), given={"g": ["a"]})


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    refused("FL0801", "is no file", path=tmp_path / "none.csv")
    refused("FL0801", "is no file", path=tmp_path)
    bad = tmp_path / "bad.csv"
    bad.write_bytes(b"a,b\n\xff\xfe,1\n")
    refused("FL0801", "not readable CSV", path=bad)
    for name in ("x.npy", "x.npz", "x.parquet"):
        (tmp_path / name).write_bytes(b"\x93NUMPY garbage")
        refused("FL0801", "not a readable", path=tmp_path / name)
        (tmp_path / name).write_bytes(b"")
        refused("FL0801", "not a readable", path=tmp_path / name)
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused("FL0801", "pickled", path=tmp_path / "o.npy")
    (tmp_path / "x.xls").write_bytes(b"")
    refused("FL0801", "`.xls` files are not read", path=tmp_path / "x.xls")
    np.save(tmp_path / "n.npy", np.array([[1.0, np.nan], [1, 2]]))
    refused("FL0802", "first at rows 0", path=tmp_path / "n.npy")
    np.save(tmp_path / "s.npy", np.array(["a", "b"]))
    refused("FL0802", "and not numbers", path=tmp_path / "s.npy")


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([".csv", ".npy", ".npz"]))
def test_any_bytes_give_a_table_or_a_diagnostic(
    tmp_path_factory: pytest.TempPathFactory, blob: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(blob)
    said, rows = None, 0
    try:
        rows = len(read_table(path))
    except fl.FlowError as e:
        said = e.diagnostics[0].code
    assert rows > 0 or said in ("FL0801", "FL0802", "FL0804")


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(-9, 9), st.integers(1, 9), st.lists(st.integers(-300, 300), min_size=2, max_size=50, unique=True))
def test_the_printed_step_divides_every_difference(exponent: int, digit: int, places: list[int]) -> None:
    step = digit * 10.0**exponent
    found = printed_step(np.array([float(f"{p * step:.12g}") for p in places]))
    gaps = np.diff(sorted(places))
    if found > 0:  # the grid may be coarser than the step, never finer
        assert found == pytest.approx(float(gaps.min()) * step, rel=1e-6)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.floats(0.01, 1e3), st.floats(-1e3, 1e3))
def test_standardisation_is_undone_and_its_log_det_is_that_of_the_map(
    n: int, d: int, scale: float, shift: float
) -> None:
    x = np.random.default_rng(0).standard_normal((n, d)) * scale + shift
    s = Standardiser.fit(x)
    assert np.allclose(s.undo(s.apply(x)), x)
    jacobian = np.stack([(s.apply(x[:1] + e) - s.apply(x[:1]))[0] for e in np.eye(d)], 1)
    assert np.isclose(np.linalg.slogdet(jacobian)[1], s.log_det, atol=1e-6)
