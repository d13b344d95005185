"""From a graph under construction to a checked `ModelProto`: pruning, fusing, names, initializers."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from flowlang.backends.onnx.folding import fold_affine
from flowlang.backends.onnx.graph import BOOL, INT, REAL, Body, Builder, Node, Value, bodies, every_node, use_counts
from flowlang.backends.onnx.outline import DOMAIN, Function, outline
from flowlang.backends.onnx.products import fuse_products
from flowlang.backends.onnx.turns import absorb_turns
from onnx import TensorProto, helper, numpy_helper

LOWEST_OPSET, DEFAULT_OPSET = 18, 18
HIGHEST_OPSET = 25
LARGEST = 2**31 - 2**24  # bytes of weights that fit in one protobuf message, beside the graph


def prune(body: Body) -> None:
    """Drops nodes that no result needs."""

    def keep(body: Body, used: set[int]) -> None:
        kept: list[Node] = []
        for node in reversed(body.nodes):
            if not any(id(o) in used for o in node.outputs):
                continue
            for inner in node.bodies.values():
                used.update(id(o) for o in inner.outputs)
                keep(inner, used)
            used.update(id(i) for i in node.inputs if i is not None)
            kept.append(node)
        body.nodes = kept[::-1]

    keep(body, {id(o) for o in body.outputs})


def fuse(body: Body, dtype: str) -> None:
    """Fewer nodes with the same meaning."""
    uses = use_counts(body)
    for part in bodies(body):
        fold_affine(part, uses)
        fuse_linear(part, uses)
        fuse_slices(part)
        absorb_turns(part, body)
    uses = use_counts(body)
    for part in bodies(body):
        fuse_sums(part, uses)
        fuse_scales(part, uses)
    uses = use_counts(body)
    for part in bodies(body):
        fuse_products(part, uses, dtype)


def fuse_linear(part: Body, uses: Counter[int]) -> None:
    """`MatMul` and a bias become `Gemm` where x is a matrix."""
    gone: set[int] = set()
    here = {id(n) for n in part.nodes}
    for node in part.nodes:
        if node.op != "Add":
            continue
        product = next((v for v in node.inputs if v is not None and v.node is not None and v.node.op == "MatMul"), None)
        bias = next((v for v in node.inputs if v is not product), None)
        if product is None or product.node is None or bias is None or uses[id(product)] != 1:
            continue
        matrix = product.node.inputs[1]
        if matrix is None or matrix.array is None or product.rank != 2 or bias.array is None or bias.rank > 1:
            continue
        if id(product.node) not in here or (bias.rank == 1 and bias.shape[0] not in (1, product.shape[1])):
            continue
        gone.add(id(product.node))
        node.op, node.inputs = "Gemm", [*product.node.inputs, bias]
        if node.hint in ("Add", "add"):
            node.hint = "linear"
    part.nodes = [n for n in part.nodes if id(n) not in gone]


def fuse_sums(part: Body, uses: Counter[int]) -> None:
    """A chain of additions of one number for each sample becomes one `Sum`; sums of alike values one sum of a `Sum`."""
    made: list[Node] = []
    gone: set[int] = set()
    here = {id(n) for n in part.nodes}
    for node in part.nodes:
        if node.op != "Add" or node.outputs[0].rank != 1:
            made.append(node)
            continue
        terms: list[Value] = []
        for v in node.inputs:
            assert v is not None
            inner = v.node
            if (
                inner is not None
                and inner.op in ("Add", "Sum")
                and id(inner) in here
                and uses[id(v)] == 1
                and v.rank == 1
            ):
                gone.add(id(inner))
                terms += [t for t in inner.inputs if t is not None]
            else:
                terms.append(v)
        if len(terms) > 2:
            node.op, node.inputs = "Sum", list(terms)
        made.append(node)
    part.nodes = [n for n in made if id(n) not in gone]
    for node in [n for n in part.nodes if n.op == "Sum"]:
        groups: dict[tuple[object, ...], list[Value]] = {}
        for v in node.inputs:
            assert v is not None
            inner = v.node
            if inner is None or inner.op != "ReduceSum" or id(inner) not in here or uses[id(v)] != 1:
                continue
            source, axes = inner.inputs
            assert source is not None
            assert axes is not None
            if axes.array is not None and not inner.attrs.get("keepdims"):
                groups.setdefault((source.shape, tuple(axes.array.tolist())), []).append(v)
        for values in groups.values():
            if len(values) < 3:
                continue
            last = values[-1]
            inners = [v.node for v in values if v.node is not None]
            first = inners[-1]
            together = Node("Sum", [n.inputs[0] for n in inners], [], {}, node.scope, "log_slopes")
            together.outputs = [Value(inners[0].inputs[0].shape, level=last.level, node=together)]  # type: ignore[union-attr]
            first.inputs = [together.outputs[0], first.inputs[1]]
            first.scope = node.scope
            node.inputs = [v for v in node.inputs if v is last or v not in values]
            drop = {id(n) for n in inners}
            at = part.nodes.index(node)
            part.nodes = [*[n for n in part.nodes[:at] if id(n) not in drop], together, first, *part.nodes[at:]]
        if len(node.inputs) == 2:
            node.op = "Add"
        elif len(node.inputs) == 1:  # all terms are in one sum, which gives the result itself
            only = node.inputs[0]
            assert only is not None
            assert only.node is not None
            only.node.outputs, node.outputs[0].node = node.outputs, only.node
            part.nodes.remove(node)


def fuse_slices(part: Body) -> None:
    """Slices that partition an axis become one `Split`."""
    found: dict[tuple[int, int], list[Node]] = {}
    for node in part.nodes:
        if node.op == "Slice" and len(node.inputs) == 4:
            axes = node.inputs[3]
            fixed = all(v is not None and v.array is not None for v in node.inputs[1:3])
            if fixed and axes is not None and axes.array is not None and axes.array.size == 1:
                found.setdefault((id(node.inputs[0]), int(axes.array[0])), []).append(node)
    for (_, axis), nodes in found.items():
        source = nodes[0].inputs[0]
        assert source is not None
        ranges = sorted((int(n.inputs[1].array[0]), int(n.inputs[2].array[0]), k) for k, n in enumerate(nodes))  # type: ignore[union-attr, index]
        ends = [0, *(stop for _, stop, _ in ranges)]
        if len(nodes) < 2 or [s for s, _, _ in ranges] != ends[:-1] or ends[-1] != source.shape[axis]:
            continue
        sizes = np.asarray([stop - start for start, stop, _ in ranges], dtype=np.int64)
        split = Node("Split", [source, Value((len(sizes),), INT, sizes)], [], {"axis": axis}, nodes[0].scope, "parts")
        split.outputs = [nodes[k].outputs[0] for _, _, k in ranges]
        for v, (_, _, k) in zip(split.outputs, ranges, strict=True):
            v.name = v.name or f"?{nodes[k].scope}/{nodes[k].hint}"
            v.node = split
        drop = {id(n) for n in nodes}
        at = part.nodes.index(nodes[0])
        part.nodes = [*part.nodes[:at], split, *(n for n in part.nodes[at:] if id(n) not in drop)]


def fuse_scales(part: Body, uses: Counter[int]) -> None:
    """A number that multiplies one part of a linear layer's results goes into the layer's weights."""
    renewed: dict[int, Value] = {}
    for node in part.nodes:
        node.inputs = [renewed.get(id(v), v) if v is not None else None for v in node.inputs]
        if node.op != "Mul":
            continue
        number = next((v for v in node.inputs if v is not None and v.array is not None and v.array.ndim == 0), None)
        v = next((v for v in node.inputs if v is not number), None)
        if number is None or v is None or v.node is None or v.node.op != "Split" or uses[id(v)] != 1:
            continue
        split, source = v.node, v.node.inputs[0]
        assert source is not None
        layer = source.node
        whole = layer is not None and layer.op == "Gemm" and uses[id(source)] == 1
        if layer is None or not whole or split.attrs["axis"] not in (-1, source.rank - 1):
            continue
        x, weight, bias = layer.inputs
        if weight is None or bias is None or weight.array is None or bias.array is None:
            continue
        scale = np.ones(weight.shape[1])  # type: ignore[arg-type]
        sizes = [o.shape[-1] for o in split.outputs]
        place = split.outputs.index(v)
        first = sum(n for n in sizes[:place] if isinstance(n, int))
        scale[first : first + sizes[place]] = number.array  # type: ignore[operator]
        layer.inputs = [
            x, Value(weight.shape, array=weight.array * scale, name=weight.name),
            Value(weight.shape[1:], array=np.broadcast_to(bias.array, scale.shape) * scale, name=bias.name),
        ]  # fmt: skip
        renewed[id(node.outputs[0])] = v
        uses[id(v)] = uses[id(node.outputs[0])]
    if renewed:
        part.outputs = [renewed.get(id(v), v) for v in part.outputs]
        for inner in every_node(part):
            inner.inputs = [renewed.get(id(v), v) if v is not None else None for v in inner.inputs]
        for inner_body in bodies(part):
            inner_body.outputs = [renewed.get(id(v), v) for v in inner_body.outputs]
        part.nodes = [n for n in part.nodes if id(n.outputs[0]) not in renewed]


def clean(name: str) -> str:
    return re.sub(r"[^\w.\-/'²]+", "_", name) or "v"


class Writer:
    """Gives names and writes protos."""

    def __init__(self, g: Builder):
        self.g = g
        self.taken: Counter[str] = Counter()
        self.initializers: dict[tuple[Any, ...], str] = {}
        self.protos: list[TensorProto] = []
        self.local: dict[int, str] = {}  # names inside a function
        self.types = {REAL: TensorProto.DOUBLE if g.dtype == "float64" else TensorProto.FLOAT, INT: TensorProto.INT64,
                      BOOL: TensorProto.BOOL}  # fmt: skip

    def fresh(self, wanted: str) -> str:
        name = clean(wanted)
        self.taken[name] += 1
        if self.taken[name] == 1:
            return name
        return self.fresh(f"{name}_{self.taken[name]}")

    def write(self, body: Body, name: str) -> onnx.GraphProto:
        for v in body.inputs:
            self.taken[v.name] += 1
        for v in body.outputs:
            self.taken[v.name] += 1
        return self.graph(body, name)

    def graph(self, body: Body, name: str) -> onnx.GraphProto:
        for v in body.inputs:
            v.name = v.name or self.fresh(f"{name}/in")
        nodes = [self.node(n) for n in body.nodes]
        return helper.make_graph(
            nodes, name, [self.info(v) for v in body.inputs], [self.info(v) for v in body.outputs],
            value_info=[self.info(v) for n in body.nodes for v in n.outputs if v not in body.outputs],
        )  # fmt: skip

    def function(self, f: Function) -> onnx.FunctionProto:
        """A function's nodes with names of their own; constants that all calls share stand inside."""
        inner = Writer(self.g)
        for k, v in enumerate(f.inputs):
            v_name = f"in{k}"
            inner.taken[v_name] += 1
            inner.local[id(v)] = v_name
        nodes = [inner.node(n) for n in f.nodes]
        constants = [helper.make_node("Constant", [], [p.name], name=p.name, value=p) for p in inner.protos]
        return helper.make_function(
            DOMAIN, f.name, [inner.local[id(v)] for v in f.inputs], [inner.local[id(v)] for v in f.outputs],
            [*constants, *nodes], [helper.make_opsetid("", self.g.opset)],
        )  # fmt: skip

    def info(self, v: Value) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(v.name, self.types[v.kind], list(v.shape))

    def node(self, n: Node) -> onnx.NodeProto:
        base = self.fresh(n.hint if self.local or not n.scope else f"{n.scope}/{n.hint}")
        inside = bool(self.local)
        for k, v in enumerate(n.outputs):
            if inside:
                self.local[id(v)] = base if k == 0 else self.fresh(f"{base}.{k}")
            elif v.name.startswith("?"):  # a name that is wanted, if it is free
                v.name = self.fresh(v.name[1:].lstrip("/"))
            elif not v.name:
                v.name = base if k == 0 else self.fresh(f"{base}.{k}")
        inputs = [self.operand(v, base, k) for k, v in enumerate(n.inputs)]
        while inputs and not inputs[-1]:
            inputs.pop()
        attrs = dict(n.attrs)
        if n.op == "Cast":
            attrs["to"] = self.types[attrs["to"]]
        attrs = {k: list(v) if isinstance(v, tuple) else v for k, v in attrs.items()}
        for k, inner in n.bodies.items():
            attrs[k] = self.graph(inner, f"{base}.body")
        outputs = [self.local[id(v)] if inside else v.name for v in n.outputs]
        return helper.make_node(n.op, inputs, outputs, name=base, domain=n.domain or None, **attrs)

    def operand(self, v: Value | None, user: str, slot: int) -> str:
        if v is None:
            return ""
        if id(v) in self.local:
            return self.local[id(v)]
        if v.array is None:
            assert v.name, "a value is used before it is made"
            return v.name
        with np.errstate(over="ignore", under="ignore"):  # whole in one pass, also where it was transposed
            array = np.ascontiguousarray(v.array, self.g.dtype if v.kind == REAL else None).reshape(v.array.shape)
        # Large ones are told apart by a digest, so that none is kept twice.
        own = array.tobytes() if array.nbytes <= OWN_FILE else hashlib.blake2b(array.data, digest_size=32).digest()
        key = (v.kind, array.shape, own)
        if key not in self.initializers:
            name = self.fresh(v.name or f"{user}:{'ABCDEFGH'[slot % 8]}")
            self.initializers[key] = name
            self.protos.append(numpy_helper.from_array(array, name))
        return self.initializers[key]


def finish(
    g: Builder, name: str, outputs: Mapping[str, Value], metadata: Mapping[str, str], doc: str
) -> onnx.ModelProto:
    """The model of a built graph, checked with strict shape inference."""
    main = g.stack[0]
    assert len(g.stack) == 1
    for key, v in outputs.items():
        # An output has its own node, whatever else has the same value.
        made = g.multi("Identity", v, shapes=[v.shape], kind=v.kind, pure=False)[0]
        if v.node is not None and v.array is None and v.node in main.nodes and not v.name:
            main.nodes.pop()
            made = v
        made.name = key
        main.outputs.append(made)
    prune(main)
    fuse(main, g.dtype)
    functions = outline(main, use_counts(main))
    writer = Writer(g)
    graph = writer.write(main, name)
    graph.doc_string = doc
    opset = helper.make_opsetid("", g.opset)
    own = [helper.make_opsetid(DOMAIN, 1)] if functions else []
    model = helper.make_model(
        graph, opset_imports=[opset, *own], functions=[writer.function(f) for f in functions], producer_name="flowlang", producer_version=metadata.get("flowlang_version", ""),
        ir_version=helper.find_min_ir_version_for([opset]),
    )  # fmt: skip
    helper.set_model_props(model, dict(metadata))
    large: list[TensorProto] = []
    if weights_size(writer.protos) > CHECKED_WHOLE:  # checks copy the model several times: without what makes it large
        large = [w for w in writer.protos if len(w.raw_data) > OWN_FILE]
        writer.protos = [w for w in writer.protos if len(w.raw_data) <= OWN_FILE]
        model.graph.input.extend(helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in large)
    model.graph.initializer.extend(writer.protos)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    del model.graph.input[len(main.inputs) :]
    while large:  # one by one, so that none stands twice
        model.graph.initializer.append(large.pop(0))
    return model


CHECKED_WHOLE = 2**26  # bytes of weights up to which the checks see them
OWN_FILE = 1024  # bytes from which on a weight may stand in a file of its own


def weights_size(weights: Iterable[TensorProto]) -> int:
    return sum(len(w.raw_data) for w in weights)


def put_outside(model: onnx.ModelProto, location: str) -> Iterator[bytes]:
    """Takes the weights out of a model that is too large for one message, into a file beside it; gives what that holds."""
    place = 0
    for w in model.graph.initializer:
        raw = w.raw_data
        if len(raw) <= OWN_FILE:
            continue
        onnx.external_data_helper.set_external_data(w, location, offset=place, length=len(raw))
        place += len(raw)
        w.ClearField("raw_data")
        yield raw
