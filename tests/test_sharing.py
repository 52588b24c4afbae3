"""What the files of several cells have in common is stored once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import tiny_checkpoint

from m2dexport.build.source import Source, export_sources
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.engines import Compilation, engine_maker
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.runtime.archive import POOL
from m2dexport.runtime.sharing import share


def joined(spans: Any, entries: dict[str, bytes]) -> bytes:
    return b"".join(entries[s.entry][s.offset : s.offset + s.size] for s in spans)


@pytest.mark.parametrize("seed", range(8))
def test_files_are_put_together_again_from_what_is_stored(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = [rng.bytes(int(rng.integers(1, 20_000))) for _ in range(6)]
    blocks += [bytes(5000), b"\x07" * 9000, b"", b"ab" * 3000]
    stored = {name: b"".join(rng.choice(np.array(blocks, object), 4)) for name in ("x", "y")}
    cells = [
        {name: b"".join(rng.choice(np.array(blocks, object), 5)) for name in ("x", "z")}
        for _ in range(3)
    ]
    more, spans = share(stored, cells, "rest")
    entries = {**stored, "rest": more}
    for files, found in zip(cells, spans, strict=True):
        assert {name: joined(found[name], entries) for name in files} == files
    assert share(stored, cells, "rest") == (more, spans)


def test_what_stands_elsewhere_behind_other_bytes_is_stored_once() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.bytes(1 << 16) for _ in range(4)]
    deep = b"header".join(weights)
    shallow = b"another one" + weights[2] + b"?" + weights[0]
    more, _ = share({"model": deep}, [{"model": shallow}], "rest")
    assert len(more) < 32_000  # less than a piece at each of four ends
    assert share({"model": deep}, [{"model": deep, "copy": deep}], "rest")[0] == b""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """From engine to two depths of a BERT whose last layer computes the CLS token alone."""
    config = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("cls") / "m"
    model = open_checkpoint(tiny_checkpoint(folder, config=config, pooling="cls"))
    return export_sources(model, (1, 2), 128, ("onnx", "openvino"))


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_the_depths_of_a_checkpoint_share_their_weights(
    sources: dict[str, Source], engine: str, weights: Any
) -> None:
    maker = engine_maker(engine)
    texts = CalibrationTokens([list(range(5, 5 + n)) for n in range(4, 30)], 0)
    shallow, deep = (
        maker.files(
            maker.quantize(sources[engine].vectors_at(depth), weights, texts), Compilation()
        )
        for depth in (1, 2)
    )
    name = max(shallow, key=lambda name: len(shallow[name]))
    _, (spans,) = share(deep, [{name: shallow[name]}], POOL)
    again = sum(span.size for span in spans[name] if span.entry == POOL)
    assert again < 0.2 * len(shallow[name])  # a few pieces of 6 kB
