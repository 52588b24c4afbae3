#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests that need one, then the bench. From a clone:
#
#     tools/gpu_check.sh [FOLDER]     what it prints also goes to FOLDER, ./gpu-check by default
#
# Installs the package with CUDA's torch into an environment of its own in FOLDER.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-gpu-check}"
mkdir -p "$out"
python3 -m venv "$out/env"
# shellcheck disable=SC1091
. "$out/env/bin/activate"
python -m pip install --quiet --upgrade pip
python -m pip install --quiet -e ".[export,tensorrt-rtx]" pytest "sentence-transformers>=6.2"
# CUDA's provider replaces the CPU's onnxruntime: the two overwrite each other's files.
python -m pip uninstall --quiet --yes onnxruntime
python -m pip install --quiet "onnxruntime-gpu[cuda,cudnn]"
python -m pip install --quiet "tensorrt>=11" || echo "tensorrt is not to be had here" | tee "$out/tensorrt.txt"
{
    nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv
    m2dexport doctor || true
} 2>&1 | tee "$out/machine.txt"
python -m pytest -n 0 -m gpu tests/test_tensorrt.py tests/test_onnxruntime.py 2>&1 | tee "$out/tests.txt" || true
python tools/bench_gpu.py --layers 6,2 --out "$out/bench.md" 2>&1 | tee "$out/bench.log"
