"""Exact last-layer pruning: where one token is pooled, the last layer computes only its row.

With CLS or last-token pooling, the last layer needs keys and values of all tokens, and nothing else
from them::

    x ──┬── keys, values ──────────────┐
        ├─pooled─ queries ───────── attention ── projection ─┐
        └─pooled──────────────────────────────────────────── + ── norm ── feed-forward ... ─> vector

So the choice of the pooled token, which ends the exported graph, moves back through every operator
that treats tokens one by one, up to values that are needed for all tokens. It is moved in place:
no operator is added but for the choice, and ``restore_last_layer`` moves it to the end again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from m2dexport.graph.edit import constant, only_user, producer
from m2dexport.graph.rows import Rows, row_inputs

#: What a value is called of which only the pooled token's row is taken: ``x`` becomes ``x.pooled``.
_POOLED = ".pooled"
#: The token axis of such a value; its size is 1.
_ONE = "pooled_token"
_INDEX = "pooled_token.index"


@dataclass(frozen=True)
class _Pooling:
    """How an exported graph takes one token: ``Squeeze(GatherElements(state, index))``."""

    graph: ir.Graph
    gather: ir.Node
    state: ir.Value  # (batch, sequence, width)
    index: ir.Value  # int64 (batch,)


@dataclass
class _Plan:
    """Which values are needed for the pooled token only."""

    rows: dict[ir.Value, int] = field(default_factory=dict)  # value -> its token axis, from the end
    nodes: dict[ir.Node, Rows] = field(default_factory=dict)  # that compute nothing else
    stops: dict[ir.Value, int] = field(default_factory=dict)  # those of which a row is taken


def prune_last_layer(model: ir.Model) -> int:
    """Let the last layer compute the pooled token alone, where just one is pooled, in place.

    Args:
        model: a graph of one output, before or after fusing and quantizing.

    Returns:
        How many operators compute only that token now. 0: the graph is as it was, since it pools
        other tokens, too, or has several outputs.
    """
    graph = model.graph
    pooling = _pooling(graph) if len(graph.outputs) == 1 else None
    plan = _plan(pooling) if pooling is not None else None
    if pooling is None or plan is None:
        return 0
    chosen = _rows_of(plan.stops, pooling)
    for node, rows in plan.nodes.items():
        for place, value in enumerate(node.inputs):
            if value in chosen and value in rows:
                node.replace_input_with(place, chosen[value])
        if node.op_type == "Reshape":
            _reshape_to_one(graph, node, plan.rows[node.outputs[0]])
        for output in node.outputs:
            if output in plan.rows and output.shape is not None:
                output.shape = _with_one_token(output.shape, plan.rows[output])
    pooling.index.name = _INDEX
    pooling.gather.outputs[0].replace_all_uses_with(pooling.state)
    RemoveUnusedNodesPass()(model)
    graph.sort()
    return len(plan.nodes)


def restore_last_layer(model: ir.Model) -> None:
    """Let the last layer compute all tokens again, in place: undo ``prune_last_layer``."""
    graph = model.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    index = values.get(_INDEX)
    if index is None:
        return
    end = next(node for node in graph if node.op_type == "Squeeze" and _is_one_token(node))
    for node in graph:
        changed = producer(node.inputs[1], "Where") if node.op_type == "Reshape" else None
        if changed is not None and changed.inputs[1] is graph.initializers.get(_ONE):
            node.replace_input_with(1, changed.inputs[2])
    sequence: ir.SymbolicDim | int | None = None
    for name, value in values.items():
        if name.endswith(_POOLED):
            whole = values[name.removesuffix(_POOLED)]
            sequence = sequence or _replaced_size(whole.shape, value.shape)
            value.replace_all_uses_with(whole)
    for value in values.values():
        if value.shape is not None:
            value.shape = ir.Shape([sequence if _is_one(dim) else dim for dim in value.shape])
    state = end.inputs[0]
    assert state is not None and state.shape is not None
    axes, sizes = np.array([1, 2]), np.array([1, 1, state.shape[2]])
    tape = Tape(graph)
    place = tape.op("Unsqueeze", [index, constant(graph, f"{_INDEX}.axes", axes)])
    wide = tape.op("Expand", [place, constant(graph, f"{_INDEX}.sizes", sizes)])
    end.replace_input_with(0, tape.op("GatherElements", [state, wide], {"axis": 1}))
    RemoveUnusedNodesPass()(model)
    graph.sort()


def _pooling(graph: ir.Graph) -> _Pooling | None:
    """Find where a graph takes one token of each text, if that is how it pools."""
    for gather in graph:
        if gather.op_type != "GatherElements" or only_user(gather.outputs[0], "Squeeze") is None:
            continue
        expand = producer(gather.inputs[1], "Expand")
        place = producer(expand.inputs[0], "Unsqueeze") if expand else None
        state, index = gather.inputs[0], place.inputs[0] if place else None
        if state is not None and index is not None and producer(index, "ArgMax"):
            return _Pooling(graph, gather, state, index) if len(state.shape or ()) == 3 else None
    return None


def _plan(pooling: _Pooling) -> _Plan | None:
    """Return what can be computed for one token only; None: nothing can.

    A row cannot be taken of some values, such as those whose first axis is heads times texts. What
    would need that is computed for all tokens.
    """
    barred: set[ir.Node] = set()
    while True:
        plan = _marked(pooling, barred)
        if pooling.state in plan.stops:
            return None
        impossible = [value for value in plan.stops if not _has_rows(value, pooling)]
        if not impossible:
            return plan
        users = {node for value in impossible for node in value.consumers()}
        barred |= users.intersection(plan.nodes)


def _marked(pooling: _Pooling, barred: set[ir.Node]) -> _Plan:
    """Go through the nodes from the last to the first: users come before what they use."""
    plan = _Plan()
    whole = set(pooling.graph.outputs)  # values that are needed for all tokens
    for node in reversed(pooling.graph):
        if node is pooling.gather:
            plan.rows[pooling.state] = -2
            whole.add(pooling.index)
            continue
        wanted = {value: plan.rows[value] for value in node.outputs if value in plan.rows}
        used_whole = not whole.isdisjoint(node.outputs)
        inputs = None
        if len(set(wanted.values())) == 1 and node not in barred and not used_whole:
            inputs = row_inputs(node, next(iter(wanted.values())))
        if inputs is not None and all(plan.rows.get(v, a) == a for v, a in inputs.items()):
            plan.nodes[node] = inputs
            plan.rows |= inputs
            whole.update(v for v in node.inputs if v is not None and v not in inputs)
        elif wanted or used_whole:
            plan.stops |= wanted
            whole.update(value for value in node.inputs if value is not None)
    return plan


def _has_rows(value: ir.Value, pooling: _Pooling) -> bool:
    """Say whether the rows of a value are found by text and token."""
    assert pooling.state.shape is not None
    shape = value.shape
    return shape is not None and len(shape) > 2 and shape[0] in (pooling.state.shape[0], 1)


def _rows_of(values: Mapping[ir.Value, int], pooling: _Pooling) -> dict[ir.Value, ir.Value]:
    """Return each value's row of each text's pooled token; the token axis stays, of size 1.

    Args:
        values: value -> its axis of tokens, from the end. Its first axis is the batch, or of size 1
            where all texts share it.
        pooling: which token is pooled.
    """
    graph, index, state = pooling.graph, pooling.index, pooling.state.shape
    tape, chosen = Tape(graph), {}
    column = tape.op("Unsqueeze", [index, constant(graph, f"{_INDEX}.axis1", np.array([1]))])
    for value, axis in values.items():
        assert value.shape is not None and state is not None
        rank = len(value.shape)
        place = rank + axis
        if value.shape[0] == 1:
            swapped = list(range(rank))
            swapped[0], swapped[place] = place, 0
            rows = tape.op("Gather", [value, index], {"axis": place})  # batch where tokens were
            row = tape.op("Transpose", [rows], {"perm": swapped})
        else:
            order = [0, place, *(other for other in range(1, rank) if other != place)]
            first = value if place == 1 else tape.op("Transpose", [value], {"perm": order})
            rows = tape.op("GatherND", [first, column], {"batch_dims": 1})
            kept = constant(graph, f"{_INDEX}.axis{place}", np.array([place]))
            row = tape.op("Unsqueeze", [rows, kept])
        row.name, row.type = f"{value.name}{_POOLED}", value.type
        row.shape = ir.Shape([state[0], *_with_one_token(value.shape, axis)[1:]])
        chosen[value] = row
    return chosen


def _reshape_to_one(graph: ir.Graph, node: ir.Node, axis: int) -> None:
    """Let a Reshape make a token axis of size 1, unless it copies that size from its input."""
    target, shape = node.inputs[1], node.outputs[0].shape
    assert target is not None and shape is not None
    rank, place = len(shape), len(shape) + axis
    sizes = target.const_value.numpy() if target.const_value is not None else None
    if sizes is not None and sizes[place] == 0 and not node.attributes.get_int("allowzero", 0):
        return
    is_token = constant(graph, f"{_ONE}.axis{place}of{rank}", np.arange(rank) == place)
    one = constant(graph, _ONE, np.array([1]))
    node.replace_input_with(1, Tape(graph).op("Where", [is_token, one, target]))


def _with_one_token(shape: ir.Shape, axis: int) -> ir.Shape:
    sizes = list(shape)
    sizes[axis] = ir.SymbolicDim(_ONE)
    return ir.Shape(sizes)


def _is_one(size: ir.SymbolicDim | int) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value == _ONE


def _is_one_token(node: ir.Node) -> bool:
    x = node.inputs[0]
    return x is not None and x.shape is not None and len(x.shape) == 3 and _is_one(x.shape[1])


def _replaced_size(whole: ir.Shape | None, row: ir.Shape | None) -> ir.SymbolicDim | int | None:
    """Return how many tokens a value has, from its shape and that of its pooled row."""
    pairs = zip(whole or (), row or (), strict=False)
    return next((size for size, one in pairs if _is_one(one)), None)
