"""Which slips of a regression are errors, and that programs which look like them are not refused."""

from __future__ import annotations

import pytest

import flowlang as fl

MODEL = """
{top}
model m(v: net = {net}, path: path = {path}) {{
  data x1: R[D = 2], dx: R[D = 2]
  def loss {{
    x0 ~ normal
    t ~ uniform(0, 1)
    u: R[D] = v({read})
    mean((u - {target}) ^ 2)
  }}
  def sample {{ x0 ~ normal;  integrate(v, x0, t = 0 -> 1, euler(steps = {steps})) }}
}}
"""
PLACE, SPEED = "path.at(t, x0, x1), t", "path.velocity(t, x0, x1)"
GOOD = {"top": "", "net": "time_mlp(8)", "path": "cond_ot", "read": PLACE, "target": SPEED, "steps": 4}


def slips(**changed: object) -> list[str]:
    report = fl.check(MODEL.format(**{**GOOD, **changed}))
    assert all(d.code == "FL0607" for d in report if d.severity in ("error", "warning"))
    return [d.severity for d in report if d.code == "FL0607"]


def test_what_is_right_is_not_told() -> None:
    assert slips() == []
    assert slips(path="vp", target="path.velocity(t, x0, x1)") == []
    assert slips(net="mlp(8)") == []


@pytest.mark.parametrize("net", ["time_mlp(8)", "mlp(8)"])
@pytest.mark.parametrize("path", ["cond_ot", "vp", "geodesic(exp = flat_exp, log = flat_log)"])
@pytest.mark.parametrize("end", ["x1", "x0"])
def test_a_field_that_is_shown_an_end_is_refused(net: str, path: str, end: str) -> None:
    assert slips(net=net, path=path, read=f"{end}, t") == ["error"]


@pytest.mark.parametrize("end", ["x1", "x0"])
def test_a_field_that_is_asked_for_an_end_is_refused(end: str) -> None:
    assert slips(target=end) == ["error"]
    assert slips(target=end, path="cosine") == ["error"]


@pytest.mark.parametrize(
    "changed",
    [
        {"read": "x0, t", "steps": 1},  # one step learned from its start
        {"read": "path.at(t, x0, x1), 0 * t"} | {"net": "mlp(8)"},  # a field whose time is told otherwise
        {"read": "x1 + 0.1 * x0, t"},  # a place that is made by hand
        {"read": "(1 - t) * x0 + t * x1, t"},
        {"target": "dx"},  # velocities that are data
        {"read": "x1, t", "target": "dx"},  # a field learned from places and their velocities
        {"target": "x1", "read": "(1 - t) * x0 + t * x1, t"},
        {"top": "path near (t, x0, x1) { require prior == normal(0, 0.00001)\n require endpoint <= 1e-4\n x_t = 0.00001 * x0 + t * x1 }",
         "path": "near", "target": "x1"},  # whose velocity is the data
    ],
)  # fmt: skip
def test_what_a_program_may_mean_is_not_refused(changed: dict[str, object]) -> None:
    assert "error" not in slips(**changed)


def test_a_field_without_time_is_a_warning() -> None:
    text = """
    model m(w: net = mlp(8), path: path = cond_ot) {
      data x1: R[D = 2]
      def field(x: R[D = 2], t: R) { u: R[D = 2] = w(x);  u }
      def loss {
        x0 ~ normal
        t ~ uniform(0, 1)
        u: R[D] = w(path.at(t, x0, x1))
        mean((u - path.velocity(t, x0, x1)) ^ 2)
      }
      def sample { x0 ~ normal;  integrate(field, x0, t = 0 -> 1, euler(steps = 4)) }
    }"""
    assert [(d.code, d.severity) for d in fl.check(text) if d.severity != "note"] == [("FL0607", "warning")]
