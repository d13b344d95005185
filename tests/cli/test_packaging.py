"""A wheel holds everything that an installed FlowLang needs, and works outside of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = (".flow", ".lark", ".md", ".json")


def shipped() -> set[str]:
    """Files of code and data, as they are named inside the wheel."""
    found = set()
    for top in ("flowlang", "grammar", "backends", "stdlib"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", *DATA) and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                found.add(name if top == "flowlang" else f"flowlang/{name}")
    return found


@pytest.mark.slow
def test_a_wheel_is_whole_and_works_in_another_environment(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    skipped = shutil.ignore_patterns(".venv", ".git", "build", "out", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, clone, ignore=skipped)
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(clone)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "absent from the `packages`" not in made.stderr
    wheel = next(tmp_path.glob("*.whl"))

    env = tmp_path / "env"
    venv.create(env, with_pip=True)
    python = env / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, timeout=300)
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    installed = {p.relative_to(site).as_posix() for p in (site / "flowlang").rglob("*") if p.suffix in (".py", *DATA)}
    assert installed == shipped()

    # The dependencies come from the environment of the tests; FlowLang itself does not.
    paths = [sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))]
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n")
    spec = tmp_path / "first.flow"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [env / "bin" / "flowlang", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=300, env=clean
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.check_output(
        [python, "-c", "import flowlang; print(flowlang.__file__)"], text=True, cwd=tmp_path, env=clean
    )
    assert Path(where.strip()).is_relative_to(site)
    run("new", "first.flow")
    assert "no errors" in run("check", str(spec))
    assert "rqs_coupling" in run("std")
    assert "FL0401" in run("explain", "FL0401")
    run("build", str(spec), "-o", "first.py")
    assert (tmp_path / "first.py").is_file()
