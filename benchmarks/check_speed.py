"""How long `flowlang check` takes, cold, as specs grow; and how fast bombs are refused. Prints figures; asserts nothing.

python benchmarks/check_speed.py [--repeat 5] [--no-bombs]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.frontend.bombs import BOMBS

HEAD = """## {name}: written by benchmarks/check_speed.py
"""

# One block each: a person's own layers and the flow that uses them, 22 to 30 lines.
BLOCKS = [
    """
## Affine coupling with a bounded scale.
bijector coupling_{k}(net: net = mlp(64, 64), bound: real = 2.0) (x: R[D, ..] given c: R[..]?) {{
  a, b = halves[D](x)
  shift: R[b.D, ..], raw: R[b.D, ..] = net(a, c)
  log_scale = bound * tanh(raw / bound)
  y = b * exp(log_scale) + shift
  join[D](a, y)
}}

## Mixing after each coupling.
bijector mix_{k}(x: R[D]) {{
  param W: Invertible[D', D] ~ orthogonal
  param b: R[D] = 0
  sum[D](W * x) + b
}}

flow tabular_{k} {{
  data x: R[D = {dims}]
  given c: R[E = 3]
  repeat {depth} {{
    coupling_{k}(net = mlp(32, 32), bound = 1.5)
    mix_{k}
  }}
  elementwise(asinh)
  base normal
}}
""",
    """
## Two layers with a skip.
net skip_{k}(width: int = 32) (x: R[D], c: R[E]?) -> R[O] {{
  h: R[H = width] = linear(x, c)
  h := silu(h)
  h := h + mlp(width)(h)
  linear(h)
}}

## A monotone scalar map: the CDF of a mixture of logistics, then its logit.
bijector mixture_{k}(K: int = 4) (x: R[D]) {{
  param mean: R[D, K] ~ normal
  param log_scale: R[D, K] = 0
  param logits: R[D, K] = 0
  weight = softmax[K](logits)
  p = sum[K](weight * sigmoid((x - mean) * exp(-log_scale)))
  logit(p)
}}

flow scalar_{k} {{
  data x: R[D = {dims}]
  mixture_{k}(K = 5)
  repeat {depth} {{
    affine_coupling(net = mlp(24))
    reverse
  }}
  base student_t(df = 4)
}}
""",
    """
const width_{k} = {dims} * 8

## Strictly causal along D.
bijector auto_{k}(hidden: [int] = [width_{k}, width_{k}]) (x: R[D]) {{
  shift: R[D], raw: R[D] = autoregressive_mlp[D](x, hidden = hidden)
  log_scale = tanh(raw)
  x * exp(log_scale) + shift
}}

bijector pair_{k} {{
  auto_{k}
  reverse
}}

flow causal_{k} {{
  data x: Positive[D = {dims}]
  elementwise(log)
  repeat {depth} {{
    pair_{k}
  }}
  require log_det <= O(D)
  base normal
}}
""",
]


def spec(lines: int) -> str:
    """A spec of about this many lines: many declarations, each flow with its own layers."""
    text, k = HEAD.format(name=f"{lines} lines"), 0
    while text.count("\n") < lines:
        text += BLOCKS[k % len(BLOCKS)].format(k=k, dims=2 + k % 5, depth=2 + k % 7)
        k += 1
    return text


def environment(folder: str) -> dict[str, str]:
    """As after an installation: modules are compiled already, in a folder of our own."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**env, "PYTHONPYCACHEPREFIX": folder}


def spent() -> float:
    """Processor time of all children so far: on a busy machine the figure to compare."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cold(command: list[str], repeat: int, env: dict[str, str]) -> tuple[float, float, float, float, int]:
    """Median and best wall time, median processor time, peak MiB of any child so far, and the exit code."""
    times, busy, code = [], [], 0
    subprocess.run(command, capture_output=True, check=False, env=env)  # compiles the modules
    for _ in range(repeat):
        start, before = time.perf_counter(), spent()
        code = subprocess.run(command, capture_output=True, check=False, env=env).returncode
        times.append(time.perf_counter() - start)
        busy.append(spent() - before)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return statistics.median(times), min(times), statistics.median(busy), peak, code


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeat", type=int, default=5)
    options.add_argument("--no-bombs", action="store_true")
    asked = options.parse_args()
    repeat = asked.repeat
    python = [sys.executable, "-c"]
    flow = [sys.executable, "-m", "flowlang.cli.main", "check"]
    print(f"{'what':44} {'median':>8} {'best':>8} {'processor':>9} {'peak so far':>12}")

    def row(name: str, command: list[str]) -> None:
        median, best, busy, peak, code = cold(command, repeat, env)
        print(
            f"{name + (f' (exit {code})' if code else ''):44} {median:7.3f}s {best:7.3f}s {busy:8.3f}s {peak:8.0f} MiB"
        )

    with tempfile.TemporaryDirectory() as folder:
        env = environment(str(Path(folder, "compiled")))
        row("python, nothing", [*python, "pass"])
        row("import flowlang", [*python, "import flowlang"])
        for lines in (30, 100, 300, 1000):
            file = Path(folder, f"spec_{lines}.flow")
            text = spec(lines)
            file.write_text(text, "utf-8")
            row(f"check, {text.count(chr(10))} lines", [*flow, str(file)])
        for name, make in () if asked.no_bombs else sorted(BOMBS.items()):
            file = Path(folder, "bomb.flow")
            file.write_text(make(), "utf-8")
            row(f"bomb: {name}", [*flow, str(file)])


if __name__ == "__main__":
    main()
