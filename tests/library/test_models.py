"""Models with named programs: flow matching as a text, trained, sampled and scored."""

from __future__ import annotations

import math

import pytest
import torch
from flowlang.backends.torch.runtime import Model

import flowlang as fl
from flowlang.diagnostics import FlowError
from flowlang.elaborate.models import MODULE_NAMES

FLOW_MATCHING = """
model flow_matching(v: net = mlp(64, 64, act = tanh), path: path = cond_ot) {
  data x1: R[D = 2]
  def loss {
    x0 ~ normal
    t ~ uniform(0, 1)
    mean((v(path.at(t, x0, x1), t) - path.velocity(t, x0, x1)) ^ 2)
  }
  def sample { x0 ~ normal;  integrate(v, x0, t = 0 -> 1, rk4(steps = 20)) }
  def log_prob(x1) { z, log_det = cnf(v, rk4(steps = 20))(x1);  normal.log_prob(z) + log_det }
}
"""


def gaussian(n: int, seed: int) -> torch.Tensor:
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return z @ torch.tensor([[0.8, 0.0], [0.5, 0.4]]).mT + torch.tensor([1.0, -0.5])


@pytest.mark.slow
def test_flow_matching_learns_a_gaussian_and_scores_it() -> None:
    model = fl.compile(FLOW_MATCHING, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    x = gaussian(20_000, 1)
    for k in range(1500):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - k / 1500)
        batch = x[torch.randint(len(x), (256,), generator=g)]
        optimizer.zero_grad()
        loss = model.loss(batch, generator=g)
        assert loss.shape == ()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        samples = model.sample((4000,), generator=g)
        assert torch.allclose(samples.mean(0), x.mean(0), atol=0.08)
        assert torch.allclose(samples.T.cov(), x.T.cov(), atol=0.08)
        test = gaussian(500, 2)
        truth = torch.distributions.MultivariateNormal(torch.tensor([1.0, -0.5]), x.T.cov())
        assert abs(float((model.log_prob(test) - truth.log_prob(test)).mean())) < 0.08


def test_loss_is_the_formula() -> None:
    model = fl.compile(FLOW_MATCHING, seed=0, dtype=torch.float64)
    x1 = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = model.loss(x1, generator=torch.Generator().manual_seed(4))
    g = torch.Generator().manual_seed(4)
    x0 = torch.randn(5, 2, dtype=torch.float64, generator=g)
    t = torch.rand(5, dtype=torch.float64, generator=g)[:, None]
    wanted = (model.v(torch.cat(((1 - t) * x0 + t * x1, t), -1)) - (x1 - x0)).square().mean()
    assert torch.allclose(found, wanted, rtol=1e-12)


def test_density_integrates_to_one() -> None:
    model = fl.compile(FLOW_MATCHING, seed=1, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel()))
        axis = torch.linspace(-7, 7, 141, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        assert abs(float(model.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2) - 1) < 1e-2


@pytest.mark.parametrize("path", ["cosine", "vp", "linear_vp", "ot(sigma_min = 1e-3)", "polynomial(n = 3)"])
def test_paths_give_their_positions_and_velocities(path: str) -> None:
    text = f"""
    model m(path: path = {path}) {{
      data x1: R[D = 3]
      def at(x1, x0: R[D = 3], t: Unit) {{ path.at(t, x0, x1) }}
      def velocity(x1, x0: R[D = 3], t: Unit) {{ path.velocity(t, x0, x1) }}
      def alpha(t: Unit) {{ path.alpha(t), path.alpha_rate(t) }}
    }}
    """
    model = fl.compile(text, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 6, 3, dtype=torch.float64, generator=g)
    t = 0.1 + 0.8 * torch.rand(6, dtype=torch.float64, generator=g)
    numeric = (model.at(x1, x0, t + 1e-6) - model.at(x1, x0, t - 1e-6)) / 2e-6
    assert torch.allclose(model.velocity(x1, x0, t), numeric, rtol=1e-6, atol=1e-7)
    alpha, rate = model.alpha(t)
    step = (model.at(torch.ones_like(x1), torch.zeros_like(x0), t))[:, 0]
    assert torch.allclose(alpha, step, rtol=1e-10)
    assert torch.allclose(rate, (model.alpha(t + 1e-6)[0] - model.alpha(t - 1e-6)[0]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("model m { data x: R[D = 2] }", "FL0212", "no program"),
        ("model m { data x: R[D = 2]\n def loss { y ~ normal\n mean(x - z) } }", "FL0201", "`z`"),
        ("model m { def sample { x ~ normal\n x } }", "FL0310", "no type"),
        ("model m(path: path = cond_ot) { data x: R[D = 2]\n def loss { path.speed(x) } }", "FL0306", "`speed`"),
        (
            "model m(path: path = cond_ot) { data x: R[D = 2]\n def loss { mean(path.at(0.5, x)) } }",
            "FL0203",
            "(t, x0, x1)",
        ),
        ("model m(path: path = vp) { data x: R[D = 2]\n def at(x, t: R) { path.at(t, x, x) } }", "FL0409", "[0, 1]"),
        ("model m(v: net = mlp(8)) { data x: R[D = 2]\n def loss { mean(log(x)) } }", "FL0409", "`log`"),
    ],
)
def test_what_a_model_cannot_mean_is_told(text: str, code: str, words: str) -> None:
    (error,) = fl.check(text).errors
    assert error.code == code
    assert words in error.message


def test_wrong_values_are_told() -> None:
    model = fl.compile(FLOW_MATCHING, seed=0)
    with pytest.raises(FlowError, match="has shape"):
        model.loss(torch.zeros(4, 3))
    assert repr(model).startswith("FlowMatching(")
    assert math.prod(model.sample(7).shape) == 14


def test_names_that_every_module_has_cannot_name_programs() -> None:
    has = {n for n in dir(Model()) if not n.startswith("_")} - {"T_destination"}
    assert has <= MODULE_NAMES
    (error,) = fl.check("model m { data x: R[D = 2]\n def train { mean(x) } }").errors
    assert error.code == "FL0204"
    assert "`train`" in error.message


def test_names_that_python_lacks_get_ascii_spellings() -> None:
    model = fl.compile("model m { data x': R[D = 2], λ: R\n def loss'(x', λ) { λ * mean(x') } }")
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model.loss_prime(x, torch.tensor(2.0)), 2 * x.mean())


@pytest.mark.parametrize(
    "name", ["run", "inputs", "context", "certify", "jit", "named_parameters", "origin", "add_module"]
)
def test_parts_may_have_names_that_modules_have(name: str) -> None:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    model = fl.compile(
        f"model m {{ data x: R[D = 2]\n {name} = mlp(4)\n def loss(x) {{ y: R[D] = {name}(x)\n mean(y ^ 2) }} }}",
        seed=0,
    )
    model.loss(x).backward()
    assert all(p.grad is not None for p in model.parameters())
    flow = fl.compile(
        f"bijector {name}(x: R[D]) {{ param s: Positive[D] = 2\n x * s }}\nflow f {{ data x: R[D = 2]\n {name}\n base normal\n}}"
    )
    assert torch.allclose(flow(x)[0], 2 * x)


@pytest.mark.parametrize("name", ["check", "version", "fitted", "program"])
def test_programs_may_have_the_names_of_what_modules_keep_to_themselves(name: str) -> None:
    model = fl.compile(f"model m {{ data x: R[D = 2]\n def {name}(x) {{ mean(x) }}\n def loss(x) {{ mean(x) }} }}")
    assert model.state_dict() == {}
    assert torch.equal(getattr(model, name)(torch.ones(3, 2)), torch.ones(3))
    (error,) = fl.check("model m { data x: R[D = 2]\n def _mine(x) { mean(x) } }").errors
    assert error.code == "FL0204"


@pytest.mark.parametrize("value", ["linear[D -> D](x)", "conv[D, S](x[D -> (D, S = 1)], 2)[(D, S) -> D]", "s * x"])
def test_weights_in_a_program_belong_to_the_model(value: str) -> None:
    declared = "param s: R[D] = 2\n" if value.startswith("s") else ""
    model = fl.compile(
        f"model m {{ data x: R[D = 2]\n def loss(x) {{ {declared}y: R[D] = {value}\n mean((y - x) ^ 2) }}\n def plain(x) {{ mean(x) }} }}",
        seed=0,
    )
    assert len(list(model.parameters())) >= 1
    model.loss(torch.ones(3, 2)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == fl.info(model.origin["spec"])[-1]["parameters"]


def test_a_parameter_of_two_programs_is_refused() -> None:
    one = "param s: R[D] = 1\n mean((s * x) ^ 2)"
    (error,) = fl.check(f"model m {{ data x: R[D = 2]\n def loss(x) {{ {one} }}\n def other(x) {{ {one} }} }}").errors
    assert error.code == "FL0204"


@pytest.mark.parametrize("call", ["conv[D, D](x, 4)", "sum[D, D](x)", "max_pool[C, D, D](x, 1)"])
def test_an_axis_twice_in_brackets_is_refused(call: str) -> None:
    (error,) = fl.check(f"net f(x: R[C = 2, D = 4]) {{ {call} }}").errors
    assert error.code == "FL0307"
    assert "twice" in error.message
