"""Whether the stored weights fill the model that config.json describes; no weight is read."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m2dexport.checkpoint.families import Layout
from m2dexport.checkpoint.hf_config import model_class
from m2dexport.checkpoint.tensors import FLOATS
from m2dexport.errors import CheckpointError, one_line

# What may be missing from a checkpoint without touching its embeddings.
_UNUSED = ("pooler.", "decoder.", "lm_head.")


def require_fit(folder: Path, config: Any, layout: Layout, *, own_code: bool) -> None:
    """Refuse a checkpoint that transformers would fill up with random weights.

    transformers itself is asked, by handing it tensors of the stored shapes that take no memory:
    it alone knows which stored names it renames, fuses, ties or does without.

    Args:
        folder: the checkpoint's, for its code and for messages.
        config: transformers' view of its config.json.
        layout: its tensors.
        own_code: whether its model is code that it brings.

    Raises:
        CheckpointError: when a weight is missing, has another shape than config.json asks for, or
            is stored in a type that is not floating.
    """
    import torch

    tensors = layout.tensors(layout.layers)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and name.endswith((".weight", ".bias")):
            raise CheckpointError(
                f"{folder} stores {name} as {tensor.dtype}, so its weights are quantized; slice "
                "the checkpoint that it was quantized from."
            )
    state = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in tensors.items()}
    try:
        with quiet():
            _, info = model_class(folder, config.model_type, own_code=own_code).from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=state,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except CheckpointError:
        raise
    except Exception as error:  # a model class may raise anything about a config it dislikes
        raise CheckpointError(f"transformers cannot load {folder}: {one_line(error)}") from error
    require_filled(folder, info)
    cut = narrow_modules(layout)
    for name, stored, asked in info["mismatched_keys"]:
        if cut is None or not cut.fullmatch(name.rpartition(".")[0]):
            raise CheckpointError(
                f"{folder} holds {name} of shape {tuple(stored)}, where its config.json asks for "
                f"{tuple(asked)}."
            )


def require_filled(folder: Path, info: Any) -> None:
    """Refuse a model some of whose weights transformers found no value for.

    Args:
        folder: the checkpoint's, for the message.
        info: what ``from_pretrained`` reports with ``output_loading_info``.

    Raises:
        CheckpointError: when what is missing takes part in embedding.
    """
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(_UNUSED))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the weights that its config.json asks for, such as "
            f"{missing[0]}."
        )


def narrow_modules(layout: Layout) -> re.Pattern[str] | None:
    """Return the names of the linear modules that may be narrower than config.json can say."""
    family, block = layout.family, layout.family.block
    if block is None:
        return None
    linear = "|".join(map(re.escape, (*block.rows, *block.columns.values())))
    return re.compile(rf"{re.escape(family.layers[0])}\d+\.({linear})")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting what is checked here: missing and unexpected weights."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
