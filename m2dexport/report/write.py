"""What ``profile`` leaves in its folder: profile.json, report.html and the pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2dexport.files import atomic_file, require_file
from m2dexport.profile.manifest import write_profile
from m2dexport.profile.schema import Profile

PROFILE = "profile.json"
PAGE = "report.html"
#: Each is written as NAME.png and NAME.svg.
PICTURES = ("frontier", "maps", "tasks", "size")
_FILES = tuple(f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg"))


def require_report_folder(folder: Path, *, force: bool = False) -> None:
    """Refuse a folder that ``write_report`` could not write to, before anything is measured.

    Raises:
        UsageError: when it is a file, cannot be written to, or holds one of the files and
            ``force`` does not say that they are to be replaced.
    """
    for name in (PROFILE, PAGE, *_FILES):
        require_file(folder / name, force=force)


def write_report(profile: Profile, folder: Path, *, force: bool = False) -> tuple[Path, ...]:
    """Write profile.json, report.html and the pictures; return their paths.

    Raises:
        UsageError: as ``require_report_folder``.
    """
    write_profile(profile, folder / PROFILE, force=force)  # first: the rest can be made again
    return folder / PROFILE, *write_views(profile, folder, force=force)


def write_views(profile: Profile, folder: Path, *, force: bool = False) -> tuple[Path, ...]:
    """Write report.html and the pictures of a profile; return their paths.

    Raises:
        UsageError: as ``require_report_folder``.
    """
    from m2dexport.report.maps import plot_maps, plot_size, plot_tasks
    from m2dexport.report.page import page_of
    from m2dexport.report.pictures import plot_frontier

    for name in (PAGE, *_FILES):
        require_file(folder / name, force=force)
    with atomic_file(folder / PAGE, force=force) as temporary:
        temporary.write_text(page_of(profile), encoding="utf-8")
    plots: dict[str, Callable[[Profile], Any]] = {
        "frontier": plot_frontier,
        "maps": plot_maps,
        "tasks": plot_tasks,
        "size": plot_size,
    }
    for name in PICTURES:
        write_picture(plots[name](profile), folder / name, force=force)
    return tuple(folder / name for name in (PAGE, *_FILES))


def write_picture(figure: Any, path: Path, *, force: bool = False) -> None:
    """Write a matplotlib figure as ``path`` with .png and with .svg, the same bytes every time.

    Raises:
        UsageError: when one of them is there and ``force`` does not say that it is replaced.
    """
    from matplotlib import rc_context

    # As wide as what is drawn: a legend or a label beside the axes is never cut off.
    options = {"dpi": 150, "bbox_inches": "tight"}
    with rc_context({"svg.hashsalt": path.name}):
        with atomic_file(path.with_name(f"{path.name}.png"), force=force) as temporary:
            figure.savefig(temporary, **options)
        with atomic_file(path.with_name(f"{path.name}.svg"), force=force) as temporary:
            figure.savefig(temporary, **options, metadata={"Date": None})
