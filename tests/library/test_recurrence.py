"""`scan`, `if training`, general states, `def backward` and `surrogate`, against plain torch and onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flowlang as fl
from flowlang.diagnostics import FlowError

RNN = """
net f(x: R[T, D]) -> R[T, H = 4] {
  a = linear[D -> H = 4](x)
  back = linear[H -> H = 4]
  h = zeros[H = 4]
  scan T {
    h := tanh(a + back(h))
    y = 2 * h
  }
  y
}
"""


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def compiled(text: str, dtype: torch.dtype = torch.float64, **sizes: int) -> Any:
    return fl.compile(text, flow="f", dtype=dtype, **sizes)


def onnx_of(module: Any, path: Path, x: Tensor) -> tuple[Any, Any]:
    made = fl.export_onnx(module.eval(), str(path))
    file = next(iter(made.values())) if isinstance(made, dict) else made[0] if isinstance(made, list | tuple) else made
    session = onnxruntime.InferenceSession(str(file))
    return session.run(None, {"x": x.numpy()})[0], str(file)


# ---- scan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_a_loop_over_slices(batch: tuple[int, ...], reverse: bool) -> None:
    module = compiled(RNN.replace("scan T", "scan reverse T") if reverse else RNN, T=5, D=3)
    x = data(*batch, 5, 3).requires_grad_()
    first = torch.nn.functional.linear(x, module.linear_weight, module.linear_bias)
    h, out = torch.zeros(*batch, 4, dtype=torch.float64), [None] * 5
    for t in reversed(range(5)) if reverse else range(5):
        h = torch.tanh(first[..., t, :] + torch.nn.functional.linear(h, module.back_weight, module.back_bias))
        out[t] = 2 * h
    expected = torch.stack(out, -2)
    assert torch.allclose(module(x), expected, rtol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(v.square().sum(), x)[0] for v in (module(x), expected)), rtol=1e-10)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
@settings(derandomize=True, max_examples=12, deadline=None)
def test_what_is_carried_is_a_running_sum(length: int, size: int, batch: int) -> None:
    module = compiled("net f(x: R[D, T]) { s = zeros[D]\n scan T { s := s + x\n y = s }\n y }", T=length, D=size)
    x = data(*([batch + 1] * (batch % 2)), size, length)
    assert torch.allclose(module(x), x.cumsum(-1).mT)


def test_a_scan_is_a_loop_in_onnx(tmp_path: Path) -> None:
    import onnx

    for text in (RNN, RNN.replace("scan T", "scan reverse T")):
        module = compiled(text, torch.float32, T=5, D=3)
        x = data(7, 5, 3, dtype=torch.float32)
        found, file = onnx_of(module, tmp_path / "m.onnx", x)
        assert np.allclose(found, module(x).detach().numpy(), atol=1e-6)
        assert "Loop" in {n.op_type for n in onnx.load(file).graph.node}


def test_a_scan_has_no_graph_break() -> None:
    module = compiled(RNN, T=5, D=3)
    x = data(2, 5, 3)
    fast = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.allclose(fast(x), module(x))


def test_a_scan_over_the_batch_sees_samples_in_order() -> None:
    text = "net f(x: R[D]) { s = zeros[D]\n scan B { y = s\n s := s + x }\n y }"
    module = compiled(text, D=3)
    x = data(6, 3)
    assert torch.allclose(module(x), x.cumsum(0) - x)
    with pytest.raises(FlowError, match="no function of a sample"):
        fl.export_onnx(module.eval(), "unused.onnx")


def test_parameters_of_a_scan_are_counted_once() -> None:
    module = compiled(RNN, T=5, D=3)
    assert sum(p.numel() for p in module.parameters()) == 3 * 4 + 4 + 4 * 4 + 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("net f(x: R[T, D]) { scan K { y = x }\n y }", "`K` is no axis"),
        ("net f(x: R[T, D]) { h = x\n scan T { h := h + x }\n h }", "has that axis itself"),
        ("net f(x: R[T, D]) { h = 0\n scan T { h := h + x }\n h }", "before the step"),
        ("net f(x: R[T, D]) { a = x[T = 1..]\n scan T { y = a + x }\n y }", "size"),
        ("net f(x: R[T, D]) { s = zeros[D]\n scan T { s := s + log(x) }\n s }", "`log` needs a positive"),
        ("bijector f(x: R[T, D]) { s = zeros[D]\n scan T { s := s + x\n y = s }\n y }", "inside a bijector"),
    ],
)  # fmt: skip
def test_what_a_scan_cannot_do_is_told(text: str, words: str) -> None:
    with pytest.raises(FlowError, match=words):
        compiled(text, T=3, D=2)


def test_a_flow_may_condition_on_a_network_that_scans() -> None:
    text = """
    net summary(x: R[D]) -> R[out] {
      h = zeros[H = 4]
      scan D { h := tanh(linear[H -> H](h) + x) }
      linear[H -> out](h)
    }
    flow g { data x: R[D = 4]
      affine_coupling(net = summary)
      base normal }
    """
    flow = fl.compile(text, dtype=torch.float64)
    x = data(5, 4)
    z, log_det = flow(x)
    back, other = flow.inverse(z)
    assert torch.allclose(back, x)
    assert torch.allclose(log_det, -other)


# ---- training, inference, states ----------------------------------------------------------------


EMA = """
norm f(x: R[C]) {
  state m: R[C] = 0, n: Int = 0
  if training {
    n := n + 1
    m := 0.5 * m + 0.5 * mean[B](x)
  }
  x - m
}
"""


def test_a_state_is_kept_while_training_alone() -> None:
    module = compiled(EMA, C=3)
    m = torch.zeros(3, dtype=torch.float64)
    for step in range(4):
        x = data(5, 3, seed=step)
        m = 0.5 * m + 0.5 * x.mean(0)
        assert torch.allclose(module(x), x - m)  # `:=` takes effect in text order
        assert torch.allclose(module.m, m)
        assert int(module.n) == step + 1
        assert module.n.dtype == torch.int64
    module.eval()
    x = data(5, 3, seed=9)
    assert torch.allclose(module(x), x - m)
    assert torch.allclose(module.m, m)
    assert set(module.state_dict()) == {"m", "n"}


def test_a_state_in_the_gradient_s_way_does_not_break_it() -> None:
    """The buffer is replaced in place after the forward pass, and the backward pass reads the old value."""
    module = compiled("norm f(x: R[C]) { state m: R[C] = 2\n y = x * m\n m := mean[B](x)\n y }", C=3)
    x = data(5, 3).requires_grad_()
    module(x).sum().backward()
    assert torch.equal(x.grad, torch.full((5, 3), 2.0, dtype=torch.float64))
    assert torch.allclose(module.m, x.mean(0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("norm f(x: R[C]) { state m: R[C] = 0\n m := x\n x }", "one for all samples"),
        ("norm f(x: R[C]) { state m: Positive[C] = 1\n m := mean[B](x)\n x * m }", "values in `Positive`"),
        ("norm f(x: R[C]) { if training { y = x } else { y = sum[C](x) }\n y * 2\n }", None),
        ("norm f(x: R[C]) { if training { y: R[C] = x } else { y = true }\n x * y }", "in training"),
        ("bijector f(x: R[C]) { if training { y = x } else { y = 2 * x }\n y }", "inside a bijector"),
        ("norm f(x: R[C]) { param a: R = 1\n def backward(dy) { dy }\n a * x }", "gives no gradient to the parameters"),
        ("norm f(x: R[C]) { def backward(dy) { sum[C](dy) * ones[C, K = 2] }\n x }", "`backward` gives"),
        ("bijector f(x: R[C]) { def backward(dy) { dy }\n 2 * x }", "belongs in a net"),
    ],
)  # fmt: skip
def test_what_states_and_modes_cannot_do_is_told(text: str, words: str | None) -> None:
    if words is None:
        compiled(text, C=3)
        return
    with pytest.raises(FlowError, match=words):
        compiled(text, C=3)


# ---- gradients ----------------------------------------------------------------------------------


def test_a_backward_pass_of_its_own_holds_in_training() -> None:
    module = compiled("net f(x: R[C]) { y = x ^ 2\n def backward(dy) { 7 * dy * y }\n y }", C=3)
    x = data(5, 3).requires_grad_()
    (g,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.allclose(g, 7 * x.square())
    module.eval()
    (g,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.allclose(g, 2 * x)


def test_a_backward_pass_reads_states_as_they_are_then() -> None:
    text = """
    net f(x: R[C]) {
      state k: R[C] = 1
      def backward(dy) { dx = k * dy
        k := k + mean[B](dy)
        dx }
      3 * x
    }
    """
    module = compiled(text, C=2)
    x = data(4, 2).requires_grad_()
    one, two = module(x), module(x)
    assert torch.equal(module.k, torch.ones(2, dtype=torch.float64))  # the forward pass leaves it
    (g,) = torch.autograd.grad(one.sum(), x)
    assert torch.equal(g, torch.ones_like(x))
    (g,) = torch.autograd.grad(two.sum(), x)
    assert torch.equal(g, torch.full_like(x, 2.0))


def test_a_surrogate_has_one_function_s_value_and_another_s_gradient() -> None:
    module = compiled("net f(x: R[C]) { surrogate(value = x > 0.5, gradient = sigmoid(x)) }", C=3)
    x = data(5, 3).requires_grad_()
    y = module(x)
    assert torch.equal(y, (x > 0.5).double())
    (g,) = torch.autograd.grad(y.sum(), x)
    s = torch.sigmoid(x)
    assert torch.allclose(g, s * (1 - s))
