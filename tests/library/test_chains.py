"""300 chains of the library's bijectors, drawn at random: round trip in both precisions and log-det, as for each by itself.

Points include 0, ±1e-6, ±30 and the joints of splines; references are autograd Jacobians in float64.
"""

from __future__ import annotations

import copy
import random
from functools import cache

import pytest
import torch

import flowlang as fl
from flowlang.verify import perturb
from tests.library.registry import Case, cases
from tests.library.test_bijectors import condition, jacobian, points

ITERATIVE = ("bracketing", "fixed point", "integration")


@cache
def steps() -> tuple[str, ...]:
    """Every bijector of vectors of reals, as the registry writes it."""
    texts = (c.text for c in cases() if "data x: R[D = " in c.text and not c.context)
    return tuple(dict.fromkeys(t.split("\n")[2].strip() for t in texts))


@cache
def fits(step: str, d: int) -> bool:
    return fl.check(spec([step], d)).ok


def spec(chain: list[str], d: int) -> str:
    return "\n  ".join([f"flow f {{\n  data x: R[D = {d}]", *chain, "base normal"]) + "\n}\n"


def chain(seed: int) -> str:
    """Two to four steps, some of them inverted, some repeated."""
    r = random.Random(seed)
    while True:
        d = r.choice([2, 4, 5])
        found = []
        for _ in range(r.randrange(2, 5)):
            step = r.choice([s for s in steps() if fits(s, d)])
            turned = f"inverse({step})"
            if r.random() < 0.15 and fits(turned, d):
                step = turned
            found.append(f"repeat 2 {{ {step} }}" if r.random() < 0.15 else step)
        text = spec(found, d)
        if fl.check(text).ok:  # steps that narrow the range do not stand before others
            return text


def holds(seed: int) -> None:
    text = chain(seed)
    facts = next(f for f in fl.info(text) if f["kind"] == "flow")
    flow = fl.compile(text, seed=0, dtype=torch.float64).eval()
    perturb(flow, torch.Generator().manual_seed(1), 0.3)
    x = points(Case("chain", text, False), flow.data_shape)
    j = jacobian(flow, x, {})
    with torch.no_grad():
        *z, log_det = flow(x)
        back, back_det = flow.inverse(*z)
    # Neither side saturates: the point and the way there have digits left.
    regular = j.flatten(1).isfinite().all(1) & torch.isfinite(z[0]).flatten(1).all(1)
    scale = torch.full_like(log_det, torch.inf)
    scale[regular] = (1 + x[regular].abs()).flatten(1).amax(1) * condition(j[regular])
    kept = scale < 1e10
    assert kept.sum() >= len(x) // 3, text
    iterative = any(w in str(facts["inverse"]) for w in ITERATIVE)
    error = (back - x).abs().flatten(1).amax(1) / scale
    assert error[kept].max() <= (1e-7 if iterative else 1e-9), text
    if facts["exactness"] == "exact":
        wanted = torch.linalg.slogdet(j[kept])[1]
        assert ((log_det[kept] - wanted).abs() / wanted.abs().clamp_min(1)).max() <= 1e-8, text
        # The inverse's own value, away from kinks, where rounding may take it to the other side.
        assert ((log_det + back_det).abs() / scale)[:10][kept[:10]].max() <= 1e-7, text
    single = copy.deepcopy(flow).float()
    with torch.no_grad():
        *w, _ = single(x.float())
        again = single.inverse(*w)[0]
    kept &= scale < 1e4  # of seven digits
    assert ((again - x).abs().flatten(1).amax(1) / scale)[kept].max() <= 1e-5, text


@pytest.mark.parametrize("seed", range(10))
def test_a_chain_comes_back_with_its_log_det(seed: int) -> None:
    holds(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10, 310, 25))
def test_many_chains_come_back_with_their_log_det(first: int) -> None:
    for seed in range(first, first + 25):
        holds(seed)
