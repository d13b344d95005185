"""LANGUAGE.md, sections 1 to 3: declarations, bodies, instances. Each test names the sentence it is about."""

from __future__ import annotations

import pytest
import torch

from tests.conformance.support import codes, made, parameters, same, told, value

X = [[1.0, 2.0, 3.0]]


# ---- 1. declarations ----------------------------------------------------------------------------


def test_a_kind_with_an_expression_is_an_alias() -> None:
    text = "bijector b(k: real = 2) (x: R[D]) { x * exp(k) }\nbijector c = b(k = 1)\n"
    assert told(text + "flow f { data x: R[D = 2];  c;  inverse(c);  base normal }") == []


def test_const_is_for_constants() -> None:
    assert same(value("const k = 3\nnet f(x: R[D]) { k * x }", X, D=3), [[3.0, 6.0, 9.0]])


def test_a_parameter_is_static_or_a_tensor_by_its_type() -> None:
    assert same(value("net f(k: int = 2, x: R[D]) { k * x }", X, D=3), [[2.0, 4.0, 6.0]])


def test_two_lists_are_for_the_eye_only() -> None:
    one, two = "net f(k: int = 2, x: R[D]) { k * x }", "net f(k: int = 2) (x: R[D]) { k * x }"
    assert same(value(one, X, D=3), value(two, X, D=3))


def test_a_star_is_variadic() -> None:
    text = "net g(*ks: int) (x: R[D]) {{ y = x;  for k in ks {{ y := k * y }};  y }}\nnet f(x: R[D]) {{ g({})(x) }}"
    assert same(value(text.format("2, 3"), X, D=3), [[6.0, 12.0, 18.0]])
    assert same(value(text.format("2"), X, D=3), [[2.0, 4.0, 6.0]])


OPTIONAL = "net g(x: R[D] given c: R[C]?) -> R[D] {{ {body} }}\nnet f(x: R[D]) {{ g(x) }}"


def test_an_absent_value_may_go_to_an_optional_place() -> None:
    assert told(OPTIONAL.format(body="linear[D -> D](x)") + "\nnet h(x: R[D] given c: R[C]?) { g(x, c) }") == []


def test_an_absent_value_may_stand_under_present() -> None:
    assert told(OPTIONAL.format(body="if present(c) { x * sum[C](c) } else { x }")) == []


def test_an_absent_value_elsewhere_is_refused() -> None:
    assert codes(OPTIONAL.format(body="x * sum[C](c)")) == ["FL0309"]


CHOICE = "net g(way: one_of(up, down) = up) (x: R[D]) {{ if way == up {{ x + 1 }} else {{ x - 1 }} }}\nnet f(x: R[D]) {{ g({})(x) }}"


@pytest.mark.parametrize("steps", ["actnorm;  reverse", "squeeze;  actnorm[C]", "affine_coupling[T](net = mlp(4))"])
def test_a_chain_that_nothing_uses_is_judged_on_what_its_steps_take(steps: str) -> None:
    assert told(f"bijector c {{ {steps} }}") == []


def test_an_enumeration_takes_its_words() -> None:
    assert same(value(CHOICE.format("way = down"), X, D=3), [[0.0, 1.0, 2.0]])
    assert same(value(CHOICE.format(""), X, D=3), [[2.0, 3.0, 4.0]])
    assert codes(CHOICE.format("way = sideways")) == ["FL0306"]


def test_an_enumeration_takes_its_words_by_position_whatever_else_they_name() -> None:
    text = CHOICE.replace("up", "exp").replace("down", "checkerboard")
    assert same(value(text.format("checkerboard"), X, D=3), [[0.0, 1.0, 2.0]])
    assert same(value(text.format("exp"), X, D=3), [[2.0, 3.0, 4.0]])
    assert codes(text.format("chekerboard")) == ["FL0306"]
    handed = text.replace("net f", "net h(way: one_of(exp, checkerboard)) (x: R[D]) {{ g(way)(x) }}\nnet f")
    assert same(value(handed.replace("g({})", "h({})").format("checkerboard"), X, D=3), [[0.0, 1.0, 2.0]])
    several = text.replace("(way", "(k: int = 2, way").replace("x + 1", "k * x")
    assert same(value(several.format("3, exp"), X, D=3), [[3.0, 6.0, 9.0]])


def test_a_bijector_without_a_tensor_parameter_is_a_chain() -> None:
    assert told("bijector c { actnorm;  reverse }\nflow f { data x: R[D = 2];  c;  base normal }") == []


# ---- 2. results ---------------------------------------------------------------------------------


def test_the_last_expression_is_the_result_named_or_not() -> None:
    assert same(value("net f(x: R[D]) { y = 2 * x }", X, D=3), value("net f(x: R[D]) { 2 * x }", X, D=3))


def test_several_results() -> None:
    a, b = value("net f(x: R[D]) { x + 1, x - 1 }", X, D=3)
    assert same(a, [[2.0, 3.0, 4.0]])
    assert same(b, [[0.0, 1.0, 2.0]])


def test_a_value_that_goes_nowhere_is_an_error() -> None:
    assert told("net f(x: R[D]) {\n  x * 2\n  x + 1\n}") == ["FL0209 x * 2"]


def test_a_name_never_read_is_a_warning() -> None:
    assert told("net f(x: R[D]) {\n  y = x * 2\n  x + 1\n}") == ["FL0210 y"]


def test_in_a_chain_an_expression_is_a_step() -> None:
    assert told("flow f { data x: R[D = 2];  actnorm;  x * 2;  base normal }") == ["FL0211 x * 2"]


# ---- 2. bind, update, draw ----------------------------------------------------------------------


def test_updates_take_effect_in_text_order() -> None:
    assert same(value("net f(x: R[D]) { y = x;  z = y;  y := y + 1;  z * 10 + y }", X, D=3), [[12.0, 23.0, 34.0]])


def test_an_update_of_what_was_not_bound_is_refused() -> None:
    assert codes("net f(x: R[D]) { y := x;  y }") == ["FL0201"]


def test_several_names_swap() -> None:
    a, b = value("net f(x: R[D]) { a, b = x, 2 * x;  a, b := b, a;  a, b }", X, D=3)
    assert same(a, [[2.0, 4.0, 6.0]])
    assert same(b, X)


def test_a_draw_in_a_bijector_must_leave() -> None:
    assert codes("bijector b(x: R[D]) { u: R[D] ~ normal;  x + u }") == ["FL0402"]


# ---- 2. param and state -------------------------------------------------------------------------


def test_an_equals_sign_is_an_exact_start() -> None:
    assert same(made("net f(x: R[D]) { param s: R[D] = 0.25;  s * x }", D=3).s, [0.25] * 3)


def test_a_tilde_is_a_random_start() -> None:
    s = made("net f(x: R[D]) { param s: R[D] ~ normal(5, 0.1);  s * x }", D=200).s.detach()
    assert 4.9 < float(s.mean()) < 5.1
    assert 0.05 < float(s.std()) < 0.15


def test_state_that_is_never_updated_is_a_buffer() -> None:
    model = made("net f(x: R[D]) { state s: R[D] = 2;  s * x }", D=3)
    assert "s" in dict(model.named_buffers())
    assert not list(model.parameters())


# ---- 2. choice ----------------------------------------------------------------------------------


def test_if_is_static() -> None:
    assert codes("net f(x: R[D]) { if sum(x) > 0 { x } else { 2 * x } }") == ["FL0305"]


def test_where_chooses_by_data() -> None:
    assert same(value("net f(x: R[D]) { where(x > 1.5, x, -x) }", X, D=3), [[-1.0, 2.0, 3.0]])


def test_there_is_no_ternary() -> None:
    assert codes("net f(x: R[D]) { x > 0 ? x : -x }") == ["FL0101"]


# ---- 2. copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["repeat 3", "for k in 0..3", "for w in [1, 2, 3]"])
def test_each_copy_has_its_own_parameters(loop: str) -> None:
    assert parameters(f"net f(x: R[D]) {{ h = x;  {loop} {{ h := linear[D -> D](h) }};  h }}", D=3) == 3 * (9 + 3)


def test_copies_of_a_for_may_differ_in_size() -> None:
    text = (
        "net f(x: R[D]) -> R[D] { h = x[D -> H];  for w in [5, 7] { h := linear[H -> H = w](h) };  linear[H -> D](h) }"
    )
    assert parameters(text, D=3) == (3 * 5 + 5) + (5 * 7 + 7) + (7 * 3 + 3)


def test_equal_copies_share_code() -> None:
    model = made("flow f { data x: R[D = 2];  repeat 5 { affine_coupling(net = mlp(8));  reverse };  base normal }")
    kinds = {type(m).__name__ for m in model.modules()}
    assert len([k for k in kinds if "coupling" in k.lower()]) == 1


# ---- 2. comprehensions and def ------------------------------------------------------------------


def test_a_comprehension_lists_instances() -> None:
    text = "net f(x: R[D]) {{ g = [linear[D -> D] for i in 0..4{}];  h = x;  for l in g {{ h := l(h) }};  h }}"
    assert parameters(text.format(""), D=3) == 4 * 12
    assert parameters(text.format(" if i > 0"), D=3) == 3 * 12


def test_a_comprehension_lists_values_of_different_sizes() -> None:
    text = "net f(x: R[D]) { parts = [x[D = 0..k] for k in [1, 2]];  join[D](parts) }"
    assert same(value(text, X, D=3), [[1.0, 1.0, 2.0]])


def test_def_closes_over_its_owner_and_makes_no_instances() -> None:
    text = "net f(x: R[D]) { g = linear[D -> D];  def twice(v) { g(g(v)) };  twice(twice(x)) }"
    assert parameters(text, D=3) == 12


# ---- 2. emit, require, pipes --------------------------------------------------------------------


def test_emit_leaves_under_its_own_distribution() -> None:
    text = "bijector b(x: R[D]) { a, e = halves[D](x);  emit e ~ normal;  a }\nflow f { data x: R[D = 4];  b;  base normal }"
    flow = made(text)
    x = torch.randn(5, 4, dtype=torch.float64)
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1)
    assert torch.allclose(flow.log_prob(x), wanted)


def test_dequantisation_is_a_draw_in_a_bijector() -> None:
    text = "bijector d(x: Int(0..4)[D]) { u: R[D] ~ uniform(0, 1);  (x + u) / 4 }\n"
    assert told(text + "flow f { data x: Int(0..4)[D = 2];  d;  base uniform }") == []


@pytest.mark.parametrize(
    ("claim", "code"),
    [("log_det <= O(D)", []), ("log_det <= O(1)", ["FL0501"]), ("1 + 1 == 2", []), ("1 + 1 == 3", ["FL0502"])],
)
def test_require_stands_anywhere(claim: str, code: list[str]) -> None:
    flow = f"flow f {{ data x: R[D = 4];  affine_coupling(net = mlp(8));  require {claim};  base normal }}"
    assert codes(flow) == code


def test_require_stands_at_top_level() -> None:
    flow = "flow f { data x: R[D = 2];  actnorm;  base normal }\n"
    assert codes(flow + "require parameters(f) == 4") == []
    assert codes(flow + "require parameters(f) == 5") == ["FL0502"]


def test_a_pipe_is_application() -> None:
    assert same(value("net f(x: R[D]) { x |> exp |> log }", X, D=3), X)
    assert parameters("net f(x: R[D]) -> R[D] { x |> linear[D -> E = 5] |> tanh |> linear[E -> D] }", D=3) == 20 + 18


# ---- 3. instances -------------------------------------------------------------------------------


def test_a_declaration_called_with_tensors_makes_an_instance_for_that_place() -> None:
    assert parameters("net g(x: R[D]) { linear[D -> D](x) }\nnet f(x: R[D]) { g(g(x)) }", D=3) == 24


def test_a_bound_network_is_one_instance_shared_by_every_use() -> None:
    assert parameters("net f(x: R[D]) { g = linear[D -> D];  g(g(x)) }", D=3) == 12


def test_a_parameter_of_type_net_is_shared_likewise() -> None:
    text = "net g(n: net) (x: R[D]) { y: R[D] = n(x);  z: R[D] = n(y) }\nnet f(x: R[D]) { g(mlp(4))(x) }"
    assert parameters(text, D=3) == (3 * 4 + 4) + (4 * 3 + 3)


def test_empty_parentheses_make_a_fresh_one() -> None:
    text = "net f(x: R[D]) { g = linear[D -> D];  g()(g()(x)) }"
    assert parameters(text, D=3) == 24


def test_arguments_are_evaluated_at_each_copy() -> None:
    flow = "flow f {{ data x: R[D = 2];  {}repeat 4 {{ affine_coupling(net = {}) }};  base normal }}"
    own = parameters(flow.format("", "mlp(8)"))
    shared = parameters(flow.format("n = mlp(8);  ", "n"))
    assert own == 4 * shared


def test_the_compiler_notes_a_network_shared_by_copies() -> None:
    from flowlang.compiler import compile_source
    from flowlang.source import Source

    text = "flow f { data x: R[D = 2];  n = mlp(8);  repeat 4 { affine_coupling(net = n) };  base normal }"
    assert [d.code for d in compile_source(Source("spec.flow", text)).report] == ["FL0214"]


# ---- inverses of steps that change shapes -------------------------------------------------------

SQUEEZED = (
    "bijector small() {{ squeeze;  actnorm[C] }}\nmodel f {{ data x: R[C = 1, H = 4, W = 4];  s = {step}\n{programs} }}"
)
DENSITY = "def log_prob(x) { z, l = s(x);  normal.log_prob(z) + l }"
BACK = "def back(z: R[C = 4, H = 2, W = 2]) { x, l = inverse(s)(z);  x }"
FORTH = "def forth(x) { z, l = s(x);  z }"


@pytest.mark.parametrize("step", ["squeeze", "squeeze()", "small()"])
@pytest.mark.parametrize("programs", [DENSITY + "\n" + FORTH + "\n" + BACK, BACK + "\n" + FORTH])
def test_the_inverse_of_a_step_that_changes_shapes(step: str, programs: str) -> None:
    m = made(SQUEEZED.format(step=step, programs=programs))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    assert torch.allclose(m.back(m.forth(x)), x, atol=1e-12)


def test_it_stands_in_a_chain_too() -> None:
    m = made("flow f { data x: R[C = 1, H = 4, W = 4];  squeeze;  actnorm[C];  inverse(squeeze);  base normal }")
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    z, _ = m(x)
    assert z.shape == x.shape
    assert torch.allclose(m.inverse(z)[0], x, atol=1e-12)


def test_where_parts_leave_it_is_a_sample_in_a_program() -> None:
    text = SQUEEZED.format(
        step="factor_out[C](normal)", programs="def back(z: R[C = 2, H = 4, W = 4]) { x, l = inverse(s)(z);  x }"
    )
    m = made(text.replace("C = 1", "C = 4"))
    z = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    a, b, c = (m.back(z, generator=torch.Generator().manual_seed(k)) for k in (0, 0, 1))
    assert a.shape == (3, 4, 4, 4)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
