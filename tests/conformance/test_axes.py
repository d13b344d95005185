"""LANGUAGE.md, section 4: axes and domains. Each test names the sentence it is about."""

from __future__ import annotations

import pytest
import torch

from tests.conformance.support import codes, parameters, same, told, value

X = torch.arange(6.0, dtype=torch.float64).reshape(1, 2, 3)  # one sample of R[T = 2, D = 3]
TD = {"T": 2, "D": 3}


# ---- names and sizes ----------------------------------------------------------------------------


def test_one_name_may_have_different_sizes_in_different_values() -> None:
    text = "net f(x: R[D]) { a, b = halves[D](x);  join[D](b, a) * (a.D + 10 * b.D) }"
    assert same(value(text, [[1.0, 2.0, 3.0]], D=3), [[36.0, 12.0, 24.0]])


def test_b_dot_d_is_the_size_of_b_along_d_also_in_a_type() -> None:
    text = "net f(x: R[D]) -> R[D] { a, b = halves[D](x);  y: R[b.D] = linear(a);  join[D](a, y) }"
    assert parameters(text, D=5) == 3 * 2 + 2


def test_a_bare_axis_as_a_number_is_the_declared_inputs_size() -> None:
    assert same(
        value("net f(x: R[D]) { a, b = halves[D](x);  join[D](a, b) * D }", [[1.0, 2.0, 3.0]], D=3), [[3.0, 6.0, 9.0]]
    )


def test_operations_align_by_name() -> None:
    text = "net f(x: R[T, D], y: R[D, T]) { x + y }"
    assert same(value(text, X, X.transpose(1, 2), **TD), 2 * X)


def test_operations_check_sizes() -> None:
    assert told("net f(x: R[D = 5]) { a, b = halves[D](x);  a + b }") == ["FL0301 a + b"]


def test_an_axis_that_one_operand_lacks_is_broadcast() -> None:
    assert same(
        value("net f(x: R[T, D], y: R[D]) { x * y }", X, [[1.0, 10.0, 100.0]], **TD),
        X * torch.tensor([1.0, 10.0, 100.0]),
    )


def test_operands_that_each_lack_an_axis_of_the_other_are_refused() -> None:
    assert told("net f(x: R[T], y: R[D]) { x * y }") == ["FL0303 x * y"]


@pytest.mark.parametrize(
    "text", ["net f(x: R[T], y: R[D]) { z: R[T, D] = x * y;  z }", "net f(x: R[T, d], y: R[d, D]) { sum[d](x * y) }"]
)
def test_unless_the_type_is_written_or_a_shared_axis_is_reduced(text: str) -> None:
    assert told(text) == []


def test_a_reduction_of_an_axis_that_is_not_shared_is_no_licence() -> None:
    assert codes("net f(x: R[T], y: R[D]) { sum[D](x * y) }") == ["FL0303"]


# ---- primes -------------------------------------------------------------------------------------


def test_a_prime_is_another_axis_of_the_same_size_and_a_reduction_takes_it_off() -> None:
    text = "net f(x: R[D]) { param L: R[D', D] = 2, b: R[D] = 1;  sum[D](L * x) + b }"
    assert same(value(text, [[1.0, 2.0, 3.0]], D=3), [[13.0] * 3])


# ---- brackets on a value ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("brackets", "wanted"),
    [
        ("D -> E", X),
        ("(T, D) -> E", X.reshape(1, 6)),
        ("T -> S, D -> E", X),
        ("T = 0", X[:, 0]),
        ("T = -1", X[:, -1]),
        ("D = 1..", X[..., 1:]),
        ("D = 0..2", X[..., :2]),
        ("T = 1, D = 0..1", X[:, 1, :1]),
        ("(T, D) -> E, E -> (a = 3, b)", X.reshape(1, 3, 2)),
    ],
)
def test_brackets_rename_split_merge_and_slice_from_left_to_right(brackets: str, wanted: torch.Tensor) -> None:
    assert same(value(f"net f(x: R[T, D]) {{ x[{brackets}] }}", X, **TD), wanted)


def test_brackets_gather_by_whole_numbers() -> None:
    text = "net f(x: R[T, D]) { i = index[T](x);  x[T = 1 - i] }"
    assert told(text) == []


@pytest.mark.parametrize(
    ("brackets", "code"),
    [
        ("E -> F", "FL0302"),
        ("D -> T", "FL0307"),
        ("D = 3", "FL0307"),
        ("D = 1..9", "FL0307"),
        ("D -> (h = 2, d)", "FL0312"),
    ],
)
def test_brackets_that_make_no_sense(brackets: str, code: str) -> None:
    assert codes(f"net f(x: R[T = 2, D = 3]) {{ x[{brackets}] }}") == [code]


def test_a_range_includes_its_start_and_excludes_its_end() -> None:
    assert same(value("net f(x: R[D]) { x[D = 1..2] }", [[1.0, 2.0, 3.0]], D=3), [[2.0]])


# ---- reductions ---------------------------------------------------------------------------------


def test_reductions_name_their_axes() -> None:
    assert same(value("net f(x: R[T, D]) { sum[T](x) }", X, **TD), X.sum(1))
    assert same(value("net f(x: R[T, D]) { sum[T, D](x) }", X, **TD), X.sum((1, 2)))


def test_a_bare_reduction_takes_all_but_the_batch() -> None:
    two = torch.cat([X, 2 * X])
    assert same(value("net f(x: R[T, D]) { mean(x) }", two, **TD), two.mean((1, 2)))


def test_a_reduction_of_an_axis_that_is_not_there_is_refused() -> None:
    assert codes("net f(x: R[T, D]) { sum[Q](x) }") == ["FL0302"]


def test_groups_inside_a_statistic_reduce_within_groups_and_broadcast_back() -> None:
    x = torch.randn(2, 6, dtype=torch.float64)
    wanted = x.reshape(2, 2, 3).mean(-1, keepdim=True).expand(2, 2, 3).reshape(2, 6)
    assert same(value("net f(x: R[C]) { x * 0 + mean[C / 2](x) }", x, C=6), wanted)


def test_groups_elsewhere_are_refused() -> None:
    assert codes("net f(x: R[C = 6]) { x[C / 2] }") == ["FL0307"]
    assert codes("net f(x: R[C = 6]) { cumsum[C / 2](x) }") == ["FL0307"]


# ---- the rest of the axes, and calls -------------------------------------------------------------

SCALE = "bijector scale(x: R[D, ..]) { param s: Positive[D] = 1;  x * s }\n"


def test_dots_capture_the_remaining_axes() -> None:
    assert told(SCALE + "flow f { data x: R[C = 3, H = 4, W = 4];  scale;  base normal }") == []
    assert told(SCALE + "flow f { data x: R[D = 3];  scale;  base normal }") == []


def test_couplings_serve_vectors_and_images() -> None:
    assert told("flow f { data x: R[D = 4];  affine_coupling(net = mlp(8));  base normal }") == []
    assert told("flow f { data x: R[C = 4, H = 4, W = 4];  affine_coupling[C](net = conv_net(8));  base normal }") == []


def test_axes_that_are_not_mentioned_are_lifted_over() -> None:
    net = "net g(x: R[D]) -> R[D] { linear[D -> D](x) }\nnet f(x: R[T, D]) { g(x) }"
    assert parameters(net, **TD) == 12


def test_explicit_brackets_bind_first() -> None:
    net = "net g(x: R[D]) -> R[D] { linear[D -> D](x) }\nnet f(x: R[T, D]) { g[T](x[D -> E]) }"
    assert parameters(net, **TD) == 6


def test_positions_bind_if_the_ranks_agree() -> None:
    assert told("net g(x: R[A, C]) { sum[A](x) }\nnet f(x: R[T, D]) { g(x) }") == []


def test_otherwise_a_call_is_an_error() -> None:
    assert codes("net g(x: R[A]) { exp(x) }\nnet f(x: R[T, D]) { g(x) }") == ["FL0307"]


def test_two_formal_axes_may_bind_one_axis_of_the_caller() -> None:
    net = "net g(q: R[T, D], k: R[S, D]) { sum[D](q * k) }\nnet f(x: R[T, D]) { g(x, x) }"
    assert told(net) == []


# ---- networks -----------------------------------------------------------------------------------


def test_mlp_flattens_only_inputs_of_one_axis() -> None:
    assert codes("net f(x: R[T, E]) -> R[T, E] { y: R[T, E] = mlp(8)(x) }") == ["FL0307"]


def test_mlp_with_one_axis_lifts_the_others() -> None:
    assert parameters("net f(x: R[T, D]) { y: R[T, D] = mlp[D](x, 8) }", **TD) == 3 * 8 + 8 + 8 * 3 + 3


def test_mlp_with_several_axes_takes_them_together() -> None:
    assert parameters("net f(x: R[T, D]) { y: R[E = 5] = mlp[T, D](x, 8) }", **TD) == 6 * 8 + 8 + 8 * 5 + 5


def test_linear_consumes_the_named_axis_or_the_only_one_absent_from_the_result() -> None:
    assert parameters("net f(x: R[T, D]) { linear[D -> E = 4](x) }", **TD) == 3 * 4 + 4
    assert parameters("net f(x: R[T, D]) { y: R[T, E = 4] = linear(x) }", **TD) == 3 * 4 + 4
    assert codes("net f(x: R[T, D]) { y: R[E = 4] = linear(x) }") == ["FL0307"]


def test_declared_outputs_fill_a_networks_free_axes_and_so_size_it() -> None:
    text = "net f(x: R[D]) { s: R[D], t: R[D] = mlp(8)(x);  s + t }"
    assert parameters(text, D=3) == 3 * 8 + 8 + 8 * 6 + 6


def test_a_bare_distribution_has_the_type_of_the_data_one_with_arguments_has_theirs() -> None:
    text = "model m { data x: R[D = 2];  def loss { e ~ normal;  t ~ uniform(0, 1);  sum[D](x + t * e) } }"
    assert told(text) == []
    assert codes("model m { data x: R[D = 2];  def loss { t ~ uniform(0, 1);  sum[D](t) + sum[D](x) } }") == ["FL0302"]


# ---- domains ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "low", "high"), [("R", -9, 9), ("Positive", 0, 9), ("Unit", 0, 1), ("Interval(-2, 5)", -2, 5)]
)
def test_domains_of_numbers(domain: str, low: float, high: float) -> None:
    from tests.conformance.support import made

    p = made(f"net f(x: R[D]) {{ param p: {domain}[D];  x * p }}", D=4)
    found = value(f"net f(x: R[D]) {{ param p: {domain}[D];  x * p }}", torch.ones(1, 4), D=4)
    assert p is not None
    assert bool((found >= low).all())
    assert bool((found <= high).all())


@pytest.mark.parametrize(
    "domain", ["Invertible", "Invertible(dense)", "Orthogonal", "LowerTriangular", "UnitLowerTriangular", "Spd"]
)
def test_a_constrained_matrix_makes_an_invertible_step(domain: str) -> None:
    text = f"bijector b(x: R[D]) {{ param W: {domain}[D', D];  sum[D](W * x) }}\nflow f {{ data x: R[D = 3];  b;  base normal }}"
    assert told(text) == []


def test_an_unconstrained_matrix_does_not() -> None:
    text = "bijector b(x: R[D]) { param W: R[D', D] ~ normal(0, 1);  sum[D](W * x) }\nflow f { data x: R[D = 3];  b;  base normal }"
    assert codes(text) == ["FL0403"]


@pytest.mark.parametrize("domain", ["Rotation", "Ball"])
def test_domains_without_a_meaning_yet_say_so(domain: str) -> None:
    assert codes(f"net f(x: R[D]) {{ param p: {domain}[D', D];  sum[D](p * x) }}") == ["FL0902"]


def test_an_unknown_domain_is_an_unknown_name() -> None:
    assert codes("net f(x: Real[D]) { x }") == ["FL0201"]


def test_support_images_and_base_must_agree() -> None:
    assert codes("flow f { data x: Positive[D = 2];  base normal }") == ["FL0408"]
    assert codes("flow f { data x: Positive[D = 2];  base exponential }") == []
