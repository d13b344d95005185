"""Specs that the tests of the PyTorch backend share: every kind of inverse, context, parts that leave."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from flowlang.backends.torch.load import instantiate

from flowlang.api import generate

SPECS = {
    "coupling": "flow f { data x: R[D = 4]; repeat 2 { affine_coupling(net = mlp(8)); reverse }; base normal }",
    "context": """
flow f {
  data x: R[D = 4]
  given c: R[K = 3]
  repeat 2 { rqs_coupling(bins = 4, net = mlp(8)); reverse }
  affine_autoregressive(hidden = [8, 8])
  base normal
}""",
    "autoregressive": "flow f { data x: R[D = 5]; repeat 2 { affine_autoregressive(hidden = [8, 8]); reverse }; base normal }",
    "spline_autoregressive": "flow f { data x: R[D = 4]; rqs_autoregressive(bins = 4, hidden = [8]); reverse; base normal }",
    "shared": """
flow f {
  data x: R[D = 4]
  net = mlp(8)
  repeat 2 { affine_coupling(net = net); reverse }
  base normal
}""",
    "bracketing": """
bijector wiggle(x: R[D]) { param a: Interval(0, 0.9)[D] = 0.5;  x + a * tanh(x) }
flow f { data x: R[D = 3]; wiggle; affine_coupling(net = mlp(8)); base normal }""",
    "contraction": "flow f { data x: R[D = 2]; residual_block(net = mlp(8, act = elu), lip = 0.5); base normal }",
    "image": """
flow f {
  data x: R[C = 2, H = 4, W = 4]
  squeeze
  repeat 2 { actnorm; conv1x1; affine_coupling[C](net = conv_net(8)) }
  factor_out(p = normal)
  affine_coupling[C](net = conv_net(8))
  base normal
}""",
    "linear": "flow f { data x: R[D = 4]; affine_elementwise; sinh_arcsinh; base student_t(df = 5) }",
}


@cache
def generated(spec: str, standalone: bool = False) -> tuple[str, str]:
    """The source of a spec's flow and the name of its class; made once."""
    return generate(spec, standalone=standalone)


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, size: float = 0.2) -> Any:
    """A flow moved away from its start, where many maps are the identity."""
    torch.manual_seed(seed)
    flow = instantiate(*generated(SPECS.get(name, name))).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    if hasattr(flow, "initialised"):
        flow.initialised.fill_(True)
    return flow.eval()


def data(flow: Any, *batch: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, *flow.data_shape, generator=generator, dtype=torch.float64).to(flow.like.dtype)


def context(flow: Any, *batch: int, seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(*batch, *s, generator=generator, dtype=torch.float64).to(flow.like.dtype)
        for k, s in flow.given_shapes.items()
    }
