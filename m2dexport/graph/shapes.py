"""Exact rewrites of what a graph computes about shapes: what is known beforehand becomes constant.

Every rewrite changes a model in place and returns how many matches it replaced.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from m2dexport.graph.edit import array_of, constant, table_users

#: Operators that repeat or leave out values of their first input, and make no other.
_PICKS = frozenset(["Expand", "Gather", "GatherElements", "Identity", "Reshape", "Slice"])


def fix_reshapes(model: ir.Model) -> int:
    """Let every Reshape to a computed shape copy sizes from its input instead.

    A size that is at the same place before and after becomes 0, which copies it, and one other may
    be -1. Heads are split by ``[0, 0, heads, width]`` then, and merged by ``[0, 0, width]``.
    """
    fixed = 0
    for node in model.graph:
        target = node.inputs[1] if node.op_type == "Reshape" else None
        if target is None or target.const_value is not None:
            continue
        sizes = _copied_sizes(node)
        if sizes is not None:
            name = "shape." + "_".join(map(str, sizes))
            node.replace_input_with(1, constant(model.graph, name, np.array(sizes)))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
            fixed += 1
    return fixed


def look_up_once(model: ir.Model) -> int:
    """Look a row of a table up now, where all texts and tokens add the same one.

    So are token types, which are 0 for every token of a text that stands alone.
    """
    found = 0
    for table in list(model.graph.initializers.values()):
        for node in table_users(table):
            row = _only_index(node.inputs[1])
            users = node.outputs[0].consumers()
            if row is None or any(user.op_type != "Add" for user in users):
                continue
            name = f"{table.name}.row{row}"
            looked_up = constant(model.graph, name, array_of(table)[row])
            node.outputs[0].replace_all_uses_with(looked_up)
            found += 1
    return found


def _copied_sizes(node: ir.Node) -> list[int] | None:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None:
        return None
    before = [*x.shape, *[None] * len(y.shape)]
    sizes = [
        size if isinstance(size, int) else 0 if size == same else -1
        for size, same in zip(y.shape, before, strict=False)
    ]
    return sizes if sizes.count(-1) <= 1 else None


def _only_index(ids: ir.Value | None) -> int | None:
    """Return the one index that ids are made of, None where they differ or are not known."""
    node = ids.producer() if ids is not None else None
    if node is not None:
        return _only_index(node.inputs[0]) if node.op_type in _PICKS else None
    if ids is None or ids.const_value is None:
        return None
    different = np.unique(ids.const_value.numpy())
    return int(different[0]) if different.size == 1 else None
