"""What `flowlang info` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


def table(head: list[str], rows: list[list[str]], numbers: Sequence[int] = (), across: int | None = None) -> str:
    """Columns of text, those of `numbers` aligned to the right; the last one cut where lines would be over `across`."""
    widths = [max(len(r[k]) for r in [head, *rows]) for k in range(len(head))]
    if across is not None:
        widths[-1] = min(widths[-1], max(across - sum(w + 2 for w in widths[:-1]), 20))
        rows = [[*r[:-1], textwrap.shorten(r[-1], widths[-1], placeholder=" …")] for r in rows]

    def line(cells: list[str]) -> str:
        shown = [c.rjust(w) if k in numbers else c.ljust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(shown).rstrip()

    lines = [line(r) for r in [head, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def certified(found: Mapping[str, Any]) -> str:
    """What is proved of contractions, and of the weights that they rest on."""
    parts = []
    if found.get("contraction") is not None:
        parts.append(f"contractions have a constant of at most {found['contraction']:.6g}")
    if found.get("weights"):
        parts.append(
            f"{found['weights']} weights are within their bounds (nearest is `{found['nearest']}`, of norm {found['norm']:.6g},"
            f" and {found['bound']:.6g} is allowed)"
        )
    return f"certificate: {'; '.join(parts)}"


def info_text(declarations: list[dict[str, Any]]) -> str:
    blocks: list[str] = []
    for d in declarations:
        head = f"{d['kind']} {d['name']}"
        if "data" in d:
            head += ": " + ", ".join(f"{v['as']} {n}: {v['type']}" for n, v in d["data"].items())
        elif "inputs" in d:
            given = f" given {', '.join(d['context'])}" if d["context"] else ""
            head += f": {', '.join(d['inputs'])}{given} -> {', '.join(d['outputs'])}"
        lines = [head]
        facts = []
        if d.get("invertible"):
            facts.append(f"inverse {d['inverse']}, log-det {d['log_det']}, {d['exactness']}")
        if "parameters" in d:
            counts = {"": d["parameters"], "stored": d["stored_parameters"], "free": d["free_parameters"]}
            modes = [f"{n:,} {m}".rstrip() for m, n in counts.items() if not m or n != d["parameters"]]
            extra = f" ({', '.join(modes[1:])})" if modes[1:] else ""
            facts.append(f"{modes[0]} parameters{extra}" + ("" if "data" in d else f", {d['flops']:,} FLOPs a sample"))
        for key, what in (("parameter_formula", "parameters"), ("flop_formula", "FLOPs")):
            if key in d:
                facts.append(f"{what} = {d[key] or 'no polynomial in the sizes of the data'}")
        if "base" in d:
            facts.append(f"base {d['base']}, {d['steps']} steps")
        if "contraction" in d:
            facts.append(f"{certified(d)}, for weights within their bounds")
        for name, program in d.get("programs", {}).items():
            if program["exactness"] != "exact":
                facts.append(f"`{name}`: its log-density is {SAID[program['exactness']]}")
        if "norm" in d:
            facts.extend(norm_facts(d["norm"]))
        if d["kind"] == "solver":
            facts.extend(f"{k} {v}" for k, v in d.items() if k.startswith("order("))
        if d["kind"] == "solver" and "order" in d:
            facts.append(f"order {d['order']}" + (f", {VALID[d['valid']]}" if d.get("valid") in VALID else ""))
        if d["kind"] == "path":
            facts.extend(path_facts(d))
        lines.extend(f"  {f}" for f in facts)
        if "programs" in d:
            rows = [
                [n, ", ".join(f"{k}: {t}" for k, t in p["inputs"].items()), ", ".join(p["outputs"]), f"{p['flops']:,}"]
                for n, p in d["programs"].items()
            ]
            lines += ["", table(["program", "takes", "gives", "FLOPs (no log-dets, derivatives)"], rows, numbers=(3,))]
        if d.get("chain"):
            rows = [
                [r["step"] if len(r["step"]) < 60 else r["step"][:57] + "...", f"x{r['count']}" if r["count"] > 1 else "", r["shape"],
                 r["inverse"], r["log_det"], f"{r['parameters']:,}", f"{r['flops']:,}"]
                for r in d["chain"]
            ]  # fmt: skip
            lines.append("")
            lines.append(
                table(["step", "", "shape", "inverse", "log-det", "parameters", "FLOPs"], rows, numbers=(5, 6))
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


SAID = {
    "unbiased": "an unbiased estimate", "lower bound": "a lower bound", "upper bound": "an upper bound", "biased": "a biased estimate",
    "ratio": "right up to a constant",
}  # fmt: skip
CHANGES = {
    ("scale", "all"): "scaling the input, or the weights before it", ("scale", "sample"): "scaling a sample",
    ("scale", "channel"): "scaling a channel, or one weight vector", ("shift", "all"): "shifting the input",
    ("shift", "sample"): "shifting a sample, or all weight vectors alike", ("shift", "channel"): "shifting a channel, or the data",
}  # fmt: skip


VALID = {
    "always": "probabilities for every step",
    "small_steps": "probabilities where h times the rate of leaving is at most 1",
}


def path_facts(d: Mapping[str, Any]) -> list[str]:
    """What follows from a path."""
    lines = []
    if d.get("drawn"):
        lines.append(f"each entry is x1's with probability {d['alpha']}, else x0's")
        lines.append(f"rate of jumps: ({d['pace']}) * (p - here), p the probabilities of the data")
    elif "alpha" in d:
        lines.append(f"signal {d['alpha']}, noise {d['sigma']}")
    elif "mean" in d:
        lines.append(f"given x1: mean {d['mean']}, scale {d['scale']}; noise, velocity and score follow from the data")
    if "velocity" in d:
        lines.append(f"velocity {d['velocity']}")
    if d.get("stays") == "convex":
        lines.append("stays in every convex domain that holds its ends")
    if d.get("assumes"):
        lines.append(f"required of its networks: {', '.join(d['assumes'])}")
    if d.get("endpoint"):
        lines.append(f"misses an end by {d['endpoint']:.3g}")
    return lines


def norm_facts(found: dict[str, Any]) -> list[str]:
    """What is shown of a norm, a line for each mode."""
    lines = []
    for mode in ("training", "inference"):
        words = {k: found[mode][k[0]][k[1]] for k in CHANGES}
        kept = [CHANGES[k] + ("" if w == "yes" else " (up to eps)") for k, w in words.items() if w != "not shown"]
        batch = "depends on the batch" if found["batch"][mode] else "each sample by itself"
        lines.append(
            f"{mode}: {batch}; unchanged by {'; '.join(kept) if kept else 'no scale or shift that could be shown'}"
        )
    lines.append(f"centred over {', '.join(found['centred'])}" if found["centred"] else "not centred")
    if found["modes_differ"]:
        lines.append("training and inference differ")
    folds = found["folds"]
    lines.append(
        "folds into the linear map beside it at inference"
        if folds == "yes"
        else f"does not fold: {folds.removeprefix('no: ')}"
    )
    return lines
