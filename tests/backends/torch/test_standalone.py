"""What `flowlang build` writes: a file that needs torch alone, gives the same numbers, and holds no user's text as code."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flowlang.backends.torch import runtime

from tests.backends.torch.specs import SPECS, build, context, data, generated

EXACT = sorted(set(SPECS) - {"contraction"})

RUN = """
import json, sys, importlib.util, torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flowlang", "lark"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
torch.set_num_threads(1)
out = {}
for name in sys.argv[2:]:
    spec = importlib.util.spec_from_file_location(name, f"{sys.argv[1]}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    state, x, c, cls = torch.load(f"{sys.argv[1]}/{name}.pt")
    flow = getattr(module, cls)().double().eval()
    flow.load_state_dict(state)
    z, *parts, log_det = flow(x, **c)
    back, _ = flow.inverse(z, *parts, **c)
    sample = flow.sample((3,), generator=torch.Generator().manual_seed(0), **c)
    try:
        flow.log_prob(x[..., :0], **c)
        refused = ""
    except ValueError as e:
        refused = str(e)
    out[name] = [flow.log_prob(x, **c).tolist(), back.tolist(), sample.tolist(), refused]
assert not any(m.startswith("flowlang") for m in sys.modules)
print(json.dumps(out))
"""


def test_the_file_needs_torch_alone_and_gives_the_same_numbers(tmp_path: Path) -> None:
    flows = {}
    for name in EXACT:
        text, cls = generated(SPECS[name], True)
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
        flow = flows[name] = build(name)
        torch.save((flow.state_dict(), data(flow, 3), context(flow, 3), cls), tmp_path / f"{name}.pt")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, str(tmp_path), *EXACT],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for name, flow in flows.items():
        x, c = data(flow, 3), context(flow, 3)
        log_prob, back, sample, refused = found[name]
        expected = flow.sample((3,), generator=torch.Generator().manual_seed(0), **c)
        torch.testing.assert_close(torch.tensor(log_prob, dtype=torch.float64), flow.log_prob(x, **c).detach())
        torch.testing.assert_close(torch.tensor(back, dtype=torch.float64), x, rtol=0, atol=1e-8)
        torch.testing.assert_close(torch.tensor(sample, dtype=torch.float64), expected)
        assert "one sample is R[" in refused


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("standalone", [True, False])
def test_the_file_is_clean(name: str, standalone: bool, tmp_path: Path) -> None:
    """What linters ask of every file: nothing unused, nothing undefined; and lines that a screen holds."""
    text, _ = generated(SPECS[name], standalone)
    file = tmp_path / "made.py"
    file.write_text(text, "utf-8")
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if ruff is not None:
        run = subprocess.run(
            [ruff, "check", "--isolated", "--select", "E4,E7,E9,F", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout
    long = [line for line in text.splitlines() if len(line) > 120]
    assert not long, long[:3]


def test_the_same_bytes_under_other_hash_seeds(tmp_path: Path) -> None:
    (tmp_path / "specs.json").write_text(json.dumps(SPECS), "utf-8")
    code = (
        "import json, sys\n"
        "from flowlang.api import generate\n"
        "for name, spec in sorted(json.load(open(sys.argv[1])).items()):\n"
        "    print(generate(spec, standalone=True)[0])\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "specs.json")],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "4711")
    }  # fmt: skip
    assert len(texts) == 1


HOSTILE = """
## Ends a docstring \"\"\" and goes on: \\
## import os; os.system("true")   '''   \\N{{BULLET}} %s {{x}} \\x41
bijector f(self: R[D]) {{
  param lambda: R[D] = 0, {greek}: Positive[D] = 1, class': R[D] = 0
  torch = self * {greek} + lambda
  x = torch + class'
  x
}}
## \"\"\"
flow import_ {{
  data exec: R[D = 2]
  given None_: R[print = 2], eval: R[K = 1]
  f
  affine_coupling(net = mlp(4))
  base normal
}}
"""


@pytest.mark.parametrize("greek", ["α", "σ_x"])
def test_no_text_of_the_user_becomes_code(greek: str) -> None:
    spec = HOSTILE.format(greek=greek)
    for standalone in (True, False):
        text, cls = generated(spec, standalone)
        tree = ast.parse(text)
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"eval", "exec", "compile", "__import__", "open"}
        imported = {
            (n.module or "").split(".")[0] if isinstance(n, ast.ImportFrom) else n.names[0].name.split(".")[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.Import | ast.ImportFrom)
        }
        assert imported <= {
            "__future__",
            "fnmatch",
            "warnings",
            "math",
            "collections",
            "contextlib",
            "itertools",
            "types",
            "typing",
            "torch",
            "flowlang",
        }
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert all(n.isascii() for n in names)
        assert cls.isidentifier()
    flow = build(spec)
    x, c = data(flow, 3), context(flow, 3)
    z, _ = flow(x, **c)
    torch.testing.assert_close(flow.inverse(z, **c)[0], x)


def test_generated_code_can_import_every_part_of_the_runtime() -> None:
    from flowlang.backends.torch import runtime
    from flowlang.backends.torch.files import runtime_parts

    functions = {p for p, part in runtime_parts(False).items() if part.text.startswith(("def ", "class ", "@"))}
    assert functions <= set(runtime.__all__)


def test_lines_of_the_runtime_fit() -> None:
    """They are copied into built files as they are."""
    folder = Path(runtime.__file__).parent
    long = [
        f"{p.name}:{n}"
        for p in sorted(folder.glob("*.py"))
        for n, line in enumerate(p.read_text("utf-8").splitlines(), 1)
        if len(line) > 120
    ]
    assert not long
