"""Text in, final vector out: numpy, tokenizers and one engine, without torch or a network."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from m2dexport.batches import encode_tokens
from m2dexport.cores import workers_for
from m2dexport.engines import ENGINES, Device, engine_runner, require_version
from m2dexport.errors import (
    BundleError,
    M2DError,
    UnsafeContent,
    UsageError,
    one_line,
    usable,
)
from m2dexport.files import SPEC
from m2dexport.runtime import artifact
from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.runtime.graph_guard import examine_graph, ranges_of, table_rows
from m2dexport.runtime.one_space import require_one_space, require_ranges_of_graph
from m2dexport.runtime.tokenizer import Tokens, load_tokenizer, require_room, tokenize
from m2dexport.runtime.tokenizer_guard import require_plain_tokenizer
from m2dexport.strict import shown
from m2dexport.vectors.codecs import (
    Ranges,
    code_dtype,
    code_width,
    encode_vectors,
    ranges_from_json,
)
from m2dexport.vectors.search import Codec

#: What the folder of engines that were built here adds to the name of what they were built of.
_ENGINES = ".engines"


@dataclass(frozen=True)
class Encoded:
    """Vectors and what a caller should know about how they came about."""

    vectors: NDArray[Any]  # (texts, width), as codecs.encode_vectors describes a row
    truncated: int  # how many texts were longer than the maximum length
    space_id: str  # vectors of another space must not be compared with these
    failed: Mapping[int, str]  # why a text has no vector, by its number; its row holds zeros


class Encoder:
    """A loaded artifact. Safe to use from several threads, and in a process that is forked later.

    Args:
        spec: the artifact's specification.
        tokenizer_json: content of its tokenizer.json.
        graph: the files of its graph by name, as contents, or as paths of files too large to read.
        device: what to run it on; what it leaves open is as the artifact says.
        ranges: the frozen ranges of int8 and int4 vectors; needed to use the codes.
        tokenizer: of another encoder that has the same ``tokenizer_json``; None: one is made.

    Raises:
        M2DError: when the tokenizer or the graph holds what no artifact of ``build`` does, or the
            engine refuses it.
    """

    def __init__(
        self,
        spec: ArtifactSpec,
        tokenizer_json: str,
        graph: Mapping[str, Path | bytes],
        device: Device = Device(),
        ranges: Ranges | None = None,
        tokenizer: tokenizers.Tokenizer | None = None,
    ) -> None:
        self.spec = spec
        self.ranges = ranges
        self._engine = engine_runner(spec.engine)
        require_version(spec.engine, spec.min_engine)
        #: The hash of what tokenizer.json holds, which a space_id depends on.
        self.tokenizer_sha256 = require_plain_tokenizer(tokenizer_json, spec.max_length)
        self._tokenizer = load_tokenizer(tokenizer_json) if tokenizer is None else tokenizer
        require_room(self._tokenizer)
        files = [graph[name] for name in ENGINES[spec.engine].files]
        states = _states(files)
        content = examine_graph(spec.engine, files)
        self._rows = table_rows(content)
        #: "range_low" and "range_step" of int8 and int4 vectors, as the graph has them.
        self.graph_ranges = ranges_of(content)
        device = device.or_else(spec.device)
        self._session = self._engine.load(graph, device, spec.isa)
        self._workers = workers_for(device.workers, device.threads)
        if _states(files) != states:
            raise M2DError("the graph changed while it was loaded; load it again.")
        _LOADED.add(self)

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU, by an engine that was compiled for it."""
        engine = ENGINES[self.spec.engine]
        return engine.on_gpu and not self.describe()["engine"].startswith("onnxruntime")

    @property
    def codec(self) -> Codec:
        """How its vectors are stored: decodes, compares and searches them.

        Raises:
            UsageError: when int8 or int4 vectors came without their ranges.
        """
        spec = self.spec
        return Codec(spec.vectors, spec.dim, self.ranges, spec.bit_order)

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Its tokenizer, which truncates and does not pad."""
        return self._tokenizer

    @property
    def default_prompt(self) -> str:
        """The text that goes before every text when no prompt is named."""
        return self._prompt(None)

    @property
    def vocab_size(self) -> int:
        """Token ids, from 0, that it has vectors for."""
        known: int = self._tokenizer.get_vocab_size()
        return known if self._rows is None else min(known, self._rows)

    def describe(self) -> dict[str, str]:
        """Return what the artifact really runs on: "engine" with its version, and "provider"."""
        facts: dict[str, str] = self._engine.describe(self._session)
        return facts

    def encode(
        self, texts: Sequence[str], *, prompt: str | None = None, batch_size: int = 32
    ) -> NDArray[Any]:
        """Return one vector per text, in order; see ``encode_report`` for the arguments.

        Raises:
            UsageError: as ``encode_report``, or when a text has no vector, naming its number.
        """
        encoded = self.encode_report(texts, prompt=prompt, batch_size=batch_size)
        for index, reason in encoded.failed.items():
            raise UsageError(f"text {index} {reason}.")
        return encoded.vectors

    def encode_report(
        self, texts: Sequence[str], *, prompt: str | None = None, batch_size: int = 32
    ) -> Encoded:
        """Return one vector per text, in order, and what befell the texts.

        Args:
            texts: any number of texts.
            prompt: name of one of the model's prompts, such as "query"; None uses the default
                prompt where the model has one, "" uses none.
            batch_size: texts run together at most; an artifact whose vectors depend on the batch
                always runs one at a time.

        Raises:
            UsageError: when the model has no prompt of that name, or ``texts`` is one string.
            M2DError: when the graph fails, or what it returns is not as the specification says.
        """
        tokens = self.tokens(texts, prompt=prompt)
        failed = {i: reason for i, each in enumerate(tokens) if (reason := self.lacks(each.ids))}
        good = [index for index in range(len(tokens)) if index not in failed]
        width, dtype = code_width(self.spec.dim, self.spec.vectors), code_dtype(self.spec.vectors)
        vectors = np.zeros((len(tokens), width), dtype=dtype)
        if good:
            vectors[good] = self.encode_ids([tokens[i].ids for i in good], batch_size=batch_size)
        return Encoded(vectors, sum(each.truncated for each in tokens), self.spec.space_id, failed)

    def encode_ids(self, ids: Sequence[Sequence[int]], *, batch_size: int = 32) -> NDArray[Any]:
        """Return one vector per text, in order, from its token ids, as ``tokens`` gives them.

        Args:
            ids: of each text, specials included, none of which ``lacks`` refuses; at least one
                text.
            batch_size: as for ``encode_report``; fewer where workers would have nothing to do.

        Raises:
            M2DError: as ``encode_report``.
        """
        size = min(batch_size, -(-len(ids) // self._workers)) if self.spec.batch_invariant else 1
        rows = encode_tokens(self.run, ids, self.spec.pad_id, size, self._workers)
        assert rows is not None, "no texts"
        return rows

    def run(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[Any]:
        """Return the final vectors of int64 (batch, sequence) ids and mask, one row per text.

        Raises:
            M2DError: when the graph fails, or returns another type or shape than the specification
                says, or NaN or infinite values.
        """
        vectors: NDArray[Any] = self._engine.run(self._session, input_ids, attention_mask)[0]
        spec = self.spec
        _require_finite(vectors)
        if not ENGINES[spec.engine].encodes and vectors.shape == (len(input_ids), spec.dim):
            vectors = encode_vectors(vectors, spec.vectors, self.ranges, spec.bit_order)
        shape = (len(input_ids), code_width(spec.dim, spec.vectors))
        dtype = code_dtype(spec.vectors)
        if vectors.shape != shape or vectors.dtype != dtype:
            raise BundleError(
                f"the graph returns {vectors.dtype} of shape {vectors.shape} where vectors="
                f"{spec.vectors} of {spec.dim} dims are {dtype} of shape {shape}; build it again."
            )
        return vectors

    def tokenize(self, texts: Sequence[str], *, prompt: str | None = None) -> list[list[int]]:
        """Return the token ids of each text, cut at the maximum length, specials included."""
        return [tokens.ids for tokens in self.tokens(texts, prompt=prompt)]

    def tokens(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Tokens]:
        """Return the token ids of each text, as ``tokenize``, and whether it was cut.

        Raises:
            UsageError: when the model has no prompt of that name, or ``texts`` is one string.
        """
        if isinstance(texts, str):  # a sequence of one-letter texts, too, but never meant so
            raise UsageError("texts is one string; pass a list of strings.")
        return tokenize(self._tokenizer, texts, self._prompt(prompt))

    def lacks(self, ids: Sequence[int]) -> str | None:
        """Return why a text of these token ids has no vector, None when it has one."""
        if self._rows is None or max(ids, default=0) < self._rows:
            return None
        return f"has the token {max(ids)}, and the model's table has only {self._rows} rows"

    def _prompt(self, name: str | None) -> str:
        name = self.spec.default_prompt if name is None else name
        if not name:
            return ""
        if name not in self.spec.prompts:
            known = one_line(", ".join(sorted(self.spec.prompts)) or "none")
            raise UsageError(f"this model has no prompt named {shown(name)}; it has: {known}.")
        return self.spec.prompts[name]


def _require_finite(vectors: NDArray[Any]) -> None:
    if vectors.dtype.kind == "f" and not np.isfinite(vectors).all():
        raise M2DError(
            "the graph returns vectors with NaN or infinite values; build the artifact again, in "
            "another precision if it is fp16."
        )


_LOADED: weakref.WeakSet[Encoder] = weakref.WeakSet()


def _keep_sessions() -> None:
    """Never free an engine's session in a forked process.

    Its threads stay behind in the parent. It encodes without them, but to free it is to wait for
    them to end: such a process would not come to its own end.
    """
    for encoder in list(_LOADED):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(encoder._session))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_sessions)


def encoder_from_files(
    files: Mapping[str, bytes],
    path: Path,
    device: Device = Device(),
    tokenizer: tokenizers.Tokenizer | None = None,
    where: object = None,
) -> Encoder:
    """Return the encoder of a bundle's files, as ``open_bundle`` reads them.

    Args:
        files: name to content.
        path: the bundle, beside which engines are kept.
        device: what to run it on; what it leaves open is as the artifact says.
        tokenizer: of another encoder that has the same tokenizer.json; None: one is made.
        where: the bundle or a cell of it, for messages; None: ``path``.

    Raises:
        BundleError: when a file cannot be read, or holds what no build writes, or the files do not
            belong together.
        FormatError: when one is of a format that this version does not read.
        M2DError: as ``Encoder``.
    """
    where = path if where is None else where
    try:
        with usable(where):
            spec = artifact.spec_from_json(files[SPEC], SPEC)
            tokenizer_json = decoded(files[artifact.TOKENIZER], where)
            engine = ENGINES[spec.engine]
            names = [*engine.files, *(name for name in engine.may_hold if name in files)]
            graph = {name: files[name] for name in names}
            ranges = ranges_from_json(files[artifact.RANGES]) if artifact.RANGES in files else None
    except KeyError as error:
        raise BundleError(f"{where} lacks {error}, the graph of engine {spec.engine}.") from error
    device = keeping_engines(path, spec, device)
    try:
        encoder = Encoder(spec, tokenizer_json, graph, device, ranges, tokenizer)
    except UnsafeContent as error:
        raise BundleError(f"{where}: {error}") from error
    require_one_space(spec, ranges, encoder.tokenizer_sha256, where)
    require_ranges_of_graph(spec, ranges, encoder.graph_ranges, where)
    return encoder


def keeping_engines(path: Path, spec: ArtifactSpec, device: Device) -> Device:
    """Return a device that keeps the engines built for this machine's GPU, beside their origin.

    Args:
        path: the bundle or the artifact folder.
        spec: its specification.
        device: what to run it on; what it leaves open is as the artifact says.
    """
    device, engine = device.or_else(spec.device), ENGINES[spec.engine]
    on_gpu = engine.on_gpu and (device.provider or engine.provider).startswith(engine.provider)
    if not on_gpu or device.cache is not None:
        return device
    return replace(device, cache=path.with_name(f"{path.name}{_ENGINES}"))


def _states(files: Sequence[Path | bytes]) -> list[tuple[int, ...]]:
    """Return what differs once a file is replaced or written to, of those that are paths."""
    found = [file.stat() for file in files if isinstance(file, Path)]
    return [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def decoded(content: bytes, where: object) -> str:
    """Return the text of a tokenizer.json.

    Raises:
        BundleError: when it is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{where}: {artifact.TOKENIZER} is not UTF-8; build it again.") from error
