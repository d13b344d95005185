"""Networks that draw: new noise at each run, alone, in models and in ONNX; inside a bijector in training alone. And the axes of a norm."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

import flowlang as fl

DROPPED = """net dropped(rate: real = 0.5) (x: R[D]) {
  if training {
    u: R[D] ~ uniform(0, 1)
    kept = where(u >= rate, 1 / (1 - rate), 0.0)
  } else { kept = 1.0 }
  x * kept
}
"""


def test_noise_is_new_at_each_run_and_follows_the_seed() -> None:
    module = fl.compile("net f(x: R[D = 50]) { u: R[D = 50] ~ normal\n x + u }", flow="f")
    x = torch.zeros(400, 50)
    torch.manual_seed(0)
    a, b = module(x), module(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), a)
    assert not torch.equal(a, b)
    assert abs(float(a.mean())) < 0.03
    assert abs(float(a.std()) - 1) < 0.03


def test_dropout_is_for_training_alone_and_differs_at_each_place() -> None:
    module = fl.compile(DROPPED + "net f(x: R[T = 3, D = 40]) { y = x; repeat 2 { y := dropped()(y) }; y }", flow="f")
    x = torch.ones(100, 3, 40, requires_grad=True)
    y = module(x)
    assert {float(v) for v in y.detach().unique()} == {0.0, 4.0}
    assert abs(float((y > 0).float().mean()) - 0.25) < 0.02
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(module.eval()(x), x)


def test_a_model_s_networks_may_draw() -> None:
    model = fl.compile(
        DROPPED + "model m(n: net = dropped(0.5)) { data x: R[D = 6]\n def loss(x) { mean(n(x)) } }", seed=0
    )
    torch.manual_seed(1)
    losses = {float(model.loss(torch.ones(4, 6))) for _ in range(5)}
    assert len(losses) > 1


@pytest.mark.parametrize("flow", [
    "bijector b(x: R[D]) { a, c = halves[D](x); join[D](a, c + g(a)) }\nflow f { data x: R[D = 4]\n b\n base normal }",
    "flow f { data x: R[D = 4]\n affine_coupling(net = h)\n base normal }", "flow f { data x: R[D = 4]\n cnf(v = v, solver = rk4(steps = 4))\n base normal }",
])  # fmt: skip
def test_a_bijector_s_networks_may_not(flow: str) -> None:
    nets = """net g(x: R[D]) { u: R[D] ~ normal\n tanh(u + x) }
net h(x: R[D]) -> R[out] { linear[D -> out](g(x)) }
net v(x: R[D], t: R) { g(x) * t }
"""
    assert [d.code for d in fl.check(nets + flow) if d.severity == "error"] == ["FL0410"]


NETS = """net h(x: R[D]) -> R[out] { linear[H -> out](dropout(0.5)(tanh(linear[D -> H = 32](x)))) }
net v(x: R[D], t: R) { dropout(0.5)(linear[D -> D](x)) * t }
bijector auto(x: R[D]) {
  shift: R[D], log_scale: R[D] = autoregressive_mlp[D](dropout(0.5)(x), hidden = [16])
  x * exp(tanh(log_scale)) + shift
}
"""
FLOWS = {
    "couplings": "flow f { data x: R[D = 4]\n repeat 3 { affine_coupling(net = h)\n reverse }\n base normal }",
    "autoregressive": "flow f { data x: R[D = 4]\n auto\n reverse\n auto\n base normal }",
}


@pytest.mark.parametrize("text", FLOWS.values(), ids=FLOWS)
def test_networks_of_a_bijector_may_draw_while_training(text: str, tmp_path: Path) -> None:
    """Forward passes draw, and the log-det is that of the map with the noise drawn; inverses run as at inference."""
    flow = fl.compile(NETS + text, flow="f", seed=0, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def seeded(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(2)
        z, log_det = flow(v)
        return z, log_det

    assert not torch.equal(flow.log_prob(x), flow.log_prob(x))
    for k in range(2):
        dense = torch.autograd.functional.jacobian(lambda v: seeded(v)[0], x[k : k + 1]).reshape(4, 4)
        assert abs(torch.linalg.slogdet(dense)[1] - seeded(x[k : k + 1])[1][0]) < 1e-9
    training, seen = flow.inverse(x), flow.sample((3,), generator=torch.Generator().manual_seed(3))
    flow.eval()
    z, log_det = flow(x)
    back, back_log_det = flow.inverse(z)
    assert (back - x).abs().max() < 1e-9
    assert (back_log_det + log_det).abs().max() < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(training, flow.inverse(x), strict=True))
    assert torch.equal(seen, flow.sample((3,), generator=torch.Generator().manual_seed(3)))

    single = fl.compile(NETS + text, flow="f", seed=0)
    single.load_state_dict(flow.state_dict())
    paths = fl.export_onnx(single, tmp_path / "m.onnx", programs=["log_prob", "inverse"])
    for program, wanted in (("log_prob", flow.log_prob(x)), ("inverse", flow.inverse(x)[0])):
        session = onnxruntime.InferenceSession(str(paths[program]), providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()  # no noise
        found = torch.as_tensor(session.run(None, {given.name: x.float().numpy()})[0])
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)


def test_the_inverse_of_an_autoregressive_map_stays_incremental() -> None:
    """What is drawn in training alone does not cost the inverse its schedule."""
    source = fl.generate(NETS + FLOWS["autoregressive"], flow="f")
    assert "scan_solve" not in source


@pytest.mark.parametrize("flow", [
    "flow f { data x: R[D = 4]\n inverse(auto)\n base normal }",
    "flow f { data x: R[D = 4]\n cnf(v = v, solver = rk4(steps = 4))\n base normal }",
    "bijector b(x: R[D]) { def log_det(x) { a, c = halves[D](x)\n s: R[c.D] = h(a)\n sum[D](s) }\n a, c = halves[D](x)\n k = h\n s: R[c.D] = k(a)\n join[D](a, c * exp(s)) }\n"
    "flow f { data x: R[D = 4]\n b\n base normal }",
    "model m { data x: R[D = 4]\n b = auto()\n def loss(x) { z, l = b(x)\n y, k = inverse(b)(z)\n mean((x - y) ^ 2) } }",
], ids=["as the inverse", "a field", "rules by hand", "both ways in one program"])  # fmt: skip
def test_noise_is_refused_where_it_would_be_another_each_time(flow: str) -> None:
    assert [d.code for d in fl.check(NETS + flow).errors] == ["FL0410"]


def test_programs_of_a_model_run_a_noisy_bijector_in_one_direction_each() -> None:
    text = "model m { data x: R[D = 4]\n b = auto()\n def loss(x) { z, l = b(x)\n mean(z ^ 2) - l }\n def sample { z ~ normal\n x, l = inverse(b)(z)\n x } }"
    model = fl.compile(NETS + text, flow="m", seed=0)
    x = torch.randn(5, 4)
    assert not torch.equal(model.loss(x), model.loss(x))
    torch.manual_seed(0)
    first = model.sample(3)
    torch.manual_seed(0)
    assert torch.equal(model.sample(3), first)


def test_loops_that_draw_keep_their_activations() -> None:
    text = "bijector step { affine_coupling(net = h)\n reverse }\nflow f { data x: R[D = 4]\n repeat 3 { step }\n base normal }"
    with pytest.raises(fl.FlowError, match="draw random numbers"):
        fl.compile(NETS + text, flow="f", memory="reversible")


def test_noise_is_an_input_of_an_onnx_model(tmp_path: Path) -> None:
    module = fl.compile("net f(x: R[D = 5]) { u: R[D = 5] ~ normal\n x + 2 * u }", flow="f")
    fl.export_onnx(module, str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x, u = torch.randn(4, 5), torch.randn(4, 5)
    feeds = dict(zip((i.name for i in session.get_inputs()), (x.numpy(), u.numpy()), strict=True))
    assert list(feeds) == ["x", "u"]
    torch.testing.assert_close(torch.as_tensor(session.run(None, feeds)[0]), x + 2 * u)


def test_a_norm_keeps_the_order_of_its_axes() -> None:
    text = (
        "norm n(x: R[C, H, W], m: R[H, W]) { m * x }\nnet f(x: R[C = 2, H = 3, W = 4], m: R[H = 3, W = 4]) { n(x, m) }"
    )
    x, m = torch.randn(5, 2, 3, 4), torch.randn(5, 3, 4)
    torch.testing.assert_close(fl.compile(text, flow="f")(x, m), x * m[:, None])


@pytest.mark.parametrize(
    ("condition", "expected"),
    [("true and x > 0", "a"), ("false and x > 0", "b"), ("true or x > 0", "c"), ("x > 0 or false", "a")],
)
def test_conditions_with_a_part_that_is_known(condition: str, expected: str) -> None:
    module = fl.compile(f"net f(x: R[D = 3]) {{ where({condition}, x, -x) }}", flow="f")
    x = torch.tensor([[1.0, -2.0, 3.0]])
    assert torch.equal(module(x), {"a": x.abs(), "b": -x, "c": x}[expected])
