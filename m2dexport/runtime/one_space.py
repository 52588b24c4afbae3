"""Whether the files of an artifact belong together, by what each says of the vectors' space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import ENGINES
from m2dexport.errors import BundleError, UsageError
from m2dexport.files import SPEC
from m2dexport.runtime.artifact import RANGES, ArtifactSpec, space_id_with_tokenizer
from m2dexport.vectors.codecs import LEVELS, Ranges


def require_one_space(
    spec: ArtifactSpec, ranges: Ranges | None, tokenizer_sha256: str, where: object
) -> None:
    """Refuse files that are whole one by one and do not belong together.

    Args:
        spec: of the artifact.
        ranges: of its ranges.json, None where it has none.
        tokenizer_sha256: ``sha256_of_json`` of its tokenizer.json.
        where: the bundle, a cell of one or the folder, for messages.

    Raises:
        BundleError: naming what disagrees.
    """
    if (spec.vectors in LEVELS) != (ranges is not None):
        raise BundleError(f"{where}: {RANGES} and vectors={spec.vectors} do not go together.")
    if ranges is not None and len(ranges.low) != spec.dim:
        raise BundleError(f"{where}: {RANGES} has {len(ranges.low)} dims and the model {spec.dim}.")
    try:
        expected = space_id_with_tokenizer(spec, ranges, tokenizer_sha256)
    except UsageError as error:
        raise BundleError(f"{where}: {error}") from error
    if spec.space_id != expected:
        raise BundleError(
            f"{where} is of space {spec.space_id} by its {SPEC}, and its content makes {expected}: "
            "a prompt, the tokenizer or the ranges changed; build it again."
        )


def require_ranges_of_graph(
    spec: ArtifactSpec,
    ranges: Ranges | None,
    in_graph: Mapping[str, NDArray[Any]],
    where: object,
) -> None:
    """Refuse ranges that are not those which the graph codes with.

    Args:
        spec: of the artifact.
        ranges: of its ranges.json, None where it has none.
        in_graph: those of the graph, as ``graph_guard.ranges_of`` finds them.
        where: the bundle, a cell of one or the folder, for messages.

    Raises:
        BundleError: naming the constant that differs.
    """
    if ranges is None or not ENGINES[spec.engine].encodes:
        return
    expected = {"range_low": ranges.low, "range_step": ranges.step(spec.vectors)}
    for name, values in expected.items():
        if not np.array_equal(in_graph.get(name, ()), values):
            raise BundleError(
                f"{where}: {RANGES} does not hold the ranges that the graph codes with ({name}); "
                "build it again."
            )
