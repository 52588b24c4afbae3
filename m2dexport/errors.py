"""Every error that m2dexport raises on purpose.

::

    M2DError             exit 1  something failed; the message is one sentence with a remedy
    ├── UsageError       exit 2  a value that the caller gave is wrong
    │   ├── MissingDevice    exit 2  this machine lacks the device
    │   └── FormatError      exit 2  a file has a format that this version does not read
    ├── CheckpointError  exit 1  a checkpoint cannot be read or is not supported
    ├── ParityError      exit 1  an artifact does not reproduce the torch original
    ├── DriftError       exit 3  a bundle is whole, and gives other tokens or vectors here
    ├── BundleError      exit 4  a bundle is damaged, altered or none
    ├── UnsafeContent    exit 1  a graph or tokenizer holds what no build writes or no library reads
    └── MissingExtra     exit 1  an optional dependency is not installed

The command line catches ``M2DError`` in one place, prints its sentence and exits with its
``exit_code``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class M2DError(Exception):
    """Base of all errors raised on purpose; ``str(error)`` is one sentence for the user."""

    exit_code = 1


class UsageError(M2DError):
    """A value given by the caller is wrong: an option, a path, a key of a target file."""

    exit_code = 2


class CheckpointError(M2DError):
    """A checkpoint is missing, damaged, unsafe to load, or of a kind that cannot be exported."""


class ParityError(M2DError):
    """An exported artifact differs from the torch original by more than its precision allows."""


class MissingDevice(UsageError):
    """This machine lacks a device that the engine knows."""


class FormatError(UsageError):
    """A file has a format that this version does not read, and is not damaged for that."""


class DriftError(M2DError):
    """A bundle is whole, and gives other tokens or vectors here than where it was made."""

    exit_code = 3


class BundleError(M2DError):
    """A bundle is damaged, altered, or no bundle."""

    exit_code = 4


class UnsafeContent(M2DError):
    """A graph or a tokenizer holds what no build writes, or what the library that runs it refuses.

    In a bundle, that is a BundleError.
    """


class MissingExtra(M2DError):
    """An optional dependency is needed and not installed.

    Args:
        purpose: what needs it, at the start of a sentence ("Building for OpenVINO").
        package: the package to import ("openvino").
        extra: the extra of m2dexport that installs it ("openvino").
    """

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(
            f'{purpose} needs the {package} package; run: pip install "m2dexport[{extra}]".'
        )


@contextmanager
def usable(where: object) -> Iterator[None]:
    """Turn what is wrong with a file of a bundle into the bundle's fault.

    Args:
        where: the bundle or a cell of it, for messages.

    Raises:
        BundleError: in the place of a ``UsageError``, but for another format, which is no damage.
    """
    try:
        yield
    except FormatError:
        raise
    except UsageError as error:
        raise BundleError(f"{where} cannot be used: {error}") from error


def missing_toolchain(purpose: str, error: ModuleNotFoundError) -> MissingExtra | None:
    """Return what to raise where a package of the extra ``export`` is not installed.

    Args:
        purpose: what needs the package, at the start of a sentence ("The command build").
        error: what importing it raised.

    Returns:
        The error; None for any other package, whose absence is a fault.
    """
    from importlib.metadata import PackageNotFoundError, requires  # slow to import, seldom needed

    package = (error.name or "").partition(".")[0]
    try:
        required = requires("m2dexport") or ()
    except PackageNotFoundError:  # run from a folder without an install
        required = ()
    toolchain = {
        re.split(r"[^\w-]", line)[0].replace("-", "_")
        for line in required
        if re.search(r"""extra == ['"]export['"]""", line)
    }
    return MissingExtra(purpose, package, "export") if package in toolchain else None


def one_line(text: object, limit: int = 200) -> str:
    """Return what another library says, or a stored text, as one line that a message can quote.

    Args:
        text: an exception, or anything with a text.
        limit: characters kept; what is cut off becomes "...".
    """
    line = " ".join(str(text)[: 10 * limit].split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."
