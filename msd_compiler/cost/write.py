"""Profiles as TOML."""

from __future__ import annotations

from pathlib import Path

from ..errors import OutputError
from .profile import Profile


def to_toml(profile: Profile) -> str:
    """A profile as `parse_profile` reads it; the same figures give the same bytes."""
    import tomlkit  # here, for reading profiles needs none of it

    return tomlkit.dumps(profile.model_dump(mode="json", exclude_none=True))


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.write_text(to_toml(profile), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"profile {str(path)!r} cannot be written: {error.strerror}") from error
