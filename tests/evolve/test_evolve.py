"""The search of card 048: genomes and their text, rejections, tournaments, and going on where it stopped."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import flowlang as fl
from flowlang.cli.main import cli
from flowlang.evolve import search
from flowlang.evolve.fitness import Trial, Verdict, accuracy, blobs, judge, network, stable, valid
from flowlang.evolve.genome import GIVEN, PRIMITIVES, Gene, expression, mutated, random_genome, reads_x, text, used
from flowlang.evolve.search import Member, Plan, Search, State, front, report

QUICK = Trial(anchors=("anchor_plain",), steps=12, quality=0.14, ascent=2)
PLAN = Plan(population=4, generations=3, nodes=6, trial=QUICK)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(body: str) -> str:
    return f"norm candidate (x: R[C, H, W]) {{ {body} }}\n"


def run(plan: Plan, state: State | None = None, stop_after: int | None = None) -> State:
    state = State(plan) if state is None else state

    def told(s: State) -> None:
        if stop_after is not None and s.trials >= stop_after:
            raise KeyboardInterrupt

    return Search(state, lambda s: None, told).run()


# ---- genomes ------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 14))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_a_genome_is_written_as_a_norm_that_the_compiler_judges_without_a_fault(seed: int, nodes: int) -> None:
    genome = random_genome(random.Random(seed), nodes)
    found = fl.check(f"{text(genome, 'candidate')}net f(x: R[C = 4, H = 2, W = 2]) {{ candidate()(x) }}")
    assert not any(d.code.startswith("FL01") for d in found)  # it parses
    needed = used(genome)
    assert needed[-1] == len(GIVEN) + nodes - 1
    assert reads_x(genome) == (0 in needed)


@given(st.integers(0, 10**6))
@settings(derandomize=True, max_examples=30, deadline=None)
def test_a_mutation_changes_one_node_at_most(seed: int) -> None:
    rng = random.Random(seed)
    genome = random_genome(rng, 8)
    child = mutated(rng, genome)
    assert sum(a != b for a, b in zip(genome, child, strict=True)) <= 1
    assert all(max(g.left, g.right) < len(GIVEN) + k for k, g in enumerate(child))


@pytest.mark.parametrize("op", PRIMITIVES)
def test_every_primitive_means_what_its_name_says(op: str) -> None:
    x = 0.5 + torch.rand(5, 8, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    body = expression(Gene(op, 0, 0), {0: "x"}, 4, 1e-5)
    if op in ("log", "sqrt", "div"):  # defined on part of the reals: the compiler asks for a domain
        body = body.replace("x", "max(x, 0.25)")
    module = fl.compile(
        f"norm f(x: R[C = 8, H = 3, W = 2]) {{ y: R[C, H, W] = {body} + 0 * x\n y }}", flow="f", dtype=torch.float64
    )
    if "_" not in op:
        same = {"neg": -x, "add": x + x, "mul": x * x, "div": x / x, "max": x, "square": x * x}
        expected = same[op] if op in same else getattr(torch, op)(x)
    else:
        moment, span = op.split("_")
        g = x.reshape(5, 4, 2, 3, 2) if span == "group" else x
        dims = {"batch": (0, 2, 3), "instance": (2, 3), "layer": (1, 2, 3), "group": (2, 3, 4)}[span]
        mean = g.mean(dims, keepdim=True)
        second = g.square().mean(dims, keepdim=True) if moment == "rms" else g.var(dims, correction=0, keepdim=True)
        expected = ((mean if moment == "mean" else (second + 1e-5).sqrt()) + 0 * g).reshape(x.shape)
    assert torch.allclose(module(x), expected.expand_as(x))


# ---- rejections ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "accepted"), [
    ("relu(x)", True), ("evonorm_s0(4)(x)", True), ("log(x)", False), ("x / x", False), ("x / sqrt(var[H, W](x) + 1e-5)", True),
    ("mean[H, W](x)", False), ("sqrt(x)", False), ("sqrt(x ^ 2)", True), ("y: R[C, H, W] = mean[H, W](x)\n y", True),
])  # fmt: skip
def test_validity_is_the_compiler_s_own(body: str, accepted: bool) -> None:
    found = valid(layer(body))
    if body == "mean[H, W](x)":
        found = not judge(layer(body), QUICK, 0).rejected
    assert found == accepted


def test_a_linear_network_cannot_tell_the_images_apart() -> None:
    verdict = judge(layer("1 * x"), replace(QUICK, steps=60, quality=0.3), 0)
    assert verdict.rejected == "quality"
    assert accuracy(network(layer("relu(x)"), "anchor_plain", 0), replace(QUICK, steps=60), 0) > 0.35
    x, label = blobs(64, 1)
    assert x.shape == (64, 3, 8, 8)
    assert set(label.tolist()) <= set(range(8))


def test_layers_that_explode_are_rejected() -> None:
    trial = replace(QUICK, ascent=10)
    assert stable(network(layer("tanh(batch_norm()(x))"), "anchor_plain", 0), trial, 0)
    assert not stable(network(layer("x ^ 2 * exp(x ^ 2)"), "anchor_plain", 0), trial, 0)


# ---- evolution ----------------------------------------------------------------------------------


def test_the_front_holds_what_no_other_beats() -> None:
    a, b, c = (Member((), s, k) for k, s in enumerate([(0.5, 0.2), (0.2, 0.5), (0.1, 0.2)]))
    assert front([a, b, c]) == [a, b]
    twin = Member((), (0.5, 0.2), 9)
    assert front([a, twin]) == [a, twin]


@pytest.mark.slow
def test_item_7_most_random_layers_are_rejected_and_the_best_never_worsens() -> None:
    """Card 048, item 7, on 12 nodes; and the search that is cut short and resumed is the same search."""
    plan = replace(PLAN, nodes=12)
    state = run(plan)
    assert sum(state.rejected.values()) > 0.5 * state.trials
    assert len(state.best) == 4
    assert state.best == sorted(state.best)
    assert not [d for d in fl.check(report(state)) if d.severity == "error"]


def quick(layer_text: str, trial: Trial, seed: int, extra: str = "") -> Verdict:
    """A made-up verdict that depends on the text alone, for what is not about training."""
    rng = random.Random(layer_text)
    return Verdict((rng.random(), rng.random())) if rng.random() < 0.4 else Verdict(rejected="quality")


@given(st.integers(0, 1000), st.integers(5, 60))
@settings(derandomize=True, max_examples=15, deadline=None)
def test_a_search_that_is_resumed_is_the_search(tmp_path_factory: pytest.TempPathFactory, seed: int, cut: int) -> None:
    path = tmp_path_factory.mktemp("evolve") / "search.json"
    plan = Plan(population=4, generations=4, nodes=6, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "judge", quick)
        whole = run(plan)
        begun = State(plan)
        begun.save(path)

        def told(s: State) -> None:
            if s.trials == cut:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            Search(begun, lambda s: s.save(path), told).run()
        again = Search(State.load(path), lambda s: s.save(path), lambda s: None).run()
    assert again == whole
    assert whole.best == sorted(whole.best)


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(state: State, path: Path, extra: str) -> None:
        state.save(path)
        raise KeyboardInterrupt

    monkeypatch.setattr("flowlang.cli.evolving.run", cut)
    done = CliRunner().invoke(cli, ["evolve", "-o", str(tmp_path), "--anchors", "anchor_plain"])
    assert done.exit_code == 1  # click's own; `flowlang` ends with 130
    assert f"--resume -o {tmp_path}" in done.output
    assert (tmp_path / "search.json").exists()


def test_the_command_searches_resumes_and_prints_layers(tmp_path: Path) -> None:
    out = tmp_path / "e"
    few = [
        "--population",
        "2",
        "--nodes",
        "3",
        "--steps",
        "10",
        "--quality",
        "0.13",
        "--ascent",
        "1",
        "--anchors",
        "anchor_plain",
    ]
    done = CliRunner().invoke(cli, ["evolve", "-o", str(out), "--generations", "1", *few])
    assert done.exit_code == 0, done.output
    assert "norm evolved_1" in done.output
    assert not [d for d in fl.check(out / "best.flow") if d.severity == "error"]
    more = CliRunner().invoke(cli, ["evolve", "-o", str(out), "--generations", "2", "--resume", "--json"])
    found = json.loads(more.stdout)
    assert len(found["best"]) == 3
    assert found["best"] == sorted(found["best"])


@pytest.mark.parametrize(("options", "words"), [
    (["--resume"], "there is no search"), (["--anchors", "mpl"], "unknown name `mpl`"), (["--anchors", "mlp"], "error"),
])  # fmt: skip
def test_wrong_options_are_told(options: list[str], words: str, tmp_path: Path) -> None:
    from flowlang.diagnostics import FlowError

    found = CliRunner().invoke(cli, ["evolve", "-o", str(tmp_path / "e"), *options])
    assert isinstance(found.exception, FlowError)
    assert words in str(found.exception)


def test_children_are_other_layers_and_idle_nodes_make_no_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "judge", quick)
    state = run(Plan(population=4, generations=6, nodes=12, seed=3))
    texts = [text(m.genome, "layer") for m in state.members]
    assert len(set(texts)) == len(texts)
    assert state.best[-1] > state.best[0]
