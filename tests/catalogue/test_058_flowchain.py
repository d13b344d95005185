"""Card 058, FlowChain (Maeda & Ukita 2023): what must hold, item by item."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowlang as fl
from flowlang.verify import perturb

S, T, D, L = 3, 4, 2, 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


@cache
def model(past: bool = True) -> Any:
    """A tiny model away from its start, with running statistics of a few batches, in evaluation."""
    text = f"""model m = flowchain(
      steps = {S}, observed = {T}, length = {L}, blocks = 2, hidden = 16, past = {str(past).lower()}, samples = 50,
      encoder = history_encoder(16, {L})
    )
    """
    found: Any = fl.compile(text, seed=0, dtype=torch.float64)
    perturb(found, generator(2), 0.3)
    for k in range(10):
        found.log_prob(data(64, S, D, seed=k), data(64, T, D, seed=100 + k))
    return found.eval()


def flows(m: Any) -> list[Any]:
    return [c for c in m.children() if type(c).__name__.startswith("CifStep")]


def freeze_index(m: Any) -> None:
    """r = q, constant and narrow: the index is one value, and its two densities cancel."""
    with torch.no_grad():
        for f in flows(m):
            for net in (f.r, f.q):
                for p in net.parameters():
                    p.zero_()
                _, log_scale = net.children()
                last = list(log_scale.parameters())[-1]
                assert last.dim() == 1  # a bias
                last.fill_(-40.0)


def test_item_1_each_step_is_invertible_with_its_index() -> None:
    m = model()
    for s, f in enumerate(flows(m)):
        x, c = data(20, D, seed=3), data(20, L + s * D, seed=4)
        y, u, log_det = f(x, c)
        back, back_log_det = f.inverse(y, u, c)
        assert (back - x).abs().max() < 1e-5
        assert (back_log_det + log_det).abs().max() < 1e-9


@pytest.mark.parametrize("past", [False, True])
def test_item_2_log_prob_by_change_of_variables(past: bool) -> None:
    """Chains of one and two steps (and three). With `past` the condition of a step is held at the sample's own positions."""
    m = fl.compile(
        f"model m = flowchain(steps = {S}, observed = {T}, length = {L}, blocks = 2, hidden = 16, past = {str(past).lower()},"
        f" encoder = history_encoder(16, {L}))\n",
        seed=0, dtype=torch.float64,
    ).eval()  # fmt: skip
    m.load_state_dict(model(past).state_dict())
    freeze_index(m)
    c, start = data(4, L, seed=5), data(4, D, seed=6)
    xs, log_probs, _, base = m.sample_with_log_prob(c, start, generator=generator(7))
    z = start + torch.randn(4, D, dtype=torch.float64, generator=generator(7)) * m.sigma[0].detach()
    assert torch.allclose(base, normal(z, start, m.sigma[0]), atol=1e-9)

    def through(v: Tensor, b: int, steps: int) -> Tensor:
        for s in range(steps):
            given = torch.cat((c[b], xs[b, :s].flatten())) if past else c[b]
            v = flows(m)[s].inverse(v, torch.zeros(len(given), dtype=torch.float64), given)[0]
        return v

    for b in range(4):
        for steps in (1, 2, 3):
            dense = torch.autograd.functional.jacobian(partial(through, b=b, steps=steps), z[b])
            expected = base[b] - torch.linalg.slogdet(dense)[1]
            assert abs(log_probs[b, steps - 1] - expected) < 1e-4
            assert torch.allclose(through(z[b], b, steps), xs[b, steps - 1], atol=1e-9)
    # The same density from the side of the data: step 1, whose base is centred on the last observation.
    obs = data(4, T, D, seed=8)
    obs[:, -1] = start
    one = m.log_prob_steps(xs.detach(), obs)  # its condition is the encoder's, not c
    c2 = m.encode(obs)
    u, log_det = flows(m)[0].score(xs[:, 0].detach(), c2)
    assert torch.allclose(one[:, 0], normal(u, start, m.sigma[0]) + log_det, atol=1e-9)


def normal(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, scale.detach().clamp_min(1e-4)).log_prob(x).sum(-1)


def test_item_3_bound_rises_with_draws_to_the_quadrature() -> None:
    text = "flow f {\n data x: R[D = 2]\n cif_step(index = 1, r = mlp(8), q = mlp(8))\n base normal\n}\n"
    flow = fl.compile(text, seed=0, dtype=torch.float64)
    perturb(flow, generator(9), 1.0)
    step = flow.cif_step
    x = data(16, 2, seed=10)
    with torch.no_grad():
        u = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        y, log_det = step.affine_coupling(x[:, None].expand(-1, len(u), -1), u[None, :, None].expand(16, -1, -1))
        mean, log_scale = step.q(y).unbind(-1)
        log_w = normal(y, torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)) + log_det
        log_w = log_w + torch.distributions.Normal(mean, log_scale.exp()).log_prob(u)
        truth = (log_w.logsumexp(-1) + math.log(24 / 4000)).mean()
        torch.manual_seed(0)
        means, errors = [], []
        for k in (1, 4, 16, 64):
            found = torch.stack([flow.log_prob_bound(x, k).mean() for _ in range(400)])
            means.append(float(found.mean()))
            errors.append(float(found.std()) / 20)
    assert flow.exactness == "lower bound"
    assert means == sorted(means)
    assert all(m <= truth + 4 * e for m, e in zip(means, errors, strict=True))
    assert means[0] < truth - 4 * errors[0]
    assert abs(means[-1] - truth) < 0.05


def test_item_4_losses_of_steps_reach_their_own_flows_alone() -> None:
    m = model()
    x, obs = data(8, S, D, seed=11), data(8, T, D, seed=12)
    for s in range(S):
        m.zero_grad()
        m.log_prob_steps(x, obs)[:, s].sum().backward()
        moved = [any(p.grad is not None and p.grad.abs().max() > 0 for p in f.parameters()) for f in flows(m)]
        assert moved == [k == s for k in range(S)]
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in m.encoder.parameters())
    m.zero_grad()


def cached(m: Any) -> tuple[Tensor, ...]:
    c, start = m.encode(data(1, T, D, seed=13)), data(1, D, seed=14)
    found = m.sample_with_log_prob(c.expand(50, -1), start.expand(50, -1), generator=generator(15))
    return tuple(v.detach() for v in found)


def test_item_5_update_runs_no_network() -> None:
    m = model()
    xs, _, log_dets, base = cached(m)
    calls = []
    hooks = [f.register_forward_hook(lambda *_: calls.append(1)) for f in m.modules() if f is not m]
    for t in (1, 2):
        seen = xs[3, t - 1]
        moved, later = m.update_density(xs, log_dets, base, seen, torch.tensor(t))
        expected = torch.softmax(normal(xs[:, t - 1], seen, m.sigma[t]), 0)
        assert torch.allclose(torch.softmax(moved, 0), expected, atol=1e-6)
        assert torch.allclose(moved.exp().sum(), base.exp().sum(), rtol=1e-9)  # what the weights summed to before
        assert torch.allclose(later[:, t:], moved[:, None] - log_dets[:, t:].cumsum(1), atol=1e-9)
    for h in hooks:
        h.remove()
    assert calls == []


def test_the_codes_running_mean() -> None:
    m = model()
    _, _, log_dets, base = cached(m)
    expected = base[:, None] + log_dets.cumsum(1) / torch.arange(1, S + 1)
    assert torch.allclose(m.log_prob_running_mean(log_dets, base), expected, atol=1e-12)


@cache
def step_flow() -> fl.Flow:
    flow = fl.compile(
        "flow f {\n data x: R[D = 2]\n given c: R[L = 4]\n realnvp_blocks(3, 16)\n base normal\n}\n",
        seed=0,
        dtype=torch.float64,
    )
    perturb(flow, generator(16), 0.3)
    for k in range(40):
        flow.log_prob(0.7 * data(128, 2, seed=k) + 0.3, c=data(128, 4, seed=50 + k))
    return flow.eval()


def test_item_6_the_density_of_a_step_integrates_to_1() -> None:
    side = torch.linspace(-6, 6, 241, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    with torch.no_grad():
        for k in range(3):
            mass = step_flow().log_prob(grid, c=data(1, 4, seed=60 + k).expand(len(grid), -1)).exp().sum() * 0.05**2
            assert abs(mass - 1) < 0.02


def test_item_7_batch_norm_in_evaluation() -> None:
    flow = fl.compile("flow f {\n data x: R[D = 3]\n flow_batch_norm\n base normal\n}\n", seed=0, dtype=torch.float64)
    perturb(flow, generator(17), 0.5)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for k in range(5):  # the code's update: 0.9 of the old value, unbiased variance
        x = 2 * data(16, 3, seed=k) + 1
        y, log_det = flow(x)
        scale = flow.flow_batch_norm.log_gamma.exp() / (x.var(0) + 1e-5).sqrt()
        assert torch.allclose(y, (x - x.mean(0)) * scale + flow.flow_batch_norm.beta, atol=1e-12)
        assert torch.allclose(log_det, scale.log().sum().expand(16), atol=1e-12)
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    flow.eval()
    x = data(3, seed=18)
    dense = torch.autograd.functional.jacobian(lambda v: flow(v)[0], x)
    assert abs(torch.linalg.slogdet(dense)[1] - flow(x)[1]) < 1e-12
    expected = (x - mean) / (var + 1e-5).sqrt() * flow.flow_batch_norm.log_gamma.exp() + flow.flow_batch_norm.beta
    assert torch.allclose(flow(x)[0], expected, atol=1e-12)


def test_the_coupling_as_printed() -> None:
    """u = x·exp(log_s) + t with a mask that keeps odd coordinates, then even ones; networks read [cond, masked x]."""
    for even in (False, True):
        text = f"flow f {{\n data x: R[D = 2]\n given c: R[L = 3]\n masked_affine_coupling(even = {str(even).lower()})\n base normal\n}}\n"
        flow = fl.compile(text, seed=0, dtype=torch.float64)
        x, c = data(6, 2, seed=19), data(6, 3, seed=20)
        mask = torch.tensor([1.0, 0.0] if even else [0.0, 1.0], dtype=torch.float64)
        both = torch.cat((c, mask * x), 1)
        coupling = flow.masked_affine_coupling
        log_s = torch.tanh(coupling.f(both)) * (1 - mask)
        y, log_det = flow(x, c=c)
        assert torch.allclose(y, x * log_s.exp() + coupling.g(both) * (1 - mask), atol=1e-12)
        assert torch.allclose(log_det, log_s.sum(1), atol=1e-12)


def test_trains_on_walks() -> None:
    """Constant velocity with noise."""
    m: Any = fl.compile("model m = flowchain_tiny\n", seed=0)
    g = generator(21)
    optimizer = torch.optim.Adam(m.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        v = torch.randn(128, 1, D, generator=g)
        walk = torch.cumsum(v + 0.1 * torch.randn(128, T + S, D, generator=g), 1)
        walk = walk - walk[:, T - 1 : T]
        loss = m.loss(walk[:, T:], walk[:, :T], generator=g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    m.eval()
    samples = m.sample_with_log_prob(m.encode(walk[:5, :T]), walk[:5, T - 1], generator=g)[0]
    assert torch.isfinite(samples).all()


def test_sizes_of_the_published_preset() -> None:
    """No count is published; the layers are those of the authors' configuration (two networks of 3 x 64 in each coupling)."""
    total = 24  # σ

    def linear(a: int, b: int) -> int:
        return a * b + b

    for s in range(12):
        cond = 16 + 2 * s
        coupling = 2 * (linear(2 + cond, 64) + 2 * linear(64, 64) + linear(64, 2))
        width = 2 * (2 + cond)
        gaussian = 2 * (linear(2 + cond, width) + linear(width, width) + linear(width, cond))
        total += 3 * (coupling + 4) + 2 * gaussian
    total += linear(6, 512) + linear(12, 512) + 2 * linear(128, 512) + linear(256, 16)  # Trajectron++
    m = fl.compile("model m = flowchain_eth_ucy\n", seed=0)
    assert sum(p.numel() for p in m.parameters()) == total


def test_the_encoder_of_trajectron() -> None:
    """Against torch's LSTMs: own states, and the sums of the neighbours' beside them; without neighbours their end counts nothing."""
    text = """net n(x: R[T = 8, F = 6], y: R[T = 8, F = 6], e: R) { trajectron_encoder(5, 4)(x, y, e) }\n"""
    f: Any = fl.compile(text, flow="n", seed=0, dtype=torch.float64).requires_grad_(False).eval()
    w = dict(f.named_parameters())
    names = [k.removesuffix("_weight") for k in w if k.endswith("_weight")]

    def lstm(size: int, prefix: str) -> nn.LSTM:
        made = nn.LSTM(size, 5, batch_first=True, dtype=torch.float64).requires_grad_(False)
        own = [k for k in names if k.startswith(prefix)]
        for k, which in zip(own, ("ih", "hh"), strict=True):
            getattr(made, f"weight_{which}_l0").copy_(w[f"{k}_weight"])
            getattr(made, f"bias_{which}_l0").copy_(w[f"{k}_bias"])
        return made

    own, around = lstm(6, "trajectron_encoder.lstm."), lstm(12, "trajectron_encoder.lstm_2.")
    x, y, e = data(3, 8, 6), data(3, 8, 6, seed=2), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    ends = torch.cat([e[:, None] * around(torch.cat([y, x], -1))[0][:, -1], own(x)[0][:, -1]], -1)
    k = "trajectron_encoder.linear"
    wanted = nn.functional.linear(ends, w[f"{k}_weight"], w[f"{k}_bias"])
    torch.testing.assert_close(f(x, y, e), wanted, rtol=0, atol=1e-12)
    assert torch.equal(f(x, y, e)[0], f(x, -y, e)[0])

    # While training, three dropouts of a quarter: each end, and the neighbours' once more after `edges`.
    drops = [m for m in f.modules() if type(m).__name__.startswith("Dropout")]
    seen: list[tuple[Tensor, Tensor]] = []
    for m in drops:
        m.register_forward_hook(lambda _m, i, o: seen.append((i[0], o)))
    f.train()(x.repeat(200, 1, 1), y.repeat(200, 1, 1), e.repeat(200))
    assert len(seen) == 3
    for i, o in seen:
        assert bool(((o == 0) | ((o - i / 0.75).abs() < 1e-12)).all())
        assert abs(float((o[i != 0] != 0).double().mean()) - 0.75) < 0.04


def test_the_published_configuration_reads_neighbours() -> None:
    """A small one with the published encoder: its programs take the states, the others do not; one step of training."""
    m: Any = fl.compile(
        "model m = flowchain(2, 4, length = 3, blocks = 1, hidden = 8, social = true, encoder = trajectron_encoder(6, 3))\n",
        seed=0,
    )
    assert set(m.programs["loss"]) == {"x", "obs", "history", "neighbours", "edges"}
    assert set(model().programs["loss"]) == {"x", "obs"}
    assert not {"history", "neighbours", "edges"} & set(model().given_shapes)
    g = generator(3)
    given = [torch.randn(16, *s, generator=g) for s in m.programs["loss"].values()]
    m.loss(*given, generator=g).backward()
    found = {n: p.grad for n, p in m.named_parameters() if n.startswith("encoder")}
    assert all(v is not None and bool((v != 0).any()) for v in found.values())


def test_it_says_that_it_is_a_bound() -> None:
    said = model().exactness
    assert said["log_prob"] == "lower bound"
    assert said["sample_with_log_prob"] == "upper bound"
    assert "encode" not in said


def test_onnx_of_encoder_sampler_and_update(tmp_path: Path) -> None:
    import onnxruntime as ort

    m: Any = fl.compile("model m = flowchain_tiny\n", seed=0)
    m.load_state_dict(model().state_dict())
    m.float().eval()
    programs = ["encode", "sample_with_log_prob", "update_density", "log_prob"]
    paths = fl.export_onnx(m, tmp_path / "m.onnx", programs=programs)
    sessions = {k: ort.InferenceSession(str(p)) for k, p in paths.items()}
    obs = data(5, T, D, seed=22).float()
    (c,) = sessions["encode"].run(None, {"obs": obs.numpy()})
    assert np.allclose(c, m.encode(obs).detach().numpy(), atol=1e-5)
    feeds = {"c": np.repeat(c[:1], 50, 0), "start": np.repeat(obs[:1, -1].numpy(), 50, 0)}
    rng = np.random.default_rng(0)
    for i in sessions["sample_with_log_prob"].get_inputs():
        if i.name not in feeds:
            feeds[i.name] = rng.standard_normal([50 if isinstance(d, str) else d for d in i.shape]).astype(np.float32)
    xs, log_probs, log_dets, base = sessions["sample_with_log_prob"].run(None, feeds)
    assert xs.shape == (50, S, D)
    assert np.allclose(log_probs, base[:, None] - log_dets.cumsum(1), rtol=1e-5, atol=1e-5)
    given = [torch.as_tensor(v) for v in (xs, log_dets, base, xs[3, 0])]
    expected = m.update_density(*given, torch.tensor(1))
    values = [g.numpy() for g in given] + [np.array(1)]
    inputs = sessions["update_density"].get_inputs()
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {i.name: v[None].astype(kinds[i.type]) for i, v in zip(inputs, values, strict=True)}
    found = sessions["update_density"].run(None, feeds)
    for a, b in zip(found, expected, strict=True):
        assert np.allclose(a[0], b.detach().numpy(), atol=1e-4)
    metadata = sessions["log_prob"].get_modelmeta().custom_metadata_map
    assert metadata["exactness"] == "lower bound"
