"""Linear maps, permutations and normalising steps of the library."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import flowlang as fl

D = 5


def flow_of(*steps: str, shape: str = f"D = {D}", domain: str = "R", base: str = "normal", seed: int = 0) -> fl.Flow:
    body = "\n ".join(steps)
    flow = fl.compile(
        f"flow f {{\n data x: {domain}[{shape}]\n {body}\n base {base}\n}}\n", dtype=torch.float64, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return flow


def points(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def check_against_jacobian(flow: fl.Flow, x: Tensor) -> Tensor:
    """Log-det against slogdet of the autograd Jacobian, and the round trip; returns the Jacobians."""
    z, log_det = flow(x)
    back, inverse_log_det = flow.inverse(z)
    rows = [torch.autograd.functional.jacobian(lambda v: flow(v)[0], one).reshape(one.numel(), -1) for one in x]
    jacobian = torch.stack([r for r in rows if isinstance(r, Tensor)])
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], log_det, atol=1e-10)
    assert torch.allclose(log_det, -inverse_log_det, atol=1e-10)
    condition = torch.linalg.cond(jacobian).max()
    assert float(((back - x).abs() / (1 + x.abs())).detach().max() / condition) < 1e-9
    return jacobian


STEPS = {
    "plu": "plu_linear", "dense": "dense_linear", "triangular": "triangular_linear", "orthogonal": "orthogonal_linear",
    "two reflections": "orthogonal_linear(reflections = 2)", "cayley": "cayley_linear", "rotation": "rotation",
    "permutation": "random_permutation(seed = 3)", "actnorm": "actnorm", "batch norm": "invertible_batch_norm",
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_log_det_and_round_trip(step: str) -> None:
    flow = flow_of(step).eval()
    check_against_jacobian(flow, points(4, D, scale=3.0))


@pytest.mark.parametrize(
    "step", ["orthogonal_linear", "orthogonal_linear(reflections = 2)", "cayley_linear", "rotation"]
)
def test_orthogonal_maps_keep_lengths(step: str) -> None:
    jacobian = check_against_jacobian(flow_of(step), points(3, D))
    assert torch.allclose(jacobian @ jacobian.mT, torch.eye(D, dtype=torch.float64).expand(3, D, D), atol=1e-12)
    determinant = torch.linalg.det(jacobian)
    wanted = {"cayley_linear": 1.0, "orthogonal_linear": (-1.0) ** D}.get(step, 1.0)
    assert torch.allclose(determinant, torch.full_like(determinant, wanted))


def test_fewer_reflections_have_fewer_parameters_and_fix_a_subspace() -> None:
    flow = flow_of("orthogonal_linear(reflections = 2)")
    assert sum(p.numel() for p in flow.parameters()) == 2 * D
    q = check_against_jacobian(flow, points(1, D))[0]
    assert int((torch.linalg.svdvals(q - torch.eye(D, dtype=torch.float64)) > 1e-9).sum()) == 2


def test_permutation_is_stored_and_depends_on_the_seed_alone() -> None:
    x = torch.arange(8.0, dtype=torch.float64).unsqueeze(0)
    once = flow_of("random_permutation(seed = 1)", shape="D = 8")
    again = flow_of("random_permutation(seed = 1)", shape="D = 8", seed=9)
    other = flow_of("random_permutation(seed = 2)", shape="D = 8")
    assert torch.equal(once(x)[0], again(x)[0])
    assert not torch.equal(once(x)[0], other(x)[0])
    assert sorted(once(x)[0].flatten().tolist()) == x.flatten().tolist()
    listed = flow_of("permute([2, 0, 1])", shape="D = 3")
    assert listed(torch.tensor([[10.0, 20.0, 30.0]], dtype=torch.float64))[0].tolist() == [[30.0, 10.0, 20.0]]


@pytest.mark.parametrize("step", ["conv1x1", "orthogonal_conv1x1", "actnorm", "invertible_batch_norm"])
def test_image_steps_act_alike_at_every_place(step: str) -> None:
    flow = flow_of(step, shape="C = 3, H = 2, W = 2").eval()
    x = points(2, 3, 2, 2)
    check_against_jacobian(flow, x)
    assert torch.allclose(flow(x.flip(-1))[0], flow(x)[0].flip(-1))


# ---- actnorm: the first batch ---------------------------------------------------------------------


def fresh(*steps: str, shape: str = f"D = {D}") -> fl.Flow:
    body = "\n ".join(steps)
    return fl.compile(f"flow f {{\n data x: R[{shape}]\n {body}\n base normal\n}}\n", dtype=torch.float64, seed=0)


def test_actnorm_starts_from_the_first_batch_in_the_order_of_the_chain() -> None:
    flow = fresh("repeat 3 {\n actnorm\n plu_linear\n }\n actnorm")
    x = 5 + 3 * points(200, D)
    assert not bool(flow.initialised)
    assert flow.initialise(x)
    z, _ = flow(x)
    assert torch.allclose(z.mean(0), torch.zeros(D, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(z.var(0, unbiased=False), torch.ones(D, dtype=torch.float64), atol=1e-4)
    check_against_jacobian(flow, x[:2])


def test_actnorm_on_images_takes_statistics_over_places() -> None:
    flow = fresh("actnorm", shape="C = 3, H = 4, W = 2")
    x = 2 + points(50, 3, 4, 2)
    flow.initialise(x)
    z, _ = flow(x)
    assert float(z.detach().mean((0, 2, 3)).abs().max()) < 1e-6
    assert float((z.detach().var((0, 2, 3), unbiased=False) - 1).abs().max()) < 1e-5


def test_actnorm_with_a_dead_channel_and_a_single_sample_is_finite() -> None:
    flow = fresh("actnorm")
    x = points(30, D)
    x[:, 2] = 4.0
    flow.initialise(x)
    assert torch.isfinite(flow.log_prob(x)).all()
    assert float(flow(x)[0][:, 2].detach().abs().max()) < 1e-12
    flow = fresh("actnorm")
    flow.initialise(x[:1])
    assert torch.isfinite(flow.log_prob(x)).all()
    flow = fresh("actnorm")
    flow.initialise(torch.full_like(x, float("nan")))
    assert torch.isfinite(flow.log_prob(x)).all()


def test_actnorm_remembers_in_the_state_dict_that_it_started() -> None:
    flow = fresh("actnorm")
    x = points(30, D, scale=2.0)
    flow.initialise(x)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    assert not flow.initialise(10 * x)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    other = fresh("actnorm")
    other.load_state_dict(before)
    assert not other.initialise(10 * x)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    twin = copy.deepcopy(flow)
    assert not twin.initialise(10 * x)
    assert twin.initialise(10 * x, force=True)
    assert not torch.equal(twin.log_prob(x), flow.log_prob(x))


def test_training_begins_with_the_first_batch(tmp_path: Path) -> None:
    from flowlang.train.data import read_table
    from flowlang.train.loop import Options, train

    np.save(tmp_path / "x.npy", (50 + 20 * points(400, 2)).numpy())
    flow = fl.compile("flow f {\n data x: R[D = 2]\n actnorm\n base normal\n}\n", seed=0)
    options = Options(epochs=1, lr=1e-6, progress=False, standardise=False)
    train(flow, read_table(tmp_path / "x.npy"), tmp_path / "out", options)
    assert bool(flow.initialised)
    z = flow(torch.tensor(np.load(tmp_path / "x.npy"), dtype=torch.float32))[0].detach()
    assert float(z.mean(0).abs().max()) < 0.2
    assert float((z.std(0) - 1).abs().max()) < 0.2


def test_a_flow_without_such_steps_has_no_flag() -> None:
    flow = fresh("plu_linear")
    assert not flow.initialise(points(3, D))
    assert "initialised" not in flow.state_dict()


def test_starts_are_refused_where_they_mean_nothing() -> None:
    def errors(line: str) -> list[str]:
        return [e.code for e in fl.check(f"bijector b(x: R[D]) {{\n {line}\n x + s\n}}\n").errors]

    assert errors("param s: R[D] = x") == ["FL0305"]
    assert errors("param s: R[D] = mean[B](x)") == []
    assert errors("s = mean[B](x)") == ["FL0411"]


# ---- invertible batch norm ------------------------------------------------------------------------


def test_batch_norm_in_training_uses_the_batch_and_moves_the_running_values() -> None:
    flow = fresh("invertible_batch_norm(momentum = 0.25)").train()
    x = 3 + 2 * points(64, D)
    z, log_det = flow(x)
    mean, var = x.mean(0), x.var(0, unbiased=False)
    assert torch.allclose(z, (x - mean) / torch.sqrt(var + 1e-5), atol=1e-10)
    assert torch.allclose(log_det, (-0.5 * torch.log(var + 1e-5).sum()).expand(64), atol=1e-10)
    state = dict(flow.named_buffers())
    running = next(v for k, v in state.items() if k.endswith("running_mean"))
    spread = next(v for k, v in state.items() if k.endswith("running_var"))
    assert torch.allclose(running, 0.25 * mean)
    assert torch.allclose(spread, 0.75 + 0.25 * x.var(0, unbiased=False))


def test_batch_norm_statistics_carry_gradient_and_count_as_constants() -> None:
    flow = fresh("invertible_batch_norm").train()
    x = points(16, D).requires_grad_()
    (grad,) = torch.autograd.grad(flow(x)[0][0].sum(), x)
    assert float(grad[1:].abs().max()) > 1e-6


def test_batch_norm_in_evaluation_and_its_inverse_use_the_running_values() -> None:
    flow = fresh("invertible_batch_norm").train()
    for k in range(20):
        flow(1 + 2 * torch.randn(128, D, dtype=torch.float64, generator=torch.Generator().manual_seed(k)))
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    x = points(3, D)
    flow.eval()
    z, _ = flow(x)
    assert torch.equal(flow(x[:1])[0], z[:1])
    flow.train()
    assert torch.allclose(flow.inverse(z)[0], x, atol=1e-12)
    flow.sample((5,), generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


def test_batch_norm_of_one_sample_is_finite() -> None:
    flow = fresh("invertible_batch_norm").train()
    assert torch.isfinite(flow.log_prob(points(1, D))).all()


def test_state_survives_deepcopy_state_dict_and_dtype() -> None:
    flow = fresh("invertible_batch_norm", "actnorm").train()
    flow(points(32, D))
    flow.initialise(points(32, D))
    flow.eval()
    x = points(4, D)
    assert torch.equal(copy.deepcopy(flow).log_prob(x), flow.log_prob(x))
    other = fresh("invertible_batch_norm", "actnorm").eval()
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    single = copy.deepcopy(flow).float()
    assert torch.allclose(single.log_prob(x.float()).double(), flow.log_prob(x), atol=1e-4)


def test_state_compiles_without_graph_breaks() -> None:
    flow = fresh("invertible_batch_norm", "actnorm", "plu_linear")
    twin = copy.deepcopy(flow)
    fast = torch.compile(twin.log_prob, fullgraph=True, backend="aot_eager")
    for k in range(3):
        x = points(16, D) + k
        assert torch.allclose(fast(x), flow.log_prob(x), atol=1e-10)
    assert all(torch.allclose(a, b) for a, b in zip(flow.buffers(), twin.buffers(), strict=True))
    flow.eval(), twin.eval()
    assert torch.allclose(fast(x), flow.log_prob(x), atol=1e-10)


# ---- the circle -----------------------------------------------------------------------------------


def test_periodic_shift_turns_angles() -> None:
    flow = flow_of("periodic_shift", domain="Torus", base="von_mises(concentration = 2)")
    x = flow.sample((200,), generator=torch.Generator().manual_seed(0))
    z, log_det = flow(x)
    assert bool((z.abs() <= torch.pi).all())
    assert torch.equal(log_det, torch.zeros(200, dtype=torch.float64))
    back = flow.inverse(z)[0]
    assert float((torch.remainder(back - x + torch.pi, 2 * torch.pi) - torch.pi).abs().detach().max()) < 1e-12
    grid = torch.linspace(-torch.pi, torch.pi, 721, dtype=torch.float64)[:-1].unsqueeze(-1).expand(-1, D)
    each = torch.stack([flow.log_prob(grid.roll(k, 0)) for k in range(3)])
    assert torch.isfinite(each).all()


def test_a_turn_onto_the_reals_is_refused() -> None:
    errors = fl.check("flow f {\n data x: R[D = 2]\n periodic_shift\n base normal\n}\n").errors
    assert errors
    assert all(e.code.startswith("FL04") for e in errors)
