"""Norms and transformers to come: the main entry of each card is said by the language, runs and has gradients.

`readiness/NNN.flow` is a trial of the card of that number, not an entry. Cards 033, 069, 093 and 117 have entries; card 135
needs eigenvectors, which the language lacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl

TRIALS = sorted((Path(__file__).parent / "readiness").glob("*.flow"))


def module(card: str, text: str = "", flow: str = "f") -> Any:
    source = (Path(__file__).parent / "readiness" / f"{card}.flow").read_text("utf-8")
    return fl.compile(f"{source}\n{text}", flow=flow, seed=0, dtype=torch.float64)


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("card", [t.stem for t in TRIALS])
def test_the_trial_runs_and_has_gradients(card: str) -> None:
    assert not [d for d in fl.check(TRIALS[0].parent / f"{card}.flow") if d.severity == "error"]
    net = module(card)
    values = [
        torch.randint(64, (4, *s)) if "Int" in net.types.get(n, "") else data(4, *s).requires_grad_()
        for n, s in net.inputs.items()
    ]
    out = net(*values)
    assert torch.isfinite(out).all()
    (out * data(*out.shape, seed=1)).sum().backward()
    grads = {n: p.grad for n, p in net.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in grads.values()), [
        n for n, g in grads.items() if g is None
    ]
    assert torch.isfinite(net.eval()(*values)).all()


def test_017_regions_have_their_own_statistics() -> None:
    net = module("017", "net g(x: R[C = 4, H = 6, W = 6], m: R[H = 6, W = 6]) { rn_basic()(x, m) }", "g")
    x = data(3, 4, 6, 6)
    m = (data(3, 6, 6, seed=1) > 0).double()
    y = net(x, m)
    for region in (m, 1 - m):
        inside = y.transpose(0, 1)[:, region.bool()]
        assert inside.mean(1).abs().max() < 1e-5
        assert (inside.var(1, correction=0) - 1).abs().max() < 1e-3
    plain = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(net(x, 0 * m), plain, rtol=1e-6, atol=1e-6)
    moved = net(x + torch.where(m[:, None] > 0, 3.0, -2.0), m)
    torch.testing.assert_close(moved, y, rtol=1e-5, atol=1e-5)


def test_045_the_geometric_mean_of_the_last_batches_and_its_backward_pass() -> None:
    net = module("045", "net g(x: R[C = 6]) { unified_norm(4, 0, filtered = false)[C](x) }", "g")
    core = next(m for n, m in net.named_modules() if hasattr(m, "bx"))
    rows: list[Tensor] = []
    nu, e, bg = torch.ones(6).double(), torch.zeros(6).double(), torch.zeros(4, 6).double()
    for k in range(1, 8):
        x, dy = data(5, 6, seed=k).mul(1 + k).requires_grad_(), data(5, 6, seed=50 + k)
        s2 = x.detach().square().mean(0)
        rows.append(s2)
        var = s2 if k <= 4 else torch.stack(rows[-4:]).log().mean(0).exp()
        r = torch.ones(6).double()  # until step 1000
        z = x.detach() / (var + 1e-5).sqrt()
        y = net(x)
        torch.testing.assert_close(y, z)
        nu = 0.9 * nu + 0.1 * var
        torch.testing.assert_close(core.nu, nu)
        (y * dy).sum().backward()
        g = dy * r
        gz = (g * z).mean(0)
        bg[k % 4] = gz
        mg = gz if k <= 4 else bg.mean(0)
        e = 0.9 * e + 0.1 * mg
        torch.testing.assert_close(x.grad, (g - e * z) / (var + 1e-5).sqrt())


def test_063_the_backward_pass_is_on_integers() -> None:
    """Each unit's gradient is a whole multiple of its group's step; the weights' gradient sums over the batch."""
    net = module("063", "net g(x: R[D = 5], W: R[E = 3, D = 5], u: R[E = 3]) { int_product(4)(x, W, u) }", "g")
    x, w, u = data(7, 5).requires_grad_(), data(3, 5, seed=1).requires_grad_(), torch.rand(7, 3, dtype=torch.float64)
    dy = data(7, 3, seed=2) * torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)
    (net(x, w.expand(7, 3, 5), u) * dy).sum().backward()
    r = dy.abs().amax(0)
    step = r.max() / 7 * 2.0 ** -torch.floor(torch.log2(r.max() / r)).clamp(0, 3)
    g = torch.floor(dy / step + u).clamp(-7, 7) * step

    def rounded(v: Tensor, dims: tuple[int, ...]) -> Tensor:
        unit = v.detach().abs().amax(dims, keepdim=True) / 7
        return (v.detach() / unit).round().clamp(-7, 7) * unit

    torch.testing.assert_close(x.grad, g @ rounded(w, (0, 1)))
    torch.testing.assert_close(w.grad, g.T @ rounded(x, (1,)))


def test_132_the_moments_of_the_mixture() -> None:
    net = module("132")
    state = next(m for _, m in net.named_modules() if hasattr(m, "M"))
    with torch.no_grad():
        state.M.copy_(data(4, 4, seed=3)), state.V.copy_(data(4, 4, seed=4).exp())
    old_m, old_v = state.M.clone(), state.V.clone()
    x = data(5, 4, 3, 3)
    mu, s = x.mean((2, 3)), x.var((2, 3), correction=0)
    unit = torch.nn.functional.normalize
    p = torch.softmax(unit(mu, dim=1) @ unit(old_m, dim=1).T / 0.07, 1)[:, :, None]
    mixed, spread = (1 - p) * old_m + p * mu[:, None], (1 - p) * old_v + p * s[:, None]
    mean = mixed.mean(1)
    var = spread.mean(1) + mixed.square().mean(1) - mean**2
    torch.testing.assert_close(net(x), (x - mean[..., None, None]) / (var[..., None, None] + 1e-5).sqrt())
    torch.testing.assert_close(state.M, old_m + 0.1 * (p * (mu[:, None] - old_m)).mean(0))
