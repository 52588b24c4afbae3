"""From a whole checkpoint to an aligned artifact: fit the map, find the index's ranges, build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m2dexport.align.texts import texts_or_shipped
from m2dexport.build.build import Artifact, build_artifact
from m2dexport.build.recipe import Recipe, require_recipe
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.engines import DEFAULT_ENGINE, ENGINES
from m2dexport.files import require_folder, scratch_folder
from m2dexport.progress import OnProgress
from m2dexport.runtime.index import Wanted, read_index, require_index
from m2dexport.slice.slicing import Cut, slice_checkpoint
from m2dexport.vectors.codecs import LEVELS


def build_aligned(
    checkpoint: Checkpoint,
    layers: int,
    dim: int,
    out: str | Path,
    recipe: Recipe = Recipe(),
    on_progress: OnProgress = lambda *_: None,
    *,
    force: bool = False,
) -> Artifact:
    """Align a depth with the full one, build it, and have it speak the full model's space.

    Where the codes need ranges and the recipe names no index, the ranges are those that the full
    depth gets at this dim in fp32, which is built for that.

    Args:
        checkpoint: the whole checkpoint.
        layers: depth to keep, below the full one; 0 makes a static model.
        dim: leading width of the full model's vectors.
        out: the folder to write.
        recipe: engine, device, precisions and texts, and what the result must fulfil.
        on_progress: called as texts are aligned on, and during the search for weights that stay in
            float32.
        force: whether an artifact at ``out`` is replaced.

    Raises:
        M2DError: as ``slice_checkpoint`` and ``build_artifact`` do.
    """
    out = Path(out)
    require_folder(out, force=force)
    require_recipe(recipe)
    if recipe.index is not None:  # before the work
        wanted = Wanted(dim, recipe.vectors, recipe.bit_order, layers, checkpoint.layers)
        require_index(recipe.index, wanted)
    with scratch_folder() as scratch:
        cut = Cut(align=texts_or_shipped(recipe.align_texts))
        sub_model = slice_checkpoint(checkpoint, layers, dim, scratch / "sub-model", cut)
        if recipe.index is None and recipe.vectors in LEVELS:
            whole = Recipe(
                engine=recipe.engine if ENGINES[recipe.engine].encodes else DEFAULT_ENGINE,
                vectors=recipe.vectors,
                bit_order=recipe.bit_order,
                calibration=recipe.calibration,
            )
            build_artifact(checkpoint, checkpoint.layers, dim, scratch / "index", whole)
            index = replace(read_index(scratch / "index"), name="the full model's index")
            recipe = replace(recipe, index=index)
        return build_artifact(sub_model, layers, dim, out, recipe, on_progress, force=force)
