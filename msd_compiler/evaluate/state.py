"""How far an evaluation has come, in a file: one that is killed goes on where it was."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import MsdError, OutputError
from .score import RunTally, Tally

VERSION = 1


@dataclass
class State:
    """Figures after some batches, and what they are of."""

    of: dict[str, str]
    """What the figures belong to: digests of models and tokens, windows, versions."""
    oracle: Tally
    runs: dict[str, RunTally]
    done: int = 0
    """Batches."""


@dataclass(frozen=True)
class StateFile:
    """A state's place on disk; None: nowhere."""

    path: Path | None

    def read(self, new: State) -> State:
        """What is there of the same evaluation; ``new`` if there is no file.

        Raises:
            MsdError: the file is of another evaluation, or no state.
        """
        if self.path is None or not self.path.exists():
            return new
        try:
            stored: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["version"] != VERSION:
                raise ValueError(f"version {stored['version']}, this one reads {VERSION}")
            of = dict(stored["of"])
            runs = {
                name: RunTally(**{**run, "flips": [tuple(f) for f in run["flips"]]})
                for name, run in stored["runs"].items()
            }
            state = State(of, Tally(**stored["oracle"]), runs, int(stored["done"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MsdError(f"state {str(self.path)!r} cannot be read: {error}") from error
        others = [what for what in {**of, **new.of} if of.get(what) != new.of.get(what)]
        if others:
            what = others[0]
            raise MsdError(
                f"state {str(self.path)!r} is of another evaluation: its {what} is {of.get(what, 'absent')}, and here it is "
                f"{new.of.get(what, 'absent')}; name another file, or delete this one"
            )
        return state

    def write(self, state: State) -> None:
        """Replace the file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        if self.path is None:
            return
        partial = None
        try:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self.path.parent, prefix=f".{self.path.name}.", delete=False
            ) as file:
                partial = file.name
                json.dump({"version": VERSION, **asdict(state)}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            if partial is not None:
                Path(partial).unlink(missing_ok=True)
            raise OutputError(f"state {str(self.path)!r} cannot be written: {error.strerror}") from error
