"""Norms become torch's own kernels where their formula is the kernel's, and only there; the values are those of the formula."""

from __future__ import annotations

import pytest
import torch

import flowlang as fl
from flowlang.api import generate

NORMS = {
    "layer_norm[D](x)": ("T = 3, D = 8", "F.layer_norm("), "layer_norm_all(x)": ("T = 3, D = 8", "F.layer_norm("),
    "rms_norm[D](x)": ("T = 3, D = 8", "rms_norm(x, "), "group_norm[C](2)(x)": ("C = 4, H = 3, W = 5", "grouped_norm("),
    "instance_norm[C](x)": ("C = 4, H = 3, W = 5", "F.layer_norm("), "batch_norm[C](x)": ("C = 4, H = 3, W = 5", "batched_norm("),
    "batch_norm[D](x)": ("D = 4", "batched_norm("),
}  # fmt: skip
# The same formulas with a part that the kernels do not have.
OTHERS = {
    "eps outside the root": "(x - mean[D](x)) / (sqrt(var[D](x)) + 0.1)", "unbiased": "(x - mean[D](x)) / sqrt(var[D](x, ddof = 1) + 0.1)",
    "another mean": "(x - mean[T](x)) / sqrt(var[D](x) + 0.1)", "another value": "(x - mean[D](x)) / sqrt(var[D](x ^ 2) + 0.1)",
    "not the last axis": "(x - mean[T](x)) / sqrt(var[T](x) + 0.1)", "the mean is read again": "m = mean[D](x); (x - m) / sqrt(var[D](x) + 0.1) + m",
}  # fmt: skip


@pytest.mark.parametrize("call", NORMS)
def test_the_kernel_is_used_and_named(call: str) -> None:
    axes, kernel = NORMS[call]
    text, _ = generate(f"norm n(x: R[{axes}]) {{ {call} }}\n", flow="n", standalone=False)
    assert kernel in text
    assert "# torch's own" in text


@pytest.mark.parametrize("call", NORMS)
def test_the_values_are_the_formula_s(call: str) -> None:
    """Against the same formula written so that no pattern is met (the ratio plus 0 · x), over training and inference."""
    axes, kernel = NORMS[call]
    name = call.split("(")[0].split("[")[0]
    source = next(p for p in (fl.api.standard_library().find(name),) if p is not None).text
    start = source.index(f"norm {name}(")
    text = source[start : source.index("\n\n", start)] if "\n\n" in source[start:] else source[start:]
    hidden = text.replace(f"norm {name}(", "norm plain(").replace("sqrt(", "identity_root(", 10)
    hidden += "\nnet identity_root(v: Positive[..]) { sqrt(v) }\n"
    plain = f"{hidden}\nnorm n(x: R[{axes}]) {{ {call.replace(name, 'plain', 1)} }}\n"
    other, _ = generate(plain, flow="n", standalone=False)
    assert kernel not in other
    mine = fl.compile(f"norm n(x: R[{axes}]) {{ {call} }}\n", flow="n", dtype=torch.float64)
    spelled = fl.compile(plain, flow="n", dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in mine.parameters():
            p += torch.randn(p.shape, generator=g, dtype=p.dtype)
    spelled.load_state_dict({k.replace(f"{name}.", "plain.", 1): v for k, v in mine.state_dict().items()})
    shape = [int(a.split("=")[1]) for a in axes.split(",")]
    for mode in (True, True, False):
        mine.train(mode), spelled.train(mode)
        for batch in ((6,), (2, 3)):
            a = torch.randn(*batch, *shape, generator=g, dtype=torch.float64).requires_grad_()
            b = a.detach().clone().requires_grad_()
            y, z = mine(a), spelled(b)
            torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-10)
            weight = torch.randn(y.shape, generator=g, dtype=torch.float64)
            (y * weight).sum().backward(), (z * weight).sum().backward()
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9)
    for (k, p), (_, q) in zip(mine.state_dict().items(), spelled.state_dict().items(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=k)


@pytest.mark.parametrize("formula", OTHERS)
def test_other_formulas_are_written_out(formula: str) -> None:
    text, _ = generate(f"norm n(x: R[T = 3, D = 8]) {{ {OTHERS[formula]} }}\n", flow="n", standalone=False)
    assert "# torch's own" not in text


GATED = ("evonorm_s0(2)", "evonorm_s1(2)", "evonorm_s2(2)", "evonorm_s0(4)")


@pytest.mark.parametrize("call", GATED)
def test_the_gated_norm_has_the_formula_s_gradients(call: str) -> None:
    """Values, gradients and gradients of gradients in float64, by finite differences, and beside the plain formula."""
    text, _ = generate(f"norm n(x: R[C = 4, H = 2, W = 3]) {{ {call}(x) }}\n", flow="n", standalone=True)
    assert "gated_norm(" in text
    mine = fl.compile(f"norm n(x: R[C = 4, H = 2, W = 3]) {{ {call}(x) }}\n", flow="n", dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    parameters = {
        n: (p + torch.randn(p.shape, generator=g, dtype=p.dtype)).detach().requires_grad_()
        for n, p in mine.named_parameters()
    }
    x = torch.randn(3, 4, 2, 3, generator=g, dtype=torch.float64).requires_grad_()

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mine, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(run, (x, *parameters.values()))
    name, groups = call.removesuffix(")").split("(")
    v = next((p for n, p in parameters.items() if n.endswith(".v")), None)
    gain, offset = (next(p for n, p in parameters.items() if n.endswith(k)) for k in ("gamma", "beta"))
    parts = x.reshape(3, int(groups), -1)
    spread = parts.square().mean(-1) if name == "evonorm_s2" else parts.var(-1, correction=0)
    scale = (spread + 1e-5).sqrt().repeat_interleave(4 // int(groups), 1)[:, :, None, None]
    gate = torch.sigmoid(x if v is None else v[:, None, None] * x)
    expected = x * gate / scale * gain[:, None, None] + offset[:, None, None]
    torch.testing.assert_close(run(x, *parameters.values()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(x[0], *parameters.values()), expected[0], rtol=1e-12, atol=1e-12)
    whole = torch.compile(mine, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x), mine(x))
    mapped = torch.vmap(mine)(x)
    torch.testing.assert_close(mapped, mine(x))


BY_HAND = {
    "rms_norm[D](x)": ("T = 2, D = 5", "rms_norm(x, 1, "), "rms_norm[D](outside = true)(x)": ("T = 2, D = 5", "rms_norm(x, 1, "),
    "partial_rms_norm(0.5)[D](x)": ("T = 2, D = 5", "0, 2)"), "x / sqrt(mean[T, D](x ^ 2) + 0.1)": ("T = 2, D = 5", "rms_norm(x, 2, None"),
    "p = x[D = 2..4]; x / sqrt(mean[D](p ^ 2) + 0.1)": ("T = 2, D = 5", "2, 4)"),
    "evonorm_b0()(x)": ("C = 3, H = 2, W = 3", "over_larger("), "evonorm_b1()(x)": ("C = 3, H = 2, W = 3", "over_larger("),
    "evonorm_b2()(x)": ("C = 3, H = 2, W = 3", "over_larger("), "x + var[T](x)": ("T = 4, D = 3", "variance("),
    "x + var[T, D](x, ddof = 1)": ("T = 4, D = 3", "variance("), "x + running(var[B, T](x), 0.1)": ("T = 4, D = 3", "batch_var("),
    "x + running(var[B](x, ddof = 1), 0.1)": ("D = 3", "batch_var("),
}  # fmt: skip


@pytest.mark.parametrize("body", BY_HAND)
def test_gradients_by_hand_are_those_of_the_formula(body: str) -> None:
    """In float64 by finite differences, of first and second order; beside the formula op by op, compiled and mapped."""
    axes, call = BY_HAND[body]
    spec = f"norm n(x: R[{axes}]) {{ {body} }}\n"
    text, _ = generate(spec, flow="n", standalone=True)
    assert call in " ".join(text.split()).replace("( ", "(").replace(", )", ")")
    mine = fl.compile(spec, flow="n", dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    parameters = {
        n: (p + 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype)).detach().requires_grad_()
        for n, p in mine.named_parameters()
    }
    shape = [int(a.split("=")[1]) for a in axes.split(",")]
    x = (2 * torch.randn(3, *shape, generator=g, dtype=torch.float64)).requires_grad_()

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mine, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(run, (x, *parameters.values()))
    torch._dynamo.reset()
    whole = torch.compile(mine, fullgraph=True, backend="eager")  # by the formula
    torch.testing.assert_close(whole(x), mine(x), rtol=1e-12, atol=1e-12)
    mine.eval()
    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
    torch.testing.assert_close(torch.vmap(mine)(x), mine(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine(x)[0], mine(x[0]), rtol=1e-12, atol=1e-12)


LINEAR = {
    "linear[D -> E = 3](x, weight = weight_norm)": ("D = 5", True), "conv(x, 4, kernel = 3, weight = weight_norm)": ("C = 2, H = 4, W = 4", True),
    "linear[D -> E = 3](x, weight = other)": ("D = 5", False),
}  # fmt: skip
OTHER = "norm other(V: R[O, ..]) { param g: R[O] = 1; V / (sqrt(sum[..](V ^ 2)) + 0.1) * g }\n"


@pytest.mark.parametrize("body", LINEAR)
def test_weight_norm_is_torch_s_kernel(body: str) -> None:
    """Values, gradients and their gradients, inside and outside of transformations of functions."""
    axes, native = LINEAR[body]
    spec = f"{OTHER}net n(x: R[{axes}]) {{ {body} }}\n"
    text, _ = generate(spec, flow="n", standalone=False)
    assert ("normed_weight(" in text and "# torch's own weight norm" in text) == native
    if not native:
        return
    module = fl.compile(spec, flow="n", dtype=torch.float64, seed=0)
    v = next(p for n, p in module.named_parameters() if n.endswith("_weight"))
    g = module.weight_norm.g.detach() + 0.5

    def plain(v: torch.Tensor) -> torch.Tensor:
        return v * (g / v.flatten(1).norm(dim=1)).reshape(-1, *(1,) * (v.dim() - 1))

    def used(v: torch.Tensor, g: torch.Tensor = g) -> torch.Tensor:
        return torch.func.functional_call(module.weight_norm, {"g": g}, (v,))

    torch.testing.assert_close(used(v), plain(v), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(used, v.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(used, v.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(used, (v.detach(), g.requires_grad_()))
    assert torch.autograd.gradgradcheck(used, (v.detach().requires_grad_(), g))
    g.requires_grad_(False)
    many = torch.stack([v.detach(), 2 * v.detach() + 0.1])
    torch.testing.assert_close(
        torch.func.vmap(used)(many), torch.stack([plain(w) for w in many]), rtol=1e-12, atol=1e-12
    )


def test_a_counter_is_added_to_in_place() -> None:
    """A state that a number is added to and that nothing else reads; one that is read keeps its old value for that."""
    spec = """norm n(x: R[C = 2]) {
      state a: Int = 0, b: R = 0, c: Int = 3
      b := b + 2 * a
      a := a + 1
      c := c + 2
      x
    }"""
    text, _ = generate(spec, flow="n", standalone=False)
    assert "self.c.add_(2)" in text
    assert "self.a.add_" not in text
    module = fl.compile(spec, flow="n")
    for _ in range(3):
        module(torch.zeros(4, 2))
    states = {n.split(".")[-1]: float(b) for n, b in module.named_buffers()}
    assert {k: states[k] for k in "abc"} == {"a": 3, "b": 0 + 2 + 4, "c": 9}
