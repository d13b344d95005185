"""Card 138: Batch Normalization (Ioffe & Szegedy 2015). Tests carry the card's item numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flowlang as fl
from flowlang.diagnostics import FlowError
from tests.catalogue.norms import count, data, gradient, norm, part, runs_in_onnx, same, trains

IMAGE = {"C": 4, "H": 3, "W": 2}


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = (0, *range(2, x.dim()))
    return x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)


@pytest.mark.parametrize("sizes", [{"C": 4}, {"C": 4, "H": 5}, IMAGE])
def test_item_1_training_gives_mean_beta_and_variance_gamma_squared(sizes: dict[str, int]) -> None:
    module = norm("batch_norm()", moved=0.5, **sizes)
    x = data(9, *sizes.values(), scale=3, shift=2)
    m = part(module, "BatchNorm")
    y = module(x)
    mean, var = (v.flatten() for v in statistics(y))
    _, own = statistics(x)
    assert (mean - m.beta).abs().max() < 1e-5
    assert (var - m.gamma**2 * own.flatten() / (own.flatten() + 1e-5)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("call", "sizes", "layer"),
    [
        ("batch_norm()", {"C": 4}, nn.BatchNorm1d(4)), ("batch_norm()", {"C": 4, "L": 5}, nn.BatchNorm1d(4)),
        ("batch_norm_2d()", IMAGE, nn.BatchNorm2d(4)),
        ("batch_norm_2d(momentum = 0.3, eps = 1e-3)", IMAGE, nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)),
    ],
)  # fmt: skip
def test_item_2_is_torch_s_layer_with_its_buffers(call: str, sizes: dict[str, int], layer: nn.Module) -> None:
    module, other = norm(call, moved=0.5, **sizes), layer.double()
    m = part(module, "BatchNorm")
    other.load_state_dict({**other.state_dict(), "weight": m.gamma.detach(), "bias": m.beta.detach()})
    for seed in range(5):
        module(data(7, *sizes.values(), seed=seed)), other(data(7, *sizes.values(), seed=seed))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(m, name), getattr(other, name), rtol=1e-12), name
    x = data(7, *sizes.values(), seed=9)
    same(module, other, x)
    same(module.eval(), other.eval(), x)
    assert m.num_batches_tracked.dtype == torch.int64


def test_item_3_gradient_is_the_closed_formula_and_finite_differences() -> None:
    module = norm("batch_norm()", moved=0.5, **IMAGE)
    x, dy = data(6, 4, 3, 2), data(6, 4, 3, 2, seed=1)
    gamma = part(module, "BatchNorm").gamma.detach()[:, None, None]
    mean, var = statistics(x)
    n, sd = 6 * 6, (var + 1e-5).sqrt()
    hat = (x - mean) / sd
    total = [v.sum((0, 2, 3), keepdim=True) for v in (dy, dy * hat)]
    expected = gamma / (n * sd) * (n * dy - total[0] - hat * total[1])
    dx = gradient(module, x, dy)
    assert torch.allclose(dx, expected, atol=1e-9)
    assert torch.autograd.gradcheck(module, x.requires_grad_(), atol=1e-6)
    assert dx.sum((0, 2, 3)).abs().max() < 1e-9
    assert (dx * hat).sum((0, 2, 3)).abs().max() < 1e-4


@pytest.mark.parametrize("a", [0.2, 5.0])
def test_item_4_scale_of_the_weights_before_it(a: float) -> None:
    text = "net f(x: R[D]) { batch_norm(eps = 1e-12)(linear[D -> C = 3](x, bias = false)) }"
    module = fl.compile(text, flow="f", D=5, dtype=torch.float64)
    x, target = data(8, 5), data(8, 3, seed=2)

    def run() -> tuple[Tensor, Tensor]:
        y = module(x)
        (g,) = torch.autograd.grad((y * target).sum(), module.linear_weight)
        return y, g

    y, g = run()
    with torch.no_grad():
        module.linear_weight.mul_(a)
    scaled, scaled_g = run()
    assert torch.allclose(y, scaled, rtol=1e-4)
    assert torch.allclose(scaled_g, g / a, rtol=1e-3)


def test_item_5_inference_is_an_affine_map_of_each_sample_and_folds() -> None:
    text = "net f(x: R[D]) { batch_norm()(linear[D -> C = 3](x)) }"
    module = fl.compile(text, flow="f", D=5, dtype=torch.float64)
    x, other = data(8, 5), data(8, 5, seed=4)
    other[0] = x[0]
    for seed in range(3):
        module(data(8, 5, seed=seed, shift=1))
    assert not torch.allclose(module(x)[0], module(other)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(other)[0])
    m = part(module, "BatchNorm")
    scale = m.gamma / (m.running_var + 1e-5).sqrt()
    weight, bias = scale[:, None] * module.linear_weight, scale * (module.linear_bias - m.running_mean) + m.beta
    assert torch.allclose(module(x), nn.functional.linear(x, weight, bias), rtol=1e-10)


def test_item_6_the_kept_variance_is_unbiased() -> None:
    module = norm("batch_norm(momentum = 1)", C=4)
    x = data(2, 4)
    module(x)
    assert torch.allclose(part(module, "BatchNorm").running_var, 2 * x.var(0, correction=0))


def test_item_6_one_value_a_channel_is_an_error_in_training() -> None:
    module = norm("batch_norm()", C=4)
    with pytest.raises(FlowError, match="1 values for a variance"):
        module(data(1, 4))
    module.eval()(data(1, 4))
    norm("batch_norm()", C=4, L=2)(data(1, 4, 2))


@pytest.mark.slow
def test_item_7_a_saturating_network_trains() -> None:
    x = data(256, 16, dtype=torch.float32)
    label = (x[:, :4].argmax(1)) % 4
    losses = {}
    for bn in ("true", "false"):
        torch.manual_seed(0)
        text = f"net f(x: R[D]) -> R[K = 4] {{ sigmoid_mlp(32, 32, 32, 32, 32, 32, bn = {bn})(x) }}"
        module = fl.compile(text, flow="f", D=16)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(300):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(module(x), label)
            loss.backward()
            optimiser.step()
        losses[bn] = float(loss.detach())
    assert losses["true"] < 0.7 * losses["false"]


def test_item_8_can_be_the_identity() -> None:
    module = norm("batch_norm()", **IMAGE)
    x = data(7, 4, 3, 2, scale=2, shift=1)
    m = part(module, "BatchNorm")
    mean, var = statistics(x)
    with torch.no_grad():
        m.gamma.copy_((var.flatten() + 1e-5).sqrt())
        m.beta.copy_(mean.flatten())
    assert torch.allclose(module(x), x, atol=1e-6)


def test_population_statistics_are_plain_averages() -> None:
    """Algorithm 2: E[x] averages the means, Var[x] the unbiased variances."""
    module = norm("batch_norm_population()", moved=0.3, **IMAGE)
    batches = [data(6, 4, 3, 2, seed=k, shift=k) for k in range(4)]
    for x in batches:
        module(x)
    m = part(module, "BatchNormPopulation")
    mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0)
    assert torch.allclose(m.population_mean, mean)
    assert torch.allclose(m.population_var, var)
    module.eval()
    c = (slice(None), None, None)
    expected = (batches[0] - mean[c]) / (var[c] + 1e-5).sqrt() * m.gamma[c] + m.beta[c]
    assert torch.allclose(module(batches[0]), expected)


def test_presets_have_the_published_sizes() -> None:
    head = "net f(x: R[D]) -> R[K = 10] {{ mnist_sigmoid_mlp({})(x) }}"
    assert count(head.format(""), D=784) == 99710
    assert count(head.format("bn = true"), D=784) == 100010
    assert (
        count("net f(x: R[D]) -> R[K = 4] { sigmoid_mlp(32, 32)(x) }", D=16) == 16 * 32 + 32 + 32 * 32 + 32 + 32 * 4 + 4
    )


def test_onnx_and_training(tmp_path: Path) -> None:
    runs_in_onnx("batch_norm_2d()", tmp_path, **IMAGE)
    runs_in_onnx("batch_norm_population()", tmp_path, C=4)
    trains("batch_norm()", **IMAGE)


def test_onnx_of_a_training_step(tmp_path: Path) -> None:
    """Batch statistics by reductions, and the renewed buffers as more outputs, beside `nn.BatchNorm2d`."""
    import onnx
    import onnxruntime

    module, other = norm("batch_norm_2d()", torch.float32, **IMAGE), nn.BatchNorm2d(4)
    (file,) = fl.export_onnx(module, tmp_path / "t.onnx", ["train"]).values()
    session = onnxruntime.InferenceSession(str(file))
    x = data(7, *IMAGE.values(), dtype=torch.float32, shift=1)
    y, *states = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.as_tensor(y), other(x).detach(), rtol=1e-5, atol=1e-5)
    found = {o.name.split(".")[-1]: v for o, v in zip(session.get_outputs()[1:], states, strict=True)}
    for name, value in found.items():
        torch.testing.assert_close(torch.as_tensor(value), getattr(other, name).float(), rtol=1e-5, atol=1e-6)
    assert set(found) == {"running_mean", "running_var", "num_batches_tracked"}
    assert "ReduceMean" in {n.op_type for n in onnx.load(str(file)).graph.node}


def test_bn_inception_s_size() -> None:
    """11,295,240 numbers in the published Caffe model, whose convolutions have biases (10,016 of them) before their norms."""
    text = "net f(x: R[C, H, W]) { bn_inception()(x) }"
    with torch.device("meta"):
        module = fl.compile(text, flow="f", C=3, H=224, W=224)
    biases = sum(m.conv_weight.shape[0] for m in module.modules() if hasattr(m, "conv_weight"))
    assert sum(p.numel() for p in module.parameters()) + biases == 11_295_240
    assert biases == 10_016


def test_bn_inception_s_places_and_training() -> None:
    """224 pixels end as 7 x 7 places of 1024 channels; a small image trains; inference folds every norm."""
    text = "net f(x: R[C = 3, H = 64, W = 64]) -> R[K = 4] { bn_inception(classes = 4)(x) }"
    module = fl.compile(text, flow="f", seed=0)
    shapes: list[tuple[int, ...]] = []
    for m in module.modules():
        if type(m).__name__.startswith("BnInceptionModule"):
            m.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:])))
    x, label = data(4, 3, 64, 64, dtype=torch.float32), torch.arange(4)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(module(x), label)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert [s[0] for s in shapes[:10]] == [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]
    assert shapes[9] == (1024, 2, 2)
    module.double().eval()
    folded = fl.folded(module)
    assert all(v.folds for v in folded.verdicts)
    assert [n for n, _ in folded.named_buffers()] == ["like"]
    torch.testing.assert_close(folded(x.double()), module(x.double()), rtol=1e-9, atol=1e-9)
