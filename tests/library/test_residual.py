"""Residual maps: contractions with a certificate, and low-rank updates (planar and radial are in the catalogue's card 067)."""

from __future__ import annotations

import copy

import pytest
import torch
from flowlang.backends.torch.runtime import fixed_point_solve
from torch import Tensor

import flowlang as fl


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compiled(step: str, size: int, seed: int = 0, push: float = 0.5) -> fl.Flow:
    flow = fl.compile(f"flow f {{\n data x: R[D = {size}]\n {step}\n base normal\n}}\n", dtype=torch.float64, seed=seed)
    draws = generator(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p += push * torch.randn(p.shape, dtype=p.dtype, generator=draws)
    return flow


def points(n: int, size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, size, dtype=torch.float64, generator=generator(5))


def jacobians(flow: fl.Flow, x: Tensor) -> Tensor:
    rows = [torch.autograd.functional.jacobian(lambda v: flow(v)[0], one) for one in x]
    return torch.stack([r for r in rows if isinstance(r, Tensor)])


# ---- low rank -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rank"), [(2, 1), (2, 2), (5, 1), (5, 3), (5, 5)])
@pytest.mark.parametrize("name", ["sylvester", "low_rank_linear"])
def test_low_rank_log_det_and_round_trip(name: str, size: int, rank: int) -> None:
    flow = compiled(f"{name}(rank = {rank})", size)
    x = points(6, size, 3.0)
    z, log_det = flow(x)
    assert torch.allclose(torch.linalg.slogdet(jacobians(flow, x))[1], log_det, atol=1e-10)
    back, inverse_log_det = flow.inverse(z)
    assert float((back - x).abs().detach().max()) < 1e-9
    assert torch.allclose(log_det, -inverse_log_det, atol=1e-9)


def test_sylvester_is_the_papers_map() -> None:
    flow = compiled("sylvester(rank = 3)", 5)
    x = points(4, 5)
    step = flow.sylvester
    q, r, r_tilde = step.Q(), step.R(), step.R_tilde()
    assert torch.allclose(q.mT @ q, torch.eye(3, dtype=torch.float64), atol=1e-12)
    by_hand = x + torch.tanh(x @ q @ r_tilde.mT + step.b) @ r.mT @ q.mT
    assert torch.allclose(flow(x)[0], by_hand, atol=1e-12)
    slope = 1 - torch.tanh(x @ q @ r_tilde.mT + step.b) ** 2
    diagonal = 1 + torch.diagonal(r) * torch.diagonal(r_tilde) * slope
    assert torch.allclose(flow(x)[1], diagonal.log().sum(-1), atol=1e-12)


def test_low_rank_linear_is_a_matrix() -> None:
    flow = compiled("low_rank_linear(rank = 2)", 5)
    step = flow.low_rank_linear
    q, lower = step.Q(), step.L()
    core = torch.eye(5, dtype=torch.float64) + q @ (lower - torch.eye(2, dtype=torch.float64)) @ q.mT
    x = points(4, 5)
    assert torch.allclose(flow(x)[0], (x * step.scale() + step.shift) @ core.mT, atol=1e-12)


FALSE = {
    "columns that are not orthonormal": "param Q: R[D, K = 2] ~ normal,  L: LowerTriangular[K', K = 2]\n"
    " s = sum[D](Q * x)\n x + sum[K](Q * sum[K](L * tanh(s)))",
    "a full inner matrix": "param Q: Stiefel[D, K = 2],  M: R[K', K = 2] ~ normal\n"
    " s = sum[D](Q * x)\n x + sum[K](Q * sum[K](M * tanh(s)))",
    "a negative slope": "param Q: Stiefel[D, K = 2],  L: LowerTriangular[K', K = 2]\n"
    " s = sum[D](Q * x)\n x - sum[K](Q * sum[K](L * tanh(s)))",
    "two matrices": "param Q: Stiefel[D, K = 2],  P: Stiefel[D, K = 2],  L: LowerTriangular[K', K = 2]\n"
    " s = sum[D](P * x)\n x + sum[K](Q * sum[K](L * tanh(s)))",
    "a second way": "param Q: Stiefel[D, K = 2],  L: LowerTriangular[K', K = 2],  w: R[D] ~ normal\n"
    " s = sum[D](Q * x)\n x + sum[K](Q * (sum[K](L * tanh(s)) + sum[D](w * x)))",
    "a flat end": "param Q: Stiefel[D, K = 2]\n s = sum[D](Q * x)\n x + sum[K](Q * (tanh(s) - s))",
}


@pytest.mark.parametrize("body", FALSE.values(), ids=FALSE)
def test_what_is_no_low_rank_bijection_is_refused(body: str) -> None:
    errors = fl.check(
        f"bijector b(x: R[D]) {{\n {body}\n}}\nflow f {{\n data x: R[D = 4]\n b\n base normal\n}}\n"
    ).errors
    assert errors
    assert all(e.code.startswith("FL04") for e in errors)


def test_more_columns_than_rows_are_refused() -> None:
    errors = fl.check(
        "bijector b(x: R[D = 2]) {\n param Q: Stiefel[D, K = 3]\n s = sum[D](Q * x)\n x + sum[K](Q * tanh(s))\n}\n"
    ).errors
    assert [e.code for e in errors] == ["FL0311"]


def test_new_low_rank_maps_pass() -> None:
    """Nobody shipped these: another function, context inside, a coupling of the bottleneck's entries."""
    spec = """bijector b(x: R[D] given c: R[C]) {
  param Q: Stiefel[D, K = 2],  L: LowerTriangular[K', K = 2]
  shift: R[K = 2] = mlp(4)(c)
  s = sum[D](Q * x)
  x + sum[K](Q * (sum[K](L * sinh(s + shift)) + 0.5 * tanh(s)))
}
flow f {
  data x: R[D = 4]
  given c: R[C = 3]
  b
  base normal
}
"""
    flow = fl.compile(spec, dtype=torch.float64, seed=0)
    x, c = points(5, 4), points(5, 3)
    z, log_det = flow(x, c=c)
    rows = [torch.autograd.functional.jacobian(lambda v, k=k: flow(v, c=c[k])[0], x[k]) for k in range(5)]
    dense = torch.linalg.slogdet(torch.stack([r for r in rows if isinstance(r, Tensor)]))[1]
    assert torch.allclose(log_det, dense, atol=1e-9)
    assert float((flow.inverse(z, c=c)[0] - x).abs().detach().max()) < 1e-7


# ---- contractions ---------------------------------------------------------------------------------

LIP = 0.9


def residual(size: int = 2) -> fl.Flow:
    return fl.compile(
        f"flow f {{\n data x: R[D = {size}]\n repeat 2 {{ residual_block(net = mlp(16, 16, act = elu), lip = {LIP}) }}\n base normal\n}}\n",
        dtype=torch.float64, seed=0,
    )  # fmt: skip


def steepest(flow: fl.Flow, seed: int = 0, pairs: int = 4000) -> float:
    """The largest |g(a) - g(b)| / |a - b| over random pairs, near and far, and over Jacobians, for every block."""
    dtype = next(flow.parameters()).dtype
    worst = 0.0
    size = flow.data_shape[0]
    a = torch.randn(pairs, size, dtype=dtype, generator=generator(seed)) * 3
    b = a + torch.randn(pairs, size, dtype=dtype, generator=generator(seed + 1)) * torch.logspace(
        -2, 1, pairs, dtype=dtype
    ).unsqueeze(-1)
    for block in flow.blocks:
        inner = next(m for m in block.modules() if type(m).__name__.startswith("Residual"))

        def g(x: Tensor, inner: torch.nn.Module = inner) -> Tensor:
            made = inner.value(x) if hasattr(inner, "value") else inner(x)[0]
            assert isinstance(made, Tensor)
            return made - x

        with torch.no_grad():
            ratio = (g(a) - g(b)).norm(dim=-1) / (a - b).norm(dim=-1)
        worst = max(worst, float(ratio.max()))
    return worst


def test_the_certificate_holds_after_training_and_in_every_dtype() -> None:
    flow = residual()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
    x = points(64, 2) * torch.tensor([3.0, 0.3], dtype=torch.float64)
    torch.manual_seed(0)
    for _ in range(15):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert steepest(flow) <= LIP * (1 + 1e-9)
    assert steepest(copy.deepcopy(flow).float()) <= LIP * (1 + 1e-3)
    with torch.no_grad():
        for p in flow.parameters():
            p *= 10
    assert steepest(flow) <= LIP * (1 + 1e-9)
    z, _ = flow(x)
    assert float((flow.inverse(z)[0] - x).abs().detach().max()) < 1e-7
    single = copy.deepcopy(flow).float()
    z, _ = single(x.float())
    assert float((single.inverse(z)[0] - x.float()).abs().detach().max()) < 1e-4


def test_the_log_det_is_unbiased() -> None:
    flow = residual()
    with torch.no_grad():
        for p in flow.parameters():
            p *= 3
    x = points(3, 2)
    dense = torch.linalg.slogdet(jacobians(flow, x))[1]
    torch.manual_seed(0)
    with torch.no_grad():
        found = torch.stack([flow(x)[1] for _ in range(600)])
    assert float(((found.mean(0) - dense).abs() / (found.std(0) / 600**0.5 + 1e-12)).max()) < 4
    assert {d["name"]: d for d in fl.info("flow f {\n data x: R[D = 2]\n residual_block\n base normal\n}")}["f"][
        "exactness"
    ] == "unbiased"  # fmt: skip


def test_a_constant_of_one_or_more_is_refused() -> None:
    errors = fl.check("flow f {\n data x: R[D = 2]\n residual_block(lip = 1.0)\n base normal\n}\n").errors
    assert len(errors) == 1


# ---- limits ---------------------------------------------------------------------------------------


def test_a_fixed_point_that_is_not_reached_is_not_a_number() -> None:
    """x - 0.9999 x: 2000 rounds leave 0.8 of the way. The other samples, which start at rest, keep their values."""
    rate = torch.tensor([0.9999, 0.5, 0.5], dtype=torch.float64)[:, None]
    y = torch.tensor([[1.0], [1.0], [torch.nan]], dtype=torch.float64, requires_grad=True)
    x = fixed_point_solve(lambda x: -rate * x, y, 0.9999)
    assert torch.isnan(x).flatten().tolist() == [True, False, True]
    assert float(x[1].detach()) == pytest.approx(2.0, rel=1e-12)
    (grad,) = torch.autograd.grad(x.sum(), y)
    assert float(grad[1]) == pytest.approx(2.0, rel=1e-12)


class LogProb(torch.nn.Module):
    def __init__(self, flow: fl.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about its own parts
def test_the_log_det_of_a_contraction_is_no_part_of_a_graph() -> None:
    """Compiled code runs it outside its graphs; what must be one graph is refused with the reason."""
    flow = compiled("residual_block(net = mlp(8))", 3)
    x = points(4, 3)
    torch.manual_seed(0)
    wanted = flow.log_prob(x)
    torch.compiler.reset()
    torch.manual_seed(0)
    assert torch.allclose(torch.compile(flow.log_prob, backend="aot_eager")(x), wanted)
    torch.compiler.reset()
    with pytest.raises(Exception, match="series of random length"):
        torch.compile(flow.log_prob, backend="aot_eager", fullgraph=True)(x)
    with pytest.raises(fl.FlowError, match="series of random length"):
        torch.export.export(LogProb(flow), (x,))
