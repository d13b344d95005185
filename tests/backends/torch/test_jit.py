"""`jit`: programs run by torch.compile, with equal results and gradients; modules stay what they are."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from flowlang.backends.torch.runtime.face import COMPILED

import flowlang as fl

FLOW = "flow f {\n data x: R[D = 4]\n given c: R[K = 2]\n repeat 2 { rqs_coupling(bins = 4, net = mlp(8))\n reverse }\n base normal\n}\n"
MODEL = "model m(v: net = mlp(8)) {\n data x: R[D = 2]\n def loss(x) { y: R[D] = v(x)\n mean((y - x) ^ 2) }\n def sample { x ~ normal\n y: R[D] = v(x)\n y }\n}\n"


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def both(text: str, jit: bool | str) -> tuple[Any, Any]:
    return fl.compile(text, seed=0), fl.compile(text, seed=0, jit=jit)


def agree(plain: Any, fast: Any, x: torch.Tensor, c: torch.Tensor) -> None:
    for value in (lambda f: f.log_prob(x, c=c), lambda f: f(x, c=c)[0], lambda f: f.inverse(x, c=c)[0]):
        torch.testing.assert_close(value(fast), value(plain), rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(f.log_prob(x, c=c).mean(), [*f.parameters()]) for f in (plain, fast)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_flow_by_torch_s_own_backend() -> None:
    plain, fast = both(FLOW, True)
    for n in (5, 9):
        agree(plain, fast, batch(n, 4), batch(n, 2))
    assert bool(torch.isfinite(fast.sample((7,), c=batch(2))).all())


def test_a_flow_by_another_backend() -> None:
    plain, fast = both(FLOW, "aot_eager")
    agree(plain, fast, batch(5, 4), batch(5, 2))
    assert any(cls is type(fast) for cls, _, _ in COMPILED)
    drawn = [f.sample((7,), c=batch(2), generator=torch.Generator().manual_seed(1)) for f in (plain, fast)]
    torch.testing.assert_close(*drawn)  # a generator is taken as it is


def test_a_model_and_its_programs() -> None:
    plain, fast = both(MODEL, "aot_eager")
    torch.testing.assert_close(fast.loss(batch(6, 2)), plain.loss(batch(6, 2)))
    assert fast.sample((3,)).shape == (3, 2)


def test_copies_and_pickles_keep_it_and_their_own_weights() -> None:
    _, fast = both(FLOW, "aot_eager")
    x, c = batch(5, 4), batch(5, 2)
    before = fast.log_prob(x, c=c)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.jit == "aot_eager"
        torch.testing.assert_close(other.log_prob(x, c=c), before)
        with torch.no_grad():
            for p in other.parameters():
                p += 0.1
        assert not torch.allclose(other.log_prob(x, c=c), before)
    torch.testing.assert_close(fast.log_prob(x, c=c), before)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(fl.FlowError, match="FL0804"):
        fl.compile(FLOW, jit=True, memory="reversible")
    with pytest.raises(fl.FlowError, match="did you mean `inductor`"):
        fl.compile(FLOW, jit="inducto")


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(fl.FlowError, match="FL0805"):
        fl.compile(FLOW, jit=True)
