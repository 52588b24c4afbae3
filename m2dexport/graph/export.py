"""torch -> ONNX: one graph whose outputs are the pooled vectors of every requested depth."""

from __future__ import annotations

import ast
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from transformers import AttentionInterface, masking_utils

from m2dexport.checkpoint.open import Checkpoint
from m2dexport.errors import CheckpointError, one_line
from m2dexport.graph.vector import depth_output
from m2dexport.reference.pooler import DepthPooler

#: onnxruntime 1.17 and everything newer loads opset 18 and IR version 8.
OPSET = 18
IR_VERSION = 8

_ATTENTION = "m2dexport_plain"
# transformers 4.57 does not make a bidirectional mask here: its encoders add their own.
_BIDIRECTIONAL = getattr(masking_utils, "bidirectional_mask_function", None)


def graph_from_checkpoint(checkpoint: Checkpoint, depths: Sequence[int] | None = None) -> ir.Model:
    """Export a checkpoint to an ONNX graph with one output per depth.

    Args:
        checkpoint: the checkpoint; its transformer runs in float32.
        depths: the depths to output, 1..N; all of them if None.

    Returns:
        A graph from int64 ``input_ids`` and ``attention_mask`` of (batch, sequence) to float32
        (batch, dim) outputs named by ``graph.depth_output``, neither cut to a dim nor normalised.

    Raises:
        CheckpointError: if torch cannot export the architecture.
    """
    depths = tuple(depths or range(1, checkpoint.layers + 1))
    module = DepthPooler(checkpoint, depths, attention=_ATTENTION)
    input_ids = torch.full((2, 7), min(5, checkpoint.vocab_size - 1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 4:] = 0
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet(), _ordered_sets(module):
            program = torch.onnx.export(
                module,
                (input_ids, attention_mask),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(dynamic, dynamic),
                input_names=["input_ids", "attention_mask"],
                output_names=[depth_output(depth) for depth in depths],
                verbose=False,
            )
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise CheckpointError(
            f"torch could not export the {checkpoint.model_type} architecture to ONNX: {reason}"
        ) from error
    assert program is not None
    model: ir.Model = program.model
    model.ir_version = IR_VERSION
    _name_weights(model.graph)
    return model


def _name_weights(graph: ir.Graph) -> None:
    """Name the weights that the exporter transposed (such as ``val_55``) after their modules."""
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) > 1:
            continue
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        modules = [scope for scope in scopes[:-1] if scope]
        if modules and f"{modules[-1]}.weight" not in graph.initializers:
            weight.name = f"{modules[-1]}.weight"


def _plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in its textbook operators, which graph rewrites and every engine recognise.

    query is (batch, heads, sequence, head width); key and value may have fewer heads. The result is
    (batch, sequence, heads, head width).
    """
    if unsupported := [name for name in ("s_aux",) if _unused.get(name) is not None]:
        raise NotImplementedError(f"attention with {unsupported[0]}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = torch.softmax(scores, dim=-1)
    return torch.matmul(probabilities, value).transpose(1, 2), None


def _plain_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    cache_position: torch.Tensor | None = None,
    mask_function: Any = _BIDIRECTIONAL,
    attention_mask: torch.Tensor | None = None,
    **_unused: Any,
) -> torch.Tensor | None:
    """Return the additive float32 mask, broadcastable to (batch, 1, query, key), or None.

    Padding and pattern stay separate until they are added: a bidirectional mask is
    (batch, 1, 1, key).
    """
    # transformers 4.57 gives the position of queries as cache_position, 5.x as their number.
    positions = torch.arange(q_length if cache_position is None else cache_position.shape[0])
    lowest = torch.finfo(torch.float32).min
    mask = None
    if attention_mask is not None:
        mask = (1.0 - attention_mask[:, None, None, :].float()) * lowest
    if mask_function is not _BIDIRECTIONAL:
        zero = torch.zeros((), dtype=torch.long)
        allowed = mask_function(zero, zero, positions[:, None], torch.arange(kv_length)[None, :])
        pattern = torch.where(allowed, 0.0, lowest)[None, None]
        mask = pattern if mask is None else torch.minimum(mask, pattern)
    return mask


AttentionInterface.register(_ATTENTION, _plain_attention)
masking_utils.AttentionMaskInterface.register(_ATTENTION, _plain_mask)


@contextmanager
def _ordered_sets(module: torch.nn.Module) -> Iterator[None]:
    """Let a model iterate its sets in the order in which they were filled.

    That of strings differs between processes, and a graph has the order in which a model computes:
    ModernBERT in transformers 5 makes its two tables of positions by iterating a set.
    """
    names = {type(each).__module__ for each in module.modules()}
    files = [sys.modules[name] for name in names if name.startswith("transformers")]
    for each in files:
        each.set = dict.fromkeys  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for each in files:
            del each.set


@contextmanager
def _quiet() -> Any:
    """Keep the exporter's progress messages and warnings off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
