"""Card 002, NanoFlow (Lee et al. 2020): what must hold, item by item."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flowlang as fl
from flowlang.verify import perturb
from tests.backends.torch.test_cached_attention import flops
from tests.backends.torch.test_scan import plain_scan

SMALL = "mel = 3, rows = 4, flows = 2, layers = 2, width = 6, embed = 5"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


@cache
def audio(samples: int = 16, form: str = "full", bins: int = 0) -> Any:
    text = f"flow f = nanoflow_wave(samples = {samples}, form = {form}, bins = {bins}, {SMALL})\n"
    return moved(fl.compile(text, seed=0, dtype=torch.float64))


@cache
def image(form: str = "full") -> Any:
    text = (
        f"flow f = nanoflow_glow(channels = 3, size = 4, levels = 2, depth = 2, width = 6, embed = 2, form = {form})\n"
    )
    return moved(fl.compile(text, seed=0, dtype=torch.float64))


def moved(flow: Any) -> Any:
    flow.initialised.fill_(True) if hasattr(flow, "initialised") else None
    perturb(flow, generator(1), 0.3)
    return flow.eval()


def steps_of(flow: Any, name: str = "NanoflowStepWave") -> list[Any]:
    return [m for m in flow.modules() if type(m).__name__.startswith(name)]


def slogdet(f: Any, x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda v: torch.cat([p.flatten() for p in f(v)]), x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]


@pytest.mark.parametrize(
    ("form", "bins"), [("full", 0), ("deployed", 0), ("decomp", 0), ("naive", 0), ("waveflow", 0), ("full", 5)]
)
def test_item_1_audio_inverse_and_log_det(form: str, bins: int) -> None:
    flow, x, c = audio(16, form, bins), normal(2, 16), normal(2, 3, 1, seed=1)
    z, log_det = flow(x, c=c)
    with torch.no_grad():
        assert (flow.inverse(z, c=c)[0] - x).abs().max() <= 1e-9
    for k in range(2):
        assert abs(slogdet(lambda v, k=k: [flow(v, c=c[k])[0]], x[k]) - log_det[k]) <= 1e-8
    single = fl.compile(f"flow f = nanoflow_wave(samples = 16, form = {form}, bins = {bins}, {SMALL})\n", seed=0)
    single.load_state_dict(flow.state_dict())
    with torch.no_grad():
        y = single.inverse(single(x.float(), c=c.float())[0], c=c.float())[0]
        assert (y - x.float()).abs().max() <= 1e-4


@pytest.mark.parametrize("form", ["full", "decomp", "naive", "glow"])
def test_item_1_image_inverse_and_log_det(form: str) -> None:
    flow, x = image(form), normal(2, 3, 4, 4, seed=2)
    *parts, log_det = flow(x)
    with torch.no_grad():
        assert (flow.inverse(*parts)[0] - x).abs().max() <= 1e-9
    assert abs(slogdet(lambda v: flow(v)[:-1], x[0]) - log_det[0]) <= 1e-8


@cache
def one_step() -> Any:
    text = """flow f {
      data x: R[H = 6, W = 4]
      given mel: R[M = 3, H = 6, W = 4], e: R[E = 5]
      nanoflow_step_wave(nanoflow_estimator(6, 3), 6, 3)
      base normal
    }
    """
    return moved(fl.compile(text, seed=0, dtype=torch.float64))


def test_item_2_a_row_reads_only_the_rows_above() -> None:
    flow, x, mel, e = one_step(), normal(6, 4), normal(3, 6, 4, seed=1), normal(5, seed=2)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, mel=mel, e=e)[0], x)
    for i in range(6):
        assert not jacobian[i, :, i + 1 :].any()
        own = jacobian[i, :, i]
        assert torch.equal(own != 0, torch.eye(4, dtype=torch.bool))
        assert i == 0 or jacobian[i, :, :i].abs().max() > 0


def parameters(text: str) -> int:
    with torch.device("meta"):
        flow = fl.compile(f"flow f = {text}\n")
    return sum(p.numel() for p in flow.parameters())


def test_item_3_published_counts() -> None:
    text = """flow a = nanoflow_wave
    require parameters(a) == 3_865_188
    flow b = nanoflow_wave_large
    require parameters(b) == 4_936_324
    flow c = nanoflow_wave_deployed
    require parameters(c) == 2_818_530
    flow d = nanoflow_wave(flows = 16, form = deployed)
    require parameters(d) == 2_845_186
    flow e = waveflow
    require parameters(e) == 22_385_892
    flow f = waveflow_r64
    require parameters(f) == 5_950_180
    """
    assert fl.check(text).ok
    assert parameters("nanoflow_wave(samples = 256)") == 3_865_188


def test_item_3_parameters_grow_by_what_a_step_owns() -> None:
    sizes = "samples = 256, rows = 16, layers = 8, width = 128"
    of = {k: parameters(f"nanoflow_wave({sizes}, flows = {k}, embed = 512)") for k in (2, 3)}
    assert of[3] - of[2] == 1284 + 512
    naive = {k: parameters(f"nanoflow_wave({sizes}, flows = {k}, form = naive)") for k in (2, 3)}
    assert naive[3] == naive[2]
    narrow = [parameters(f"nanoflow_wave({sizes}, mel = 8, flows = {k}, embed = 512)") for k in (2, 3)]
    assert narrow[1] - narrow[0] == 1284 + 512  # whatever the shared network's size
    full = parameters(f"nanoflow_wave({sizes}, flows = 16, embed = 1024)")
    assert full / parameters(f"nanoflow_wave({sizes}, flows = 16, form = waveflow)") < 0.2


def test_item_4_tied_steps_are_one_function() -> None:
    flow = moved(fl.compile(f"flow f = nanoflow_wave(samples = 16, {SMALL})\n", seed=0, dtype=torch.float64))
    chain = next(m for m in flow.modules() if hasattr(m, "indication"))
    first, second = steps_of(flow)
    x, mel = normal(4, 4), normal(3, 4, 4, seed=1)
    with torch.no_grad():
        assert (first(x, mel, chain.indication[0])[0] - second(x, mel, chain.indication[1])[0]).abs().max() > 1e-3
        second.load_state_dict(first.state_dict())
        chain.indication[1] = chain.indication[0]
        assert torch.equal(first(x, mel, chain.indication[0])[0], second(x, mel, chain.indication[1])[0])
        seen: list[Tensor] = []
        handles = [s.register_forward_hook(lambda m, i, o: seen.append(o[0])) for s in (first, second)]
        flow(normal(16, seed=3), c=normal(3, 1, seed=4))
        chain.indication[1] += 0.5
        flow(normal(16, seed=3), c=normal(3, 1, seed=4))
        for h in handles:
            h.remove()
    assert torch.equal(seen[0], seen[2])  # the first step is as it was
    assert (seen[1] - seen[3]).abs().max() > 1e-3


def estimator_by_hand(own: dict[str, Tensor], x: Tensor, mel: Tensor, e: Tensor, gates: Tensor, layers: int) -> Tensor:
    """The estimator in torch's functions: weights in the order in which the declaration makes them."""
    names = [n.removesuffix("_weight") for n in own if n.endswith("_weight")]
    convs, lines = ([n for n in names if n.startswith(k)] for k in ("conv", "linear"))
    gains = iter([own[n] for n in own if n.endswith(".g")])
    plan = [convs[0]]
    for l in range(layers):
        plan += [convs[1 + 3 * l], convs[2 + 3 * l], lines[l], convs[3 + 3 * l]]
    weight = {}
    for n in plan:
        v, g = own[f"{n}_weight"], next(gains)
        norm = v.flatten(1).norm(dim=1)
        weight[n] = v * (g / norm).reshape(-1, *[1] * (v.dim() - 1))
    h = F.conv2d(x[None, None], weight[convs[0]], own[f"{convs[0]}_bias"])
    total = torch.zeros_like(h)
    for l in range(layers):
        a, c, line, out = plan[1 + 4 * l : 5 + 4 * l]
        padded = F.pad(h, (2**l, 2**l, 2, 0))
        y = F.conv2d(padded, weight[a], own[f"{a}_bias"], dilation=(1, 2**l))
        y = y + F.conv2d(mel[None], weight[c], own[f"{c}_bias"])
        y = y + F.linear(e, weight[line], own[f"{line}_bias"])[None, :, None, None]
        u, v = y.chunk(2, 1)
        r, s = F.conv2d(torch.tanh(u) * torch.sigmoid(v), weight[out], own[f"{out}_bias"]).chunk(2, 1)
        h, total = h + r * gates[l][None, :, None, None], total + s
    return total[0]


def test_item_5_a_gate_of_0_leaves_the_layer_s_residual_out() -> None:
    flow, x, mel, e = one_step(), normal(6, 4), normal(3, 6, 4, seed=1), normal(5, seed=2)
    (net,) = (m for m in flow.modules() if type(m).__name__.startswith("NanoflowEstimator"))
    own = {k: v.clone() for k, v in net.state_dict().items()}
    gates = 1 + 0.3 * normal(3, 6, seed=5)
    shut = gates.clone()
    shut[0] = 0
    with torch.no_grad():
        for g in (gates, shut):
            assert (net(x, mel, e, g) - estimator_by_hand(own, x, mel, e, g, 3)).abs().max() <= 1e-9
        weight = next(k for k in own if k.startswith("conv_4") and k.endswith("_weight"))  # layer 0's residual and skip
        own[weight.replace("weight", "bias")][:6] += 1.0  # its residual half
        assert (estimator_by_hand(own, x, mel, e, shut, 3) - net(x, mel, e, shut)).abs().max() <= 1e-9
        own[weight.replace("weight", "bias")][6:] += 1.0  # its skip half
        changed = estimator_by_hand(own, x, mel, e, shut, 3) - net(x, mel, e, shut)
        assert (changed - 1).abs().max() <= 1e-9


def rows(n: int, g: torch.Generator) -> Tensor:
    """Eight numbers, each of two humps whose middle and width follow the number before."""
    x = [torch.randn(n, generator=g)]
    for _ in range(7):
        p = x[-1]
        sign = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)
        x.append(
            torch.sin(2 * p) + (0.2 + 0.8 * torch.sigmoid(2 * p)) * (0.9 * sign + 0.25 * torch.randn(n, generator=g))
        )
    return torch.stack(x, 1)


def held_out(form: str, seed: int, train: Tensor, test: Tensor) -> float:
    """Nats for each number of held-out rows after 500 steps."""
    sizes = "samples = 8, mel = 1, rows = 8, flows = 4, layers = 2, width = 6, embed = 16"
    flow = fl.compile(f"flow f = nanoflow_wave({sizes}, form = {form})\n", seed=seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=500)
    batches = generator(seed + 1)
    for _ in range(500):
        optimizer.zero_grad()
        x = train[torch.randint(4096, (128,), generator=batches)]
        (-flow.log_prob(x, c=torch.zeros(128, 1, 1)).mean() / 8).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(-flow.log_prob(test, c=torch.zeros(2048, 1, 1)).mean() / 8)


@pytest.mark.slow
def test_item_6_full_beats_decomp_beats_naive() -> None:
    """Means over four seeds of data, weights and batches; `naive` is so far behind (0.2, seen) that one seed shows it.

    Between `full` and `decomp` 0.030, 0.050, 0.000 and 0.082 were seen, at sizes that were chosen: at these few steps the order of these
    two is a matter of means, not of each seed. With width 3 the differences were 0.134, 0.026, 0.042, 0.020, 0.039, 0.069 (seeds 100 to 105)
    and, afresh, 0.201, 0.020, -0.002, -0.088, -0.010, 0.014 (0 to 5): 0.039 in the mean of twelve, standard error 0.021; with
    width 2, 0.106, 0.025, 0.020, 0.002, 0.169, -0.027. What varies is whether 500 steps find the two humps.
    """
    found: dict[str, list[float]] = {"full": [], "decomp": [], "naive": []}
    for seed in range(4):
        draw = generator(seed)
        train, test = rows(4096, draw), rows(2048, draw)
        mean, std = train.mean(), train.std()
        for form in ("full", "decomp", *(["naive"] if seed == 0 else [])):
            found[form].append(held_out(form, seed, (train - mean) / std, (test - mean) / std))
    assert np.mean(found["full"]) <= np.mean(found["decomp"]) - 0.02, found
    assert max(found["decomp"]) <= found["naive"][0] - 0.02, found


def test_item_7_the_queue_of_rows_gives_what_a_recomputation_gives() -> None:
    text = f"flow f = nanoflow_wave(samples = 64, {SMALL.replace('rows = 4', 'rows = 8')})\n"
    fast, plain = fl.compile(text, seed=0), plain_scan(text).float()
    perturb(fast, generator(1), 0.3)
    plain.load_state_dict(fast.state_dict())
    fast.requires_grad_(False), plain.requires_grad_(False)
    fast.check_inverse = plain.check_inverse = False  # the look at what was found is two passes more
    z, c = normal(3, 8, 8).float(), normal(3, 3, 1, seed=1).float()
    with torch.no_grad():
        assert (fast.inverse(z, c=c)[0] - plain.inverse(z, c=c)[0]).abs().max() <= 1e-5
    once = flops(lambda: fast(normal(3, 64).float(), c=c))
    assert flops(lambda: fast.inverse(z, c=c)) <= 2.3 * once  # one of the two passes is the log-det's
    assert flops(lambda: plain.inverse(z, c=c)) >= 5 * once


def waveform() -> tuple[Tensor, Tensor]:
    """Windows of 256 samples of a recorded waveform, four channels of an EEG (matplotlib's sample data), and four bands of each
    window's spectrum on a log scale as its mel frame."""
    from matplotlib.cbook import get_sample_data

    with get_sample_data("eeg.dat") as file:
        whole = torch.from_numpy(np.frombuffer(file.read(), dtype=np.float64).copy()).reshape(800, 4).T
    x = ((whole - whole.mean(1, keepdim=True)) / whole.std(1, keepdim=True)).unfold(1, 256, 136).reshape(-1, 256)
    power = torch.fft.rfft(x * torch.hann_window(256, dtype=x.dtype)).abs().square()[:, 1:]
    bands = torch.stack([b.mean(1) for b in power.chunk(4, 1)], 1).log()
    return x.float(), bands.unsqueeze(-1).float()


def digits() -> Tensor:
    """Digits of 16 x 16 pixels in three channels, dequantised."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().images[:16], dtype=torch.float32)
    x = x.repeat_interleave(2, 1).repeat_interleave(2, 2).unsqueeze(1).expand(-1, 3, -1, -1)
    return (x + torch.rand(x.shape, generator=generator(1))) / 17 - 0.5


@pytest.mark.parametrize("name", ["nanoflow_wave_tiny", "nanoflow_glow_tiny"])
def test_tiny_presets_train_on_real_data(name: str) -> None:
    """A recorded waveform with its spectrum, and images of digits."""
    flow = fl.compile(name, seed=0)
    wave = name == "nanoflow_wave_tiny"
    x, bands = waveform() if wave else (digits(), torch.zeros(()))
    c = {"c": bands} if wave else {}
    if hasattr(flow, "initialise"):
        flow.initialise(x, **c)
    before = float(-flow.log_prob(x, **c).detach().mean())
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = -flow.log_prob(x, **c).mean()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.parameters())
        optimizer.step()
    assert float(loss.detach()) < before


def test_onnx_of_both_directions(tmp_path: Path) -> None:
    import onnxruntime as ort

    flow = fl.compile(f"flow f = nanoflow_wave(samples = 32, {SMALL})\n", seed=0).eval()
    perturb(flow, generator(1), 0.3)
    paths = fl.export_onnx(flow, tmp_path / "m.onnx", programs=["forward", "inverse"])
    x, c = normal(3, 32).float(), normal(3, 3, 1, seed=1).float()
    z, log_det = (v.detach() for v in flow(x, c=c))
    forward, inverse = (ort.InferenceSession(str(paths[p])) for p in ("forward", "inverse"))
    found = forward.run(None, {forward.get_inputs()[0].name: x.numpy(), "c": c.numpy()})
    assert np.allclose(found[0], z.numpy(), atol=1e-4)
    assert np.allclose(found[1], log_det.numpy(), atol=1e-3)
    back = inverse.run(None, {inverse.get_inputs()[0].name: z.numpy(), "c": c.numpy()})
    assert np.allclose(back[0], x.numpy(), atol=1e-4)
