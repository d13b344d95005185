"""Inverses whose conditioner is causal attention or a causal convolution: row after row, what rows before gave kept.

The loop is compared with the plain scan, which computes the whole conditioner in every round, over generated conditioners;
its work is counted in floating-point operations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import flowlang as fl
from tests.backends.torch.specs import build, context, data
from tests.backends.torch.test_scan import plain_scan, plans

# Attention along T, written out: keys and values of all heads, or shared by them; what is added to the scores.
ATTENTION = """
net looking(heads: int, one_key: bool, bias: bool, temperature: real) (x: R[T, D]) {{
  q = linear[D -> D](x)[D -> (h = heads, d)]
  if one_key {{
    k = linear[D -> d = q.d](x)
    v = linear[D -> d = q.d](x)
  }} else {{
    k = linear[D -> D](x)[D -> (h = heads, d)]
    v = linear[D -> D](x)[D -> (h = heads, d)]
  }}
  scores: R[h, T, S = T] = sum[d](q * k[T -> S]) / (temperature * sqrt(q.d))
  if bias {{
    param near: R[h = heads, T, S = T] ~ normal(0, 0.3)
    scores := scores + near
  }}
  a = softmax[S](scores, causal = "T")
  linear[D -> D](sum[S](a * v[T -> S])[(h, d) -> D])
}}
net conditioner(x: R[T, D]{given}) -> R[T, D], R[T, D] {{
  param place: R[T, E = {width}] ~ normal(0, 0.3)
  h = linear[D -> E = {width}](x) + place
  {label}
  repeat {layers} {{
    h := {block}
    h := h + linear[F -> E](tanh(linear[E -> F = 6]({norm}(h))))
  }}
  a: R[T, D], b: R[T, D] = linear[E](h)
  {shifted}
}}
bijector step(x: R[T, D]{given}) {{
  u = {into}
  a: R[T, D], b: R[T, D] = conditioner(u{argument})
  z = (u - b) * exp(-tanh(a))
  {out}
}}
"""
BLOCKS = {
    "before": "h + looking[T]({norm}(h), {arguments})",
    "after": "{norm}(h + looking[T](h, {arguments}))",
    "library": "h + attention[T]({norm}(h), {heads}, true)",
}


@st.composite
def attending(draw: st.DrawFn) -> str:
    size, heads = draw(st.integers(2, 6)), draw(st.sampled_from([1, 2, 4]))
    label, reversed_ = draw(st.booleans()), draw(st.booleans())
    first = draw(st.booleans())  # the shift stands before the network or after it
    flags = f"{heads}, {str(draw(st.booleans())).lower()}, {str(draw(st.booleans())).lower()}, {draw(st.sampled_from([1, 2]))}"
    norm = draw(st.sampled_from(["layer_norm[E]", "rms_norm[E]", ""]))
    block = BLOCKS[draw(st.sampled_from(sorted(BLOCKS)))].format(norm=norm, arguments=flags, heads=heads)
    moved = "reverse[T](x)" if reversed_ else "x"
    text = ATTENTION.format(
        given=" given y: R[K]" if label else "", label="h := h + tanh(linear[K -> E](y))" if label else "",
        argument=", y" if label else "", width=4, layers=draw(st.integers(1, 2)), block=block, norm=norm,
        shifted="a, b" if first else "shift[T](a, 1), shift[T](b, 1)",
        into=moved, out="reverse[T](z)" if reversed_ else "z",
    )  # fmt: skip
    if first:
        text = text.replace("conditioner(u", "conditioner(shift[T](u, 1)")
    given_ = "given y: R[K = 2]; " if label else ""
    return f"{text}flow f {{ data x: R[T = {size}, D = {draw(st.integers(1, 2))}]; {given_}step; base normal }}\n"


def assert_as_plain(spec: str) -> Any:
    """The inverse equals the one that recomputes everything, and undoes the map."""
    flow, plain = build(spec, size=0.4), plain_scan(spec)
    z, c = data(flow, 3), context(flow, 3)
    with torch.no_grad():
        found, expected = flow.inverse(z, **c), plain.inverse(z, **c)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flow(found[0], **c)[0], z, rtol=1e-7, atol=1e-7)
    return flow


@settings(
    max_examples=24, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(attending())
def test_the_cached_inverse_is_the_plain_one(spec: str) -> None:
    assert None not in plans(spec), spec
    assert_as_plain(spec)


MORE = {
    "lifted over": """bijector step(x: R[T, D]) {
      h = transformer[T](shift[T](x, 1), 4, 2, layers = 1, causal = true)
      mean: R[T, D], log_scale: R[T, D] = linear(h)
      (x - mean) * exp(-tanh(log_scale))
    }
    flow f { data x: R[L = 2, T = 4, D = 2]; step[T, D]; base normal }""",
    "cross attention beside it": """net reads(x: R[T, D], c: R[S, K]) {
      q = linear[D -> d = 3](x)
      a = softmax[S](sum[d](q * linear[K -> d = 3](c)))
      linear[d -> D](sum[S](a * linear[K -> d = 3](c)))
    }
    bijector step(x: R[T, D] given c: R[S, K]) {
      h = linear[D -> E = 4](x)
      h := h + attention[T](h, 2, true)
      h := h + reads[T, E](h, c)
      mean: R[T, D], log_scale: R[T, D] = linear[E](h)
      (x - shift[T](mean, 1)) * exp(-tanh(shift[T](log_scale, 1)))
    }
    flow f { data x: R[T = 4, D = 2]; given c: R[S = 3, K = 2]; step; base normal }""",
    "one network in both steps": """bijector step(net: net) (x: R[T, D]) {
      mean: R[T, D], log_scale: R[T, D] = linear(net(shift[T](x, 1)))
      (x - mean) * exp(-tanh(log_scale))
    }
    bijector both {
      f = transformer[T](4, 2, layers = 1, causal = true)
      step(f)
      reverse[T]
      step(f)
    }
    flow f { data x: R[T = 4, D = 2]; both; base normal }""",
    "rotary positions": """net turned(x: R[T, h, d]) {
      half = (x.d) / 2
      a = x[d = 0..half]
      b = x[d = half..2 * half]
      angle: R[T, a.d] = index[T](x) * exp(-3 * index[d](a) / half)
      join[d](a * cos(angle) - b * sin(angle), a * sin(angle) + b * cos(angle))
    }
    bijector step(x: R[T, D]) {
      e = linear[D -> E = 8](shift[T](x, 1))
      q = turned(linear[E -> E](e)[E -> (h = 2, d)])
      k = turned(linear[E -> E](e)[E -> (h = 2, d)])
      scores: R[h, T, S = T] = sum[d](q * k[T -> S]) / 2
      a = softmax[S](scores, causal = "T")
      m: R[T, D] = linear[E](sum[S](a * linear[E -> E](e)[E -> (h = 2, d)][T -> S])[(h, d) -> E])
      x * exp(tanh(m)) + m
    }
    flow f { data x: R[T = 5, D = 2]; step; base normal }""",
    "linear attention": """bijector step(x: R[T, D]) {
      e = linear[D -> E = 3](shift[T](x, 1))
      k = exp(0.3 * linear[E -> K = 4](e))
      q = exp(0.3 * linear[E -> K = 4](e))
      v = linear[E -> V = 3](e)
      all: R[T, K, V] = cumsum[T](k * v)
      m: R[T, D] = linear[V](sum[K](q * all) / (1 + sum[K](q * cumsum[T](k))))
      x * exp(tanh(m)) + m
    }
    flow f { data x: R[T = 5, D = 2]; step; base normal }""",
    "a running sum backwards": """bijector step(x: R[T, D]) {
      m = cumsum[T](tanh(shift[T](x, -1)), reverse = true)
      x * exp(tanh(m)) + m
    }
    flow f { data x: R[T = 5, D = 2]; step; base normal }""",
    "two tokens at once": """bijector step(x: R[T, D]) {
      h = transformer[T](shift[T](x, 2), 4, 2, layers = 1, causal = true)
      mean: R[T, D], log_scale: R[T, D] = linear(h)
      (x - mean) * exp(-tanh(log_scale))
    }
    flow f { data x: R[T = 5, D = 2]; step; base normal }""",
    "keys without the newest": """bijector step(x: R[T, D]) {
      h = linear[D -> E = 4](x)
      scores: R[T, S = T] = sum[E](linear[E -> E](h) * linear[E -> E](shift[T](h, 1))[T -> S])
      a = softmax[S](scores, causal = "T")
      m: R[T, D] = linear[E](sum[S](a * shift[T](h, 1)[T -> S]))
      x * exp(tanh(shift[T](m, 1))) + shift[T](m, 1)
    }
    flow f { data x: R[T = 5, D = 2]; step; base normal }""",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MORE))
def test_other_ways_to_attend(name: str) -> None:
    assert None not in plans(MORE[name])
    assert_as_plain(MORE[name])


CONVOLUTIONS = {
    "dilated": """net causal(x: R[C, H, W]) {
      h = conv(x, 3, kernel = 1)
      h := h + tanh(conv(h, 3, kernel = 3, dilation = [2, 1], causal = "H"))
      h := h + tanh(conv(h, 3, kernel = [2, 3], causal = "H"))
      conv(h, x.C, kernel = 1)
    }
    bijector step(x: R[C, H, W]) {
      m = causal(shift[H](x, 1))
      x * exp(tanh(m)) + m
    }
    flow f { data x: R[C = 1, H = 5, W = 3]; step; reverse[H]; step; base normal }""",
    "gated, with weights of its own": """net gated(x: R[C, H, W]) {
      h = linear[C -> C = 3](x)
      skips = 0 * h
      for l in 0..2 {
        a = conv(h, 6, kernel = 3, dilation = [1, 2 ^ l], causal = "H", weight = weight_norm)
        u, v = halves[C](a)
        h, skip = halves[C](conv(tanh(u) * sigmoid(v), 6, kernel = 1))
        skips := skips + skip
      }
      conv(skips, x.C, kernel = 1)
    }
    bijector step(x: R[C, H, W]) {
      u = reverse[H](x)
      m = shift[H](gated(u), 1)
      reverse[H](u * exp(tanh(m)) + m)
    }
    flow f { data x: R[C = 1, H = 4, W = 5]; step; base normal }""",
    "two rows at once": """bijector step(x: R[C, H, W]) {
      h = tanh(conv(shift[H](x, 2), 3, kernel = 3, causal = "H"))
      m = conv(h, 1, kernel = [2, 3], causal = "H")
      x * exp(tanh(m)) + m
    }
    flow f { data x: R[C = 1, H = 5, W = 3]; step; base normal }""",
    "with attention and a running sum": """bijector step(x: R[T, C]) {
      h = conv[C, T](shift[T](x, 2), 4, kernel = 3, causal = "T")
      h := h + attention[T](h, 2, true)
      m: R[T, C] = linear[C](cumsum[T](h))
      x * exp(tanh(m)) + m
    }
    flow f { data x: R[T = 7, C = 2]; step; base normal }""",
    "one axis, groups": """bijector step(x: R[T, C]) {
      h = conv[C, T](shift[T](x, 1), 4, kernel = 3, causal = "T", groups = 2)
      m = conv[C, T](silu(h), 2, kernel = 2, causal = "T", bias = false)
      x * exp(tanh(m)) + m
    }
    flow f { data x: R[T = 6, C = 2]; step; base normal }""",
    "a mask hides what comes": """bijector step(x: R[C, H, W]) {
      param k: R[out = 1, from = 1, i = 3, j = 3] ~ normal(0, 0.4)
      m = conv(x, weight = k * where(index[i](k) == 0, 1, 0), bias = false)
      x * exp(tanh(m)) + m
    }
    flow f { data x: R[C = 1, H = 4, W = 3]; step; base normal }""",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_causal_convolutions_keep_their_last_rows(name: str) -> None:
    assert None not in plans(CONVOLUTIONS[name])
    assert_as_plain(CONVOLUTIONS[name])


def flops(run: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


COSTS = {
    "attention": "flow f {{ data x: R[T = {}, D = 2]; tarflow_block(tarflow_net(16, 2, 8)); base normal }}",
    "convolution": """net causal(x: R[C, H, W]) {{
      h = tanh(conv(conv(x, 8, kernel = 1), 8, kernel = 3, causal = "H"))
      conv(h, x.C, kernel = 1)
    }}
    bijector step(x: R[C, H, W]) {{
      m = causal(shift[H](x, 1))
      x * exp(tanh(m)) + m
    }}
    flow f {{ data x: R[C = 1, H = {}, W = 6]; step; base normal }}""",
}


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("kind", sorted(COSTS))
def test_all_steps_together_cost_about_one_pass(kind: str, size: int) -> None:
    """With the pass for the log-det two; the plain scan takes a pass for each row."""
    spec = COSTS[kind].format(size)
    x = torch.randn(
        3, *((size, 2) if kind == "attention" else (1, size, 6)), generator=torch.Generator().manual_seed(1)
    )
    flow = fl.compile(spec, seed=0)
    flow.check_inverse = False  # the look at what was found is two passes more
    forward = flops(lambda: flow(x))
    assert flops(lambda: flow.inverse(x)) <= 2.2 * forward
    plain = plain_scan(spec).float()
    assert flops(lambda: plain.inverse(x)) >= size * forward
