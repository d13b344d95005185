"""Evolution with tournaments over layers (Real et al. 2019; Liu et al. 2020, section 3.2), which goes on where it stopped.

The start is filled with random layers that pass all rejections. Then each child is the mutated winner of a tournament: of
`tournament` layers drawn from the population, one on the Pareto front of their accuracies. The worst layer leaves, so that the
best never does. A layer with the accuracies of one that lives is the same function in other words, and is left out: twins would
fill a small population (own; the paper's holds thousands). Every draw comes from the seed and the number of the trial: a search
that is resumed is the search.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowlang.evolve.fitness import Trial, Verdict, judge
from flowlang.evolve.genome import Gene, Genome, mutated, random_genome, reads_x, text

ATTEMPTS = 2000  # random layers tried for one place in the first population


@dataclass(frozen=True)
class Plan:
    """What is searched: sizes, the seed and how layers are tried."""

    population: int = 8
    generations: int = 10
    nodes: int = 12
    tournament: int = 3
    seed: int = 0
    trial: Trial = field(default_factory=Trial)


@dataclass(frozen=True)
class Member:
    genome: Genome
    scores: tuple[float, ...]
    born: int  # the number of its trial

    @property
    def fitness(self) -> float:
        return Verdict(self.scores).fitness


@dataclass
class State:
    """Where a search stands."""

    plan: Plan
    trials: int = 0
    members: list[Member] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)
    best: list[float] = field(default_factory=list)  # after each generation

    @property
    def children(self) -> int:
        return self.plan.population * self.plan.generations

    def save(self, path: Path) -> None:
        made = json.dumps(asdict(self), indent=1)
        part = path.with_suffix(".part")
        part.write_text(made, "utf-8")
        os.replace(part, path)

    @staticmethod
    def load(path: Path) -> State:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        trial = found["plan"].pop("trial")
        plan = Plan(**found["plan"], trial=Trial(**{**trial, "anchors": tuple(trial["anchors"])}))
        members = [
            Member(tuple(Gene(**g) for g in m["genome"]), tuple(m["scores"]), m["born"]) for m in found["members"]
        ]
        return State(plan, found["trials"], members, found["rejected"], found["best"])


def front(members: list[Member]) -> list[Member]:
    """The members that no other beats on one network without losing on another."""

    def beaten(m: Member) -> bool:
        return any(
            all(a >= b for a, b in zip(o.scores, m.scores, strict=True)) and o.scores != m.scores for o in members
        )

    return [m for m in members if not beaten(m)]


class Search:
    """Runs a plan; `save` is called after every trial that was worth one, `tell` after each."""

    def __init__(self, state: State, save: Callable[[State], None], tell: Callable[[State], None], extra: str = ""):
        self.state, self.save, self.tell, self.extra = state, save, tell, extra

    def run(self) -> State:
        s = self.state
        while len(s.members) < s.plan.population and not s.best:
            self.start()
        while len(s.best) <= s.plan.generations:
            if not s.best:
                s.best.append(max(m.fitness for m in s.members))
                self.save(s)
            if len(s.best) > s.plan.generations:
                break
            self.generation()
        return s

    def alive(self) -> set[str]:
        return {text(m.genome, "layer") for m in self.state.members}

    def rng(self) -> random.Random:
        return random.Random(f"{self.state.plan.seed}:{self.state.trials}")

    def tried(self, genome: Genome) -> Verdict:
        s = self.state
        s.trials += 1
        if not reads_x(genome):
            verdict = Verdict(rejected="invalid")
        else:
            verdict = judge(text(genome, "candidate"), s.plan.trial, s.plan.seed, self.extra)
            if not verdict.rejected and any(m.scores == verdict.scores for m in s.members):
                verdict = Verdict(rejected="twin")
        if verdict.rejected:
            s.rejected[verdict.rejected] = s.rejected.get(verdict.rejected, 0) + 1
        else:
            s.members.append(Member(genome, verdict.scores, s.trials))
        self.tell(s)
        return verdict

    def start(self) -> None:
        """One more random layer that passes."""
        alive = self.alive()
        for _ in range(ATTEMPTS):
            rng = self.rng()
            genome = random_genome(rng, self.state.plan.nodes)
            while text(genome, "layer") in alive:
                genome = random_genome(rng, self.state.plan.nodes)
            if not self.tried(genome).rejected:
                self.save(self.state)
                return
        raise RuntimeError(f"none of {ATTEMPTS} random layers passed: lower what is asked of them")

    def generation(self) -> None:
        """As many children as there are members; the best of all stay."""
        s = self.state
        for _ in range(s.plan.population):
            self.child()
            s.members = sorted(s.members, key=lambda m: (-m.fitness, m.born))[: s.plan.population]
        s.best.append(s.members[0].fitness)
        self.save(s)

    def child(self) -> None:
        """A child that the compiler accepts, of tournaments until there is one; it may still be rejected when it is tried."""
        s = self.state
        for _ in range(ATTEMPTS):
            rng = self.rng()
            drawn = rng.sample(s.members, min(s.plan.tournament, len(s.members)))
            winner = rng.choice(sorted(front(drawn), key=lambda m: m.born))
            if self.tried(self.other(rng, winner.genome)).rejected != "invalid":
                return

    def other(self, rng: random.Random, genome: Genome) -> Genome:
        """A mutant that is another layer than all that live: one of a node that nothing reads is the layer it was, and such
        twins would soon fill a small population. A node more is mutated until it differs."""
        alive = self.alive()
        child = mutated(rng, genome)
        while text(child, "layer") in alive:
            child = mutated(rng, child)
        return child


def report(state: State, count: int = 3) -> str:
    """The best layers as norms of the language, with what is known of them."""
    lines = []
    for k, m in enumerate(sorted(state.members, key=lambda m: (-m.fitness, m.born))[:count]):
        scores = ", ".join(f"{a} {v:.3f}" for a, v in zip(state.plan.trial.anchors, m.scores, strict=True))
        lines.append(
            f"## Found by `flowlang evolve`, seed {state.plan.seed}, trial {m.born} (own). Accuracy: {scores}."
        )
        lines.append(text(m.genome, f"evolved_{k + 1}"))
    return "\n".join(lines)
