#!/usr/bin/env bash
# Runs the tests of slicing and export against other transformers versions, each in an environment
# of its own below the given folder: tools/test_versions.sh FOLDER [VERSION...]
# Without versions: the oldest supported and the newest on the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?name a folder for the environments}
shift
for version in "${@:-4.57.6 newest}"; do
  for each in $version; do
    python3 -m venv "$folder/$each"
    wanted="transformers==$each"
    [ "$each" = newest ] && wanted=transformers
    # Neither constraints.txt nor the dev extra: they ask for the newest transformers.
    "$folder/$each/bin/python" -m pip install --quiet --upgrade -e ".[export]" torch==2.13.0 "$wanted" \
      sentence-transformers hypothesis jsonschema pytest pytest-xdist
    "$folder/$each/bin/python" -c "import sentence_transformers as s, transformers as t; \
print('transformers', t.__version__, 'sentence-transformers', s.__version__)"
    "$folder/$each/bin/python" -m pytest -n auto tests/test_checkpoint.py tests/test_families.py \
      tests/test_graph.py tests/test_convert.py tests/test_lora.py tests/test_slicing.py \
      tests/test_towers.py
  done
done
