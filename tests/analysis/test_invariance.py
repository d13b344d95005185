"""What `info` says of norms, against what their modules do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowlang.analysis.invariance import report
from flowlang.api import analyse
from flowlang.cli.main import cli
from tests.catalogue.norms import data, norm

IMAGE = {"C": 4, "H": 3, "W": 2}
NORMS: dict[str, dict[str, int]] = {
    "batch_norm()": IMAGE, "batch_norm_population()": IMAGE, "layer_norm()": {"D": 6}, "layer_norm_all()": IMAGE,
    "rms_norm()": {"D": 6}, "rms_norm(outside = true)": {"D": 6}, "partial_rms_norm(p = 0.5)": {"D": 6},
    "group_norm(2)": IMAGE, "instance_norm()": IMAGE, "evonorm_b0()": IMAGE, "evonorm_b1()": IMAGE, "evonorm_b2()": IMAGE,
    "evonorm_s0(2)": IMAGE, "evonorm_s1(2)": IMAGE, "evonorm_s2(2)": IMAGE, "power_norm_v()": {"C": 4, "T": 3},
    "power_norm(10)": {"C": 4, "T": 3}, "group_scaling(2)": {"C": 4}, "layer_scaling()": IMAGE, "online_norm()": {"C": 4},
    "activation_clamp()": {"C": 4},
}  # fmt: skip


def said(call: str, sizes: dict[str, int]) -> dict[str, Any]:
    axes = ", ".join(f"{n} = {s}" for n, s in sizes.items())
    comp = analyse(f"norm f(x: R[{axes}]) {{ {call}(x) }}", sized=True)
    return report(comp.regions["f"])


def factors(who: str, x: Tensor, seed: int) -> Tensor:
    shape = [1] * x.dim()
    if who == "sample":
        shape[0] = len(x)
    if who == "channel":
        shape[1] = x.shape[1]
    return data(*shape, seed=seed).exp()


def changed(call: str, sizes: dict[str, int], mode: str, kind: str, who: str, seed: int = 0) -> float:
    """The largest change of the result, relative to its size."""
    first, second = norm(call, moved=0.3, **sizes), norm(call, moved=0.3, **sizes)
    for module in (first, second):
        for k in range(3):
            module(data(5, *sizes.values(), seed=40 + k, shift=0.3))
        module.train(mode == "training")
    x = data(5, *sizes.values(), seed=seed, scale=20)
    c = factors(who, x, seed + 1)
    a, b = first(x), second(x * c if kind == "scale" else x + 10 * c)
    return float((a - b).detach().abs().max() / a.detach().abs().max())


@pytest.mark.parametrize("call", NORMS)
def test_what_is_shown_holds_and_what_is_not_does_not(call: str) -> None:
    found = said(call, NORMS[call])
    for mode in ("training", "inference"):
        for kind in ("scale", "shift"):
            for who, word in found[mode][kind].items():
                far = changed(call, NORMS[call], mode, kind, who)
                if word == "not shown":
                    assert far > 1e-3, (mode, kind, who)
                else:
                    assert far < (1e-9 if word == "yes" else 1e-4), (mode, kind, who)


@pytest.mark.parametrize("call", NORMS)
def test_dependence_on_the_batch_and_on_the_mode(call: str) -> None:
    sizes = NORMS[call]
    found = said(call, sizes)
    x = data(5, *sizes.values())
    y = torch.cat([x[:2], data(3, *sizes.values(), seed=8, scale=3)])
    for mode in ("training", "inference"):
        one, two = norm(call, **sizes).train(mode == "training"), norm(call, **sizes).train(mode == "training")
        a, b = one(x)[1], two(y)[1]
        if mode == "training" and call.startswith("online"):
            a, b = one(x)[4], two(y)[4]  # of the samples before it alone
            assert not torch.equal(a, b)
            continue
        assert torch.equal(a, b) != found["batch"][mode], mode
    again = norm(call, **sizes)
    again(data(5, *sizes.values(), seed=3, scale=2))
    trained = again(x)
    assert torch.equal(trained, again.eval()(x)) != found["modes_differ"]


@pytest.mark.parametrize(("call", "axes"), [
    ("batch_norm()", ["B", "H", "W"]), ("layer_norm()", ["D"]), ("layer_norm_all()", ["C", "H", "W"]),
    ("rms_norm()", []), ("evonorm_b0()", []), ("power_norm_v()", []), ("instance_norm()", ["H", "W"]),
])  # fmt: skip
def test_what_is_centred(call: str, axes: list[str]) -> None:
    assert said(call, NORMS[call])["centred"] == axes


@pytest.mark.parametrize(("call", "scale", "shift"), [
    ("batch_norm()", (True, False, True), (True, False, True)), ("layer_norm()", (True, True, False), (True, True, False)),
    ("rms_norm()", (True, True, False), (False, False, False)),
    ("partial_rms_norm(p = 0.5)", (True, True, False), (False, False, False)),
])  # fmt: skip
def test_the_table_of_card_097(call: str, scale: tuple[bool, ...], shift: tuple[bool, ...]) -> None:
    """In the order: all (matrix, data), a sample (all weight vectors alike), a channel (one weight vector; the data's mean)."""
    found = said(call, NORMS[call])["training"]
    assert tuple(w != "not shown" for w in found["scale"].values()) == scale
    assert tuple(w != "not shown" for w in found["shift"].values()) == shift


TERMS = st.recursive(
    st.sampled_from(
        [
            "x",
            "mean[D](x)",
            "sqrt(var[D](x))",
            "abs(x)",
            "max(x, 0)",
            "relu(x)",
            "2",
            "sqrt(mean[B](x ^ 2))",
            "mean[B](x)",
        ]
    ),
    lambda t: st.tuples(t, st.sampled_from(["+", "-", "*"]), t).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
    max_leaves=4,
)


@given(TERMS, TERMS, st.integers(0, 5))
@settings(derandomize=True, max_examples=25, deadline=None)
def test_random_norms_are_never_said_to_be_more_than_they_are(above: str, below: str, seed: int) -> None:
    from tests.catalogue.norms import fl

    text = f"norm f(x: R[D = 3]) {{ y: R[D = 3] = {above} + 0 * x\n y / sqrt(({below}) ^ 2 + 1e-9) }}"
    comp = analyse(text, sized=True)
    if not comp.ok:
        return
    found = report(comp.regions["f"])["training"]
    module = fl.compile(text, flow="f", dtype=torch.float64)
    x = data(4, 3, seed=seed, scale=3)
    for kind in ("scale", "shift"):
        for who, word in found[kind].items():
            if word == "not shown":
                continue
            c = factors(who, x, seed + 1)
            a, b = module(x), module(x * c if kind == "scale" else x + c)
            size = max(float(a.abs().max()), 1e-3)
            if size < 1e4 and math.isfinite(size):  # else the eps is what is left below
                assert float((a - b).abs().max()) < 1e-3 * size, (text, kind, who)


def test_info_tells_it(tmp_path: Any) -> None:
    spec = tmp_path / "n.flow"
    spec.write_text("norm n(x: R[D = 4]) { layer_norm()(x) }\n")
    out = CliRunner().invoke(cli, ["info", str(spec)]).output
    assert "each sample by itself; unchanged by scaling the input" in out
    assert "centred over D" in out


@pytest.mark.parametrize(("text", "names"), [
    ("net f(x: R[D = 3]) { batch_norm[H](linear[D -> H = 4](x)) }", ["linear_bias"]),
    ("net f(x: R[C = 3, H = 4, W = 4]) { batch_norm()(conv(x, 8, kernel = 3)) }", ["conv_bias"]),
    ("net f(x: R[D = 3]) { batch_norm[H](linear[D -> H = 4](x, bias = false)) }", []),
    ("net f(x: R[D = 3]) { layer_norm[H](linear[D -> H = 4](x)) }", []),  # an offset for each unit is seen
    ("net f(x: R[D = 3]) { batch_norm[H](relu(linear[D -> H = 4](x))) }", []),
    ("net f(x: R[D = 3]) { h = linear[D -> H = 4](x)\n batch_norm[H](h) + h }", []),
    ("net f(x: R[D = 3]) { batch_norm[D](x) }", []),
])  # fmt: skip
def test_an_offset_without_effect_is_told(text: str, names: list[str]) -> None:
    from tests.catalogue.norms import fl

    told = [d for d in fl.check(text) if d.code == "FL0503"]
    assert [d.severity for d in told] == ["warning"] * len(names)
    assert all(n.split("_")[1] in d.message for n, d in zip(names, told, strict=True))
    if names:
        module = fl.compile(text, flow="f", dtype=torch.float64)
        x = data(6, *next(iter(module.inputs.values())))
        module(x).square().sum().backward()
        assert float(dict(module.named_parameters())[names[0]].grad.abs().max()) < 1e-9
