"""Every built-in name is documented, by an example that compiles."""

import pytest
from click.testing import CliRunner

import flowlang as fl
from flowlang.cli.main import cli
from flowlang.elaborate.builtins import BUILTINS
from flowlang.elaborate.forms import FORMS

NET = """net t(x: R[T = 4, D = 6], y: R[T = 4, D = 6], im: R[C = 4, H = 8, W = 8], M: R[D' = 6, D = 6],
  k: Int(0..4)[T = 4], c: Bool[T = 4]) {{ {} }}"""
STEP = "flow t {{ data x: R[D = 6]\n {}\n base normal }}"
LOSS = "model t(v: net = mlp(8)) {{ data x: R[D = 6]\n def loss {{ {} }} }}"
PLACES = {
    "elementwise": STEP,
    "inverse": STEP,
    "multivariate_normal": "flow t {{ data x: R[D = 6]\n actnorm\n {} }}",
    "uniform_sphere": "flow t {{ data p: Sphere[Q = 3]\n {} }}",
    "residual_log_det": """net g(x: R[D]) -> R[D] {{ param W: Lipschitz(0.9)[E = D, D]; sum[D](W * tanh(x))[E -> D] }}
bijector b(x: R[D]) {{ {}
 x + g(x) }}
flow t {{ data x: R[D = 2]\n b\n base normal }}""",
    "copy": LOSS,
    "ema": LOSS,
}


def test_every_built_in_name_is_documented() -> None:
    assert sorted(FORMS) == sorted(BUILTINS)
    assert all(name in form for name, (form, _) in FORMS.items())


@pytest.mark.parametrize("name", FORMS)
def test_an_example_compiles(name: str) -> None:
    form = FORMS[name][0]
    if name == "paired":
        start, form = form.split("; ")
        text = f"model t {{ data x: R[D = 6]\n def loss {{ {start}; mean({form} ^ 2) }} }}"
    else:
        text = PLACES.get(name, NET).format(form)
    assert [d.code for d in fl.check(text).errors] == []


def test_std_shows_them() -> None:
    shown = CliRunner().invoke(cli, ["std", "conv"])
    assert shown.exit_code == 0
    assert FORMS["conv"][0] in shown.output
    assert "conv_transpose" in CliRunner().invoke(cli, ["std"]).output


def test_a_call_that_does_not_fit_is_answered_by_the_example() -> None:
    (error,) = fl.check("net f(x: R[C = 8, H = 8, W = 8]) { conv[C -> C = 16](x, kernel = 3) }").errors
    assert error.suggestion == f"as in `{FORMS['conv'][0]}`"
