"""Show that slicing streams: cut a synthetic 7B checkpoint to 8 layers and report peak memory.

    python tools/bench_slicing.py [--layers 8] [--dtype fp16|bf16|fp32] [--folder /tmp]

The checkpoint has the shape of a 7B llama in float16 (13 GB, in shards). Its files are sparse and
take almost no disk space, but the sub-model does (3.5 GB at 8 layers). Both are removed at the end.
Slicing runs in its own process, whose resident memory is read before and after.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN, FFN, LAYERS, VOCAB, SHARDS = 4096, 11008, 32, 32000, 8
MIB = 1 << 20

CHILD = """
import json, resource, sys, time
from pathlib import Path
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.slice.slicing import Cut, slice_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

checkpoint = open_checkpoint(Path(sys.argv[1]))
before, start = peak(), time.perf_counter()
cut = Cut(dtype=sys.argv[4] or None)
slice_checkpoint(checkpoint, int(sys.argv[3]), 256, Path(sys.argv[2]), cut)
print(json.dumps({"before": before, "peak": peak(), "seconds": time.perf_counter() - start}))
"""


def main() -> None:
    """Make the checkpoint, slice it in its own process and print the memory used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: $TMPDIR")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        source, out = Path(temporary) / "7b", Path(temporary) / "sliced"
        largest = make_checkpoint(source)
        arguments = [str(source), str(out), str(options.layers), options.dtype]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True
        )
        result = json.loads(done.stdout.splitlines()[-1])
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        written = (out / "model.safetensors").stat().st_size
    print(f"checkpoint          {size / MIB:9.0f} MiB in {SHARDS} shards, {LAYERS} layers")
    print(f"sub-model           {written / MIB:9.0f} MiB, {options.layers} layers")
    print(f"largest tensor      {largest / MIB:9.0f} MiB")
    print(f"resident, opened    {result['before'] / MIB:9.0f} MiB (Python, torch, transformers)")
    print(f"resident, peak      {result['peak'] / MIB:9.0f} MiB")
    print(f"slicing itself      {(result['peak'] - result['before']) / MIB:9.0f} MiB")
    print(f"time                {result['seconds']:9.1f} s, hashing the checkpoint included")


def make_checkpoint(folder: Path) -> int:
    """Write a sparse float16 llama of 7B parameters; return the bytes of its largest tensor."""
    folder.mkdir()
    shards: list[dict[str, list[int]]] = [{} for _ in range(SHARDS)]
    shards[0]["model.embed_tokens.weight"] = [VOCAB, HIDDEN]
    for layer in range(LAYERS):
        shards[layer * SHARDS // LAYERS].update(layer_shapes(f"model.layers.{layer}."))
    shards[-1].update({"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCAB, HIDDEN]})
    names = [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    for name, shapes in zip(names, shards, strict=True):
        write_sparse(folder / name, shapes)
    weight_map = {t: name for name, shapes in zip(names, shards, strict=True) for t in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_rest(folder)
    return max(2 * rows[0] * rows[1] for s in shards for rows in s.values() if len(rows) == 2)


def layer_shapes(prefix: str) -> dict[str, list[int]]:
    """Return the tensors of one llama block."""
    square = [f"self_attn.{name}_proj" for name in "qkvo"]
    shapes = {f"{prefix}{name}.weight": [HIDDEN, HIDDEN] for name in square}
    for name in ("gate_proj", "up_proj"):
        shapes[f"{prefix}mlp.{name}.weight"] = [FFN, HIDDEN]
    shapes[f"{prefix}mlp.down_proj.weight"] = [HIDDEN, FFN]
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{prefix}{name}.weight"] = [HIDDEN]
    return shapes


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write a sparse safetensors file whose values read as zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


def write_rest(folder: Path) -> None:
    """Write config, tokenizer and pooling."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, vocab_size=VOCAB
    )
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)
    kinds = ["Transformer", "Pooling"]
    modules = [
        {"path": "" if i == 0 else "1_Pooling", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))


if __name__ == "__main__":
    main()
