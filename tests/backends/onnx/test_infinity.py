"""Beyond the box a spline is the identity, for infinite numbers too; what is no number stays none, for its sample alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flowlang.backends.onnx.build import Options, export

from flowlang.api import analyse
from tests.backends.onnx.support import flow_of, session

SPLINES = ["rqs_elementwise", "linear_spline_elementwise", "quadratic_spline_elementwise", "cubic_spline_elementwise"]
HUGE = {torch.float32: 3e38, torch.float64: 1e300}


@pytest.mark.parametrize("dtype", HUGE, ids=str)
@pytest.mark.parametrize("step", SPLINES)
def test_a_spline_beyond_its_box(step: str, dtype: torch.dtype) -> None:
    comp = analyse(f"flow f {{ data x: R[D = 2]\n {step}\n base normal }}", {}, sized=True)
    flow = flow_of(comp, "f", dtype)
    ends = [math.inf, -math.inf, HUGE[dtype], -HUGE[dtype], 1e31, -70.0]
    x = torch.tensor([*([e, 0.5] for e in ends), [math.nan, 0.5], [0.5, 0.5]], dtype=dtype)
    with torch.no_grad():
        (z, log_det), (back, _), log_prob = flow(x), flow.inverse(x), flow.log_prob(x)
    found = {}
    for program, name in (("forward", "x"), ("inverse", "z"), ("log_prob", "x")):
        run = session(export(comp.regions["f"], comp.analyses, flow, program, Options()))
        found[program] = run.run(None, {name: x.numpy()})
    for value, own in ((found["forward"][0], z), (found["inverse"][0], back)):
        for v in (value, own.numpy()):
            assert np.array_equal(v[: len(ends), 0], x[: len(ends), 0].numpy())
            assert np.isnan(v[len(ends), 0])
            assert np.isfinite(v[:, 1]).all()
    for density in (found["log_prob"][0], log_prob.numpy()):
        assert (density[:2] == -math.inf).all()
        assert np.isnan(density[len(ends)])
        assert np.isfinite(density[-3]), "the number that is none spoils its own sample alone"
        assert np.isfinite(density[-1])
    for density in (found["forward"][1], log_det.numpy()):  # of the finite number beside it, as the slope is 1 beyond
        assert np.allclose(density[: len(ends)], density[0], atol=1e-6)
        assert np.isfinite(density[: len(ends)]).all()
