"""Hand-given `def inverse` and `def log_det`: used in place of the derived ones, typed, and verified by numbers."""

from __future__ import annotations

import pytest
import torch

import flowlang as fl
from flowlang.api import FlowError, analyse
from flowlang.verify import verify

CUBE = """
bijector cube (x: R[D, ..]) {
  param a: Positive = 0.7
  def inverse(y) { sign(y / a) * (abs(y / a) ^ (1 / 3)) }
  def log_det(x) { sum(log(3 * a * x ^ 2)) }
  a * x ^ 3
}
"""
# With more than a few coordinates no rule of the compiler inverts this: x arrives twice, through a full mixture.
MIXED = """
bijector mixed (x: R[D]) {
  s = sum[D](x)
  def inverse(y) { %(inverse)s }
  def log_det(x) { %(log_det)s }
  x + s
}
"""
RIGHT = {"inverse": "y - sum[D](y) / (1 + x_size)", "log_det": "log(1.0 + x_size) + 0 * sum[D](x)"}


def mixed(inverse: str = RIGHT["inverse"], log_det: str = RIGHT["log_det"], d: int = 3) -> str:
    return (MIXED % {"inverse": inverse, "log_det": log_det}).replace("x_size", str(d))


def flow(steps: str, data: str = "x: R[D = 3]") -> str:
    return f"flow f {{\n  data {data}\n  {steps}\n  base normal\n}}\n"


def compiled(text: str) -> torch.nn.Module:
    return fl.compile(text, seed=0, dtype=torch.float64)


def agrees(text: str, given: dict[str, torch.Tensor] | None = None, shape: tuple[int, ...] = (3,)) -> torch.nn.Module:
    """The compiled flow's round trip and its log-det against autograd's Jacobian."""
    model = compiled(text)
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = given or {}
    z, log_det = model(x, **given)
    back, back_det = model.inverse(z, **given)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back_det, -log_det, rtol=1e-8, atol=1e-8)
    for k in range(4):
        one = {n: v[k : k + 1] for n, v in given.items()}
        j = torch.autograd.functional.jacobian(lambda v, one=one: model(v.unsqueeze(0), **one)[0], x[k])
        dense = torch.linalg.slogdet(j.reshape(x[k].numel(), -1))[1]
        torch.testing.assert_close(log_det[k], dense, rtol=1e-8, atol=1e-8)
    return model


@pytest.mark.parametrize(
    "text",
    [
        CUBE + flow("affine_elementwise\n  cube"),
        mixed() + flow("mixed"),
        mixed() + flow("affine_elementwise\n  repeat 3 { mixed\n reverse }"),
        mixed() + "bijector outer (x: R[D]) { 2 * mixed(tanh(0.1 * x) + x) }\n" + flow("outer"),
        mixed() + "bijector pair { mixed\n reverse\n mixed }\n" + flow("pair\n  pair"),
        mixed() + flow("inverse(mixed)"),
    ],
    ids=["elementwise", "needed", "repeat", "inside", "chain", "inverted"],
)
def test_right_rules_are_used(text: str) -> None:
    agrees(text)


def test_without_rules_it_is_refused() -> None:
    bare = "bijector mixed (x: R[D]) { s = sum[D](x)\n x + s }\n"
    assert fl.check(bare + flow("mixed")).ok  # a small matrix of numbers
    assert not fl.check(bare + flow("mixed", "x: R[D = 40]")).ok


def test_rules_take_the_context() -> None:
    text = """
bijector moved (x: R[D] given c: R[D]) {
  s = sum[D](x)
  def inverse(y) { u = y - c; u - sum[D](u) / 4 }
  def log_det(x, c) { log(4.0) + 0 * sum[D](x * c) }
  x + s + c
}
flow f { data x: R[D = 3]; given c: R[D = 3]; moved; base normal }
"""
    agrees(text, {"c": torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))})


def test_rules_are_lifted_over_other_axes() -> None:
    agrees(mixed() + flow("mixed", "x: R[T = 2, D = 3]"), shape=(2, 3))


def test_several_values() -> None:
    text = """
bijector turned (a: R[D], b: R[D]) {
  def inverse(u, v) { (u + v) / 2, (u - v) / 2 }
  def log_det(a, b) { 3 * log(2.0) + 0 * sum[D](a) }
  a + b, a - b
}
bijector both (x: R[E]) {
  a, b = halves[E](x)
  u, v = turned[E](a, b)
  join[E](u, v)
}
"""
    agrees(text + flow("both", "x: R[E = 6]"), shape=(6,))


def test_an_inverse_alone_keeps_the_derived_log_det() -> None:
    text = (
        "bijector line (x: R[D]) { param a: Positive[D] = 2\n def inverse(y) { y / a - 1 / a }\n a * x + 1 }\n"
        + flow("line")
    )
    agrees(text)
    said = {d["name"]: d for d in fl.info(text)}
    assert said["line"]["inverse"] == "explicit"
    assert said["f"]["exactness"] == "exact"


def test_a_log_det_alone_keeps_the_derived_inverse() -> None:
    wave = "bijector wave (x: R[D]) { def log_det(x) { sum[D](log(1 + 0.5 * cos(x))) }\n x + 0.5 * sin(x) }\n"
    agrees(wave + flow("wave"))
    assert {d["name"]: d for d in fl.info(wave + flow("wave"))}["wave"]["inverse"] == "bracketing"


def test_an_inverse_alone_needs_a_derivable_log_det() -> None:
    text = "bijector mixed (x: R[D]) { s = sum[D](x)\n def inverse(y) { y - sum[D](y) / 41 }\n x + s }\n"
    text += flow("mixed", "x: R[D = 40]")
    error = fl.check(text).errors[0]
    assert "def inverse" in error.message
    assert "def log_det" in (error.suggestion or "")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (mixed(inverse="y - sum[D](y) / 5"), "inverse"),
        (mixed(log_det="log(5.0) + 0 * sum[D](x)"), "log_det"),
        (mixed(inverse="log(y) - sum[D](y) / 4"), "inverse"),
        # Right where x is positive, wrong elsewhere.
        (
            CUBE.replace("sign(y / a) * (abs(y / a) ^ (1 / 3))", "abs(y / a) ^ (1 / 3)").replace("cube", "mixed"),
            "inverse",
        ),
        (mixed(inverse="y - sum[D](y) / 4 + max(sum[D](y) - 8, 0)"), "inverse"),
    ],
    ids=["inverse", "log_det", "nan", "half_the_domain", "far_out"],
)
def test_wrong_rules_are_found(text: str, rule: str) -> None:
    text += flow("affine_elementwise\n  mixed")
    assert fl.check(text).ok, "check computes no numbers"
    for run in (fl.compile, fl.generate):
        with pytest.raises(FlowError) as caught:
            run(text)
        (found,) = caught.value.diagnostics
        assert found.code == "FL0412"
        assert f"def {rule}" in found.message
        assert found.span is not None


def test_an_inverse_must_hold_for_all_that_the_body_may_give() -> None:
    """The bounds of this body are all reals, and it reaches half of them: no inverse can hold there."""
    text = """
bijector half (x: R[D]) {
  def inverse(y) { log(y) }
  def log_det(x) { sum[D](x) }
  exp(x) - 0 * x
}
""" + flow("half")
    with pytest.raises(FlowError) as caught:
        fl.compile(text)
    assert {d.code for d in caught.value.diagnostics} <= {"FL0412", "FL0408"}


@pytest.mark.parametrize(
    ("word", "log_det", "ok", "said"),
    [
        ("bound", "log(3.5) + 0 * sum[D](x)", True, "lower bound"),
        ("bound", "log(4.5) + 0 * sum[D](x)", False, ""),
        ("ratio", "7 + 0 * sum[D](x)", True, "ratio"),
        ("ratio", "0.1 * sum[D](x)", False, ""),
        ("estimate", "log(4.0) + 0 * sum[D](x)", True, "unbiased"),
    ],
)
def test_what_a_log_det_is_said_to_be(word: str, log_det: str, ok: bool, said: str) -> None:
    text = mixed(log_det=log_det).replace("def log_det(x)", f"def log_det(x) -> {word}") + flow(
        "affine_elementwise\n  mixed"
    )
    if not ok:
        with pytest.raises(FlowError):
            fl.compile(text)
        return
    fl.compile(text)
    facts = {d["name"]: d for d in fl.info(text)}
    assert facts["mixed"]["exactness"] == facts["f"]["exactness"] == said


def test_check_notes_them_as_unverified() -> None:
    report = fl.check(mixed() + flow("mixed"))
    assert report.ok
    notes = [d for d in report if d.code == "FL0413"]
    assert len(notes) == 2
    assert all(d.severity == "note" for d in notes)


def test_verify_runs_them() -> None:
    comp = analyse(mixed() + flow("mixed"), sized=True)
    assert all(c.ok for c in verify(comp, "f"))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def inverse(y) { x / 2 }\n 2 * x", "FL0201"),
        ("def inverse(y, z) { y / 2 }\n 2 * x", "FL0202"),
        ("def inverse(y) { sum[D](y) }\n def log_det(x) { x }\n 2 * x", "FL0308"),
        ("def inverse(y) { y, y }\n 2 * x", "FL0308"),
        ("def inverse(y) { y > 0 }\n 2 * x", "FL0306"),
        ("def log_det(x) -> guess { sum[D](x) }\n 2 * x", "FL0306"),
        ("def inverse(y) { stack[E](y, y) }\n 2 * x", "FL0308"),
        ("def inverse(y) { e: R[D] ~ normal; y + e }\n 2 * x", "FL0902"),
        ("def inverse(y) { nothing(y) }\n 2 * x", "FL0201"),
    ],
)
def test_rules_that_do_not_fit_are_told(body: str, code: str) -> None:
    report = fl.check(f"bijector b (x: R[D]) {{\n{body}\n}}\n" + flow("b"))
    assert [d.code for d in report.errors] == [code]


def test_a_chain_has_no_rules_of_its_own() -> None:
    report = fl.check("bijector b { def inverse(y) { y }\n reverse }\n" + flow("b"))
    assert [d.code for d in report.errors] == ["FL0106"]


def test_gradients_flow_through_rules() -> None:
    model = fl.compile(CUBE + flow("affine_elementwise\n  cube"), seed=0, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (-model.log_prob(x).mean()).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
