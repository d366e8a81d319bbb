"""The commands about targets: measure this machine, check a profile against it, list what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import OptionError, OutputError
from ..screen import progress_bars

CASES = 156
"""Of a validation."""


def calibrate(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.toml", help="write the profile; default: print it")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="measure other layers, too, and compare with what is predicted")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="with --validate: measured earlier; do not measure anew")
    ] = None,
    seed: Annotated[int, typer.Option(help="with --validate: what its layers are drawn from", min=0)] = 0,
    cases: Annotated[int, typer.Option(help="with --validate: how many", min=1)] = CASES,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg|png", help="with --validate: draw it, too")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """Measure this machine in less than two minutes, and write what was found as a profile for --target.

    With --validate, layers that were not measured are timed in every way that can run, and compared with what the profile
    predicts; that takes some minutes. Other programs should be quiet.
    """
    from ..picture import check_plot
    from . import validate as validation
    from .calibrate import calibrate as measure
    from .profile import CpuProfile, load_target
    from .write import to_toml, write_profile

    given = {"--profile": profile, "--plot": plot, "--seed": seed or None, "--cases": None if cases == CASES else cases}
    if not validate and (needless := [name for name, value in given.items() if value is not None]):
        raise OptionError(f"{needless[0]} is for --validate")
    if profile is not None and output is not None:
        raise OptionError("--output is for a profile that is measured, --profile gives one")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise OutputError(f"profile {str(output)!r} cannot be written: it must be a file in an existing folder")
    if plot is not None:
        check_plot(plot)
    with progress_bars(quiet=json_) as progress:
        measured = measure(progress=progress) if profile is None else load_target(str(profile))
        if not isinstance(measured, CpuProfile):
            raise OptionError(f"{str(profile)!r} is no profile of a CPU")
        if output is not None:
            write_profile(measured, output)
        report = validation.validate(measured, seed=seed, cases=cases, progress=progress) if validate else None
    if report is None:
        if json_:
            print(measured.model_dump_json(indent=2, exclude_none=True))
        elif output is None:
            print(to_toml(measured), end="")
    elif json_:
        print(report.model_dump_json(indent=2))
    else:
        Console().print(validation.view(report))
    if report is not None and plot is not None:
        validation.plot(report, plot)
    for written in (output, plot):
        if written is not None and not json_:
            Console().print(f"wrote {written}", soft_wrap=True)


def targets(
    json_: Annotated[bool, typer.Option("--json", help="print one JSON document and nothing else")] = False,
) -> None:
    """List the profiles that come with the package; the default one is that of the instruction set used here."""
    from ..doctor import used_isa
    from .profile import default_target, digest, load_target, target_names

    default = default_target(used_isa())
    rows: list[dict[str, Any]] = []
    for name in target_names():
        profile = load_target(name)
        about = {"family": profile.family, "description": profile.description, "digest": digest(profile)}
        rows.append({"name": name, **about, "is_default": name == default})
    if json_:
        print(json.dumps({"targets": rows}, indent=2))
        return
    table = Table(box=box.SIMPLE)
    for column in ("", "target", "what it is"):
        table.add_column(column)
    for row in rows:
        table.add_row("default" if row["is_default"] else "", row["name"], row["description"])
    Console().print(table)
