"""Card 081, FireFlow (Deng et al. 2024): what must hold, item by item."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlang as fl
from tests.catalogue.attention_toy import TOY, velocity
from tests.catalogue.programs import same_in_onnx
from tests.catalogue.test_121_rf_solver import images, shifted

F64 = torch.float64
CURVED = "net field(x: R[D], t: R) { sin(3 * t) - x * (1 + 0.5 * sin(x)) }\n"
WEAK = {
    "from_nothing": "solver from_nothing (v, x, t, h) { state u = 0\n u := v(x + h / 2 * u, t + h / 2)\n x + h * u }\n",
    "never": "solver never (v, x, t, h) { x + h * v(x, t + h / 2) }\n",
}


@cache
def end(solver: str, count: int, bent: bool = False) -> float:
    """Where the curved field leads from 1 in so many steps, equal or on FLUX's grid (turned, from 0 on)."""
    times = [1 - t for t in shifted(count, 4096)]
    options = f"times = {times}" if bent else f"steps = {count}"
    net: Any = fl.compile(
        CURVED
        + WEAK.get(solver, "")
        + f"net m(x: R[D = 1]) {{ integrate(field(), x, t = 0 -> 1, {solver}({options})) }}",
        flow="m",
        dtype=F64,
    )
    return float(net(torch.ones(1, 1, dtype=F64)))


@cache
def truth() -> float:
    net: Any = fl.compile(
        CURVED + "net m(x: R[D = 1]) { integrate(field(), x, t = 0 -> 1, dopri5(rtol = 1e-12, atol = 1e-12)) }",
        flow="m",
        dtype=F64,
    )
    return float(net(torch.ones(1, 1, dtype=F64)))


def slopes(solver: str, counts: tuple[int, ...], bent: bool = False) -> list[float]:
    errors = [abs(end(solver, n, bent) - truth()) for n in counts]
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize(("solver", "each", "more"), [("fireflow", 1, 1), ("midpoint", 2, 0), ("euler", 1, 0)])
def test_item_1_evaluations(solver: str, each: int, more: int, steps: int) -> None:
    net: Any = fl.compile(
        CURVED + f"net m(x: R[D = 1]) {{ integrate(field(), x, t = 0 -> 1, {solver}(steps = {steps})) }}", flow="m"
    )
    with fl.count_steps() as counts:
        net(torch.ones(1, 1))
    assert counts.evaluations == each * steps + more


def test_item_2_orders_on_equal_steps() -> None:
    assert all(1.9 <= s <= 2.5 for s in slopes("fireflow", (16, 32, 64)))
    assert all(1.9 <= s <= 2.5 for s in slopes("midpoint", (16, 32, 64)))
    assert all(0.9 <= s <= 1.1 for s in slopes("euler", (16, 32, 64)))


def test_item_2_order_on_the_shifted_grid() -> None:
    assert all(s >= 1.85 for s in slopes("fireflow", (64, 128, 256, 512), bent=True))


def test_item_3_exact_where_the_velocity_does_not_hang_on_the_place() -> None:
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    for field, wanted in (("1.5 + 0 * x + 0 * t", 1.5), ("1 + 3 * t + 0 * x", 2.5)):
        net: Any = fl.compile(
            f"net field(x: R[D], t: R) {{ {field} }}\nnet m(x: R[D = 2]) {{ integrate(field(), x, t = 0 -> 1, fireflow(steps = 1)) }}",
            flow="m",
            dtype=F64,
        )
        assert (net(x) - x - wanted).abs().max() < 1e-12


@cache
def round_trip(solver: str) -> float:
    text = f"""model m {{
      data x: R[D = 2]
      field = gmm_velocity([1.5, 0, -1.5], [0, 1.5, -1], 1, 0.4)
      def v(x, t) {{ field(x, t, 0 * t) }}
      def trip(x) {{ integrate(v, integrate(v, x, t = 1 -> 0, {solver}), t = 0 -> 1, {solver}) }}
    }}"""
    model: Any = fl.compile(text, dtype=F64)
    g = torch.Generator().manual_seed(1)
    modes = torch.tensor([[1.5, 0], [0, 1.5], [-1.5, -1]], dtype=F64)
    x = modes[torch.randint(3, (300,), generator=g)] + 0.4 * torch.randn(300, 2, dtype=F64, generator=g)
    return float((model.trip(x) - x).norm(dim=-1).mean())


def test_item_4_the_way_there_and_back_through_a_mixture() -> None:
    assert round_trip("fireflow(steps = 8)") < 0.5 * round_trip("euler(steps = 8)")
    assert round_trip("fireflow(steps = 8)") < round_trip("euler(steps = 18)")  # 9 evaluations each way against 18


def test_item_5_rf_solver_is_the_midpoint_rule() -> None:
    for n in (4, 16):
        assert abs(end("rf_solver2", n) - end("midpoint", n)) <= 1e-12


def test_item_6_a_wrong_first_slope_costs_a_constant_and_none_at_all_the_order() -> None:
    counts = (64, 128, 256)
    assert all(1.8 <= s <= 2.2 for s in slopes("from_nothing", counts))
    assert all(0.8 <= s <= 1.1 for s in slopes("never", counts))
    assert abs(end("from_nothing", 128) - truth()) > 2 * abs(end("fireflow", 128) - truth())


def editor(inject: int, steps: int = 5) -> Any:
    text = (
        TOY
        + f"model m = fireflow_edit(v = toy(), steps = {steps}, inject = {inject}, first = 1, taken = 2, heads = 2, head = 4, distilled = false)"
    )
    return fl.compile(text, H=2, W=2, P=3, L=3, K=5, seed=0, dtype=F64)


def reference(
    net: Any, x: Tensor, text: Tensor, steps: int, inject: int, inverse: bool, store: dict[Any, Tensor]
) -> Tensor:
    """One way of FireFlow, features under keys (time, stage, block); where there is none the network's own is used."""
    times, flags = shifted(steps, 4), [True] * inject + [False] * (steps - inject)
    if inverse:
        times, flags = times[::-1], flags[::-1]
    carried: Tensor | None = None
    for here, there, flag in zip(times, times[1:], flags, strict=False):
        key = there if inverse else here

        def change(k: int, v: Tensor, second: bool, key: float = key, flag: bool = flag) -> Tensor:
            if k < 1 or not flag:
                return v
            if inverse:
                store[key, second, k] = v
            return v if inverse else store.get((key, second, k), v)

        slope = velocity(net, x, here, text, lambda k, v: change(k, v, False)) if carried is None else carried
        carried = velocity(
            net, x + (there - here) / 2 * slope, (here + there) / 2, text, lambda k, v: change(k, v, True)
        )
        x = x + (there - here) * carried
    return x


@pytest.mark.parametrize("inject", [0, 1, 3, 5])
def test_editing_is_the_authors_procedure(inject: int) -> None:
    model = editor(inject)
    x, source, target = images()
    store: dict[Any, Tensor] = {}
    with torch.no_grad():
        noise = reference(model.v, x, source, 5, inject, True, store)
        wanted = reference(model.v, noise, target, 5, inject, False, store)
        found, cache = model.invert(x, source)
        torch.testing.assert_close(found, noise)
        torch.testing.assert_close(model.edit(x, source, target), wanted)
        if inject:
            assert cache.shape[1] == inject * 2  # only second stages
            torch.testing.assert_close(model.edit_from(found, cache, target), wanted)


def test_item_7_the_same_text_reconstructs_and_without_injection_it_samples() -> None:
    x, source, target = images()
    whole, none = editor(5), editor(0)
    with torch.no_grad():
        assert torch.equal(whole.edit(x, source, source), whole.reconstruct(x, source))
        noise, _ = none.invert(x, source)
        text = (
            TOY
            + f"""model m(v: net = toy()) {{
          data z: R[H = 2, W = 2, P = 3]
          given c: R[L = 3, K = 5]
          def generate(z, c) {{
            def field(y, t) {{ v(y, t, c) }}
            integrate(field, z, t = 1 -> 0, fireflow(times = {shifted(5, 4)}))
          }}
        }}"""
        )
        plain: Any = fl.compile(text, seed=0, dtype=F64)
        assert (none.edit(x, source, target) - plain.generate(noise, target)).abs().max() <= 1e-6


def test_a_step_of_training_and_the_presets() -> None:
    model: Any = fl.compile("fireflow_edit_tiny", H=2, W=2, P=3, L=3, K=5, seed=0)
    x, source, target = (v.float() for v in images())
    model.edit(x, source, target).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_onnx_velocity_sampler_inversion_and_edit(tmp_path: Path) -> None:
    text = """model m(v: net = time_mlp(16)) {
      data x: R[D = 2]
      def velocity(x, t: R) { u: R[D] = v(x, t)
        u }
      def generate(x) { integrate(v, x, t = 1 -> 0, fireflow(steps = 4)) }
      def invert(x) { integrate(v, x, t = 0 -> 1, fireflow(steps = 4)) }
    }"""
    model: Any = fl.compile(text, seed=0)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    same_in_onnx(model, "velocity", tmp_path, x, torch.rand(5))
    same_in_onnx(model, "generate", tmp_path, x)
    same_in_onnx(model, "invert", tmp_path, x)
    pair: Any = fl.compile(
        TOY
        + "model m = fireflow_edit(v = toy(), steps = 3, inject = 1, first = 1, taken = 2, heads = 2, head = 4, distilled = false)",
        H=2,
        W=2,
        P=3,
        L=3,
        K=5,
        seed=0,
    )
    same_in_onnx(pair, "edit", tmp_path, *(v.float() for v in images()), dynamic=())
