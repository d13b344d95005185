"""`flowlang export`: ONNX models of a flow."""

from __future__ import annotations

from typing import Any

import click

from flowlang import limits
from flowlang.cli.common import flow_option, spec_options


@click.command()
@click.argument("spec")
@spec_options
@flow_option
@click.option(
    "-w", "--weights", type=click.Path(), help="A run's folder, or a safetensors file; fresh weights by default."
)
@click.option(
    "--program", "programs", multiple=True, metavar="NAME",
    help="log_prob, forward, inverse, sample or sample_and_log_prob, train of a net, or a model's program; may be repeated. [default: log_prob, sample; of a model all but losses]",
)  # fmt: skip
@click.option("-o", "--out", default="flow.onnx", show_default=True, type=click.Path(dir_okay=False),
              help="File for one program; several go to FILE.PROGRAM.onnx.")  # fmt: skip
@click.option("--opset", type=int, help="ONNX opset, 18 to 25. [default: 18]")
@click.option("--seed", type=int, help="Draw noise inside, by a random op with this seed; it is an input otherwise.")
@click.option("--unroll", type=click.IntRange(0), default=limits.WRITTEN_STAGES, show_default=True, metavar="STAGES",
              help="Write out autoregressive loops of at most so many stages: faster, more nodes; 0 keeps all loops.")  # fmt: skip
@click.option(
    "--dynamic", metavar="AXES",
    help="Axes of any size, as H,W; `none` fixes all. [default: those whose size the spec leaves open]",
)  # fmt: skip
@click.option(
    "--check/--no-check", default=True, help="Run what was written in onnxruntime beside PyTorch. [default: check]"
)
@click.option("--double", is_flag=True, help="float64 instead of float32.")
def export(
    spec: str, sets: tuple[str, ...], flow: str | None, weights: str | None, programs: tuple[str, ...], out: str,
    opset: int | None, seed: int | None, unroll: int, dynamic: str | None, check: bool, double: bool,
) -> None:  # fmt: skip
    """Write the flow's programs as ONNX models that need no PyTorch."""
    from flowlang.api import compare_onnx, compile_from, export_onnx
    from flowlang.backends.onnx.files import Written, check_opset, need_onnx
    from flowlang.cli.common import load_ok
    from flowlang.cli.tables import certified

    need_onnx()
    check_opset(opset)
    if weights is None:
        made: Any = compile_from(load_ok(spec, sets, False, sized=True, build=flow), flow, seed=0)
        module = made
    else:
        from flowlang.cli.training import trained_flow

        made, _ = trained_flow(spec, sets, weights)
        module = made
    if double:
        module.double()
    axes = (
        None if dynamic is None else [] if dynamic == "none" else [a.strip() for a in dynamic.split(",") if a.strip()]
    )
    files = export_onnx(made, out, programs or None, opset=opset, seed=seed, dynamic=axes, unroll=unroll)
    compared = compare_onnx(made, files) if check else {}
    for program, file in files.items():
        written = Written(file)
        nodes, loops = written.nodes
        size = f"{nodes} nodes" + (f", {loops} of them loops" if loops > 1 else ", one a loop" if loops else "")
        click.echo(f"{file}: {program}, {size}, {file.stat().st_size / 1000:.0f} kB")
        if (beside := written.weights) is not None:
            click.echo(f"  its weights stand in {beside}, {beside.stat().st_size / 1e6:.0f} MB: keep both together")
        click.echo(f"  {written.interface}")
        if stages := written.metadata.get("written_out"):
            click.echo(
                f"  loops of up to {stages} stages are written out, which is faster; --unroll 0 keeps them, and the size, as they are for any number of coordinates"
            )
        if program in compared:
            error, reason = compared[program].error, compared[program].reason
            click.echo(
                f"  not compared with PyTorch: {reason}"
                if error is None
                else f"  in onnxruntime within {error:.1e} of PyTorch"
            )
    if written.certificate:  # of the weights, so the same in all files
        click.echo(certified(written.certificate))
    if weights is None:
        click.echo("fresh weights: give trained ones with --weights")
