"""LANGUAGE.md, sections 5, 6 and 8: conventions, grammar facts, names taken for granted."""

from __future__ import annotations

import pytest
import torch

from flowlang.compiler import compile_source
from flowlang.elaborate.builtins import BUILTINS
from flowlang.elaborate.later import later_family
from flowlang.library import standard_library
from flowlang.source import Source
from tests.conformance.support import codes, made, parameters, same, told, value

X = [[1.0, 2.0, 3.0, 4.0, 5.0]]


# ---- 5. conventions -----------------------------------------------------------------------------


def test_a_solvers_body_is_its_step() -> None:
    assert told("solver e (v, x, t, h) { require order == 1;  x + h * v(x, t) }") == []


def test_a_path_may_say_x_t() -> None:
    assert told("path p (t, x0, x1) { x_t = (1 - t) * x0 + t * x1 }") == []


def test_keyword_arguments_bind_first_and_positions_fill_the_rest() -> None:
    text = "net g(a: int, b: int) (x: R[D]) { a * x + b }\nnet f(x: R[D]) { g(7, a = 2)(x) }"
    assert same(value(text, X, D=5), [[9.0, 11.0, 13.0, 15.0, 17.0]])


def test_a_domains_argument_is_its_parametrisation_the_draw_its_start() -> None:
    text = "bijector b(x: R[D]) { param W: Invertible(dense)[D', D] ~ identity;  sum[D](W * x) }\n"
    flow = made(text + "flow f { data x: R[D = 3];  b;  base normal }")
    x = torch.randn(2, 3, dtype=torch.float64)
    assert same(flow(x)[0].detach(), x)


def test_minus_one_is_the_last_index() -> None:
    assert same(value("net f(x: R[D]) { x[D = -1] }", X, D=5), [5.0])


def test_halves_gives_the_larger_half_first() -> None:
    a, b = value("net f(x: R[D]) { halves[D](x) }", X, D=5)
    assert (a.shape[-1], b.shape[-1]) == (3, 2)


def test_default_arguments_are_evaluated_at_each_copy() -> None:
    text = "bijector b(n: net = mlp(8)) (x: R[D]) { a, c = halves[D](x);  t: R[c.D] = n(a);  join[D](a, c + t) }\n"
    flow = "flow f {{ data x: R[D = 4];  repeat {} {{ b }};  base normal }}"
    assert parameters(text + flow.format(4)) == 4 * parameters(text + flow.format(1))


def test_a_type_covers_every_name_since_the_last_typed_one() -> None:
    text = "net f(x: R[D]) { a, b: R[D] = mlp(4)(x);  a + b }"
    assert parameters(text, D=3) == parameters("net f(x: R[D]) { a: R[D], b: R[D] = mlp(4)(x);  a + b }", D=3)


def test_a_network_of_several_inputs_joins_them() -> None:
    text = "net f(x: R[D], c: R[C]) { y: R[D] = mlp(4)(x, c) }"
    assert parameters(text, D=3, C=2) == 5 * 4 + 4 + 4 * 3 + 3


def test_it_broadcasts_missing_axes_and_skips_absent_optionals() -> None:
    assert told("net f(x: R[T, D], t: R) { y: R[T, D] = mlp[D](x, t, 8) }") == []
    assert told("net f(x: R[D] given c: R[C]?) { y: R[D] = mlp(4)(x, c) }") == []


def test_a_free_result_is_unified_with_the_other_operand_of_a_sum() -> None:
    assert parameters("net f(x: R[D]) { x + mlp(4)(x) }", D=3) == 3 * 4 + 4 + 4 * 3 + 3


def test_it_is_an_error_if_nothing_sizes_it() -> None:
    assert codes("net f(x: R[T, D]) { y = exp(linear[D -> E](x));  y * 2 }") == ["FL0304"]


def test_an_update_may_change_sizes_outside_loops_at_run_time() -> None:
    assert told("net f(x: R[D = 4]) { h = x;  h := h[D = 0..2];  h }") == []


def test_conv_pads_with_zeros_to_keep_the_size() -> None:
    text = "net f(x: R[C, H, W]) { conv(x, 2, kernel = 3) }"
    assert value(text, torch.randn(1, 1, 5, 6), C=1, H=5, W=6).shape == (1, 2, 5, 6)


def test_shift_puts_what_was_before_and_zeros() -> None:
    assert same(value("net f(x: R[D]) { shift[D](x, 2) }", X, D=5), [[0.0, 0.0, 1.0, 2.0, 3.0]])


def test_a_loss_that_keeps_the_batch_is_averaged_over_it() -> None:
    model = made("model f { data x: R[D = 5];  def loss { sum[D](x) } }")
    assert float(model.loss(torch.tensor(X * 2, dtype=torch.float64))) == 15.0


@pytest.mark.parametrize(("g", "proved"), [("lipschitz(mlp(8, act = tanh), 0.9)", True), ("mlp(8, act = tanh)", False)])
def test_lipschitz_with_a_number_is_the_function_normalised(g: str, proved: bool) -> None:
    text = f"bijector b(x: R[D]) {{ x + {g}(x) }}\nflow f {{ data x: R[D = 2];  b;  base normal }}"
    assert codes(text) == ([] if proved else ["FL0401"])


def test_what_stands_before_given_is_mapped_and_after_is_context() -> None:
    text = (
        "bijector b(x: R[D] given c: R[D]) { x + c ^ 2 }\nflow f { data x: R[D = 2];  given c: R[D];  b;  base normal }"
    )
    flow = made(text)
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert same(flow(x, c=torch.full((1, 2), 3.0, dtype=torch.float64))[0], [[9.0, 9.0]])


def test_a_written_size_is_a_default() -> None:
    text = "flow f { data x: R[D = 2];  actnorm;  base normal }"
    assert made(text).data_shape == (2,)
    assert made(text, D=6).data_shape == (6,)


def test_a_specs_own_name_shadows_the_librarys_with_a_note() -> None:
    text = "bijector actnorm(x: R[D]) { 2 * x }\nflow f { data x: R[D = 2];  actnorm;  base normal }"
    assert [(d.code, d.severity) for d in compile_source(Source("spec.flow", text)).report] == [("FL0213", "note")]
    assert parameters(text) == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2 + 3 * 4", 14), ("-2 ^ 2", -4), ("2 ^ 3 ^ 2", 512), ("2 * -3", -6), ("7 - 2 - 1", 4), ("8 / 2 / 2", 2), ("2 ^ -1", 0.5),
        ("(1 + 2) * 3", 9),
    ],
)  # fmt: skip
def test_precedence_of_arithmetic(text: str, wanted: float) -> None:
    assert same(value(f"net f(x: R[D]) {{ x * 0 + ({text}) }}", [[1.0]], D=1), [[wanted]])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("not 1 == 2 and 3 < 4", True), ("1 < 2 or 1 / 0 == 1 and false", None), ("true or false and false", True), ("not true or true", True)],
)  # fmt: skip
def test_precedence_of_logic(text: str, wanted: bool | None) -> None:
    assert codes(f"const c = {text}\nrequire c") == ([] if wanted else ["FL0305"])


# ---- 6. grammar facts ---------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["if", "else", "for", "in", "until", "repeat", "and", "or", "not"])
def test_hard_words_are_no_names(word: str) -> None:
    assert "FL0101" in codes(f"net f(x: R[D]) {{ {word} = x;  {word} }}")


@pytest.mark.parametrize(
    "word",
    ["import_", "data", "given", "param", "state", "base", "emit", "def", "scan", "require", "net", "path", "solver", "norm", "flow"],
)  # fmt: skip
def test_soft_words_and_kinds_stay_names_inside_bodies(word: str) -> None:
    assert told(f"net f(x: R[D]) {{ {word} = 2 * x;  {word} + 1 }}") == []


@pytest.mark.parametrize(
    "text",
    [
        "net f(x: R[D]) { y = 2 * x; y + 1 }",
        "net f(x: R[D]) {\n  y =\n    2 * x\n  y +\n    1\n}",
        "net f(x: R[D]) {\n  y = 2 * x\n  y\n    + 1\n}",
        "net f(\n  x: R[\n    D\n  ]\n)\n{\n  y = (2\n    * x)\n  y + 1\n}",
        "net f(x: R[D]) {\n  y = 2 * x\n  y\n    |> exp\n}",
        "net f(k: bool = true) (x: R[D]) {\n  if k { x }\n  else { 2 * x }\n}",
    ],
)
def test_where_newlines_do_not_count(text: str) -> None:
    assert told(text) == []


def test_a_line_that_begins_with_minus_begins_a_statement_and_the_slip_is_caught() -> None:
    assert told("net f(x: R[D]) {\n  2 * x\n  - x\n}") == ["FL0209 2 * x"]


def test_a_semicolon_inside_brackets_is_an_error() -> None:
    assert codes("net f(x: R[D]) { exp(x; 1) }") == ["FL0101"]


def test_tableau_cells_are_ratios_with_signs() -> None:
    text = "solver s {\n  require order == 2\n  tableau {\n    0 |\n    2/3 | 2/3\n    | 1/4 3/4\n  }\n}"
    assert told(text) == []
    assert codes(text.replace("1/4 3/4", "1/4 -3/4")) != []


def test_a_name_may_not_shadow_an_axis_of_its_scope() -> None:
    assert codes("net f(x: R[D]) { D = 2 * x;  D }") == ["FL0206"]


def test_a_superscript_is_refused_in_names() -> None:
    assert codes("net f(x: R[D]) { x² }") == ["FL0103"]


# ---- 8. names taken for granted -----------------------------------------------------------------

GRANTED = """
    exp log log1p expm1 sqrt abs sign square sin cos tan sinh cosh asinh tanh atanh sigmoid logit softplus relu leaky_relu elu selu
    silu gelu erf erfinv min max clamp where floor round
    sum mean var std prod argmax logsumexp softmax log_softmax cumsum sort any all
    halves join stack shift reverse permute zeros ones index onehot checker resize
    mod running present none lipschitz layer_norm batch_norm
    linear mlp autoregressive_mlp conv conv_net attention transformer embedding time_embedding
    affine_coupling additive_coupling affine_autoregressive rqs_coupling rqs_autoregressive rqs_elementwise residual_block cnf actnorm
    conv1x1 squeeze factor_out elementwise inverse
    normal student_t uniform exponential laplace logistic mixture von_mises
    euler midpoint heun rk4 dopri5 tsit5 cond_ot vp ve cosine
"""


@pytest.mark.parametrize("name", GRANTED.split())
def test_a_name_taken_for_granted_exists_or_says_that_it_comes_later(name: str) -> None:
    assert name in BUILTINS or name in standard_library().names() or later_family(name)


def test_checker_is_1_0_1_along_its_axis() -> None:
    assert same(value("net f(x: R[D]) { x * checker[D] }", X, D=5), [[1.0, 0.0, 3.0, 0.0, 5.0]])


def test_a_step_takes_the_flows_given_inputs_by_name() -> None:
    text = "bijector b(x: R[D] given c: R[C]) { x + sum[C](c) }\nflow f { data x: R[D = 2];  given c: R[C = 3];  b;  base normal }"
    assert told(text) == []
    assert codes(text.replace("given c: R[C = 3]", "given d: R[C = 3]")) == ["FL0203"]
