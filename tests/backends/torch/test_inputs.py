"""Batch shapes, context, and inputs that do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flowlang.diagnostics import FlowError
from tests.backends.torch.specs import SPECS, build, context, data

EXACT = sorted(set(SPECS) - {"contraction"})


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 1, 3)])
def test_any_leading_batch_dims(name: str, batch: tuple[int, ...]) -> None:
    flow = build(name)
    x, c = data(flow, *batch), context(flow, *batch)
    z, *parts, log_det = flow(x, **c)
    assert z.shape == (*batch, *flow.base_shape)
    assert log_det.shape == batch
    back, inverse_log_det = flow.inverse(z, *parts, **c)
    assert back.shape == x.shape
    assert inverse_log_det.shape == batch
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-8)
    log_prob = flow.log_prob(x, **c)
    assert log_prob.shape == batch
    # The same samples one by one.
    flat = x.reshape(-1, *flow.data_shape)
    flat_c = {k: v.reshape(-1, *flow.given_shapes[k]) for k, v in c.items()}
    alone = [flow.log_prob(v, **{k: u[i] for k, u in flat_c.items()}) for i, v in enumerate(flat)]
    if alone:
        torch.testing.assert_close(torch.stack(alone).reshape(batch), log_prob, rtol=0, atol=1e-10)
    assert flow.sample(batch, **c).shape == x.shape
    sample, density = flow.sample_and_log_prob(batch, **c)
    assert density.shape == batch
    if name != "image":  # its parts are drawn again
        torch.testing.assert_close(flow.log_prob(sample, **c), density, rtol=0, atol=1e-7)


def test_context_is_broadcast() -> None:
    flow = build("context")
    x, c = data(flow, 5), context(flow)
    one = flow.log_prob(x, **c)
    torch.testing.assert_close(one, flow.log_prob(x, c=c["c"].expand(5, 3)))
    many = context(flow, 4, 1)
    assert flow.log_prob(x, **many).shape == (4, 5)
    torch.testing.assert_close(flow.log_prob(x, **many)[2], flow.log_prob(x, c=many["c"][2]))
    assert flow.log_prob(data(flow), **context(flow, 6)).shape == (6,)
    assert flow.sample(**context(flow, 6)).shape == (6, 4)
    assert flow.sample((2, 6), **context(flow, 6)).shape == (2, 6, 4)
    assert flow.sample(7, **context(flow)).shape == (7, 4)
    assert flow.to_distribution(**context(flow, 6)).sample((2,)).shape == (2, 6, 4)


def test_numbers_of_other_kinds_are_converted() -> None:
    flow = build("coupling", dtype=torch.float32)
    x = [[0, 1, 2, 3]]
    expected = flow.log_prob(torch.tensor(x, dtype=torch.float32))
    for other in (x, torch.tensor(x), torch.tensor(x).numpy(), torch.tensor(x).numpy().astype("float64")):
        assert torch.equal(flow.log_prob(other), expected)


WRONG: list[tuple[str, Any, tuple[str, ...]]] = [
    ("last dim", lambda f, x, c: f.log_prob(x[..., :3], **c), ("(5, 3)", "R[D = 4]")),
    ("too few dims", lambda f, x, c: f.log_prob(x[0, 0], **c), ("`data`", "R[D = 4]")),
    ("base", lambda f, x, c: f.inverse(x[..., :2], **c), ("`base`", "R[D = 4]")),
    ("dtype", lambda f, x, c: f.log_prob(x.float(), **c), ("float32", "float64")),
    ("complex", lambda f, x, c: f.log_prob(x.to(torch.complex64), **c), ("complex64",)),
    ("no tensor", lambda f, x, c: f.log_prob("x", **c), ("`data`", "str")),
    ("no context", lambda f, x, c: f.log_prob(x), ("`c`", "missing", "R[K = 3]")),
    ("unknown context", lambda f, x, c: f.log_prob(x, d=c["c"], **c), ("`d`", "no context", "R[K = 3]")),
    ("context shape", lambda f, x, c: f.log_prob(x, c=c["c"][..., :2]), ("`c`", "R[K = 3]")),
    ("context dtype", lambda f, x, c: f.log_prob(x, c=c["c"].float()), ("`c`", "float32")),
    ("batch shapes", lambda f, x, c: f.log_prob(x[:4], **c), ("(4,)", "(5,)")),
    ("sample shape", lambda f, x, c: f.sample((4,), **c), ("(4,)", "(5,)")),
    ("parts", lambda f, x, c: f.inverse(x, x, **c), ("0 parts", "1")),
]


@pytest.mark.parametrize(("call", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_does_not_fit_is_one_diagnostic(call: Any, words: tuple[str, ...]) -> None:
    flow = build("context")
    with pytest.raises(FlowError) as e:
        call(flow, data(flow, 5), context(flow, 5))
    (diagnostic,) = e.value.diagnostics
    assert diagnostic.code == "FL0702"
    assert diagnostic.suggestion
    text = f"{diagnostic.message}; {diagnostic.suggestion}"
    assert all(w in text for w in words), text


@pytest.mark.parametrize("name", EXACT)
def test_nan_stays_in_its_sample(name: str) -> None:
    flow = build(name)
    x, c = data(flow, 4), context(flow, 4)
    clean = flow.log_prob(x, **c)
    x[1].view(-1)[-1] = math.nan
    found = flow.log_prob(x, **c)
    assert torch.isnan(found[1])
    keep = torch.tensor([0, 2, 3])
    torch.testing.assert_close(found[keep], clean[keep])
    z, *parts, log_det = flow(x, **c)
    assert torch.isnan(log_det[1]) or torch.isnan(z[1]).any()
    back, _ = flow.inverse(z, *parts, **c)
    torch.testing.assert_close(back[keep], x[keep], rtol=0, atol=1e-8)
    assert torch.isnan(back[1]).any()


@pytest.mark.parametrize("name", EXACT)
def test_a_generator_fixes_samples(name: str) -> None:
    flow = build(name)
    c = context(flow, 3)
    one, two = (flow.sample((3,), generator=torch.Generator().manual_seed(5), **c) for _ in range(2))
    assert torch.equal(one, two)


def test_nan_does_not_stop_an_iteration_for_others() -> None:
    flow = build("contraction")
    z = data(flow, 4)
    clean = flow.inverse(z)[0]
    z[1] = math.nan
    found = flow.inverse(z)[0]
    assert torch.isnan(found[1]).all()
    keep = torch.tensor([0, 2, 3])
    torch.testing.assert_close(found[keep], clean[keep], rtol=0, atol=1e-12)
