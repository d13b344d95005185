"""Rules around the optimizer's step: gradients clipped by unit, weights whose vectors keep length 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flowlang as fl
from flowlang.train.loop import train
from flowlang.train.units import clip_units, keep_units
from tests.train.test_run import SPEC, options, table


def clipped(g: np.ndarray, w: np.ndarray, clip: float) -> np.ndarray:
    """The rule unit by unit, as the paper's listing has it."""
    rows = zip(g, w, strict=True) if w.ndim > 1 else [(g, w)]
    out = []
    for a, b in rows:
        bound = clip * max(float(np.sqrt((b**2).sum())), 1e-3)
        size = float(np.sqrt((a**2).sum()))
        out.append(a * bound / max(size, 1e-6) if size >= bound else a)
    return np.stack(out) if w.ndim > 1 else out[0]


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7), (6,), ()])
def test_card_052_items_5_and_6_a_unit_s_gradient_is_bounded_by_its_weights(shape: tuple[int, ...]) -> None:
    """Against a loop over units; those below their bound keep their bits, the others their direction."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    p.grad = torch.randn(shape, dtype=torch.float64)
    if len(shape) > 1:
        p.grad *= torch.logspace(-4, 1, shape[0], dtype=torch.float64).reshape(-1, *(1,) * (len(shape) - 1))
    if len(shape) > 1:
        p.data[-1] = 0  # of no length: 1e-3 counts
    before = p.grad.clone()
    clip_units([{"params": [p], "clip": 0.01}, {"params": [nn.Parameter(torch.ones(2))], "clip": 0.01}])
    expected = clipped(before.numpy(), p.detach().numpy(), 0.01)
    np.testing.assert_allclose(p.grad.numpy(), expected, rtol=1e-12, atol=0)
    if len(shape) > 1:
        assert torch.equal(p.grad[0], before[0])  # below its bound, though the whole gradient is above the weight's
        assert before.norm() > 0.01 * p.norm()
        cosine = torch.cosine_similarity(p.grad.flatten(1), before.flatten(1))
        assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-12)


def test_groups_without_the_rule_are_left_alone() -> None:
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.full((3, 3), 100.0)
    clip_units([{"params": [p], "lr": 0.1}])
    keep_units([{"params": [p], "lr": 0.1}])
    assert float(p.grad.min()) == 100
    assert float(p.detach().min()) == 1


@pytest.mark.parametrize("axis", [0, 1])
def test_card_022_item_1_vectors_have_length_1_after_training(axis: int, tmp_path: Path) -> None:
    flow = fl.compile(SPEC, seed=0)
    train(flow, table(), tmp_path, options(rules=f"*weight: unit={axis}, clip=0.5"))
    weights = [p.detach() for n, p in flow.named_parameters() if n.endswith("weight") and p.dim() == 2]
    assert weights
    for w in weights:
        assert ((w.norm(dim=axis) - 1).abs() < 1e-6).all()
    others = [p.detach() for n, p in flow.named_parameters() if not n.endswith("weight")]
    assert any((p.norm() - 1).abs() > 1e-3 for p in others)


def test_a_vector_of_zeros_stays() -> None:
    p = nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    keep_units([{"params": [p], "unit": 1}])
    assert p.detach().tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]
