"""Card 082, weight normalisation: its items under "What must hold", and torch's own parametrisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import flowlang as fl
from tests.catalogue.nets import count, data, in_onnx, net, same_value_and_gradients, shaken

LAYERS = {
    "linear[D -> E = 4](x, weight = weight_norm)": (nn.Linear(6, 4), {"D": 6}, 0),
    "conv[C, T](x, 4, kernel = 3, weight = weight_norm)": (nn.Conv1d(6, 4, 3, padding=1), {"C": 6, "T": 5}, 0),
    "conv(x, 4, kernel = 3, stride = 2, weight = weight_norm)": (nn.Conv2d(6, 4, 3, 2, 1), {"C": 6, "H": 5, "W": 4}, 0),
    "conv(x, 4, kernel = 3, groups = 2, weight = weight_norm)": (nn.Conv2d(6, 4, 3, padding=1, groups=2), {"C": 6, "H": 5, "W": 4}, 0),
    "conv[C, Z, H, W](x, 4, kernel = 3, weight = weight_norm)": (nn.Conv3d(6, 4, 3, padding=1), {"C": 6, "Z": 3, "H": 3, "W": 3}, 0),
    "conv_transpose(x, 4, kernel = 4, stride = 2, weight = weight_norm)": (nn.ConvTranspose2d(6, 4, 4, 2, 1), {"C": 6, "H": 3, "W": 4}, 1),
}  # fmt: skip


def parts(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """v, g and b of a module with one weight-normalised layer."""
    named = dict(module.named_parameters())
    v = next(p for n, p in named.items() if n.endswith("_weight"))
    b = next(p for n, p in named.items() if n.endswith("_bias"))
    return v, named["weight_norm.g"], b


def used(module: Any) -> Tensor:
    v = next(p for n, p in module.named_parameters() if n.endswith("_weight"))
    return module.weight_norm(v)


@pytest.mark.parametrize("body", LAYERS)
def test_layers_are_torch_s(body: str) -> None:
    """torch.nn.utils.parametrizations.weight_norm: value and gradients; transposed layers by their second axis."""
    layer, sizes, dim = LAYERS[body]
    mine = shaken(net(body, **sizes))
    other = parametrizations.weight_norm(layer.double(), dim=dim)
    v, g, b = parts(mine)
    with torch.no_grad():
        w = other.parametrizations.weight
        w.original1.copy_(v)
        w.original0.copy_(g.reshape(w.original0.shape))
        other.bias.copy_(b)
    same_value_and_gradients(
        mine, other, data(3, *sizes.values()), [(v, w.original1), (g, w.original0), (b, other.bias)]
    )
    assert count(mine) == count(other)


def test_1_length_is_g_and_v_has_no_scale() -> None:
    """Item 1."""
    mine = shaken(net("linear[D -> E = 4](x, weight = weight_norm)", D=6))
    v, g, _ = parts(mine)
    x = data(5, 6)
    torch.testing.assert_close(used(mine).norm(dim=1), g.abs(), rtol=1e-12, atol=1e-12)
    before = mine(x)
    (dv,) = torch.autograd.grad(before.square().sum(), [v])
    assert (v * dv).sum(1).abs().max() < 1e-7
    with torch.no_grad():
        v.mul_(3.7)
    torch.testing.assert_close(mine(x), before, rtol=1e-12, atol=1e-12)


def test_2_gradients_are_the_paper_s() -> None:
    """Item 2: dL/dg = dL/dw·v/|v|, dL/dv = (g/|v|) M_w dL/dw, against autograd."""
    mine = shaken(net("linear[D -> E = 4](x, weight = weight_norm)", D=6))
    v, g, _ = parts(mine)
    x, target = data(5, 6), data(5, 4, seed=2)
    w = used(mine).detach().requires_grad_()
    _, _, b = parts(mine)
    (dw,) = torch.autograd.grad((x @ w.T + b - target).square().sum(), [w])
    dv, dg = torch.autograd.grad((mine(x) - target).square().sum(), [v, g])
    length = v.norm(dim=1)
    torch.testing.assert_close(dg, (dw * v).sum(1) / length, rtol=1e-9, atol=1e-10)
    project = dw - w * (w * dw).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
    torch.testing.assert_close(dv, (g / length)[:, None] * project, rtol=1e-9, atol=1e-10)


def test_3_descent_lengthens_v() -> None:
    """Item 3: |v'|² = |v|² + lr² |dv|² at every step of SGD."""
    mine = shaken(net("linear[D -> E = 4](x, weight = weight_norm)", D=6))
    v, g, b = parts(mine)
    x, target, lr = data(20, 6), data(20, 4, seed=2), 0.05
    for _ in range(10):
        grads = torch.autograd.grad((mine(x) - target).square().mean(), [v, g, b])
        expected = v.square().sum(1) + lr**2 * grads[0].square().sum(1)
        with torch.no_grad():
            for p, d in zip((v, g, b), grads, strict=True):
                p -= lr * d
        torch.testing.assert_close(v.square().sum(1), expected, rtol=1e-6, atol=0)


DEEP = """
  h = wn_conv(8)(x)
  a = relu(h)
  u = wn_conv(6, stride = 2)(a)
  f = wn_linear(5)(relu(u)[(C, H, W) -> D])
  join[E](h[(C, H, W) -> E], u[(C, H, W) -> E], f)
"""


def pre_activations(out: Tensor) -> list[Tensor]:
    h, u, f = out.split([8 * 64, 6 * 16, 5], -1)
    return [h.unflatten(-1, (8, 64)), u.unflatten(-1, (6, 16)), f.unsqueeze(-1)]


def test_4_the_first_batch_sets_every_layer_in_order() -> None:
    """Item 4: every unit has mean 0 and deviation 1 on that batch; setting all layers at once does not give it."""
    mine = net(DEEP, C=3, H=8, W=8)
    x = 2 * data(32, 3, 8, 8) + 1
    twin = net(DEEP, C=3, H=8, W=8)
    assert mine.initialise(x)
    for t in pre_activations(mine(x)):
        assert t.mean((0, 2)).abs().max() < 1e-4
        assert (t.std((0, 2), correction=0) - 1).abs().max() < 1e-4
    assert not mine.initialise(x), "later calls change nothing"
    # All at once: every layer reads what the layers before it gave at their starts.
    with torch.no_grad():
        before = [(t.mean((0, 2)), t.std((0, 2), correction=0)) for t in pre_activations(twin(x))]
        for layer, (m, s) in zip((twin.wn_conv, twin.wn_conv_2, twin.wn_linear), before, strict=True):
            layer.g.copy_(1 / s), layer.b.copy_(-m / s)
        last = pre_activations(twin(x))[2]
    assert (last.std((0, 2), correction=0) - 1).abs().max() > 0.1


def test_4_repeated_layers_are_set_too() -> None:
    """Item 4, for the copies of a `repeat`: the published network end to end."""
    mine = net("convpool_cnn_c(width = 8)(x)", C=3, H=16, W=16)
    x = data(16, 3, 16, 16)
    seen: list[Tensor] = []
    for name, layer in mine.named_modules():
        if name.split(".")[-1].startswith(("wn_conv", "wn_linear")):
            layer.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    mine.initialise(x)
    seen.clear()
    mine(x)
    assert len(seen) == 10
    for t in seen:
        dims = (0, *range(2, t.dim()))
        assert t.mean(dims).abs().max() < 1e-4
        assert (t.std(dims, correction=0) - 1).abs().max() < 1e-4


def test_the_published_network_s_size() -> None:
    """Every layer of ConvPool-CNN-C: v, g and b."""
    widths = [
        (3, 96, 3),
        (96, 96, 3),
        (96, 96, 3),
        (96, 192, 3),
        (192, 192, 3),
        (192, 192, 3),
        (192, 192, 3),
        (192, 192, 1),
        (192, 192, 1),
        (192, 10, 1),
    ]
    with torch.device("meta"):
        mine = net("convpool_cnn_c(x)", dtype=torch.float32, C=3, H=32, W=32)
    assert count(mine) == sum(o * (i * k * k + 2) for i, o, k in widths)


def test_5_equals_batch_norm_on_whitened_input() -> None:
    """Item 5: where the covariance of x over the batch is I, BN(v·x) is weight normalisation with g = γ."""
    x = data(64, 6)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 64)).T
    mine = shaken(net("linear[D -> E = 4](x, weight = weight_norm)", D=6))
    v, g, b = parts(mine)
    t = x @ v.T
    normed = (t - t.mean(0)) / t.std(0, correction=0) * g + b
    torch.testing.assert_close(mine(x), normed, rtol=1e-6, atol=1e-6)


def test_6_only_mean_only_batch_norm_sees_other_samples() -> None:
    """Item 6: weight normalisation never does; mean-only batch norm while training; its mean is tracked."""
    x, other = data(4, 6), data(4, 6)
    other[1:] = data(3, 6, seed=9)
    plain = net("linear[D -> E = 4](x, weight = weight_norm)", D=6)
    assert torch.equal(plain(x)[0], plain(other)[0])
    mine = net("mean_only_batch_norm(linear[D -> C = 4](x, weight = weight_norm, bias = false))", D=6)
    assert not torch.allclose(mine(x)[0], mine(other)[0])
    t = x @ used(mine).T
    norm = mine.mean_only_batch_norm
    state = next(b for n, b in norm.named_buffers() if n.startswith("running"))
    first = state.clone()
    mine(x)
    assert torch.allclose(state, 0.9 * first + 0.1 * t.mean(0))
    mine.eval()
    assert torch.equal(mine(x)[0], mine(other)[0])


def test_6_the_gradient_of_mean_only_batch_norm() -> None:
    """dL/dt is dL/dt~ less its mean over the batch."""
    mine = net("mean_only_batch_norm(x)", kind="norm", C=5)
    x, weight = data(7, 5).requires_grad_(), data(7, 5, seed=4)
    (found,) = torch.autograd.grad((mine(x) * weight).sum(), [x])
    torch.testing.assert_close(found, weight - weight.mean(0), rtol=1e-12, atol=1e-12)


def reached(step: Any, start: list[Tensor], loss: Any, lr: float) -> bool:
    """Whether descent with this rate comes below 1e-3 within 400 steps."""
    values = [p.clone().requires_grad_() for p in start]
    for _ in range(400):
        value = loss(step(*values))
        if not torch.isfinite(value):
            return False
        if value < 1e-3:
            return True
        grads = torch.autograd.grad(value, values)
        values = [(p - lr * d).detach().requires_grad_() for p, d in zip(values, grads, strict=True)]
    return False


def test_7_larger_rates_stay_stable() -> None:
    """Item 7: on a quadratic with one steep direction, at least twice the largest rate that plain descent bears."""
    steep = torch.tensor([1.0, 100.0], dtype=torch.float64)
    goal = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return (steep * (w - goal) ** 2).sum() / 2

    mine = net("weight_norm[O](x)", kind="norm", O=1, D=2)
    inner = mine.weight_norm

    def weight(v: Tensor, g: Tensor) -> Tensor:
        return torch.func.functional_call(inner, {"g": g}, (v[None],))[0]

    rates = [0.001 * 1.3**k for k in range(26)]
    v = torch.tensor([0.6, 0.8], dtype=torch.float64)
    plain = max(r for r in rates if reached(lambda w: w, [v], loss, r))
    normed = max(r for r in rates if reached(weight, [v, torch.ones(1, dtype=torch.float64)], loss, r))
    assert normed >= 2 * plain


@pytest.mark.parametrize("body", [
    "linear[D -> E = 4](x[(C, H, W) -> D], weight = weight_norm)", "conv(x, 4, kernel = 3, weight = weight_norm)",
    "conv_transpose(x, 4, kernel = 4, stride = 2, weight = weight_norm)", "convpool_cnn_c(width = 4)(x)",
])  # fmt: skip
def test_8_exported_weights_are_folded(body: str, tmp_path: Path) -> None:
    """Item 8: the exported network is the same function, and holds w instead of v and g."""
    mine = net(body, torch.float32, C=3, H=12, W=12)
    x = data(2, 3, 12, 12, dtype=torch.float32)
    mine.initialise(data(64, 3, 12, 12, seed=5, dtype=torch.float32))  # few samples would make huge gains
    mine.eval()
    found, ops = in_onnx(mine, x, tmp_path)
    torch.testing.assert_close(torch.as_tensor(found), mine(x).detach(), rtol=1e-4, atol=1e-5)
    assert not {"Sqrt", "Div", "ReduceSum", "ReduceSumSquare", "Pow"} & set(ops)


def test_8_mean_only_batch_norm_is_a_bias(tmp_path: Path) -> None:
    """At inference the mean is a constant."""
    mine = net(
        "mean_only_batch_norm(conv(x, 4, kernel = 3, weight = weight_norm, bias = false))", torch.float32, C=3, H=6, W=6
    )
    mine(data(8, 3, 6, 6, dtype=torch.float32))
    x = data(2, 3, 6, 6, dtype=torch.float32)
    mine.eval()
    found, ops = in_onnx(mine, x, tmp_path)
    torch.testing.assert_close(torch.as_tensor(found), mine(x).detach(), rtol=1e-4, atol=1e-5)
    assert not {"ReduceMean", "Div"} & set(ops)


def test_the_lstm_cell_is_torch_s_with_weight_norm() -> None:
    """Values and gradients of `nn.LSTMCell` with torch's weight norm on both matrices; each unit's weights have the norm |g|."""
    text = "net f(x: R[D = 3], h: R[H = 4], c: R[H = 4]) { wn_lstm_cell()(x, h, c) }"
    mine = shaken(fl.compile(text, flow="f", dtype=torch.float64, seed=0))
    cell = nn.LSTMCell(3, 4).double()
    named = {n.split(".", 1)[1]: p for n, p in mine.named_parameters()}
    vs = [p for n, p in named.items() if n.startswith("linear") and n.endswith("weight")]
    gs = [p for n, p in named.items() if n.endswith(".g")]
    with torch.no_grad():
        cell.bias_ih.copy_(named["linear_bias"])
        cell.bias_hh.zero_()
        for name, v, g in zip(("weight_ih", "weight_hh"), vs, gs, strict=True):
            torch.nn.utils.parametrizations.weight_norm(cell, name)
            kept = getattr(cell.parametrizations, name)
            kept.original0.copy_(g[:, None])
            kept.original1.copy_(v)
            torch.testing.assert_close(getattr(cell, name).norm(dim=1), g.abs())
    values = [data(5, 3), data(5, 4, seed=2), data(5, 4, seed=3)]
    mine_in, theirs_in = ([v.clone().requires_grad_() for v in values] for _ in range(2))
    found, expected = mine(*mine_in), cell(theirs_in[0], (theirs_in[1], theirs_in[2]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    (found[0].sum() + found[1].square().sum()).backward()
    (expected[0].sum() + expected[1].square().sum()).backward()
    for a, b in zip(mine_in, theirs_in, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
