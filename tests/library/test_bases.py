"""Base distributions: densities against torch.distributions and scipy, samples by Kolmogorov-Smirnov and moments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.stats as st
import torch
import torch.distributions as td
from torch import Tensor

import flowlang as fl

N = 4000


@dataclass
class Case:
    """A base with independent entries: its spec, torch's law, scipy's distribution function, the data's domain."""

    base: str
    law: td.Distribution
    cdf: Callable[[Any], Any]
    domain: str = "R"
    extra: str = ""


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


CASES = {
    "normal": Case("normal", td.Normal(t(0.0), t(1.0)), st.norm.cdf),
    "normal moved": Case("normal(mean = 2, scale = 0.5)", td.Normal(t(2.0), t(0.5)), st.norm(2, 0.5).cdf),
    "normal learnable": Case(
        "normal(mean = m, scale = s)", td.Normal(t(-1.0), t(3.0)), st.norm(-1, 3).cdf,
        extra="param m: R[D] = -1\n param s: Positive[D] = 3",
    ),
    "laplace": Case("laplace(mean = 1, scale = 2)", td.Laplace(t(1.0), t(2.0)), st.laplace(1, 2).cdf),
    "logistic": Case(
        "logistic(mean = 1, scale = 2)",
        td.TransformedDistribution(
            td.Uniform(t(0.0), t(1.0)), [td.SigmoidTransform().inv, td.AffineTransform(t(1.0), t(2.0))]
        ),
        st.logistic(1, 2).cdf,
    ),
    "student_t": Case("student_t(df = 5)", td.StudentT(t(5.0)), st.t(5).cdf),
    "student_t moved": Case("student_t(df = 3, mean = 1, scale = 2)", td.StudentT(t(3.0), t(1.0), t(2.0)), st.t(3, 1, 2).cdf),
    "student_t learnable": Case(
        "student_t(df = nu)", td.StudentT(t(4.0)), st.t(4).cdf, extra="param nu: Positive[D] = 4"
    ),
    "uniform": Case("uniform(-1, 3)", td.Uniform(t(-1.0), t(3.0)), st.uniform(-1, 4).cdf, "Interval(-1, 3)"),
    "exponential": Case("exponential(rate = 2)", td.Exponential(t(2.0)), st.expon(0, 0.5).cdf, "Positive"),
    "von_mises": Case(
        "von_mises(mean = 1, concentration = 3)", td.VonMises(t(1.0), t(3.0)), st.vonmises(3, 1).cdf, "Torus"
    ),
}  # fmt: skip


def build(base: str, extra: str = "", domain: str = "R", size: int = 1) -> fl.Flow:
    text = f"flow f {{\n data x: {domain}[D = {size}]\n {extra}\n base {base}\n}}\n"
    torch.set_default_dtype(torch.float64)  # starts exact to the last digit
    try:
        return fl.compile(text, dtype=torch.float64, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_log_prob_is_the_closed_form(case: Case) -> None:
    flow = build(case.base, case.extra, case.domain)
    x = flow.sample((200,), generator=seeded())
    wanted = case.law.log_prob(x).sum(-1)
    if isinstance(case.law, td.VonMises):  # torch's log I0 is a polynomial good to 1e-7; scipy's is exact
        wanted = torch.from_numpy(st.vonmises(3, 1).logpdf(x.numpy())).sum(-1)
    assert torch.allclose(flow.log_prob(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_samples_follow_the_distribution(case: Case) -> None:
    flow = build(case.base, case.extra, case.domain)
    x = flow.sample((N,), generator=seeded(1)).squeeze(-1).numpy()
    at = np.sort(case.cdf(x) % 1.0 if case.domain == "Torus" else case.cdf(x))
    assert st.kstest(at, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sample_and_log_prob_agree(case: Case) -> None:
    flow = (
        build(case.base, case.extra, case.domain, size=3)
        if "=" not in case.extra
        else build(case.base, case.extra, case.domain)
    )
    x, density = flow.sample_and_log_prob((50,), generator=seeded(2))
    assert torch.allclose(density, flow.log_prob(x), rtol=1e-12, atol=1e-12)
    law = flow.to_distribution()
    assert torch.equal(law.log_prob(x), flow.log_prob(x))
    assert law.event_shape == flow.data_shape
    assert law.sample((7,)).shape == (7, *flow.data_shape)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float32_and_nan(case: Case) -> None:
    flow = build(case.base, case.extra, case.domain).float()
    x = flow.sample((20,), generator=seeded())
    assert x.dtype == torch.float32
    assert torch.isfinite(flow.log_prob(x)).all()
    y = x.clone()
    y[3] = float("nan")
    found = flow.log_prob(y)
    assert torch.isnan(found[3])
    assert torch.equal(torch.cat([found[:3], found[4:]]), torch.cat([flow.log_prob(x)[:3], flow.log_prob(x)[4:]]))


def test_outside_the_support_is_minus_infinity() -> None:
    flow = build("uniform(-1, 3)", domain="Interval(-1, 3)")
    assert flow.log_prob(torch.tensor([[4.0]], dtype=torch.float64)).item() == -float("inf")
    flow = build("exponential(rate = 2)", domain="Positive")
    assert flow.log_prob(torch.tensor([[-0.1]], dtype=torch.float64)).item() == -float("inf")


@pytest.mark.parametrize("concentration", [1e-3, 0.1, 1.0, 30.0, 1e4, 1e8])
def test_von_mises_over_all_concentrations(concentration: float) -> None:
    """log I0 to float64 accuracy, without overflow; circular moments of samples."""
    flow = build(f"von_mises(concentration = {concentration})", domain="Torus")
    x = flow.sample((N,), generator=seeded(3))
    wanted = st.vonmises(concentration).logpdf(x.numpy()).sum(-1)
    # scipy forms κ·cos(x) - log I0(κ) from large terms; allow for their rounding.
    assert np.allclose(flow.log_prob(x).numpy(), wanted, rtol=1e-12, atol=1e-12 + 4e-16 * concentration)
    mean = torch.cos(x).mean().item()
    ratio = (torch.special.i1e(t(concentration)) / torch.special.i0e(t(concentration))).item()
    assert abs(mean - ratio) < 4.5 * torch.cos(x).std().item() / N**0.5 + 1e-9


def test_von_mises_integrates_to_one() -> None:
    flow = build("von_mises(mean = 2, concentration = 5)", domain="Torus")
    x = torch.linspace(-np.pi, np.pi, 4001, dtype=torch.float64)[:-1].unsqueeze(-1)
    assert abs(flow.log_prob(x).exp().mean().item() * 2 * np.pi - 1) < 1e-10


MIXTURE = """param w: R[K = 3] ~ normal
 param m: R[K = 3, D = 2] ~ normal(0, 3)
 param s: Positive[K = 3, D = 2] = 0.7"""


def test_mixture_chooses_one_component_for_all_entries() -> None:
    flow = build("mixture(logits = w, normal(mean = m, scale = s))", MIXTURE, size=2)
    p = dict(flow.named_parameters())
    scale = torch.full((3, 2), 0.7, dtype=torch.float64)
    law = td.MixtureSameFamily(td.Categorical(logits=p["w"]), td.Independent(td.Normal(p["m"], scale), 1))
    x = flow.sample((N,), generator=seeded())
    assert torch.allclose(flow.log_prob(x), law.log_prob(x), atol=1e-8)
    check_moments(x, law.mean.detach(), law)
    x, density = flow.sample_and_log_prob((10,), generator=seeded())
    assert torch.allclose(density, flow.log_prob(x), atol=1e-12)


def test_mixture_for_each_entry() -> None:
    extra = """param w: R[D, K = 3] ~ normal
 param m: R[D, K = 3] ~ normal(0, 3)"""
    flow = build("mixture[K](logits = w, laplace(mean = m))", extra, size=2)
    p = dict(flow.named_parameters())
    law = td.Independent(td.MixtureSameFamily(td.Categorical(logits=p["w"]), td.Laplace(p["m"], 1.0)), 1)
    x = flow.sample((N,), generator=seeded())
    assert torch.allclose(flow.log_prob(x), law.log_prob(x), atol=1e-12)
    check_moments(x, law.mean.detach(), law)


def check_moments(x: Tensor, mean: Tensor, law: td.Distribution) -> None:
    error = (x.mean(0) - mean).abs() / (x.std(0) / len(x) ** 0.5)
    assert float(error.max()) < 4.5
    # The entropy binds the sampler to the density.
    other = law.sample((len(x),)) if not isinstance(law, td.MixtureSameFamily | td.Independent) else x
    assert torch.isfinite(law.log_prob(other)).all()


def test_mixture_gradients_reach_every_parameter() -> None:
    flow = build("mixture(logits = w, normal(mean = m, scale = s))", MIXTURE, size=2)
    flow.log_prob(torch.randn(20, 2, dtype=torch.float64, generator=seeded())).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())


FULL = """param L: LowerTriangular[D', D]
 param m: R[D] ~ normal"""


def test_full_covariance() -> None:
    flow = build("multivariate_normal(mean = m, scale_tril = L)", FULL, size=3)
    with torch.no_grad():
        for p in flow.parameters():
            p += torch.randn(p.shape, dtype=p.dtype, generator=seeded())
    factor = flow.L()
    law = td.MultivariateNormal(flow.m, scale_tril=factor)
    x = flow.sample((N,), generator=seeded())
    assert torch.allclose(flow.log_prob(x), law.log_prob(x), atol=1e-10)
    white = torch.linalg.solve_triangular(factor.detach(), (x - flow.m.detach()).mT, upper=False).mT
    assert torch.allclose(torch.cov(white.mT), torch.eye(3, dtype=torch.float64), atol=5 / N**0.5)
    assert float(white.mean(0).abs().max()) < 4.5 / N**0.5


def test_mixture_of_full_covariances() -> None:
    extra = """param w: R[K = 2] ~ normal
 param L: LowerTriangular[K = 2, D', D]
 param m: R[K = 2, D] ~ normal"""
    flow = build("mixture(logits = w, multivariate_normal(mean = m, scale_tril = L))", extra, size=3)
    with torch.no_grad():
        for p in flow.parameters():
            p += torch.randn(p.shape, dtype=p.dtype, generator=seeded())
    law = td.MixtureSameFamily(td.Categorical(logits=flow.w), td.MultivariateNormal(flow.m, scale_tril=flow.L()))
    x = flow.sample((N,), generator=seeded())
    assert torch.allclose(flow.log_prob(x), law.log_prob(x), atol=1e-10)
    check_moments(x, law.mean.detach(), law)


def test_parameters_from_context() -> None:
    text = """flow f {
 data x: R[D = 2]
 given c: R[C = 3]
 mean: R[D = 2], raw: R[D = 2] = mlp(8)(c)
 base normal(mean = mean, scale = exp(raw))
}
"""
    flow = fl.compile(text, dtype=torch.float64, seed=0)
    c = torch.randn(40, 3, dtype=torch.float64, generator=seeded())
    x, density = flow.sample_and_log_prob(c=c, generator=seeded())
    assert x.shape == (40, 2)
    assert torch.allclose(density, flow.log_prob(x, c=c))
    assert not torch.allclose(density, flow.log_prob(x, c=c.flip(0)))


def test_class_conditional_means() -> None:
    text = """flow f {
 data x: R[D = 2]
 given y: Int(0..4)
 param m: R[K = 4, D = 2] ~ normal(0, 3)
 base normal(mean = m[K = y], scale = 0.5)
}
"""
    flow = fl.compile(text, dtype=torch.float64, seed=0)
    y = torch.arange(4).repeat(50)
    x = flow.sample(y=y, generator=seeded())
    law = td.Independent(td.Normal(flow.m[y], 0.5), 1)
    assert torch.allclose(flow.log_prob(x, y=y), law.log_prob(x))


def test_state_dict_deepcopy_and_compile() -> None:
    flow = build("mixture(logits = w, normal(mean = m, scale = s))", MIXTURE, size=2)
    x = flow.sample((5,), generator=seeded())
    twin = copy.deepcopy(flow)
    other = fl.compile(
        "flow f {\n data x: R[D = 2]\n " + MIXTURE + "\n base mixture(logits = w, normal(mean = m, scale = s))\n}",
        dtype=torch.float64, seed=5,
    )  # fmt: skip
    assert not torch.equal(other.log_prob(x), flow.log_prob(x))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(twin.log_prob(x), flow.log_prob(x))
    assert torch.equal(other.log_prob(x), flow.log_prob(x))


WRONG = {
    "scale may be negative": ("param s: R[D] = 1\n base normal(scale = s)", "FL0409", "scale"),
    "no df": ("base student_t", "FL0203", "df"),
    "foreign axis": ("param m: R[K = 3] = 0\n base normal(mean = m)", "FL0307", "K"),
    "wrong size": ("param m: R[D = 3] = 0\n base normal(mean = m)", "FL0301", "size 3"),
    "dense factor": ("param L: R[D', D] = 1\n base multivariate_normal(scale_tril = L)", "FL0311", "lower-triangular"),
    "unknown argument": ("base normal(loc = 1)", "FL0202", "loc"),
    "mixture of nothing": ("param w: R[K = 3] = 0\n base mixture(logits = w)", "FL0203", "components"),
    "support": ("base von_mises", "FL0408", "support"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_bases_are_refused(case: tuple[str, str, str]) -> None:
    body, code, word = case
    errors = fl.check("flow f {\n data x: R[D = 2]\n " + body + "\n}\n").errors
    assert [e.code for e in errors] == [code]
    assert word in errors[0].message


def test_bernoulli_data() -> None:
    """A base of coins on whole-number data."""
    spec = """flow f {
 data x: Int(0..2)[D = 3]
 param w: R[D = 3] ~ normal
 base bernoulli(logits = w)
}
"""
    flow = fl.compile(spec, dtype=torch.float64, seed=0)
    x = flow.sample((N,), generator=seeded())
    law = td.Independent(td.Bernoulli(logits=flow.w), 1)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(flow.log_prob(x), law.log_prob(x))
    assert float((x.mean(0) - torch.sigmoid(flow.w.detach())).abs().max()) < 4.5 * 0.5 / N**0.5
