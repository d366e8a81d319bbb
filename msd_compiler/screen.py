"""Reports as a person reads them in a terminal: the same facts as the JSON, in tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .report import Agreement, Method, Outcome, OutputRow, PricingRow, Report, SiteRow, Verification

_STYLE = {Outcome.REWRITTEN: "green", Outcome.KEPT: "", Outcome.UNSUPPORTED: "yellow"}
_MANY = 12
_NAMES = ("linear", "attention", "embedding")


def report_view(report: Report, *, verbose: bool = False) -> RenderableType:
    """The whole report: what was found, what was done, how right it is."""
    parts: list[RenderableType] = [_summary_line(report), _sites_table(report.sites, verbose=verbose)]
    cache = _cache_line(report.sites)
    if cache:
        parts.append(Text(cache))
    if report.pricing is not None and report.pricing.before.seconds:
        parts += [Text(line) for line in _pricing_lines(report.pricing)]
    if verbose and any(site.candidates for site in report.sites):
        parts += [Text(), _candidates_table(report.sites)]
    reasons = _reasons(report.sites)
    if reasons is not None:
        parts += [Text(), reasons]
    if report.verification is not None:
        parts += [Text(), verification_view(report.verification)]
    return Group(*parts)


def verification_view(verification: Verification) -> RenderableType:
    """How far the result, and what the user runs today, are from the oracle."""
    parts: list[RenderableType] = []
    if verification.method is Method.WHOLE:
        parts.append(_outputs_table(verification.outputs))
        parts += [Text(line) for line in _argmax_lines(verification.outputs)]
        moved = [o.rounding_relative_l2 for o in verification.outputs if o.rounding_relative_l2 is not None]
        if moved:
            parts.append(
                Text(f"the rounding that was asked for moved the outputs by up to {max(moved):.2e} (not counted above)")
            )
        moved = [
            o.other_activations_relative_l2 for o in verification.outputs if o.other_activations_relative_l2 is not None
        ]
        if moved:
            parts.append(
                Text(f"the model's own rounding of activations: up to {max(moved):.2e} between with and without")
            )
        times = _times(verification)
        if times:
            parts.append(Text(times))
    if verification.sites and (verification.method is Method.SITES or not verification.passed):
        parts.append(_layers_table(verification))
    if verification.note:
        parts.append(Text(f"note: {verification.note}"))
    verdict = (
        ("verified: within tolerance", "bold green") if verification.passed else ("FAILED: over tolerance", "bold red")
    )
    parts.append(Text(*verdict))
    return Group(*parts)


def _summary_line(report: Report) -> Text:
    s = report.summary
    if not s.sites:
        return Text("no linear layers with stored weights: nothing to rewrite")
    by_kind = {kind: [site.outcome for site in report.sites if site.kind == kind] for kind in _NAMES}
    line = _counts("linear layer", by_kind["linear"])
    if by_kind["embedding"]:
        line += f"; {number_of(len(by_kind['embedding']), 'low-bit embedding')} kept"
    if by_kind["attention"]:
        line += "\n" + _counts("attention", by_kind["attention"])
    return Text(line, style="bold")


def _counts(name: str, outcomes: list[Outcome]) -> str:
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in Outcome)
    return f"{number_of(len(outcomes), name)}: {counts}"


def number_of(count: int, name: str) -> str:
    """``3 layers``."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def _pricing_lines(pricing: PricingRow) -> Iterable[str]:
    """What the target takes for all priced sites, before and after."""
    before, after = pricing.before, pricing.after
    yield (
        f"predicted for {pricing.target} ({pricing.digest}), {pricing.workload}: {time_text(before.seconds)} a run before, "
        f"{time_text(after.seconds)} now"
    )
    unpriced = sorted(pricing.unpriced.items(), key=lambda entry: (-entry[1], entry[0]))
    if unpriced:
        named = ", ".join(f"{count} {op}" for op, count in unpriced[:5])
        more = f" and {len(unpriced) - 5} more op types" if len(unpriced) > 5 else ""
        yield f"not priced: {named}{more}"


def time_text(seconds: float) -> str:
    """A time as tables show it: ``12.3 us``, ``4.56 ms``, ``7.89 s``."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} us"


def _candidates_table(sites: list[SiteRow]) -> RenderableType:
    """Every way to compute each site that was priced."""
    table = titled_table("candidates", ("node", "candidate"), ("time", "error"))
    for site in sites:
        for number, candidate in enumerate(site.candidates):
            table.add_row(
                site.node if number == 0 else "",
                Text(candidate.name, "bold" if candidate.name == site.choice else ""),
                "-" if candidate.seconds is None else time_text(candidate.seconds),
                Text(distance_text(candidate.error), "yellow" if candidate.why_not else ""),
            )
    return table


def _cache_line(sites: list[SiteRow]) -> str:
    """Bytes of a token in all caches, before and after."""
    changed = [s for s in sites if s.cache_bytes and s.source_cache_bytes and s.cache_bytes != s.source_cache_bytes]
    if not changed:
        return ""
    before, after = (sum(getattr(s, f) or 0 for s in changed) for f in ("source_cache_bytes", "cache_bytes"))
    return f"cache: {before} bytes a token before, {after} now"


def _sites_table(sites: list[SiteRow], *, verbose: bool) -> RenderableType:
    """A row per layer, or, where there are many, a row per kind of layer."""
    if not sites:
        return Text()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if verbose or len(sites) <= _MANY:
        for heading in ("node", "form", "weight", "K x N", "outcome"):
            table.add_column(heading, overflow="fold")
        for site in sites:
            table.add_row(
                site.node, site.form, site.format or "", _size(site), Text(_outcome(site), _STYLE[site.outcome])
            )
        return table
    table.add_column("layers", justify="right")
    for heading in ("form", "weight", "outcome"):
        table.add_column(heading, overflow="fold")
    kinds: dict[tuple[str, str, Outcome, str], list[SiteRow]] = {}
    for site in sites:
        kinds.setdefault((site.form, site.format or "", site.outcome, _outcome(site)), []).append(site)
    for (form, weight, outcome, text), rows in kinds.items():
        table.add_row(str(len(rows)), form, weight, Text(text, _STYLE[outcome]))
    return table


def _size(site: SiteRow) -> str:
    if site.kind == "attention" and site.heads:
        return f"{site.heads}/{site.kv_heads or site.heads} heads"
    return f"{site.k} x {site.n}" if site.k and site.n else ""


def _outcome(site: SiteRow) -> str:
    if site.outcome is Outcome.REWRITTEN and site.terms is None:
        return f"rewritten: {site.reason_code}"
    if site.outcome is Outcome.REWRITTEN:
        return f"rewritten, {site.activation or number_of(site.terms or 0, 'term')}"
    return f"{site.outcome}: {site.reason_code}"


def _reasons(sites: list[SiteRow]) -> RenderableType | None:
    """One example in words for every reason code."""
    examples: dict[str, SiteRow] = {}
    for site in sites:
        if site.reason_code and site.reason:
            examples.setdefault(site.reason_code, site)
    rule = next((site for site in sites if site.device_rule), None)
    if not examples and rule is None:
        return None
    lines = [Text(f"{code}: {site.node!r}: {site.reason}") for code, site in examples.items()]
    if rule is not None:
        lines.append(Text(f"device's rule: {rule.node!r}: {rule.device_rule}"))
    return Group(*lines)


def _outputs_table(outputs: list[OutputRow]) -> RenderableType:
    figures = ("result", "without library", "you run today")
    table = titled_table("distance from the oracle (relative L2)", ("output", "inputs"), figures)
    shown = outputs if len(outputs) <= _MANY else _telling(outputs)
    for row in shown:
        style = "red" if row.relative_l2 > row.tolerance else ""
        table.add_row(
            row.name,
            row.feed,
            Text(distance_text(row.relative_l2), style),
            distance_text(row.portable_relative_l2),
            distance_text(row.baseline_relative_l2),
        )
    if len(shown) < len(outputs):
        table.caption = f"{len(shown)} of {len(outputs)} outputs: those that are no cache, and the worst"
        table.caption_justify = "left"
    return table


def _telling(outputs: list[OutputRow]) -> list[OutputRow]:
    """Outputs worth a line: the first of every feed, and the farthest ones."""
    first: dict[str, OutputRow] = {}
    for row in outputs:
        first.setdefault(row.feed, row)
    worst = sorted(outputs, key=lambda r: -r.relative_l2)[:3]
    return [*first.values(), *(r for r in worst if r not in first.values())]


def titled_table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    """An empty table: columns of words, which may fold, then columns of figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading in words:
        table.add_column(heading, overflow="fold")
    for heading in figures:
        table.add_column(heading, justify="right")
    return table


def distance_text(value: float | None) -> str:
    """A distance as tables show it: ``1.68e-04``, ``0``, or ``-`` for none."""
    return "-" if value is None else "0" if value == 0 else f"{value:.2e}"


def _argmax_lines(outputs: list[OutputRow]) -> Iterable[str]:
    for row in outputs:
        if row.argmax is not None:
            today = f"; you run today: {_equal(row.baseline_argmax)}" if row.baseline_argmax else ""
            yield f"{row.name} ({row.feed}): equal arg-max {_equal(row.argmax)}{today}"


def _equal(agreement: Agreement) -> str:
    text = f"{agreement.equal:.1%} of {agreement.positions}"
    if agreement.disagreements:
        text += f" (largest margin lost {agreement.disagreements[0].margin:.3g})"
    return text


def _times(verification: Verification) -> str:
    named = (
        ("you run today", verification.source_ms),
        ("result", verification.result_ms),
        ("without library", verification.portable_ms),
    )
    known = [f"{name} {ms:.3g} ms" for name, ms in named if ms is not None]
    return "median time of a run: " + ", ".join(known) if known else ""


def _layers_table(verification: Verification) -> RenderableType:
    table = titled_table("layers alone, worst first", ("node",), ("relative L2", "max abs"))
    for site in verification.sites[:_MANY]:
        table.add_row(site.node, distance_text(site.relative_l2), distance_text(site.max_abs))
    if len(verification.sites) > _MANY:
        table.caption = f"{_MANY} of {len(verification.sites)}"
        table.caption_justify = "left"
    return table


def print_report(console: Console, report: Report, *, verbose: bool = False) -> None:
    """Show the report."""
    console.print(report_view(report, verbose=verbose))


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda what, done, total: None
        return
    columns: tuple[Any, ...] = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show
