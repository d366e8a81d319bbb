"""An evaluation joined to the report that a result carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..api import refuse_overwriting
from ..errors import OptionError, OutputError
from ..page import check_format
from ..report import Report, embedded_report
from ..source import load
from .report import Evaluation


def carried_report(source: Path, results: Sequence[Path]) -> Report:
    """The report inside the first result that has one, with the paths of both models.

    Raises:
        ModelError: a model cannot be read.
        OptionError: none has one.
    """
    for path in results:
        result = load(path)
        report = embedded_report(result.proto)
        if report is not None:
            return report.model_copy(update={"source": str(load(source).path), "result": str(result.path)})
    named = ", ".join(repr(str(path)) for path in results) or "none was given"
    raise OptionError(f"--report is about a RESULT that msd compile wrote, which carries a report ({named})")


def with_evaluation(report: Report, found: Evaluation) -> Report:
    """The report with an evaluation of its result."""
    return report.model_copy(update={"evaluation": found})


def check_report(path: Path, models: Sequence[Path]) -> None:
    """See, before the work, that a report can be written there, and is none of the models.

    Raises:
        OptionError: its name ends otherwise than a report's.
        OutputError: it cannot be written.
    """
    check_format(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"report {str(path)!r} cannot be written: it must be a file in an existing folder")
    for model in models:
        refuse_overwriting(load(model), path)
