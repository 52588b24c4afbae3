"""What ``profile`` leaves in its folder: profile.json, report.html and the pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2dexport.errors import UsageError
from m2dexport.files import atomic_file, require_file
from m2dexport.profile.manifest import write_profile
from m2dexport.profile.schema import Profile

PROFILE = "profile.json"
PAGE = "report.html"
#: Each is written as NAME.png and NAME.svg.
PICTURES = ("frontier", "maps", "tasks", "size")
_DPI = 150
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

    with rc_context({"svg.hashsalt": path.name}):
        with atomic_file(path.with_name(f"{path.name}.png"), force=force) as temporary:
            figure.savefig(temporary, dpi=_DPI)
        with atomic_file(path.with_name(f"{path.name}.svg"), force=force) as temporary:
            figure.savefig(temporary, dpi=_DPI, metadata={"Date": None})


def write_card(
    profile: Profile, path: Path, target: str | None = None, *, force: bool = False
) -> tuple[Path, ...]:
    """Write the section of a model card, and its picture beside it as PNG; return their paths.

    Args:
        profile: the profile.
        path: the Markdown file; the picture has its name with .png.
        target: the target that figures and picture are of; None: the first.
        force: whether files that are there are replaced.

    Raises:
        UsageError: when the profile has no such target, or a file may not be written.
    """
    from m2dexport.report.card import card_section
    from m2dexport.report.pictures import plot_frontier

    picture = path.with_suffix(".png")
    if picture == path:
        raise UsageError(f"{path} would be a picture; name a Markdown file with --out.")
    for each in (path, picture):
        require_file(each, force=force)
    text = card_section(profile, picture.name, target)
    figure = plot_frontier(profile, profile.target(target).name)
    with atomic_file(picture, force=force) as temporary:
        figure.savefig(temporary, dpi=_DPI)
    with atomic_file(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path, picture
