"""Chains of library bijectors made at random: round trip, log-det and gradients, as for each bijector alone.

A chain is two to four steps, some of them inverted or repeated, on vectors or images, with context or without. The
references are autograd Jacobians in float64; the points are those of `test_bijectors`, ±30 and the joints of splines among them.
"""

from __future__ import annotations

import copy
import random
import re
from functools import cache

import pytest
import torch

import flowlang as fl
from flowlang.verify import perturb
from tests.library.registry import Case, cases
from tests.library.test_bijectors import condition, given, jacobian, points

VECTOR, IMAGE = "D = 4", "C = 4, H = 2, W = 2"
WEAVES = {VECTOR: ["reverse", "permute(seed = 3)"], IMAGE: ["reverse[C]"]}
FAST, SLOW = 20, 300


@cache
def pool(size: str, context: bool) -> tuple[str, ...]:
    """Steps of the library on real values whose log-det is exact."""
    given_size = "D = 3" if context and size == VECTOR else size
    found = [c for c in cases() if f"data x: R[{given_size}]" in c.text and "base normal" in c.text]
    steps = []
    for c in found:
        if (context and not c.context) or (c.context and not context):
            continue
        if next(d for d in fl.info(c.text) if d["kind"] == "flow")["exactness"] == "exact":
            step = re.search(r"\n  (?!data |given |base )(.*)\n", c.text)
            assert step is not None, c.text
            if "squeeze" not in step[1]:  # those stand in pairs
                steps.append(step[1])
    return tuple(steps)


def chain(seed: int) -> Case:
    r = random.Random(seed)
    size = VECTOR if r.random() < 0.8 else IMAGE
    context = r.random() < 0.3
    lines = []
    for _ in range(r.randint(2, 4)):
        step = r.choice(pool(size, context) or pool(size, False))
        kind = r.random()
        if kind < 0.15:
            step = f"inverse({step})"
        lines.append(f"repeat 2 {{ {step} }}" if kind > 0.9 else step)
        if r.random() < 0.4:
            lines.append(r.choice(WEAVES[size]))
    if (
        size == IMAGE and not any("checkerboard" in x for x in lines) and r.random() < 0.5
    ):  # (of one place: nothing to split)
        lines = ["squeeze", *lines, "unsqueeze"]
    told = "\n  given c: R[E = 3]" if context else ""
    text = f"flow f {{\n  data x: R[{size}]{told}\n  " + "\n  ".join(lines) + "\n  base normal\n}\n"
    return Case(f"chain {seed}", text, context)


def judge(case: Case) -> None:
    assert fl.check(case.text).ok, case.text
    flow = fl.compile(case.text, seed=0, dtype=torch.float64).eval()
    perturb(flow, torch.Generator().manual_seed(1), 0.2)
    facts = next(d for d in fl.info(case.text) if d["kind"] == "flow")
    x = points(case, flow.data_shape)
    c = given(flow, len(x))
    j = jacobian(flow, x, c)
    assert torch.isfinite(j).all(), case.text
    cond = condition(j)
    scale = (1 + x.abs()).flatten(1).amax(1) * cond
    with torch.no_grad():
        *z, log_det = flow(x, **c)
        back, back_log_det = flow.inverse(*z, **c)
    exact = facts["inverse"] == "analytic" or str(facts["inverse"]).startswith("scan")
    assert ((back - x).abs().flatten(1).amax(1) / scale).max() <= (1e-9 if exact else 1e-7), case.text
    wanted = torch.linalg.slogdet(j)[1]
    assert ((log_det - wanted).abs() / wanted.abs().clamp_min(1)).max() <= 1e-8, case.text
    assert ((log_det + back_log_det).abs() / (wanted.abs().clamp_min(1) * cond))[:10].max() <= 1e-8, case.text
    single = copy.deepcopy(flow).float()
    y, d = x.float(), given(flow, len(x), torch.float32)
    single.check_inverse = False
    with torch.no_grad():
        again = single.inverse(*single(y, **d)[:-1], **d)[0]
    assert ((again - y).abs().flatten(1).amax(1) / scale).max() <= 1e-5, case.text
    x.requires_grad_()
    density = flow.log_prob(x, **c)
    for gradient in torch.autograd.grad(density.sum(), [x, *flow.parameters()], allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all(), case.text


@pytest.mark.parametrize("seed", range(FAST))
def test_chain(seed: int) -> None:
    judge(chain(seed))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST, FAST + SLOW, 20))
def test_chains(first: int) -> None:
    for seed in range(first, first + 20):
        judge(chain(seed))
