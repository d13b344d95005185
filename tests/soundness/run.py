"""The soundness run: `python -m tests.soundness.run COUNT [FIRST SEED [FOLDER]]` judges random graphs and counts.

With a folder it goes in chunks, one file each; chunks that are there are not judged again, so that a run may be
broken off, and several may share a range.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.soundness.judge import judge
from tests.soundness.wide import make

CHUNK = 250


@dataclass
class Tally:
    """What became of a run of random graphs."""

    judged: int = 0
    accepted: int = 0
    trivial: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        refused = ", ".join(f"{k} {n}" for k, n in sorted(self.codes.items()))
        ways = ", ".join(f"{k} {n}" for k, n in sorted(self.ways.items()))
        return (
            f"{self.judged} graphs: {self.accepted} accepted ({self.trivial} of them trivial), {len(self.wrong)} wrong\n"
            f"steps of the accepted: {ways}\nrefused: {refused}"
        )


def run(count: int, first: int = 0) -> Tally:
    tally = Tally()
    for seed in range(first, first + count):
        tally.judged += 1
        try:
            verdict = judge(make(seed), seed)
        except Exception as error:  # accepted, and what was made of it does not run
            tally.accepted += 1
            tally.wrong.append((seed, repr(error)))
            continue
        if not verdict.accepted:
            tally.codes[verdict.code] += 1
            continue
        tally.accepted += 1
        tally.trivial += verdict.trivial
        tally.ways.update(verdict.ways)
        if verdict.wrong:
            tally.wrong.append((seed, verdict.wrong))
    return tally


def in_chunks(count: int, first: int, folder: Path) -> Tally:
    """The same, kept chunk by chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    total = Tally()
    for start in range(first, first + count, CHUNK):
        kept = folder / f"{start:06d}.json"
        if not kept.exists():
            kept.write_text("{}")  # another process leaves it alone
            kept.write_text(json.dumps(vars(run(min(CHUNK, first + count - start), start))))
        found = json.loads(kept.read_text())
        if found:
            total.judged += found["judged"]
            total.accepted += found["accepted"]
            total.trivial += found["trivial"]
            total.codes.update(found["codes"])
            total.ways.update(found["ways"])
            total.wrong += [(seed, why) for seed, why in found["wrong"]]
    return total


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    tally = in_chunks(count, first, Path(sys.argv[3])) if len(sys.argv) > 3 else run(count, first)
    print(tally)
    for seed, why in tally.wrong:
        print(f"seed {seed}: {why}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
