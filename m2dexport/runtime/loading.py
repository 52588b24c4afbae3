"""Load a bundle or an artifact folder, ready to encode."""

from __future__ import annotations

from pathlib import Path

from m2dexport.engines import Device
from m2dexport.runtime import artifact, golden
from m2dexport.runtime.archive import GOLDEN, open_bundle
from m2dexport.runtime.encoder import (
    Encoder,
    decoded,
    encoder_from_files,
    keeping_engines,
)


def load(path: str | Path, device: Device = Device()) -> Encoder:
    """Load a bundle (a .m2d archive) or an artifact folder.

    Args:
        path: the archive or the folder.
        device: what to run it on; what it leaves open is as the artifact says.

    Raises:
        UsageError: when there is nothing there, or the folder is not an artifact.
        BundleError: when the archive is damaged or does not match its checksums.
        DriftError: when an engine that was built for this machine's GPU does not give the golden
            vectors.

    Example:
        >>> load("edge.m2d").encode(["A man is playing a guitar."]).shape
        (1, 128)
    """
    path = Path(path)
    if path.is_dir():
        spec = artifact.read_spec(path)
        tokenizer_json = decoded(artifact.read_file(path, artifact.TOKENIZER), path)
        graph = artifact.graph_files(path, spec.engine)
        device = keeping_engines(path, spec, device)
        return Encoder(spec, tokenizer_json, graph, device, artifact.read_ranges(path))
    files = open_bundle(path)
    encoder = encoder_from_files(files, path, device)
    if encoder.on_gpu:  # by an engine that was built here, or kept here by whoever could write it
        golden.require_golden(encoder, files[GOLDEN], path)
    return encoder
