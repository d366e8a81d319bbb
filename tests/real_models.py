"""Files of real exporters: a few are committed, more may lie beside the repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COMMITTED = Path(__file__).parent / "data/exported"
SHARED = Path(__file__).parents[2] / "shared/models"


def files() -> Iterator[Any]:
    """Parameters ``path, name`` of a test; those beside the repository are slow, and skipped by name if there are none."""
    for path in sorted(COMMITTED.glob("*.onnx")):
        yield pytest.param(path, f"exported/{path.name}", id=path.stem)
    for path in sorted(SHARED.rglob("*.onnx")):
        name = path.relative_to(SHARED).as_posix()
        yield pytest.param(path, name, id=name.removesuffix(".onnx"), marks=pytest.mark.slow)
    if not SHARED.is_dir():
        skipped = pytest.mark.skip(reason=f"{SHARED} is not here")
        yield pytest.param(None, "", id="shared models", marks=skipped)
