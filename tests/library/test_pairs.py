"""`paired[B](x0, x1)`: minibatch optimal transport beside scipy's exact assignment, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flowlang.backends.torch.runtime import assignment, paired
from scipy.optimize import linear_sum_assignment

import flowlang as fl

F64 = torch.float64
MODEL = """
model m(v: net = time_mlp(16)) {
  data x1: R[D = 2]
  def pairs(x1) {
    x0 ~ normal
    paired[B](x0, x1)
  }
  def loss {
    x0 ~ normal
    t ~ uniform(0, 1)
    x0 := paired[B](x0, x1)
    mean((v((1 - t) * x0 + t * x1, t) - (x1 - x0)) ^ 2)
  }
}
"""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_assignment_is_scipy_s(n: int, seed: int) -> None:
    cost = torch.randn(n, n, dtype=F64, generator=generator(seed))
    assert assignment(cost).tolist() == linear_sum_assignment(cost.numpy())[1].tolist()


@pytest.mark.parametrize("shape", [(30,), (5, 6)])
def test_the_sum_of_squares_is_least(shape: tuple[int, ...]) -> None:
    model: Any = fl.compile(MODEL, seed=0, dtype=F64)
    x1 = torch.randn(*shape, 2, dtype=F64, generator=generator(0))
    found = model.pairs(x1, generator=generator(1))
    x0 = torch.randn(*shape, 2, dtype=F64, generator=generator(1))
    rows, columns = linear_sum_assignment(torch.cdist(x1.reshape(-1, 2), x0.reshape(-1, 2)).square().numpy())
    assert torch.equal(found.reshape(-1, 2), x0.reshape(-1, 2)[columns])
    assert rows.tolist() == list(range(30))


def test_without_scipy_the_pairs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(2, 20, 3, dtype=F64, generator=generator(2))
    found = paired(x, y, 1)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert torch.equal(paired(x, y, 1), found)


def test_a_sample_by_itself_and_values_that_are_not_finite_stay() -> None:
    x = torch.randn(3, dtype=F64, generator=generator(3))
    assert torch.equal(paired(x, x + 1, 1), x)
    many = torch.randn(4, 3, dtype=F64, generator=generator(4))
    assert torch.equal(paired(many, many * torch.inf, 1), many)


def test_the_choice_has_no_gradient_and_the_values_keep_theirs() -> None:
    x, y = (torch.randn(9, 2, dtype=F64, generator=generator(k)).requires_grad_() for k in (5, 6))
    out = paired(x, y, 1)
    weight = torch.randn(9, 2, dtype=F64, generator=generator(7))
    gx, gy = torch.autograd.grad((out * weight).sum(), [x, y], allow_unused=True)
    assert gy is None
    order = [int((x == row).all(-1).nonzero()) for row in out]
    assert torch.equal(gx[order], weight)


def test_the_loss_regresses_on_paired_draws() -> None:
    model: Any = fl.compile(MODEL, seed=0, dtype=F64)
    x1 = torch.randn(16, 2, dtype=F64, generator=generator(8))
    found = model.loss(x1, generator=generator(9))
    g = generator(9)
    x0, t = torch.randn(16, 2, dtype=F64, generator=g), torch.rand(16, dtype=F64, generator=g)
    x0 = x0[linear_sum_assignment(torch.cdist(x1, x0).square().numpy())[1]]
    x = (1 - t[:, None]) * x0 + t[:, None] * x1
    torch.testing.assert_close(found, (model.v(x, t) - (x1 - x0)).square().mean())
    found.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_library_model_pairs_where_it_is_asked() -> None:
    x1 = torch.randn(16, 2, generator=generator(10))
    apart, near = (
        fl.compile(f"model m = flow_matching(path = cond_ot, coupling = {c})", D=2, seed=0).loss(
            x1, generator=generator(11)
        )
        for c in ("independent", "ot")
    )
    assert near < apart  # velocities x1 - x0 are shorter


def test_a_built_file_pairs_without_flowlang(tmp_path: Path) -> None:
    import runpy

    file = tmp_path / "m.py"
    file.write_text(fl.generate(MODEL, standalone=True)[0])
    assert "import flowlang" not in file.read_text()
    found = runpy.run_path(str(file))
    assert callable(found["paired"])


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("bijector b(x: R[D]) { x + 0 * paired[B](x, x) }\nflow f { data x: R[D = 2]\n b\n base normal }", "FL0410", "only programs"),
        (MODEL.replace("paired[B]", "paired"), "FL0307", "whose axis is named"),
        (MODEL.replace("paired[B](x0, x1)", "paired[B](x0, stack[K](1.0, 2.0))"), "FL0301", "one type"),
        (MODEL.replace("paired[B](x0, x1)", "paired[B](mean[B](x0), x1)"), "FL0307", "whole batch"),
    ],
)  # fmt: skip
def test_refusals(text: str, code: str, words: str) -> None:
    error = fl.check(text).errors[0]
    assert error.code == code
    assert words in error.message
    assert error.suggestion


def test_onnx_says_that_pairs_are_for_training(tmp_path: Path) -> None:
    model = fl.compile(MODEL, seed=0)
    with pytest.raises(fl.FlowError, match="no ONNX form"):
        fl.export_onnx(model, tmp_path / "m.onnx", programs=["pairs"])
