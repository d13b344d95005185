"""Specs that would eat a machine are refused, each within 10 s and 256 MiB."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.frontend.bombs import BOMBS

SECONDS, MEBIBYTES = 10, 256

CHILD = """
import json, re, sys
from flowlang.compiler import compile_source
from flowlang.source import Source
from tests.frontend.bombs import BOMBS
report = compile_source(Source.of("bomb.flow", BOMBS[sys.argv[1]]())).report
# Of this process since its start: `getrusage` counts what its parent held before, too.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
print(json.dumps({"peak": peak, "errors": [[d.code, d.message] for d in report.errors]}))
"""


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_is_refused(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, name], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["peak"] < MEBIBYTES * 1024
    assert 1 <= len(found["errors"]) <= 2, found["errors"][:5]
    assert {code for code, _ in found["errors"]} <= {"FL0901", "FL0205", "FL0208", "FL0102", "FL0101", "FL0310"}
