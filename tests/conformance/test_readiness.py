"""Norms and transformers to come: the main entry of each card is said by the language, runs and has gradients.

`readiness/NNN.flow` is a trial of the card of that number, not an entry. Cards 033, 069, 093 and 117 have entries.
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


def spd(batch: int, size: int, seed: int = 0) -> Tensor:
    a = data(batch, size, size, seed=seed)
    return a @ a.mT + 0.3 * torch.eye(size, dtype=torch.float64)


def log_of(m: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    return (vectors * values.log().unsqueeze(-2)) @ vectors.mT


def flat(m: Tensor) -> Tensor:
    """Log-Cholesky coordinates."""
    low = torch.linalg.cholesky(m)
    return low.tril(-1) + torch.diag_embed(low.diagonal(dim1=-2, dim2=-1).log())


def lie(norm: str, size: int = 3, **start: Tensor) -> Any:
    net = module("135", f"net g(x: R[E = {size}, D = {size}]) {{ {norm}(x) }}", "g")
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(start[name.rsplit(".", 1)[-1]])
    return net


@pytest.mark.parametrize("norm", ["liebn_lem()", "liebn_lcm()", "liebn_lcm(0.5)", "liebn_aim(25)"])
def test_135_mean_and_dispersion_are_what_is_asked(norm: str) -> None:
    """Items 1 to 3 of the card: the Frechet mean of the outputs is the bias, their dispersion s² v / (v + eps)."""
    shift = data(3, 3, seed=8) * 0.4
    s, x = torch.tensor(1.7, dtype=torch.float64), spd(8, 3)
    y = lie(norm, P=shift, s=s)(x)
    assert torch.linalg.eigvalsh(y).min() > 0
    if "aim" not in norm:
        theta = 0.5 if "0.5" in norm else 1.0

        def chart(m: Tensor) -> Tensor:
            return log_of(m) if "lem" in norm else flat(torch.matrix_exp(theta * log_of(m)))

        d, e = chart(x), chart(y)
        bias = (shift + shift.mT) / 2 if "lem" in norm else shift.tril()
        v = (d - d.mean(0)).square().sum((1, 2)).mean() / theta**2
        torch.testing.assert_close(e.mean(0), bias, rtol=0, atol=1e-8)
        torch.testing.assert_close(
            (e - bias).square().sum((1, 2)).mean() / theta**2, s**2 * v / (v + 1e-5), rtol=1e-6, atol=0
        )
        return
    bias = torch.matrix_exp((shift + shift.mT) / 2)
    back = torch.matrix_exp(-0.5 * log_of(bias))
    logs = log_of(back @ y @ back)
    assert logs.mean(0).abs().max() < 1e-6
    m = x.mean(0)
    for _ in range(100):
        half, inner = torch.matrix_exp(0.5 * log_of(m)), torch.matrix_exp(-0.5 * log_of(m))
        m = half @ torch.matrix_exp(log_of(inner @ x @ inner).mean(0)) @ half
    low = torch.linalg.cholesky(m).inverse()
    v = log_of(low @ x @ low.mT).square().sum((1, 2)).mean()
    torch.testing.assert_close(logs.square().sum((1, 2)).mean(), s**2 * v / (v + 1e-5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["liebn_lem()", "liebn_aim(5)", "liebn_lcm()", "liebn_lcm(0.5)"])
def test_135_of_one_number_it_is_batch_norm_of_the_logarithm(norm: str) -> None:
    """Item 4: with the factor 2 that log-Cholesky has."""
    shift, s, x = data(1, 1, seed=8), torch.tensor(1.3, dtype=torch.float64), data(9, seed=2).exp()
    y = lie(norm, 1, P=shift, s=s)(x[:, None, None]).flatten()
    logs, v = x.log(), x.log().var(correction=0)
    half = 2 if "lcm" in norm else 1
    theta = 0.5 if "0.5" in norm else 1.0  # the bias stands in the chart of x^θ, whose factor is its root
    bias = shift.flatten() * (2 / theta if half == 2 else 1)
    expected = (half * s * (logs - logs.mean()) / (v + half**2 * 1e-5).sqrt() + bias).exp()
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-8)


def test_135_gradients_where_eigenvalues_repeat() -> None:
    """Item 7: at the identity, against finite differences."""
    for call in ("matrix_log[E, D](x)", "matrix_power[E, D](x, 0.5)", "matrix_exp[E, D](x)"):
        net = fl.compile(f"net g(x: R[E = 3, D = 3]) {{ {call} }}", flow="g", dtype=torch.float64)
        for x in (
            torch.eye(3, dtype=torch.float64)[None],
            spd(2, 3),
            torch.diag(torch.tensor([1.0, 1.0, 2.0]).double())[None],
        ):
            assert torch.autograd.gradcheck(net, x.requires_grad_(), atol=1e-5)
