"""Make m2dexport-run.pyz: the base install as one file, for machines with Python and without pip.

    python tools/make_pyz.py                                     # for this machine
    python tools/make_pyz.py --platform manylinux_2_17_aarch64,manylinux_2_28_aarch64 --python 3.11

The file runs as the command does: ``python3 m2dexport-run.pyz verify edge.m2d``. Its packages are
compiled for one platform and one Python; where it first runs, shiv (which packs it) unpacks them
into ``~/.shiv``, or into the folder that SHIV_ROOT names. The checkpoint, the evaluation data and
the texts that ship are left out: a device has no use for them.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: In m2dexport/, what only makes bundles.
_DATA = ("data/checkpoint", "data/eval", "data/calibration.txt", "data/align.txt")
#: What a device imports; what else the last two bring along serves to download and to quantize.
_PACKAGES = ("m2dexport", "click", "numpy", "onnxruntime", "tokenizers")


def install(folder: Path, platforms: str, python: str | None) -> None:
    """Install the base install's packages into ``folder``, of a platform and a Python version."""
    pip = [sys.executable, "-m", "pip"]
    # A wheel is made here; what it needs may be another platform's.
    wheels = folder.with_name("wheels")
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("*.whl")
    command = [*pip, "install", "--quiet", "--no-deps", "--target", folder]
    command += ["-c", ROOT / "constraints.txt"]
    command += ["--only-binary=:all:"]
    command += [f"--platform={name}" for name in platforms.split(",") if name]
    command += [f"--python-version={python}"] if python else []
    subprocess.run([*command, wheel, *_PACKAGES[1:]], check=True)


def pack(packages: Path, out: Path) -> None:
    """Pack a folder of packages into one file.

    Args:
        packages: a site-packages folder with the base install; it is not changed.
        out: the file to write.
    """
    with tempfile.TemporaryDirectory() as scratch:
        few = Path(scratch) / "few"
        for path in packages.iterdir():
            # numpy, its numpy.libs and numpy-2.4.6.dist-info
            if path.name.startswith(
                tuple(f"{name}{end}" for name in _PACKAGES for end in ".-")
            ) or (path.name in _PACKAGES):
                without = shutil.ignore_patterns("__pycache__", "tests")
                shutil.copytree(path, few / path.name, ignore=without)
        for name in _DATA:
            path = few / "m2dexport" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shiv = [sys.executable, "-m", "shiv", "--reproducible", "--site-packages", few]
        subprocess.run([*shiv, "-c", "m2dexport", "-o", out], check=True, capture_output=True)


def main() -> None:
    """Make the file and say how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("m2dexport-run.pyz"))
    parser.add_argument("--platform", default="", help="as wheels name it; default: this machine's")
    parser.add_argument("--python", help="such as 3.11; default: this one's")
    given = parser.parse_args()
    if importlib.util.find_spec("shiv") is None:
        parser.error("it needs shiv; run: pip install shiv")
    with tempfile.TemporaryDirectory() as scratch:
        install(Path(scratch) / "packages", given.platform, given.python)
        pack(Path(scratch) / "packages", given.out)
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
