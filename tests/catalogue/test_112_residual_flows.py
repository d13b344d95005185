"""Card 112, Residual Flows: its items under "What must hold"."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowlang.backends.torch.runtime import estimate_log_det, exact_log_det
from flowlang.backends.torch.runtime.parameters import induced_norm
from flowlang.backends.torch.runtime.solvers import roulette
from flowlang.backends.torch.store import read_tensors, write_tensors
from torch import Tensor

import flowlang as fl
from flowlang.ir.lipschitz import SLACK
from tests.catalogue.nets import net

TINY = "flow f = residual_flow_tiny\n"
IMAGES = (
    "flow f = residual_flow(channels = 1, size = 4, scales = 2, blocks = 1, width = 6, fc_blocks = 1, fc_width = 6)\n"
)
C = 0.9


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    return fl.compile(TINY, seed=seed, dtype=dtype)


def grown(flow: Any, factor: float = 4.0) -> Any:
    """Weights far beyond the bound, so that every one is scaled."""
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if name.endswith("raw"):
                p *= factor
    flow.settle()
    return flow


def points(n: int, size: int = 2, seed: int = 5, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, size, dtype=torch.float64, generator=generator(seed))


def nets(flow: Any) -> list[Any]:
    return [m for m in flow.modules() if type(m).__name__.startswith(("IresnetFc", "IresnetConv"))]


def test_1_the_inverse_is_a_fixed_point_at_the_certified_rate() -> None:
    """Item 1: x to 1e-5; each step of x <- y - g(x) is shorter by the constant of g, and the error obeys the bound."""
    flow = grown(tiny()).eval()
    x = points(64)
    with torch.no_grad():
        z = flow(x)[0]
        assert float((flow.inverse(z)[0] - x).abs().max()) < 1e-5
    rate = (C * SLACK) ** 3
    for g in nets(flow)[:3]:
        with torch.no_grad():
            y = x + g(x)
            size = g(y).norm(dim=-1)
            now, gaps = y, [(y - x).norm(dim=-1)]
            for m in range(1, 12):
                now = y - g(now)
                gaps.append((now - x).norm(dim=-1))
                assert bool((gaps[-1] <= rate**m / (1 - rate) * size + 1e-12).all())
                assert bool((gaps[-1] <= rate * gaps[-2] + 1e-12).all())


def steepest(g: Any, seed: int) -> float:
    a = points(10_000, seed=seed, scale=2)
    b = a + points(10_000, seed=seed + 1) * torch.logspace(-2, 1, 10_000, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        return float(((g(a) - g(b)).norm(dim=-1) / (a - b).norm(dim=-1)).max())


def test_2_the_certificate_after_every_step() -> None:
    """Item 2: over 10,000 random pairs the slope of g is below 1 after every step of the optimiser, and the norm of every
    normalised matrix is at most c (1 + 1e-3) by its singular values."""
    flow = tiny()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.03)
    x = points(128) * torch.tensor([2.0, 0.2], dtype=torch.float64)
    torch.manual_seed(0)
    for step in range(6):
        flow.train()
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        flow.log_prob(x[:2])  # a pass in training brings the estimates to the new weights
        flow.eval()
        assert max(steepest(g, step) for g in nets(flow)) < 1
        for m in flow.modules():
            if hasattr(m, "improve"):
                assert float(torch.linalg.svdvals(m().detach())[0]) <= C * (1 + 1e-3)
    assert all(norm <= bound for norm, bound in flow.certify().values())


@pytest.mark.slow
def test_2_the_certificate_is_an_upper_bound_of_convolutions() -> None:
    """Item 2, images: the certified norm is at least that of the convolution as a dense matrix, and near it."""
    flow = grown(fl.compile(IMAGES, seed=0, dtype=torch.float64), 6.0)
    assert len(flow.certify()) == 9
    seen = 0
    for m in flow.modules():
        if type(m).__name__.startswith("LipschitzConv"):
            size = m.K.space[0]
            kernel = m.K().detach()
            eye = torch.eye(kernel.shape[1] * size * size, dtype=torch.float64).reshape(-1, kernel.shape[1], size, size)
            dense = torch.nn.functional.conv2d(eye, kernel, padding=kernel.shape[-1] // 2).flatten(1)
            true = float(torch.linalg.matrix_norm(dense, ord=2))
            assert true <= m.K.norm() * (1 + 1e-9)
            assert m.K.norm() <= 0.98 * (1 + 1e-3)
            assert true > 0.5 * m.K.norm()  # 2 x 2 and 4 x 4 places: the torus is much larger
            seen += 1
    assert seen == 6


def test_2_estimates_are_kept_and_a_weight_without_a_certificate_is_refused(tmp_path: Path) -> None:
    """The vectors of the power iteration are saved; weights that no certificate covers are refused at build and export."""
    flow = tiny(dtype=torch.float32)
    assert sum("W.u" in k for k in flow.state_dict()) == 24
    fl.save(flow, tmp_path / "w.safetensors")
    other = fl.load(tmp_path / "w.safetensors")
    name = next(k for k in flow.state_dict() if "W.u" in k)
    assert torch.allclose(other.state_dict()[name].abs(), flow.state_dict()[name].abs(), atol=1e-3)
    with torch.no_grad():
        next(p for n, p in flow.named_parameters() if n.endswith("raw")).fill_(math.inf)
    with pytest.raises(fl.FlowError, match="norm of the weight"):
        fl.export_onnx(flow, tmp_path / "f.onnx", programs=["forward"])


SMALL = "flow f {\n data x: R[D = 2]\n repeat 2 { iresblock(iresnet_fc(8, 0.9, preact = false)) }\n base normal\n}\n"


def test_2_the_certificate_is_stated_and_kept(tmp_path: Path) -> None:
    """The proved constant, and norms by singular values: in `info`, after training, in saved weights and in exported models."""
    import onnxruntime as ort
    from click.testing import CliRunner

    from flowlang.cli.main import cli

    constant = (0.9 * SLACK) ** 3 * (1.09984 / 1.1) ** 2
    spec = tmp_path / "f.flow"
    spec.write_text(SMALL)
    np.savetxt(tmp_path / "d.csv", points(64).numpy(), delimiter=",")

    def told(*words: str) -> str:
        result = CliRunner().invoke(cli, [str(w) for w in words])
        assert result.exit_code == 0, result.output
        return next(x.strip() for x in result.output.splitlines() if x.strip().startswith("certificate:"))

    said = f"certificate: contractions have a constant of at most {constant:.6g}"
    assert told("info", str(spec)) == f"{said}, for weights within their bounds"
    run = tmp_path / "run"
    after = told("train", str(spec), "--data", str(tmp_path / "d.csv"), "-o", str(run), "--epochs", "1")
    assert after.startswith(f"{said}; 6 weights are within their bounds")
    assert told("export", str(spec), "--weights", str(run), "-o", str(tmp_path / "f.onnx"), "--program", "forward").split(" (")[0] == after.split(" (")[0]  # fmt: skip

    flow: Any = fl.load(run)
    found = fl.certificate(flow)
    norms = {n: float(torch.linalg.svdvals(m().detach().double())[0]) for n, m in flow.named_modules() if hasattr(m, "improve")}  # fmt: skip
    assert found["norm"] == pytest.approx(max(norms.values()), rel=1e-5)
    assert found["contraction"] == pytest.approx(constant)
    assert found["bound"] == pytest.approx(0.9 * SLACK)
    fl.save(flow, tmp_path / "w.safetensors")
    for kept in (read_tensors(tmp_path / "w.safetensors")[1]["certificate"], read_tensors(run / "model.safetensors")[1]["certificate"]):  # fmt: skip
        assert {k: v for k, v in kept.items() if k != "nearest"} == pytest.approx({k: v for k, v in found.items() if k != "nearest"}, rel=1e-4)  # fmt: skip
    for path in fl.export_onnx(flow, tmp_path / "g.onnx", programs=["forward", "inverse"]).values():
        metadata = ort.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
        assert json.loads(metadata["certificate"])["contraction"] == pytest.approx(constant)


def test_2_a_bound_that_is_broken_is_refused_everywhere(tmp_path: Path) -> None:
    """Weights whose norm the power iteration misses (its vector has no part along the largest direction): 4.5 where 0.918 is allowed,
    which singular values confirm. Refused at export, when saved and when loaded; no file is written."""
    spec = "net g(x: R[D]) {\n param W: Lipschitz(0.9)[E = D, D]\n sum[D](W * x)[E -> D]\n}\n"
    spec += "flow f {\n data x: R[D = 2]\n exact_iresblock(g)\n base normal\n}\n"
    flow: Any = fl.compile(spec, flow="f", seed=0)
    fl.save(flow, tmp_path / "good.safetensors")
    weight = next(m for m in flow.modules() if hasattr(m, "improve"))
    with torch.no_grad():
        weight.raw.copy_(torch.diag(torch.tensor([5.0, 1.0])))
        weight.u.copy_(torch.tensor([0.0, 1.0]))
    assert float(torch.linalg.svdvals(weight().detach())[0]) == pytest.approx(4.5)
    for act in (
        lambda: fl.export_onnx(flow, tmp_path / "f.onnx", programs=["forward"]),
        lambda: fl.save(flow, tmp_path / "f.safetensors"),
        lambda: fl.certificate(flow),
    ):
        with pytest.raises(fl.FlowError, match=r"norm of the weight `.*` is 4\.5, and 0\.918"):
            act()
    assert not list(tmp_path.glob("f.*"))
    tensors, meta = read_tensors(tmp_path / "good.safetensors")
    write_tensors(tmp_path / "bad.safetensors", {**tensors, **{k: v for k, v in flow.state_dict().items() if k in tensors}}, meta)  # fmt: skip
    with pytest.raises(fl.FlowError, match="norm of the weight"):
        fl.load(tmp_path / "bad.safetensors")


# ---- induced mixed norms (the card's option) ----------------------------------------------------

ORDERS = [(1, 1), (1, 3), (2, 2), (math.inf, math.inf), (3, math.inf), (1.5, 1.5), (3, 3), (1.5, 4), (2, 3), (3, 1.5), (4, 1.2)]  # fmt: skip


def stretch(w: Tensor, p: float, q: float) -> float:
    """The largest |Wx|_q / |x|_p that ascent from many starts finds: a bound from below."""
    x = torch.randn(2000, w.shape[1], dtype=torch.float64, generator=generator(3))
    x = torch.cat([x, torch.eye(w.shape[1], dtype=torch.float64), torch.sign(w)]).requires_grad_()

    def ratio(v: Tensor) -> Tensor:
        return torch.linalg.vector_norm(v @ w.T, q, dim=-1) / torch.linalg.vector_norm(v, p, dim=-1)

    best = ratio(x).max()
    for _ in range(60):
        (slope,) = torch.autograd.grad(ratio(x).log().sum(), x)
        x = torch.nn.functional.normalize(x + 0.05 * slope / slope.norm(dim=-1, keepdim=True), dim=-1).detach().requires_grad_()  # fmt: skip
        best = torch.maximum(best, ratio(x).max())
    return float(best.detach())


@pytest.mark.parametrize(("p", "q"), ORDERS)
def test_the_bound_of_an_induced_norm(p: float, q: float) -> None:
    """Never below what ascent finds, within 1.6 of it here, and the norm itself where that is known."""
    w = torch.randn(5, 4, dtype=torch.float64, generator=generator(1))
    found = float(induced_norm(w, p, q))
    assert stretch(w, p, q) <= found < 1.6 * stretch(w, p, q)
    if p == q and p in (1, 2, math.inf):
        assert abs(found / float(np.linalg.norm(w.numpy(), p)) - 1) < 1e-2 if p == math.inf else 2e-6


def mixed(text: str = "iresnet_mixed(16, 0.9)", block: str = "exact_iresblock", n: int = 2) -> Any:
    spec = f"flow f {{\n data x: R[D = {n}]\n repeat 2 {{ {block}({text}) }}\n base normal\n}}\n"
    flow: Any = fl.compile(spec, seed=0, dtype=torch.float64)
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if ".V" in name:
                p *= 20
            if name.endswith("raw"):
                p += torch.randn(p.shape, dtype=p.dtype, generator=generator(p.numel()))
    return flow


def orders_of(g: Any) -> Tensor:
    """The learned orders by the authors' formula, in (1, 5) and 2 at 0."""
    u = 0.5493061443340548 - g.raw.detach()
    return 3 - 2 * torch.tanh(0.3 * u + 0.7 * torch.nn.functional.elu(u))


@pytest.mark.parametrize("text", ["iresnet_mixed(16, 0.9)", "iresnet_mixed(16, 0.9, mixed = false)"])
def test_2_the_certificate_in_learned_norms(text: str) -> None:
    """Item 2 in the norm that each block has learned: slopes of random pairs below 1 after every step; the orders move."""
    flow = mixed(text, "iresblock")
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    x = points(64) * torch.tensor([2.0, 0.2], dtype=torch.float64)
    torch.manual_seed(0)
    gs = [m for m in flow.modules() if type(m).__name__.startswith("IresnetMixed")]
    before = [orders_of(g).clone() for g in gs]
    for step in range(4):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for g in gs:
            p = float(orders_of(g)[0])
            a = points(4000, seed=step, scale=2)
            b = a + points(4000, seed=step + 9) * torch.logspace(-2, 1, 4000, dtype=torch.float64).unsqueeze(-1)
            with torch.no_grad():
                slope = torch.linalg.vector_norm(g(a) - g(b), p, dim=-1) / torch.linalg.vector_norm(a - b, p, dim=-1)
            assert 0 < float(slope.max()) < 0.9**3
    assert all(float((orders_of(g) - b).abs().max()) > 1e-3 for g, b in zip(gs, before, strict=True))


def test_orders_of_2_are_the_spectral_norm() -> None:
    """The authors' default `2222`: the network by hand, with weights scaled by their singular values."""
    flow = mixed("iresnet_mixed(16, 0.9, orders = [2, 2, 2, 2])")
    g = next(m for m in flow.modules() if type(m).__name__.startswith("IresnetMixed"))
    w = dict(g.named_parameters())
    beta = [torch.nn.functional.softplus(v) for k, v in w.items() if "beta" in k]
    x = h = points(9)
    for k, name in enumerate(("V1", "V2", "V3")):
        v = w[name]
        h = h * torch.sigmoid(beta[k] * h) / 1.1
        h = h @ (v * min(1.0, 0.9 / float(torch.linalg.svdvals(v.detach())[0]))).T + w[f"b{k + 1}"]
    torch.testing.assert_close(g(x), h, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("orders", "code"), [("[2, 3, 3, 4]", "FL0407"), ("[0.5, 2, 2, 0.5]", "FL0409"), ("[3, 1, inf, 3]", "")])  # fmt: skip
def test_norms_that_do_not_follow_each_other_are_refused(orders: str, code: str) -> None:
    """No norm is that of both ends, whatever each weight's bound; and what is the order of no norm."""
    spec = f"flow f {{\n data x: R[D = 2]\n iresblock(iresnet_mixed(8, 0.9, orders = {orders}))\n base normal\n}}\n"
    assert [e.code for e in fl.check(spec).errors] == ([code] if code else [])


def test_mixed_norms_export(tmp_path: Path) -> None:
    import onnxruntime as ort

    flow, x = mixed("iresnet_mixed(6, 0.9, preact = false)").eval(), points(5)
    single: Any = fl.compile("flow f {\n data x: R[D = 2]\n repeat 2 { exact_iresblock(iresnet_mixed(6, 0.9, preact = false)) }\n base normal\n}\n", seed=0)  # fmt: skip
    single.load_state_dict(flow.state_dict())
    files = fl.export_onnx(single.eval(), tmp_path / "f.onnx", programs=["log_prob", "inverse"])
    for name, wanted in (("log_prob", flow.log_prob(x)), ("inverse", flow.inverse(x)[0])):
        session = ort.InferenceSession(str(files[name]))
        found = session.run(None, {session.get_inputs()[0].name: x.float().numpy()})[0]
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-4)


def dense_of(kernel: Tensor, space: tuple[int, int], stride: int = 1) -> Tensor:
    """The matrix of a convolution with zeros around, from the images of unit vectors."""
    units = torch.eye(kernel.shape[1] * math.prod(space), dtype=kernel.dtype).reshape(-1, kernel.shape[1], *space)
    images = torch.nn.functional.conv2d(units, kernel, padding=kernel.shape[-1] // 2, stride=stride)
    return images.flatten(1).T


@pytest.mark.parametrize(("p", "q"), ORDERS)
def test_the_bound_of_an_induced_norm_of_a_convolution(p: float, q: float) -> None:
    """Of the convolution's dense matrix: never below what ascent finds, nor 1.5 times above the bound of that matrix itself."""
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=generator(1))
    for stride in (1, 2):
        dense = dense_of(kernel, (4, 3), stride)
        found = float(induced_norm(kernel, p, q, space=(4, 3)))
        assert stretch(dense, p, q) <= found
        if stride == 1:
            assert float(induced_norm(dense, p, q)) * (1 - 1e-9) <= found <= 1.5 * float(induced_norm(dense, p, q))


MIXED_CONV = "flow f {\n data x: R[C = 2, H = 3, W = 3]\n repeat 2 { BLOCK(iresnet_mixed_conv(5, 0.9ORDERS)) }\n base normal\n}\n"


def mixed_conv(block: str = "exact_iresblock", orders: str = "", dtype: torch.dtype = torch.float64) -> Any:
    flow: Any = fl.compile(MIXED_CONV.replace("BLOCK", block).replace("ORDERS", orders), seed=0, dtype=dtype)
    with torch.no_grad():
        for name, p in flow.named_parameters():
            if ".V" in name:
                p *= 20
            if name.endswith("raw"):
                p += torch.tensor([0.3, -0.4, 0.1], dtype=dtype)
    return flow


def images(n: int, seed: int = 4, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, 2, 3, 3, dtype=torch.float64, generator=generator(seed))


def test_2_the_certificate_of_convolutions_in_learned_norms() -> None:
    """Item 2 in the norm that each block has learned; the Jacobian's stretch in it, by ascent, stays below the bound too."""
    flow = mixed_conv("iresblock")
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    gs = [m for m in flow.modules() if type(m).__name__.startswith("IresnetMixedConv")]
    before = [orders_of(g).clone() for g in gs]
    torch.manual_seed(0)
    for step in range(3):
        loss = -flow.log_prob(images(32)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for g in gs:
            p = float(orders_of(g)[0])
            a = images(5000, seed=step, scale=2)
            b = a + images(5000, seed=step + 9) * torch.logspace(-2, 1, 5000, dtype=torch.float64).reshape(-1, 1, 1, 1)
            with torch.no_grad():
                far, near = (torch.linalg.vector_norm(v.flatten(1), p, dim=-1) for v in (g(a) - g(b), a - b))
            assert 0 < float((far / near).max()) < 0.9**3
            jacobian = torch.autograd.functional.jacobian(lambda v, g=g: g(v.unsqueeze(0))[0], a[0]).reshape(18, 18)
            assert stretch(jacobian, p, p) < 0.9**3
    assert all(float((orders_of(g) - b).abs().max()) > 1e-3 for g, b in zip(gs, before, strict=True))


@pytest.mark.parametrize(("made", "draw"), [(mixed, points), (mixed_conv, images)], ids=["linear", "convolution"])
def test_mixed_norms_invert_and_have_their_log_det(
    made: Callable[[], Any], draw: Callable[[int], torch.Tensor]
) -> None:
    flow, x = made().eval(), draw(8)
    z, log_det = flow(x)
    assert float((flow.inverse(z)[0] - x).detach().abs().max()) < 1e-9
    for k in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.unsqueeze(0))[0][0], x[k])
        dense = jacobian.reshape(x[k].numel(), x[k].numel())
        assert abs(float((torch.linalg.slogdet(dense)[1] - log_det[k]).detach())) < 1e-9


def test_a_kernel_bounded_for_other_sizes_is_refused() -> None:
    """The norm from l3 to l2 depends on the image's size; a kernel without sizes is no convolution's bound at all."""

    def errors(sizes: str, dilation: str = "") -> list[str]:
        net = (
            "net g(x: R[C, H, W]) -> R[C, H, W] {\n param K: R[O = 2, C, h = 3, w = 3] ~ normal\n"
            f" conv[C, H, W](x, weight = induced[C, h, w](K, 0.9, 3, 3{sizes}), bias = false{dilation})\n}}\n"
        )
        return [
            e.code
            for e in fl.check(
                net + "flow f {\n data x: R[C = 2, H = 3, W = 3]\n exact_iresblock(g)\n base normal\n}\n"
            ).errors
        ]

    assert errors(", x.H, x.W") == []
    assert errors(", 2, 2") == ["FL0401"]
    assert errors("") == ["FL0401"]
    assert errors(", x.H, x.W", ", dilation = 2") == ["FL0401"]
    assert errors(", x.H") == ["FL0305"]


def test_images_with_mixed_norms_train_and_export(tmp_path: Path) -> None:
    """The image model with the authors' `--learn-p`, and parity of its convolutional blocks in ONNX."""
    import onnxruntime as ort

    spec = "flow f = residual_flow(channels = 1, size = 4, scales = 2, blocks = 1, width = 6, fc_blocks = 1, fc_width = 6, mixed = true)\n"
    whole: Any = fl.compile(spec, seed=0)
    x = torch.rand(8, 1, 4, 4, generator=generator(2))
    whole.initialise(x)
    (-whole.log_prob(x).mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in whole.parameters())
    flow = mixed_conv(dtype=torch.float32).eval()
    files = fl.export_onnx(flow, tmp_path / "f.onnx", programs=["forward", "inverse"])
    x = images(3).float()
    for name, wanted in (("forward", flow(x)[0]), ("inverse", flow.inverse(x)[0])):
        session = ort.InferenceSession(str(files[name]))
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-4)


def linear(seed: int = 0, norm: float = 0.9, size: int = 3) -> Tensor:
    j = torch.randn(size, size, dtype=torch.float64, generator=generator(seed))
    return j * (norm / torch.linalg.matrix_norm(j, ord=2))


@pytest.mark.parametrize("law", ["geometric", "poisson"])
def test_3_the_roulette_is_unbiased(law: str) -> None:
    """Item 3: linear g with |J| = 0.9 in three coordinates, 40,000 draws of probe and length (geometric 0.5, 2 exact terms)."""
    j, runs, probes = linear(6), 4000, 10
    x = torch.zeros(probes, 3, dtype=torch.float64)
    torch.manual_seed(0)
    rate = 0.5 if law == "geometric" else 2.0
    with torch.no_grad():
        found = torch.stack([estimate_log_det(lambda v: v @ j.T, x, 1, None, law, rate, 2).mean() for _ in range(runs)])
    exact = torch.linalg.slogdet(torch.eye(3, dtype=torch.float64) + j)[1]
    assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / math.sqrt(runs)
    v = torch.randn(40_000, 3, dtype=torch.float64, generator=generator(1))
    cut = ((v @ j.T) * v).sum(-1) - ((v @ j.T @ j.T) * v).sum(-1) / 2
    assert abs(float(cut.mean() - exact)) > 10 * float(cut.std()) / math.sqrt(40_000)


def test_4_the_neumann_gradient() -> None:
    """Item 4: over 20,000 draws the mean gradient is that of the exact log-det (4 standard errors); the surrogate's value
    is not the log-det. Here the value that goes with the gradient is the unbiased one, except where the surrogate is asked for."""
    j = linear(6).requires_grad_()
    (wanted,) = torch.autograd.grad(torch.linalg.slogdet(torch.eye(3, dtype=torch.float64) + j)[1], j)
    runs, probes = 2000, 10
    x = torch.zeros(probes, 3, dtype=torch.float64)
    torch.manual_seed(0)
    grads, values, surrogates = [], [], []
    for _ in range(runs):
        found = estimate_log_det(lambda v: v @ j.T, x, 1, None, "geometric", 0.5, 2).mean()
        grads.append(torch.autograd.grad(found, j)[0])
        values.append(float(found.detach()))
        with torch.no_grad():
            surrogates.append(
                float(estimate_log_det(lambda v: v @ j.T, x, 1, None, "geometric", 0.5, 2, 1, True).mean())
            )
    g = torch.stack(grads)
    assert bool(((g.mean(0) - wanted).abs() < 4 * g.std(0) / math.sqrt(runs)).all())
    exact = float(torch.linalg.slogdet(torch.eye(3, dtype=torch.float64) + j.detach())[1])
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / math.sqrt(runs)
    assert abs(np.mean(surrogates) - exact) > 10 * np.std(surrogates) / math.sqrt(runs)


@pytest.mark.slow
def test_4_the_gradient_reaches_inputs_and_parameters_of_a_network() -> None:
    """Item 4 for a network: the gradients in the input and in every weight are those of the exact log-det, on average."""
    model: Any = fl.compile("model m = residual_flow_model(blocks = 2, width = 4)\n", seed=0, dtype=torch.float64)
    x = points(3)
    ps = list(model.parameters())

    def mean_gradient(program: str, runs: int) -> tuple[list[Tensor], list[Tensor]]:
        each = []
        for _ in range(runs):
            value = getattr(model, program)(x)
            each.append(torch.autograd.grad(value.mean(), ps, allow_unused=True))
        kept = [
            torch.stack([e[k] if e[k] is not None else torch.zeros_like(ps[k]) for e in each]) for k in range(len(ps))
        ]
        return [k.mean(0) for k in kept], [k.std(0) / math.sqrt(runs) if runs > 1 else k[0] for k in kept]

    model.settle()
    model.eval()
    exact, _ = mean_gradient("log_prob_exact", 1)
    torch.manual_seed(0)
    for program, sign in (("log_prob_unbiased", 1), ("loss_neumann", -1)):
        found, error = mean_gradient(program, 400)
        for a, b, e in zip(found, exact, error, strict=True):
            assert bool(((sign * a - b).abs() < 5 * e + 1e-9).all())


def test_5_the_log_det_of_an_inverse_with_gradients() -> None:
    """The solved value carries a hook for its own gradient, which the log-det must not meet."""
    flow: Any = fl.compile(
        "flow f {\n data x: R[D = 2]\n exact_iresblock(iresnet_fc(8, 0.9))\n base normal\n}\n",
        seed=0,
        dtype=torch.float64,
    )
    grown(flow).eval()
    x = points(4)
    z, log_det = flow(x)
    torch.testing.assert_close(flow.inverse(z)[1], -log_det, rtol=0, atol=1e-9)


def test_5_a_linear_block_in_closed_form() -> None:
    """Item 5: g(x) = A x, log det(I + A) and the inverse (I + A)^-1 y."""
    spec = """net g(x: R[D]) -> R[D] {
  param W: Lipschitz(0.9)[E = D, D]
  sum[D](W * x)[E -> D]
}
flow f {
  data x: R[D = 3]
  exact_iresblock(g)
  base normal
}
"""
    flow: Any = fl.compile(spec, seed=0, dtype=torch.float64).eval()
    a = next(m for m in flow.modules() if hasattr(m, "improve"))().detach()
    eye = torch.eye(3, dtype=torch.float64)
    y = points(8, 3)
    x, log_det = flow.inverse(y)
    torch.testing.assert_close(x, torch.linalg.solve(eye + a, y.T).T, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det, -torch.linalg.slogdet(eye + a)[1].expand(8), rtol=0, atol=1e-9)
    assert {d["name"]: d for d in fl.info(spec)}["f"]["exactness"] == "exact"


def test_6_lipswish_has_slope_at_most_one() -> None:
    """Item 6: over a fine grid, for β from 0.1 to 10; the largest slope of swish is 1.0998."""
    x = torch.linspace(-60, 60, 200_001, dtype=torch.float64, requires_grad=True)
    for beta in torch.logspace(-1, 1, 9, dtype=torch.float64):
        (slope,) = torch.autograd.grad((x * torch.sigmoid(beta * x)).sum(), x)
        assert 1.0998 < float(slope.abs().max()) <= 1.09984
    mine: Any = net("lipswish(x)", kind="norm", D=1)
    for raw in (-2.25, 0.5, 10.0):
        with torch.no_grad():
            next(iter(mine.parameters())).fill_(raw)
        (slope,) = torch.autograd.grad(mine(x.unsqueeze(-1)).sum(), x)
        assert float(slope.abs().max()) <= 1


def test_7_the_density_has_mass_one() -> None:
    """Item 7: in two coordinates, with the exact determinant, on a grid."""
    model: Any = fl.compile("model m = residual_flow_model\n", seed=1, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("raw"):
                p *= 3
    model.settle()
    side = torch.linspace(-9, 9, 181, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = float(model.log_prob_exact(grid).exp().sum() * (side[1] - side[0]) ** 2)
    assert abs(mass - 1) < 0.01


@pytest.mark.parametrize(("law", "rate"), [("geometric", 0.5), ("poisson", 2.0), ("geometric", 0.3)])
def test_8_the_weights_have_mean_one(law: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Item 8: E[c_k] = 1 for each k, by enumerating the length through its quantiles."""
    n = 20_000
    total = np.zeros(6)
    for k in range(n):
        monkeypatch.setattr(torch, "rand", lambda *_, k=k, **__: torch.tensor((k + 0.5) / n, dtype=torch.float64))
        c = roulette(law, rate, 2, None)
        total += np.array((c + [0.0] * 6)[:6])
    assert np.abs(total / n - 1).max() < 5e-3
    monkeypatch.undo()
    j, wanted = 1, []
    for _ in range(4):  # the formulas of the card
        p = (
            (1 - rate) ** (j - 1)
            if law == "geometric"
            else 1 - math.exp(-rate) * sum(rate**i / math.factorial(i) for i in range(j))
        )
        wanted.append(1 / p)
        j += 1
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1e-9, dtype=torch.float64))
    np.testing.assert_allclose(roulette(law, rate, 2, None)[2:6], wanted, rtol=1e-12)


def test_the_exact_log_det_is_autograd_s() -> None:
    flow = grown(tiny()).eval()
    g = nets(flow)[0]
    x = points(4)
    rows = torch.stack([torch.autograd.functional.jacobian(g, v) for v in x])
    wanted = torch.linalg.slogdet(torch.eye(2, dtype=torch.float64) + rows)[1]
    torch.testing.assert_close(exact_log_det(g, x, 1), wanted, rtol=0, atol=1e-12)


def test_images_invert_train_and_say_what_they_are() -> None:
    """The image flow: unbiased estimate, inverse by fixed points, one step of training with finite gradients."""
    facts = {d["name"]: d for d in fl.info(IMAGES)}["f"]
    assert facts["exactness"] == "unbiased"
    assert facts["log_det"] == "estimator"
    flow: Any = fl.compile(IMAGES, seed=0, dtype=torch.float64)
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64, generator=generator())
    flow.initialise(x)
    torch.manual_seed(0)
    before = flow.train().log_prob(x).mean()
    before.backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in flow.parameters())
    flow.eval()
    z = flow(x)[0]
    assert float((flow.inverse(z)[0] - x).detach().abs().max()) < 1e-5
    mean, error = flow.log_prob_mean(x, draws=8)
    assert bool((error > 0).all())
    assert bool((error < 0.2).all())
    assert bool(torch.isfinite(mean).all())


def test_the_cifar_preset_compiles_on_the_meta_device() -> None:
    """No published count is certain (about 25 million, unsure): this is the count of the authors' layers."""
    with torch.device("meta"):
        flow = fl.compile("flow f = residual_flow_cifar10\n")
    assert sum(p.numel() for p in flow.parameters()) == CIFAR


CIFAR = 25_174_129


def test_exported(tmp_path: Path) -> None:
    """ONNX: forward y and the exact log-density in low dimension, norms folded into the weights; the inverse as a loop."""
    import onnxruntime as ort

    spec = "flow f {\n data x: R[D = 2]\n repeat 2 { exact_iresblock(iresnet_fc(8, 0.9, preact = false)) }\n base normal\n}\n"
    flow = grown(fl.compile(spec, seed=0)).eval()
    files = fl.export_onnx(flow, tmp_path / "f.onnx", programs=["forward", "log_prob", "inverse"])
    x = points(5).float()
    run = {n: ort.InferenceSession(str(p)).run(None, {i.name: v}) for n, p in files.items()
           for i, v in [(ort.InferenceSession(str(p)).get_inputs()[0], x.numpy())]}  # fmt: skip
    with torch.no_grad():
        np.testing.assert_allclose(run["forward"][0], flow(x)[0].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(run["log_prob"][0], flow.log_prob(x).numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(run["inverse"][0], flow.inverse(x)[0].numpy(), rtol=1e-4, atol=1e-5)
