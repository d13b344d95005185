"""Card 074, spectral normalisation: its items under "What must hold", torch's own layer, and a small GAN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

import flowlang as fl
from tests.catalogue.nets import count, data, in_onnx, net, same_value_and_gradients, shaken

LINEAR = "linear[D -> E = 5](x, weight = spectral)"
LAYERS = {
    LINEAR: (nn.Linear(7, 5), {"D": 7}, 0),
    "conv(x, 4, kernel = 3, weight = spectral(rounds = 3))": (nn.Conv2d(3, 4, 3, padding=1), {"C": 3, "H": 5, "W": 4}, 0),
    "conv_transpose(x, 4, kernel = 4, stride = 2, weight = spectral)": (nn.ConvTranspose2d(3, 4, 4, 2, 1), {"C": 3, "H": 3, "W": 4}, 1),
}  # fmt: skip


def weight(module: Any) -> Tensor:
    return next(p for n, p in module.named_parameters() if n.endswith("_weight"))


def used(module: Any) -> Tensor:
    return module.spectral(weight(module))


def matrix(w: Tensor) -> Tensor:
    return w.flatten(1)


@pytest.mark.parametrize("body", LAYERS)
def test_layers_are_torch_s(body: str) -> None:
    """torch.nn.utils.spectral_norm over training steps and at inference: value, gradients, states."""
    layer, sizes, dim = LAYERS[body]
    mine = shaken(net(body, **sizes))
    other: Any = spectral_norm(layer.double(), n_power_iterations=3 if "rounds" in body else 1, dim=dim)
    bias = next(p for n, p in mine.named_parameters() if n.endswith("_bias"))
    with torch.no_grad():
        w = weight(mine)
        other.weight_orig.copy_(w)
        other.bias.copy_(bias)
        other.weight_u.copy_(mine.spectral.u)
    for step in range(3):
        x = data(3, *sizes.values(), seed=step)
        same_value_and_gradients(mine, other, x, [(w, other.weight_orig), (bias, other.bias)])
        torch.testing.assert_close(mine.spectral.u, other.weight_u, rtol=1e-10, atol=1e-12)
    mine.eval(), other.eval()
    same_value_and_gradients(mine, other, data(3, *sizes.values()), [(w, other.weight_orig), (bias, other.bias)])


def test_1_and_2_the_estimate_converges_from_below() -> None:
    """Items 1 and 2: σ never exceeds the largest singular value, and equals it after 50 passes; then W/σ has norm 1."""
    mine = shaken(net(LINEAR, D=7))
    true = torch.linalg.svdvals(weight(mine))[0]
    sigma = torch.zeros(())
    for _ in range(50):
        w = used(mine)
        sigma = weight(mine).norm() / w.norm()
        assert sigma <= true * (1 + 1e-12)
        assert torch.linalg.svdvals(w)[0] >= 1 - 1e-12
    assert abs(sigma - true) < 1e-5
    assert abs(torch.linalg.svdvals(used(mine))[0] - 1) < 1e-5


def test_3_states_change_while_training_alone() -> None:
    """Item 3: u changes in training passes, not at inference; has no gradient; is saved and restored."""
    mine = net(LINEAR, D=7)
    x = data(4, 7)
    before = mine.spectral.u.clone()
    mine(x).sum().backward()
    assert not torch.equal(mine.spectral.u, before)
    assert not mine.spectral.u.requires_grad
    assert "spectral.u" not in dict(mine.named_parameters())
    mine.eval()
    kept = mine.spectral.u.clone()
    first = mine(x)
    assert torch.equal(mine.spectral.u, kept)
    twin = net(LINEAR, seed=7, D=7).eval()
    assert not torch.allclose(twin(x), first)
    twin.load_state_dict(mine.state_dict())
    assert torch.equal(twin(x), first)


def test_4_and_5_the_gradient() -> None:
    """Items 4 and 5: dL/dW = (G - λ u vᵀ)/σ with λ = <G, W/σ>; W's scale changes nothing, and so <dL/dW, W> = 0."""
    mine = shaken(net(LINEAR, D=7))
    x, target = data(6, 7), data(6, 5, seed=3)
    for _ in range(3):
        mine(x)
    mine.eval()
    w, bias = weight(mine), next(p for n, p in mine.named_parameters() if n.endswith("_bias"))
    u, v = mine.spectral.u, mine.spectral.v
    sigma = u @ w @ v
    normed = (w / sigma).detach().requires_grad_()
    (g,) = torch.autograd.grad((x @ normed.T + bias - target).square().sum(), [normed])
    (found,) = torch.autograd.grad((mine(x) - target).square().sum(), [w])
    torch.testing.assert_close(found, (g - (g * normed).sum() * torch.outer(u, v)) / sigma, rtol=1e-6, atol=1e-9)
    assert abs((found * w).sum()) < 1e-9
    before = mine(x)
    with torch.no_grad():
        w.mul_(3.5)
    torch.testing.assert_close(mine(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normed", [True, False])
def test_6_a_discriminator_is_lipschitz(normed: bool) -> None:
    """Item 6: after the estimate has converged, |D(x) - D(y)| <= |x - y|; with plain weights scaled up it is not."""
    option = ", weight = spectral" if normed else ""
    body = f"h = relu(linear[D -> H = 32](x{option})); linear[J -> E = 1](relu(linear[H -> J = 32](h{option})){option})[E = 0]"
    mine = net(body, D=4)
    with torch.no_grad():
        for p in mine.parameters():
            p.mul_(5.0)
    for _ in range(500):
        mine(data(2, 4))
    mine.eval()
    x, y = data(1000, 4, seed=2), data(1000, 4, seed=3)
    slope = ((mine(x) - mine(y)).abs() / (x - y).norm(dim=1)).max()
    assert (slope <= 1 + 1e-4) == normed


def test_7_the_published_size() -> None:
    """Item 7."""
    with torch.device("meta"):
        mine = net("sn_disc_resnet32(x)", torch.float32, C=3, H=32, W=32)
    assert count(mine) == 1_053_824


@pytest.mark.parametrize("body", ["sn_disc_resnet32(ch = 8)(x)", "sn_disc_cnn(ch = 4)(x)"])
def test_exported_weights_are_folded(body: str, tmp_path: Path) -> None:
    """At inference σ is a number: the model holds W/σ."""
    mine = net(body, torch.float32, C=3, H=32, W=32)
    x = data(2, 3, 32, 32, dtype=torch.float32)
    for _ in range(5):
        mine(x)
    mine.eval()
    found, ops = in_onnx(mine, x, tmp_path)
    torch.testing.assert_close(torch.as_tensor(found), mine(x).detach(), rtol=1e-4, atol=1e-4)
    assert not {"Div", "Abs", "Einsum"} & set(ops)


def test_the_model_s_programs() -> None:
    """Hinge losses: the discriminator's has no gradient in the generator."""
    model = fl.compile("model s = sngan(d = sn_disc_resnet32(ch = 4), g = gen_resnet32(ch = 4), noise = 8)\n", seed=0)
    x = data(4, 3, 32, 32, dtype=torch.float32)
    loss = model.d_loss(x)
    assert loss.shape == ()
    loss.backward()
    groups = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert groups == {"d"}
    model.zero_grad()
    model.g_loss(4).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.startswith("g."))
    assert model.sample(3).shape == (3, 3, 32, 32)


RING = """
net critic(weight: net? = none) (x: R[D]) {
  h = leaky_relu(linear[D -> H = 64](x, weight = weight), 0.1)
  h := leaky_relu(linear[H -> H](h, weight = weight), 0.1)
  linear[H -> E = 1](h, weight = weight)[E = 0]
}
net maker(z: R[Z]) {
  h = relu(linear[Z -> H = 64](z))
  linear[H -> D = 2](relu(linear[H -> H](h)))
}
model ring(d: net = critic(weight = WEIGHT), g: net = maker) {
  data x: R[D = 2]
  def d_loss(x) {
    z: R[Z = 4] ~ normal
    relu(1 - d(x)) + relu(1 + d(stop(g(z))))
  }
  def g_loss {
    z: R[Z = 4] ~ normal
    -d(g(z))
  }
  def sample {
    z: R[Z = 4] ~ normal
    g(z)
  }
}
"""


def ring(n: int, g: torch.Generator) -> Tensor:
    angle = torch.randint(8, (n,), generator=g) * (math.pi / 4)
    return torch.stack([angle.cos(), angle.sin()], -1) + 0.05 * torch.randn(n, 2, generator=g)


def trained(normed: bool, seed: int, lr: float) -> tuple[bool, int]:
    """Whether the losses stay finite over 500 steps, and how many of the eight modes are met."""
    torch.manual_seed(seed)
    model: Any = fl.compile(RING.replace("WEIGHT", "spectral" if normed else "none"), seed=seed)
    g = torch.Generator().manual_seed(seed)
    ds = [p for n, p in model.named_parameters() if n.startswith("d.")]
    gs = [p for n, p in model.named_parameters() if n.startswith("g.")]
    both = torch.optim.Adam(ds, lr, (0.0, 0.9)), torch.optim.Adam(gs, lr, (0.0, 0.9))
    finite = True
    for _ in range(500):
        for _ in range(3):
            both[0].zero_grad()
            loss = model.d_loss(ring(128, g))
            loss.backward()
            both[0].step()
        both[1].zero_grad()
        other = model.g_loss(128)
        other.backward()
        both[1].step()
        finite = finite and bool(torch.isfinite(loss + other))
    made = model.sample(2000)
    modes = torch.stack([torch.arange(8).mul(math.pi / 4).cos(), torch.arange(8).mul(math.pi / 4).sin()], -1)
    near = torch.cdist(made, modes) < 0.15  # three deviations
    return finite, int((near.float().mean(0) > 0.01).sum())


@pytest.mark.slow
def test_8_a_ring_of_eight_modes() -> None:
    """Item 8: with spectral norm the losses stay finite and at least 5 modes are met; without it at ten times the rate they
    diverge or meet fewer, averaged over seeds. Measured over eight: 7.9 modes with it (8 8 8 8 7 8 8 8), 7.1 without it
    (8 7 7 8 8 5 8 6), all finite; at a rate of 1e-3 without it 8 in all: the rate is what it bears better."""
    seeds = range(4)
    normed, plain = ([trained(on, s, rate) for s in seeds] for on, rate in ((True, 1e-3), (False, 1e-2)))
    assert all(finite for finite, _ in normed)
    modes = [sum(m for _, m in runs) / len(seeds) for runs in (normed, plain)]
    assert modes[0] >= 5
    assert not all(finite for finite, _ in plain) or modes[1] < modes[0]
