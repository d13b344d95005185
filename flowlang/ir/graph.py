"""The typed graph: a networkx multi-digraph whose nodes are ops applied to ordered inputs.

Node ids grow in the order of creation and inputs exist before their users, so the order of ids is
a topological order. A `Region` is a graph with inputs and outputs: one distinct instantiation of a
declaration. Equal instances share one region, and nodes refer to it by `call` and `repeat`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flowlang.ir.types import TensorType, TupleType, Type
from flowlang.source import Span

if TYPE_CHECKING:
    import networkx as nx

    from flowlang.ir.distributions import Distribution
    from flowlang.ir.taps import Taps


@dataclass(frozen=True, slots=True)
class Node:
    id: int
    op: str
    inputs: tuple[int, ...]
    type: Type
    attrs: Mapping[str, Any] = field(default_factory=dict)
    span: Span | None = None
    label: str | None = None  # the name it has in the spec
    batched: bool = True  # varies from sample to sample

    def inputs_in(self, training: bool) -> tuple[int, ...]:
        """The operands that count in a mode: a choice by the mode has those of training first, then as many others."""
        half = len(self.inputs) // 2
        return self.inputs if self.op != "choose" else self.inputs[:half] if training else self.inputs[half:]

    @property
    def tensor(self) -> TensorType:
        assert isinstance(self.type, TensorType), f"{self.op} has a tuple type"
        return self.type


class Graph:
    """Append-only; passes build new graphs."""

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}
        self._users: dict[int, list[tuple[int, int]]] = {}  # node -> (user, slot), users in the order of creation

    def add(
        self,
        op: str,
        inputs: tuple[int, ...],
        type: Type,
        attrs: Mapping[str, Any] | None = None,
        *,
        span: Span | None = None,
        label: str | None = None,
        batched: bool | None = None,
    ) -> Node:
        if batched is None:
            batched = any(self._nodes[i].batched for i in inputs)
        node = Node(len(self._nodes), op, inputs, type, dict(attrs or {}), span, label, batched)
        self._nodes[node.id] = node
        for slot, source in enumerate(inputs):
            self._users.setdefault(source, []).append((node.id, slot))
        return node

    def again(self, node: Node, inputs: Iterable[int]) -> int:
        """The node of another graph, with its type as it is, on other inputs."""
        made = self.add(
            node.op, tuple(inputs), node.type, node.attrs, span=node.span, label=node.label, batched=node.batched
        )
        return made.id

    def relabel(self, id: int, label: str) -> None:
        """Gives a node the name under which the spec binds it (the first name stays)."""
        old = self._nodes[id]
        if old.label is None:
            self._nodes[id] = Node(old.id, old.op, old.inputs, old.type, old.attrs, old.span, label, old.batched)

    def declare(self, id: int, domain: Any) -> None:
        """Gives an input whose declaration has no domain the one that was found for it."""
        old = self._nodes[id]
        attrs = {**old.attrs, "domain": domain}
        self._nodes[id] = Node(old.id, old.op, old.inputs, old.type, attrs, old.span, old.label, old.batched)

    @property
    def nx(self) -> nx.MultiDiGraph[int]:
        """The graph for networkx's algorithms: node data `node`, the key of an edge is the operand's slot.

        Made when asked for: importing networkx takes longer than checking most specs.
        """
        import networkx

        graph: nx.MultiDiGraph[int] = networkx.MultiDiGraph()
        for node in self:
            graph.add_node(node.id, node=node)
            graph.add_edges_from((source, node.id, slot) for slot, source in enumerate(node.inputs))
        return graph

    def annotate(self, id: int, **attrs: Any) -> int:
        """Adds attributes to a node that say what is known of it."""
        old = self._nodes[id]
        self._nodes[id] = replace(old, attrs={**old.attrs, **attrs})
        return id

    def __getitem__(self, id: int) -> Node:
        return self._nodes[id]

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def operands(self, node: Node) -> list[Node]:
        return [self._nodes[i] for i in node.inputs]

    def users(self, id: int) -> list[tuple[Node, int]]:
        """(user, slot) pairs in the order of creation."""
        return [(self._nodes[user], slot) for user, slot in self._users.get(id, ())]

    def descendants(self, starts: Iterable[int]) -> set[int]:
        """All nodes that need one of the starts, the starts included."""
        seen = set(starts)
        stack = list(seen)
        while stack:
            for v, _ in self._users.get(stack.pop(), ()):
                if v not in seen:
                    seen.add(v)
                    stack.append(v)
        return seen

    def pending(self, root: int, known: Container[int]) -> list[int]:
        """What the root needs and is not known yet, operands first; all that a known node needs is known too."""
        seen: set[int] = set()
        stack = [root]
        while stack:
            i = stack.pop()
            if i not in seen and i not in known:
                seen.add(i)
                stack.extend(self._nodes[i].inputs)
        return sorted(seen)

    def reachable(self, roots: list[int], inputs_of: Callable[[Node], Sequence[int]] | None = None) -> set[int]:
        """All nodes that the roots need, roots included; `inputs_of` tells which operands of a node count."""
        seen: set[int] = set()
        stack = list(roots)
        while stack:
            i = stack.pop()
            if i not in seen:
                seen.add(i)
                stack.extend(self._nodes[i].inputs if inputs_of is None else inputs_of(self._nodes[i]))
        return seen


@dataclass(frozen=True, slots=True)
class Emission:
    """A value that leaves a bijector under its own distribution: log p(value | arguments).

    `distribution` is None where a called region scores it itself.
    """

    value: int
    distribution: Distribution | None
    arguments: tuple[tuple[str, int], ...]
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """A draw inside a bijector: an input node `value` with its distribution; −log q is scored."""

    value: int
    distribution: Distribution
    arguments: tuple[tuple[str, int], ...]
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class BaseDistribution:
    """The base of a flow: a distribution with its arguments as graph values."""

    distribution: Distribution
    arguments: tuple[tuple[str, int], ...]
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """A state that a forward run in training replaces.

    `state` is read before it is written: `new` may use it. Where `live` is given it stands for the
    state's value during that run (a batch statistic whose running mean serves inference); every other
    program reads the state. The analyses see the state alone, which is constant in the map's inputs.
    """

    state: int
    new: int
    live: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """A parameter that begins at a statistic of the first batch: param := value, in the order of the text."""

    param: int
    value: int


@dataclass(frozen=True, slots=True)
class Follow:
    """A child that is not trained: after every `every` steps it is decay · itself + (1 - decay) · `source`; 0: at the start alone."""

    source: str
    decay: float
    every: int


@dataclass(eq=False)
class Child:
    """A sub-instance of a region.

    `shared` False: the region makes and owns it. True: its caller hands it in (a network argument
    that has a name outside); the region only refers to it. `bindings` say, for each shared child of
    `region`, which child of THIS region is handed to it.
    """

    name: str
    region: Region
    shared: bool = False
    bindings: dict[str, str] = field(default_factory=dict)
    count: int = 1  # more than one: a list of equal copies, run by a `repeat` node
    follows: Follow | None = None  # an average or a copy of another child


@dataclass(frozen=True, slots=True)
class Rule:
    """A hand-given rule (`def inverse`, `def log_det`): its inputs and outputs in the region's graph."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    exactness: str = "exact"  # exact | estimate | bound | ratio
    span: Span | None = None
    updates: tuple[Update, ...] = ()  # states that a backward pass replaces


@dataclass(eq=False)
class Step:
    """One step of a chain as the spec lists it: the chain value before and after it, and its text."""

    label: str
    before: int
    after: int
    count: int = 1  # of a `repeat`
    inner: Region | None = None
    span: Span | None = None


@dataclass(eq=False)
class Region:
    """A graph with inputs and outputs; one module class in generated code."""

    name: str
    kind: str  # bijector | net | norm | flow | chain | ...
    graph: Graph
    inputs: list[int] = field(default_factory=list)  # mapped tensors, in order (op `input`, role "map")
    context: list[int] = field(default_factory=list)  # op `input`, role "context"
    outputs: list[int] = field(default_factory=list)
    emissions: list[Emission] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    children: dict[str, Child] = field(default_factory=dict)
    programs: dict[str, Region] = field(default_factory=dict)  # of a model: regions with the model's own children
    data: dict[str, tuple[str, TensorType]] = field(
        default_factory=dict
    )  # of a model: name -> (`data` or `given`, type)
    steps: list[Step] = field(default_factory=list)  # chains only
    taps: list[Taps] = field(default_factory=list)  # of its programs that read or replace inner values, by their number
    span: Span | None = None
    doc: str | None = None
    rules: dict[str, Rule] = field(default_factory=dict)  # "inverse", "log_det"
    signature: str = ""  # the instantiation in the spec's words, for comments
    base: BaseDistribution | None = None  # flows
    broken: bool = False  # a diagnostic was reported while it was made
    library: bool = False

    def input_types(self) -> list[TensorType]:
        return [self.graph[i].tensor for i in self.inputs]

    def output_types(self) -> list[TensorType]:
        return [self.graph[i].tensor for i in self.outputs]

    @property
    def has_starts(self) -> bool:
        """Whether a parameter here or below begins at a statistic of the first batch."""
        return any(r.starts for r in self.walk())

    @property
    def is_random(self) -> bool:
        """Whether this region, or one below it, draws or scores an emission."""
        return any(r.draws or any(e.distribution is not None for e in r.emissions) for r in self.walk())

    @property
    def has_map_rules(self) -> bool:
        """Whether an inverse or a log-det is given by hand; a backward pass is what the author wants, right or not."""
        return any(name in self.rules for name in ("inverse", "log_det"))

    def walk(self) -> Iterator[Region]:
        """This region and every distinct one below it, children first."""
        seen: set[int] = set()

        def visit(region: Region) -> Iterator[Region]:
            if id(region) in seen:
                return
            seen.add(id(region))
            for child in region.children.values():
                yield from visit(child.region)
            yield region

        yield from visit(self)


def result_batched(graph: Graph, node: Node, index: int) -> bool:
    """Whether one of several results varies with the sample."""
    if node.op == "choose":
        return any(graph[i].batched for i in node.inputs[index :: len(node.inputs) // 2])
    if node.op == "scan" and node.attrs["axis"] == "B":  # what the last sample leaves is one for the batch
        return index >= int(node.attrs["carried"])
    return node.batched


def result_types(type: Type) -> tuple[TensorType, ...]:
    return type.items if isinstance(type, TupleType) else (type,)
