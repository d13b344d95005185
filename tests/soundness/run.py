"""The soundness run: `python -m tests.soundness.run COUNT [FIRST SEED]` judges random graphs and counts."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch

from tests.soundness.generate import make
from tests.soundness.judge import judge


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


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    tally = run(count, first)
    print(tally)
    for seed, why in tally.wrong:
        print(f"seed {seed}: {why}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
