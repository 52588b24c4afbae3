"""Whether a profile says anything of a target that it does not hold."""

from __future__ import annotations

import warnings

from m2dexport.engines import ENGINES
from m2dexport.errors import UsageError
from m2dexport.profile.schema import Profile
from m2dexport.profile.target import Target


def require_measured_for(profile: Profile, target: Target, held: str | None = None) -> None:
    """Refuse to choose for a target that a profile was not measured for; warn of more threads.

    Args:
        profile: the profile.
        target: what is asked for.
        held: the name of a target of the profile, to compare with; None: the first.

    Raises:
        UsageError: when the profile's engine, provider or isa is not the target's, or its threads
            spin for longer than the target allows.
    """
    reason = _unlike(profile, target, held)
    if reason is not None:
        raise UsageError(f"{reason}; profile with that target first.")
    reason = _more_threads(profile, target, held)
    if reason is not None:
        warnings.warn(f"{reason}.", stacklevel=2)


def measured_otherwise(profile: Profile, target: Target, held: str | None = None) -> str | None:
    """Return why a profile was not measured for a target; None: it was, or might have been.

    Args:
        profile: the profile.
        target: what is asked for.
        held: the name of a target of the profile, to compare with; None: the first.
    """
    return _unlike(profile, target, held) or _more_threads(profile, target, held)


def _unlike(profile: Profile, target: Target, held: str | None = None) -> str | None:
    return (
        _other_engine(profile, target, held)
        or _other_isa(profile, target, held)
        or _more_spinning(profile, target, held)
    )


def _other_engine(profile: Profile, target: Target, held: str | None) -> str | None:
    cell = profile.reference_cell(held)
    provider = target.provider or ENGINES[target.engine].provider
    if (cell.engine, cell.device.provider) == (target.engine, provider):
        return None
    return (
        f"the profile was measured with {cell.engine} on {cell.device.provider}, and the target "
        f"runs {target.engine} on {provider}"
    )


def _other_isa(profile: Profile, target: Target, held: str | None) -> str | None:
    made_for = {
        cell.isa for cell in profile.of_target(held) if cell.weights == "int8" and cell.layers > 0
    }
    if made_for <= {target.isa}:
        return None
    return (
        f"the profile has int8 weights of isa={', '.join(sorted(made_for))}, and the target asks "
        f"for isa={target.isa}"
    )


def _more_spinning(profile: Profile, target: Target, held: str | None) -> str | None:
    spun = max(each.device.spin_us for each in profile.of_target(held))
    if target.spin_us is None or spun <= target.spin_us:
        return None
    return (
        f"the profile's threads spin for {spun} microseconds, and the target allows "
        f"{target.spin_us}"
    )


def _more_threads(profile: Profile, target: Target, held: str | None = None) -> str | None:
    threads = profile.threads(held)
    if target.threads is None or threads <= target.threads:
        return None
    return f"the profile was measured with {threads} threads, and the target has {target.threads}"
