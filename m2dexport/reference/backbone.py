"""The transformer of a checkpoint in torch, and its token states at every depth."""

from __future__ import annotations

import contextlib
import copy
import re
from typing import Any, cast

import numpy as np
import torch
import transformers

from m2dexport.checkpoint.families import Block
from m2dexport.checkpoint.fit import narrow_modules, quiet, require_filled
from m2dexport.checkpoint.hf_config import model_class
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.tensors import read_tensor
from m2dexport.checkpoint.widths import Widths
from m2dexport.errors import CheckpointError, one_line


class Backbone(torch.nn.Module):  # type: ignore[misc]
    """A checkpoint's transformer in float32 and evaluation mode; an encoder-decoder's encoder.

    Args:
        checkpoint: what to load.
        attention: a name that transformers knows, such as "sdpa" or "eager".

    Raises:
        CheckpointError: when transformers cannot load it, or the weights do not fill the model.
    """

    def __init__(self, checkpoint: Checkpoint, attention: str) -> None:
        super().__init__()
        self.transformer = _load(checkpoint, attention)
        name = checkpoint.layout.family.final_norm
        self._norm_name = name
        self._applied = checkpoint.final_norm == "applied"

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the token states of depths 1 to N, each float32 (batch, sequence, hidden).

        Where the checkpoint applies a final norm, every depth passes through it. transformers' own
        last hidden state is not used in families that have one: whether it is taken before or
        after the norm differs between families and versions.
        """
        raw: list[torch.Tensor] = []
        norm = self.transformer.get_submodule(self._norm_name) if self._norm_name else None
        hook = norm.register_forward_pre_hook(lambda _, args: raw.append(args[0])) if norm else None
        with hook or contextlib.nullcontext():
            outputs = self.transformer(
                input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
            )
        if norm is None:
            return (*outputs.hidden_states[1:-1], outputs.last_hidden_state)
        states = (*outputs.hidden_states[1:-1], raw[-1])
        return tuple(norm(state) for state in states) if self._applied else states


def _load(checkpoint: Checkpoint, attention: str) -> torch.nn.Module:
    own_code = checkpoint.own_code
    config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=own_code)
    loader = model_class(checkpoint.path, checkpoint.model_type, own_code=own_code)
    # MPNet, DeBERTa and, before 5.x, T5 and most encoders have a fixed choice of kernels.
    switch = "_supports_sdpa" if attention == "sdpa" else "_supports_attention_backend"
    if not getattr(loader, switch, False):
        attention = "eager"
    try:
        with quiet():
            model, info = loader.from_pretrained(
                checkpoint.path,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=checkpoint.widths is not None,  # _narrow looks at them
            )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot load {checkpoint.path}: {one_line(error)}"
        ) from error
    require_filled(checkpoint.path, info)
    if checkpoint.widths is not None:
        _narrow(model, checkpoint, checkpoint.widths)
    for module in model.modules():
        # Within the maximum length nothing is rescaled by the longest text of a batch, so the
        # check for it, on which an export would stumble, is left out.
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            module.rope_type = "default"
    model.config.use_cache = False
    return model.eval()


def _narrow(model: Any, checkpoint: Checkpoint, widths: Widths) -> None:
    """Give every layer the widths of its stored weights, where its config could not say them."""
    layout = checkpoint.layout
    family, block = layout.family, cast(Block, layout.family.block)
    inside = cast("re.Pattern[str]", narrow_modules(layout))
    parameters = dict(model.named_parameters())
    for name, tensor in layout.tensors(checkpoint.layers).items():
        module, _, parameter = name.rpartition(".")
        if name not in parameters or not inside.fullmatch(module):
            continue
        if tuple(parameters[name].shape) != tensor.shape:
            values = torch.from_numpy(read_tensor(tensor).astype(np.float32))
            setattr(model.get_submodule(module), parameter, torch.nn.Parameter(values))
    for number, counts in enumerate(zip(widths.heads, widths.kv_heads, strict=True)):
        if counts[0] != getattr(model.config, block.heads_key):
            for module in model.get_submodule(f"{family.layers[0]}{number}").modules():
                _set_heads(module, block, *counts, widths.head_dim)


def _set_heads(module: Any, block: Block, heads: int, kv_heads: int, head_dim: int) -> None:
    """Correct the counts that an attention module of transformers took from the config."""
    known = {
        **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), heads),
        "num_key_value_heads": kv_heads,
        **dict.fromkeys(("all_head_size", "dim"), heads * head_dim),
    }
    for name, value in known.items():
        if hasattr(module, name):
            setattr(module, name, value)
    if hasattr(module, "config"):  # phi3 asks it where queries end and keys begin
        module.config = copy.copy(module.config)
        setattr(module.config, block.heads_key, heads)
