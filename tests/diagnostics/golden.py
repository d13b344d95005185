"""Every diagnostic as it is shown: `golden/NAME.flow` beside `golden/NAME.txt`.

After a wanted change of wording, `python -m tests.diagnostics.golden --update` writes the texts anew; read the
difference before you commit it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flowlang.compiler import compile_source
from flowlang.diagnostics.render import render_report
from flowlang.source import Source

FOLDER = Path(__file__).parent / "golden"


def specs() -> list[Path]:
    return sorted(FOLDER.glob("*.flow"))


def shown(spec: Path) -> str:
    return render_report(compile_source(Source.of(spec.name, spec.read_text("utf-8"))).report) + "\n"


def main() -> None:
    if "--update" not in sys.argv:
        raise SystemExit(__doc__)
    for spec in specs():
        spec.with_suffix(".txt").write_text(shown(spec), "utf-8")
    print(f"{len(specs())} texts written")


if __name__ == "__main__":
    main()
