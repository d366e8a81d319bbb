"""Where pictures go. matplotlib draws them and is imported where that happens, for it takes a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import OptionError, OutputError

FORMATS = (".svg", ".png")


def check_plot(path: Path) -> None:
    """See, before the work, that a picture can be drawn there.

    Raises:
        OptionError: the file is of another type.
        OutputError: the file is in no folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"plot {str(path)!r} must end with {' or '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"plot {str(path)!r} cannot be written: it must be a file in an existing folder")


def save_plot(figure: Any, path: Path) -> None:
    """Write a matplotlib figure to a file that `check_plot` has seen.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"plot {str(path)!r} cannot be written: {error.strerror}") from error
