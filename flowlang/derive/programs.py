"""Programs of a region: forward, inverse, score and generate, as graphs of their own.

A bijector's `forward` and `inverse` also give their log|det J|. `score` and `generate` take care of
draws and emissions: `score` adds log p of what leaves and subtracts log q of what is drawn, so that
log p(x) = log p_base(z) + weight; `generate` samples what had left.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowlang.derive.plan import Plan
from flowlang.derive.program import Program, draws_noise, is_map, is_random, prune
from flowlang.derive.replay import Replay
from flowlang.ir.graph import Region, Update


def build(region: Region, plan: Plan | None, name: str) -> Program:
    """The program `name` of a region: forward (nets and maps), inverse, score, generate; for flows also
    log_prob, sample, sample_and_log_prob; of a net with its own backward pass: plain (inference), trained, backward."""
    if not is_map(region):
        r = Replay(region, None, name if name == "initialise" else "forward")
        for i in region.inputs if name != "backward" else ():
            r.feed(i)
        r.program.name = name
        r.training = {"plain": False, "trained": True, "backward": True}.get(name)
        if name == "backward":
            return backward_program(region, r)
        r.feed_context()
        outputs = [r.value(o) for o in region.outputs]
        if name == "trained":
            outputs += [r.value(n) for n in saved(region)]
        if name != "plain":
            update(r, region.updates)
        if name == "initialise":
            for s in region.starts:
                r.value(s.param)
        return r.finish(outputs, log_det=False)
    assert plan is not None
    if name in ("forward", "score", "log_prob", "initialise"):
        return forward_program(region, plan, name)
    return inverse_program(region, plan, name)


def saved(region: Region) -> list[int]:
    """What a hand-given backward pass reads of the forward one; states it reads as they are when it runs."""
    rule, graph = region.rules["backward"], region.graph
    begin = min(rule.inputs)  # the backward pass's nodes are made after the forward pass's
    roots = [*rule.outputs, *(u.new for u in rule.updates)]
    read = {i for n in graph.reachable(roots) if n >= begin for i in graph[n].inputs} | set(roots)
    return sorted(n for n in read if n < begin and graph[n].op not in ("const", "state", "index"))


def backward_program(region: Region, r: Replay) -> Program:
    """The gradients of the inputs from those of the results and what the forward pass kept."""
    rule = region.rules["backward"]
    for n in (*rule.inputs, *saved(region)):
        r.feed(n)
    outputs = [r.value(o) for o in rule.outputs]
    update(r, rule.updates)
    return r.finish(outputs, log_det=False)


def update(r: Replay, updates: Sequence[Update]) -> None:
    """What training puts into states when the program has run; running values do so where they are read."""
    for u in updates:
        if u.live is None:
            r.program.effects.append((str(r.source[u.state].attrs["name"]), r.value(u.new)))


def forward_program(region: Region, plan: Plan, name: str) -> Program:
    score = name in ("score", "log_prob")
    r = Replay(region, plan, "score" if score else name)
    r.program.name = name
    for i in region.inputs:
        r.feed(i)
    r.feed_context()
    for d in region.draws:
        arguments = {k: r.value(i) for k, i in d.arguments}
        r.env[d.value] = d.distribution.draw(r.b, r.source[d.value].tensor, arguments)
        if r.source[d.value].label:
            r.b.graph.relabel(r.env[d.value], r.source[d.value].label or "")
        r.program.random = True
    outputs = [r.value(o) for o in region.outputs]
    update(r, region.updates)
    emissions = [] if score else [r.value(e.value) for e in region.emissions]
    for e in region.emissions:
        if score and e.distribution is not None:
            r.value(e.value)
    if name == "initialise":
        for s in region.starts:
            r.value(s.param)
        return r.finish([*outputs, *emissions], log_det=False)
    weigh(r, plan)
    if score:
        r.score_random()
    if name == "log_prob":
        assert region.base is not None
        arguments = {k: r.value(i) for k, i in region.base.arguments}
        r.weights.append(region.base.distribution.total_log_prob(r.b, outputs[0], arguments))
        return r.finish([], log_det=True)
    return r.finish([*outputs, *emissions], log_det=True)


def inverse_program(region: Region, plan: Plan, name: str) -> Program:
    sampling = name in ("sample", "sample_and_log_prob")
    generate = name == "generate" or sampling
    r = Replay(region, plan, "generate" if generate else name)
    r.program.name = name
    if not sampling:
        for o in region.outputs:
            r.feed(o)
        if not generate:
            for e in region.emissions:
                r.feed(e.value)
    r.feed_context()
    if sampling:
        assert region.base is not None
        arguments = {k: r.value(i) for k, i in region.base.arguments}
        for o in region.outputs:
            r.env[o] = region.base.distribution.draw(r.b, r.source[o].tensor, arguments)
        r.program.random = True
    if generate:
        for e in region.emissions:
            if e.distribution is not None:
                r.lazy[e.value] = list(e.arguments)
    go_back(r, plan)
    outputs = [r.value(i) for i in region.inputs]
    if name == "preimage":  # for the analysis: draws too, and no log-det
        return r.finish([*outputs, *(r.value(d.value) for d in region.draws)], log_det=False)
    if name == "sample":
        return r.finish(outputs, log_det=False)
    weigh(r, plan)
    if generate:
        r.score_random()
        if name == "sample_and_log_prob":
            assert region.base is not None
            arguments = {k: r.value(i) for k, i in region.base.arguments}
            r.weights.append(region.base.distribution.total_log_prob(r.b, r.env[region.outputs[0]], arguments))
        return r.finish(outputs, log_det=True)
    r.weights = [r.b.neg(w) for w in r.weights]
    return r.finish(outputs, log_det=True)


def go_back(r: Replay, plan: Plan) -> None:
    """Makes the mapped inputs known from the outputs: by the plan's steps, or by the hand-given rule."""
    rule, region = plan.inverse, plan.region
    if rule is None:
        r.run_steps(plan.steps)
        return
    for leaf, o in zip(rule.inputs, region.outputs, strict=True):
        # What the log-det reads is computed anew from the inputs found, so that it belongs to them.
        r.env[leaf] = r.env.pop(o)
    for i, found in zip(region.inputs, rule.outputs, strict=True):
        r.bind(region.graph[i], r.value(found))
    if plan.log_det is None:
        for o in region.outputs:
            r.value(o)


def weigh(r: Replay, plan: Plan) -> None:
    """Adds the log-det: the sum of the steps' own, or the hand-given one."""
    if plan.log_det is None:
        r.weigh(plan.steps)
    else:
        r.weights = [r.value(plan.log_det.outputs[0])]


__all__ = ["Program", "build", "draws_noise", "is_map", "is_random", "prune"]
