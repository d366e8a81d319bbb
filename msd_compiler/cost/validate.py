"""Predicted against measured: layers that a calibration did not see, in every way that can run."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..bench.report import Setting
from ..errors import OptionError
from ..picture import check_plot, save_plot
from ..verification import Progress, silent
from . import error as law
from .calibrate import calibration_jobs
from .candidates import ATTENTION_ERRORS, BUDGETS
from .layers import Job, Product, Step
from .measure import Machine, ThisMachine
from .price import NoFigure
from .profile import CpuProfile, Way, digest
from .work import AttentionWork, LinearWork

PASSES = 4
"""Over all cases: the best one counts, so that it does not matter what else runs for some seconds."""

ROUNDS = 3
SECONDS = 0.6
"""Of a case in a pass; then fewer rounds."""

AS_GOOD = 0.05
"""A choice that takes so much longer than the fastest way counts as the fastest: nobody could tell."""

LARGEST_SLOW = 2**22
"""Weights of 8 bits with float activations: onnxruntime takes some 2 ns for each of them, so larger ones are left out."""

ATTENTION_SHARE = 0.3
"""Of the cases."""

_BUDGET = BUDGETS["cpu"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ValidationRow(_Record):
    """One way to compute one case."""

    case: str
    """ "512 x 4096 int4 block 32, M = 7"."""
    way: str
    """ "keep", "float activations", "2 terms"."""
    measured_seconds: float
    predicted_seconds: float
    error: float
    """Predicted relative L2 of the output."""

    @property
    def off(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_seconds / self.measured_seconds - 1


class Choices(_Record):
    """How good it is to take what is predicted to be the fastest."""

    best_share: float
    """Of cases in which the choice is the fastest as measured, or takes at most 5 % longer."""
    regret: float
    """Time of the choices over that of the fastest ways, all cases together, less 1."""


class ValidationReport(_Record):
    """Predictions of a profile on the machine that it was measured on."""

    setting: Setting
    profile: str
    digest: str
    """Of the profile."""
    seed: int
    cases: int
    median_abs_error: float
    """Of predicted over measured, less 1."""
    within_30: float
    """Share of predictions at most 30 % off."""
    best_share: float
    """See `Choices`; among all ways, however inaccurate."""
    regret: float
    within_budget: Choices
    """Among ways within the default accuracy budget."""
    notes: list[str]
    rows: list[ValidationRow]


@dataclass(frozen=True)
class Case:
    """What is computed, and every way to."""

    name: str
    ways: tuple[tuple[str, Job, float], ...]
    """Name, job, predicted relative L2."""


def validate(
    profile: CpuProfile,
    *,
    seed: int = 0,
    cases: int = 156,
    machine: Machine | None = None,
    progress: Progress = silent,
) -> ValidationReport:
    """Measure layers of random sizes in every way, and compare with what the profile says; some minutes.

    M is 1 to 512, K and N are 512 to 11008, log-uniform; int8 and int4 in blocks of 32, 64 and 128, int8 with a scale per
    column; attention over caches of float32, int8 and int4. None is measured by `calibrate`.

    Args:
        profile: of this machine.
        seed: what the cases are drawn from.
        cases: how many.
        machine: what is measured; None: this one.
        progress: told what is being done.

    Raises:
        OptionError: cases is less than 1, or the profile has no figures for any of them.
        RuntimeRefused: the native library cannot be used.
    """
    if cases < 1:
        raise OptionError(f"cases is {cases}; it must be 1 or more")
    machine = machine or ThisMachine()
    layers = list(draw(seed, cases))
    times: dict[Job, float] = {}
    for done in range(PASSES):
        for number, layer in enumerate(layers):
            progress("validating", done * len(layers) + number, PASSES * len(layers))
            ways = dict.fromkeys(job for case in layer for _, job, _ in case.ways)
            jobs = [job for job in ways if _predicted(profile, job) is not None]
            for job, time in zip(jobs, machine.times(jobs, ROUNDS, SECONDS * len(layer)), strict=True):
                if time is not None:
                    times[job] = min(time, times.get(job, time))
    progress("validating", PASSES * len(layers), PASSES * len(layers))
    rows = [row for layer in layers for case in layer for row in _rows(profile, case, times)]
    if not rows:
        raise OptionError(f"{profile.name} has no figures for anything that runs here")
    note = f"int8 weights of more than {LARGEST_SLOW} values with float activations were left out: seconds each"
    return report_of(rows, machine.describe(), profile, seed, [note])


def report_of(
    rows: Sequence[ValidationRow], setting: Setting, profile: CpuProfile, seed: int, notes: Sequence[str] = ()
) -> ValidationReport:
    """The statistics of some rows."""
    by_case: dict[str, list[ValidationRow]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    off = [abs(row.off) for row in rows]
    free = choices(list(by_case.values()))
    return ValidationReport(
        setting=setting,
        profile=profile.name,
        digest=digest(profile),
        seed=seed,
        cases=len(by_case),
        median_abs_error=median(off),
        within_30=sum(o <= 0.3 for o in off) / len(off),
        best_share=free.best_share,
        regret=free.regret,
        within_budget=choices([within for case in by_case.values() if (within := _within_budget(case))]),
        notes=list(notes),
        rows=list(rows),
    )


def choices(cases: Sequence[Sequence[ValidationRow]]) -> Choices:
    """What comes of taking the fastest predicted way of each case; of those predicted alike, the most accurate."""
    chosen = [min(rows, key=lambda r: (r.predicted_seconds, r.error)).measured_seconds for rows in cases]
    best = [min(row.measured_seconds for row in rows) for rows in cases]
    good = sum(c <= (1 + AS_GOOD) * b for c, b in zip(chosen, best, strict=True))
    return Choices(best_share=good / max(len(cases), 1), regret=sum(chosen) / sum(best) - 1 if best else 0.0)


def _within_budget(rows: Sequence[ValidationRow]) -> list[ValidationRow]:
    return [row for row in rows if row.error <= _BUDGET]


def _rows(profile: CpuProfile, case: Case, times: Mapping[Job, float]) -> Iterator[ValidationRow]:
    for name, job, error in case.ways:
        if job in times:
            yield ValidationRow(
                case=case.name,
                way=name,
                measured_seconds=times[job],
                predicted_seconds=job.predicted(profile),
                error=error,
            )


def _predicted(profile: CpuProfile, job: Job) -> float | None:
    try:
        return job.predicted(profile)
    except NoFigure:
        return None


def draw(seed: int, cases: int) -> Iterator[list[Case]]:
    """Cases, by layers: some numbers of rows of a product, or one step of attention."""
    rng = random.Random(seed)
    seen = calibration_jobs()
    steps = round(ATTENTION_SHARE * cases)
    products = cases - steps
    while products > 0:
        layer = [case for case in _product_cases(rng) if not seen & {job for _, job, _ in case.ways}][:products]
        products -= len(layer)
        seen |= {job for case in layer for _, job, _ in case.ways}
        yield layer
    while steps > 0:
        case = _step_case(rng)
        if not seen & {job for _, job, _ in case.ways}:
            steps -= 1
            seen |= {job for _, job, _ in case.ways}
            yield [case]


def _log_uniform(rng: random.Random, low: int, high: int, step: int = 1) -> int:
    drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    return min(max(round(drawn / step) * step, low), high)


def _product_cases(rng: random.Random) -> list[Case]:
    k, n = (_log_uniform(rng, 512, 11008, 128) for _ in range(2))
    bits, block = rng.choice([(8, None), (8, 32), (8, 64), (8, 128), (4, 32), (4, 64), (4, 128), (4, 128)])
    work = LinearWork(k, n, bits, block or 128, per_channel=block is None)
    layer = f"{k} x {n} int{bits} {'per channel' if block is None else f'block {block}'}"
    has_float = block is not None and (bits == 4 or k * n <= LARGEST_SLOW)
    cases = []
    for rows in sorted({_log_uniform(rng, 1, 512) for _ in range(3)}):
        ways: list[tuple[str, Job, float]] = [
            ("keep", Product(Way.SESSION, work, rows), law.relative_l2(1, k, work.group))
        ]
        if has_float:
            ways.append(("float activations", Product(Way.FLOAT, work, rows), law.FLOAT_ERROR))
        for terms in (1, 2, 3):
            error = law.relative_l2(terms, k, work.group) + law.FLOAT_ERROR
            timed = max(2, terms)  # one term is computed by the code of two
            ways.append((f"{terms} term{'s' * (terms > 1)}", Product(Way.MSD, work, rows, timed), error))
        cases.append(Case(f"{layer}, M = {rows}", tuple(ways)))
    return cases


def _step_case(rng: random.Random) -> Case:
    kv_heads, queries, size = rng.choice([2, 4, 8]), rng.choice([1, 2, 4, 8]), rng.choice([64, 128])
    batch, tokens, past = (*rng.choice([(1, 1), (1, 1), (1, 1), (4, 1), (1, None)]), _log_uniform(rng, 128, 8192))
    if tokens is None:
        tokens, past = _log_uniform(rng, 2, 512), rng.choice([0, min(past, 1024)])
    context = past + tokens
    is_float = rng.random() < 0.5

    def way(name: str, way: Way, bits: int, error: float) -> tuple[str, Job, float]:
        work = AttentionWork(kv_heads * queries, kv_heads, size, bits)
        return name, Step(way, work, batch, tokens, context), error

    ours = law.relative_l2(2, size, size)
    if is_float:
        ways = [way("keep", Way.SESSION, 32, law.FLOAT_ERROR)]
        ways += [way(f"2 terms, int{bits} cache", Way.MSD, bits, ours + ATTENTION_ERRORS[bits]) for bits in (8, 4)]
    else:
        bits = rng.choice([8, 8, 4])
        ways = [way("keep", Way.SESSION, bits, law.FLOAT_ERROR), way(f"2 terms, int{bits} cache", Way.MSD, bits, ours)]
    cache = "float32" if is_float else f"int{bits}"
    heads = f"{kv_heads * queries} heads of {size} over {kv_heads}"
    return Case(f"attention {heads}, {cache}, {batch} x {tokens} after {past}", tuple(ways))


WORST = 8
"""Predictions that are shown."""


def view(report: ValidationReport) -> RenderableType:
    """The figures, by way, and the worst predictions."""
    verdict = Table(
        box=box.SIMPLE, title=f"{report.cases} cases of seed {report.seed}, {report.profile}", title_justify="left"
    )
    for column in ("", "found", "wanted"):
        verdict.add_column(column, justify="left" if not column else "right")
    within = report.within_budget
    for name, share, wanted in (
        ("median error of a prediction", report.median_abs_error, "≤ 15 %"),
        ("predictions within 30 %", report.within_30, "≥ 90 %"),
        ("choices as fast as the best", report.best_share, "≥ 95 %"),
        ("time lost by choices", report.regret, "≤ 2 %"),
        ("the same within the accuracy budget: choices", within.best_share, "≥ 95 %"),
        ("time lost", within.regret, "≤ 2 %"),
    ):
        verdict.add_row(name, f"{100 * share:.1f} %", wanted)
    ways = Table(box=box.SIMPLE)
    for column in ("way", "timed", "median off", "within 30 %"):
        ways.add_column(column, justify="left" if column == "way" else "right")
    for name, rows in _by_way(report.rows).items():
        off = [abs(row.off) for row in rows]
        near = sum(o <= 0.3 for o in off) / len(off)
        ways.add_row(name, str(len(off)), f"{100 * median(off):.1f} %", f"{100 * near:.0f} %")
    worst = Table(box=box.SIMPLE, title="furthest off", title_justify="left")
    for column in ("case", "way", "measured ms", "predicted ms"):
        worst.add_column(column, justify="right" if column.endswith("ms") else "left")
    for row in sorted(report.rows, key=lambda r: -abs(math.log(1 + r.off)))[:WORST]:
        worst.add_row(row.case, row.way, f"{1e3 * row.measured_seconds:.3g}", f"{1e3 * row.predicted_seconds:.3g}")
    return Group(verdict, ways, worst, *(Text(note, style="dim") for note in report.notes))


def _by_way(rows: Sequence[ValidationRow]) -> dict[str, list[ValidationRow]]:
    found: dict[str, list[ValidationRow]] = {}
    for row in rows:
        kind = "attention" if row.case.startswith("attention") else "product"
        found.setdefault(f"{kind}, {row.way}", []).append(row)
    return dict(sorted(found.items()))


def plot(report: ValidationReport, path: Path) -> None:
    """Draw predicted over measured times.

    Raises:
        OptionError: the file is of another type.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    save_plot(draw_plot(report), path)


def draw_plot(report: ValidationReport) -> Any:
    """The report as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    axis = figure.subplots()
    times = [time for row in report.rows for time in (row.measured_seconds, row.predicted_seconds)]
    ends = [1e3 * min(times) / 1.5, 1e3 * max(times) * 1.5]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.fill_between(ends, [0.7 * e for e in ends], [1.3 * e for e in ends], color="black", alpha=0.08, label="30 %")
    for name, rows in _by_way(report.rows).items():
        measured = [1e3 * row.measured_seconds for row in rows]
        marker = "^" if name.startswith("attention") else "o"
        axis.scatter(
            measured, [1e3 * row.predicted_seconds for row in rows], s=12, marker=marker, alpha=0.7, label=name
        )
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured ms", ylabel="predicted ms")
    axis.set_title(f"{report.cases} cases: median error {100 * report.median_abs_error:.1f} %", fontsize=10)
    axis.legend(fontsize=7)
    return figure
