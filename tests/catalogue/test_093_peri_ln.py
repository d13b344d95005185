"""Card 093, Peri-LN (Kim et al. 2025): its items under "What must hold"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.catalogue.nets import data, in_onnx, net, shaken
from tests.catalogue.tokens import count, lm, outputs, parts, tokens, trained

PRE = "after = identity_norm, first = identity_norm"
POST = "before = identity_norm, after = identity_norm, sum = rms_norm, first = identity_norm"


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


@pytest.mark.parametrize(("width", "depth"), [(32, 8), (1024, 24)])
def test_1_numbers_more_than_pre_ln(width: int, depth: int) -> None:
    """Item 1: 2 L d + d."""
    options = f"width = {width}, depth = {depth}"
    assert count(f"peri_ln_lm({options})") - count(f"peri_ln_lm({options}, {PRE})") == 2 * depth * width + width


def residuals(call: str, scale: float, depth: int = 6) -> list[Tensor]:
    """The residual stream before the first layer and after each, weights times `scale`."""
    module = lm(f"peri_ln_lm(depth = {depth}{', ' + call if call else ''})")
    with torch.no_grad():
        for n, p in module.named_parameters():
            if p.dim() == 2 and "linear" in n:
                p.mul_(scale)
    first: list[Tensor] = []
    parts(module, "PeriLnLayer")[0].register_forward_pre_hook(lambda m, i: first.append(i[0].detach()))
    return [*first[:1], *outputs(module, "PeriLnLayer", tokens())] if first else [*capture(module, first)]


def capture(module: Any, first: list[Tensor]) -> list[Tensor]:
    after = outputs(module, "PeriLnLayer", tokens())
    return [first[0], *after]


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_2_the_residual_stream_is_bounded(scale: float) -> None:
    """Item 2: RMS(x_l) <= RMS(x_0) + 2 l for any weights; not so for Pre-LN; Post-LN's is its gain."""
    xs = residuals("", scale)
    for k, x in enumerate(xs):
        assert bool((rms(x) <= rms(xs[0]) + 2 * k + 1e-6).all())
    post = residuals(POST, scale)
    assert all(torch.allclose(rms(x), torch.ones_like(rms(x)), atol=1e-3) for x in post[1:])
    if scale > 1:
        pre = residuals(PRE, scale)
        assert any(bool((rms(x) > rms(pre[0]) + 2 * k).any()) for k, x in enumerate(pre))


def test_3_the_scale_of_a_module_s_last_weight_is_forgotten() -> None:
    """Item 3: the function stays, and the gradient goes as 1/c."""
    for name in ("Attention", "FeedForward"):
        module = lm("peri_ln_lm(depth = 2)")
        weight = (
            parts(module, name)[0].linear_4_weight if name == "Attention" else parts(module, name)[0].linear_2_weight
        )
        bias = getattr(parts(module, name)[0], "linear_4_bias", None)
        with torch.no_grad():
            weight.mul_(20)  # far from the norm's eps
            if bias is not None:
                bias.mul_(20)
        t, target = tokens(), data(4, 16, 64, seed=3)
        y = module(t)
        (g,) = torch.autograd.grad((y * target).sum(), weight)
        with torch.no_grad():
            weight.mul_(7)
            if bias is not None:
                bias.mul_(7)
        z = module(t)
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-4)
        (h,) = torch.autograd.grad((z * target).sum(), weight)
        assert abs(float(h.norm() * 7 / g.norm()) - 1) < 0.02


def test_4_the_variance_grows_linearly() -> None:
    """Item 4: two perceptrons a layer, 24 layers, at initialisation; R² above 0.98."""
    body = (
        "repeat 24 { h := placed(feed_forward(128, bias = false))(h); h := placed(feed_forward(128, bias = false))(h) }"
    )
    module = net(f"h = x; {body}; h", T=8, D=32)
    seen: list[float] = []
    for m in parts(module, "Placed"):
        m.register_forward_hook(lambda m, i, o: seen.append(float(o.detach().var())))
    with torch.no_grad():
        module(data(16, 8, 32))
    v = np.array(seen[1::2])
    assert len(v) == 24
    layers = np.arange(1, 25)
    slope, start = np.polyfit(layers, v, 1)
    rest = 1 - ((v - slope * layers - start) ** 2).sum() / ((v - v.mean()) ** 2).sum()
    assert rest > 0.98
    assert 1.5 < slope < 2.5


def test_5_massive_activations_are_damped() -> None:
    """Item 5: W_1 times 100 in one layer: Pre-LN's variance grows by about 1e4, Peri-LN does not move (relu)."""
    grown = {}
    for name, call in (("peri", ""), ("pre", PRE)):
        module = lm(f"peri_ln_lm(depth = 4{', ' + call if call else ''})")
        with torch.no_grad():  # the norm's eps is far below what the perceptron gives
            for m in parts(module, "FeedForward"):
                m.linear_2_weight.mul_(10)
            module.eval()
            before, y = outputs(module, "PeriLnLayer", tokens())[1].var(), module(tokens())
            added = parts(module, "FeedForward")[1]
            added.linear_weight.mul_(100)
            after, z = outputs(module, "PeriLnLayer", tokens())[1].var(), module(tokens())
        grown[name] = float(after / before)
        if name == "peri":
            torch.testing.assert_close(z, y, rtol=1e-3, atol=1e-3)
    assert abs(grown["peri"] - 1) < 1e-3
    assert 1e3 < grown["pre"] < 1.1e4


@pytest.mark.slow
def test_6_gradients_are_balanced_and_it_learns_faster() -> None:
    """Item 6: 12 layers of width 32, norms without gains, 40 steps of Adam at 1e-3, three seeds: a lower loss than Pre-LN and
    Post-LN, and gradients of W_2 that spread less over layers than Pre-LN's.

    The card's task, a sequence of increments, is not given; on ours losses are 1.33, 1.38, 1.33 (Peri), 2.22, 2.28, 2.39 (Pre)
    and 1.37, 1.45, 1.46 (Post), spreads 3.2, 3.7, 3.2 against 4.6, 6.1, 4.4 (Pre). The card's order of Pre and Post (Post worst)
    does not come out: with a last norm and learned positions Post-LN learns well in 40 steps.
    """
    for seed in range(3):
        found = {}
        for name, call in (("peri", "before = N, after = N, first = N, last = N"), ("pre", f"before = N, last = N, {PRE}"),
                           ("post", POST.replace("rms_norm", "N") + ", last = N")):  # fmt: skip
            call = call.replace("= N", "= layernorm_plain")
            module = lm(f"peri_ln_lm(depth = 12, {call})", torch.float32, seed)
            loss, sizes = trained(
                module,
                seed,
                40,
                lambda m: [float(b.linear_2_weight.grad.abs().mean()) for b in parts(m, "FeedForward")],
            )
            found[name] = loss, max(sizes) / min(sizes)
        assert found["peri"][0] < min(found["pre"][0], found["post"][0]), (seed, found)
        assert found["peri"][1] < found["pre"][1], (seed, found)


def test_7_other_placements_are_special_cases() -> None:
    """Item 7: without the outer norm it is Pre-LN bit for bit; without the inner one, the form with the outer alone."""
    x = data(3, 6, 16)
    for options, body in (
        ("after = identity_norm", "h = x + attention(4, causal = true)(rms_norm[D](x)); h + feed_forward(64, bias = false)(rms_norm[D](h))"),
        ("before = identity_norm", "h = x + rms_norm[D](attention(4, causal = true)(x)); h + rms_norm[D](feed_forward(64, bias = false)(h))"),
    ):  # fmt: skip
        mine, plain = net(f"peri_ln_layer(4, 64, {options})(x)", T=6, D=16), net(body, T=6, D=16)
        assert len(list(mine.parameters())) == len(list(plain.parameters()))
        for name in ("Attention", "FeedForward"):
            parts(mine, name)[0].load_state_dict(parts(plain, name)[0].state_dict())
        assert torch.equal(mine(x), plain(x))


def test_onnx_and_sizes(tmp_path: Path) -> None:
    for call in ("peri_ln_layer(4, 64)(x)", "pre_ln_layer(4, 64)(x)", "post_ln_layer(4, 64)(x)"):
        module = shaken(net(call, torch.float32, T=6, D=16), 0.1)
        x = data(2, 6, 16, dtype=torch.float32)
        found, _ = in_onnx(module, x, tmp_path)
        torch.testing.assert_close(torch.as_tensor(found), module(x).detach(), rtol=1e-4, atol=1e-5)
