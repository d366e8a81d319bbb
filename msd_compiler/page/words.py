"""The summary in words: what a stranger should take from the page at one look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from ..report import Agreement, Outcome, OutputRow, Report
from ..screen import number_of
from .evaluation import about, flip_counts, result_run, today
from .units import amount, clock, distance


@dataclass(frozen=True)
class Tile:
    """One figure of the summary: what it is of, the figure, and what is to be known with it."""

    label: str
    figure: str
    note: str


@dataclass(frozen=True)
class Verdict:
    """Whether the result is right: a word, a sentence, and how it looks."""

    word: str
    sentence: str
    tone: str


@dataclass(frozen=True)
class Flip:
    """A position where somebody's likeliest value is another than the oracle's."""

    output: str
    feed: str
    who: str
    index: list[int]
    oracle: int
    found: int
    margin: float


def model_name(report: Report) -> str:
    """The file's name, without folders."""
    path = report.source or report.result
    return PurePath(path).name if path else "model"


def verdict(report: Report) -> Verdict:
    """In the words of the command line."""
    verification = report.verification
    if verification is None and report.evaluation is not None:
        return Verdict(
            "Evaluated",
            f"Every model saw the same text and was compared with the oracle: {about(report.evaluation)}.",
            "neutral",
        )
    if verification is None:
        return Verdict("Not verified", "Nothing was run: this is what was found, and what is predicted.", "neutral")
    how = {
        "whole": "Source and result ran on the same inputs, and every output was compared with the oracle.",
        "sites": "Every rewritten layer ran alone, and was compared with float64.",
    }[verification.method]
    if verification.passed:
        return Verdict("Verified", f"Within tolerance. {how}", "good")
    return Verdict("Failed", f"Over tolerance: the result was not kept. {how}", "bad")


def headline(report: Report) -> str:
    """One sentence."""
    layers = [site for site in report.sites if site.kind == "linear"]
    if not report.sites:
        return "No linear layers with stored weights: nothing to rewrite."
    rewritten = sum(site.outcome is Outcome.REWRITTEN for site in layers)
    parts = [f"{rewritten} of {number_of(len(layers), 'linear layer')} rewritten"]
    attentions = sum(site.kind == "attention" and site.outcome is Outcome.REWRITTEN for site in report.sites)
    if attentions:
        parts[0] = parts[0].replace(" rewritten", f" and {number_of(attentions, 'attention')} rewritten")
    return "; ".join([*parts, *(text for text in [closeness(report) or flip_counts(report)] if text)]) + "."


def closeness(report: Report) -> str | None:
    """How much closer to the oracle the result is than what the user runs today; None: nobody compared them."""
    outputs = [] if report.verification is None else report.verification.outputs
    if outputs and all(row.relative_l2 == 0 for row in outputs):
        return "exactly the model’s meaning"
    gains = [o.baseline_relative_l2 / o.relative_l2 for o in outputs if o.baseline_relative_l2 and o.relative_l2]
    if not gains:
        return None
    low, high = min(gains), max(gains)
    if low > 0.8 and high < 1.25:
        return "as close to the model’s meaning as today’s session"
    shown = _figure(low) if _figure(low) == _figure(high) else f"{_figure(low)} to {_figure(high)}"
    if low >= 1:
        return f"{shown} times closer to the model’s meaning than today’s session"
    return f"{shown} times as close to the model’s meaning as today’s session"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def counts(report: Report) -> str:
    """``15 rewritten, 2 kept``."""
    summary = report.summary
    found = ((summary.rewritten, "rewritten"), (summary.kept, "kept"), (summary.unsupported, "unsupported"))
    return ", ".join(f"{count} {word}" for count, word in found if count)


def tiles(report: Report) -> Iterator[Tile]:
    """The figures that there are."""
    yield from _distances(report)
    yield from _on_the_text(report)
    pricing, verification = report.pricing, report.verification
    if pricing is not None and pricing.before.seconds:
        yield Tile(
            "Predicted time of a run",
            f"{clock(pricing.before.seconds)} → {clock(pricing.after.seconds)}",
            f"of the sites below, on {pricing.target}",
        )
    if verification is not None and verification.source_ms is not None and verification.result_ms is not None:
        yield Tile(
            "Measured time of a run",
            f"{clock(verification.source_ms / 1e3)} → {clock(verification.result_ms / 1e3)}",
            "today’s session, and the result, on the inputs below",
        )
    caches = [
        s for s in report.sites if s.cache_bytes and s.source_cache_bytes and s.cache_bytes != s.source_cache_bytes
    ]
    if caches:
        before, after = sum(s.source_cache_bytes or 0 for s in caches), sum(s.cache_bytes or 0 for s in caches)
        yield Tile("Cache, a token", f"{amount(before)} → {amount(after)}", "bytes that every token takes")


def _on_the_text(report: Report) -> Iterator[Tile]:
    found, ours = report.evaluation, result_run(report)
    before = None if found is None else today(found)
    if found is None or ours is None or before is None:
        return
    of = f"of {found.tokens.predictions:,} tokens of a text, today and now"
    yield Tile("Flips", f"{len(before.flips):,} → {len(ours.flips):,}", of)
    exact = f"the oracle’s is {found.oracle.perplexity:.4f}"
    yield Tile("Perplexity", f"{before.perplexity:.4f} → {ours.perplexity:.4f}", exact)


def _distances(report: Report) -> Iterator[Tile]:
    verification = report.verification
    if verification is None:
        return
    if verification.outputs:
        result = max(row.relative_l2 for row in verification.outputs)
        baseline = max((row.baseline_relative_l2 or 0 for row in verification.outputs), default=0)
        figure = f"{distance(baseline)} → {distance(result)}" if baseline else distance(result)
        note = "relative L2 of the worst output"
        yield Tile("Distance from the oracle", figure, f"{note}, today and now" if baseline else note)
        agreements = [row.argmax for row in verification.outputs if row.argmax is not None]
        if agreements:
            positions = sum(a.positions for a in agreements)
            equal = round(sum(a.equal * a.positions for a in agreements))
            yield Tile("Same top token", f"{equal / positions:.1%}", f"{equal} of {positions} positions agree")
    elif verification.sites:
        worst = verification.sites[0].relative_l2
        yield Tile(
            "Worst layer alone", distance(worst), f"relative L2 of {number_of(len(verification.sites), 'layer')}"
        )


def flips(outputs: list[OutputRow]) -> list[Flip]:
    """Those of the result and those of today's session, the largest margin first."""
    found = []
    for row in outputs:
        for who, agreement in (("result", row.argmax), ("today’s session", row.baseline_argmax)):
            found += [
                Flip(row.name, row.feed, who, d.index, d.oracle, d.found, d.margin)
                for d in (agreement.disagreements if agreement else ())
            ]
    return sorted(found, key=lambda flip: -flip.margin)


def agreement(value: Agreement | None) -> str:
    """``99.8% of 512``."""
    return "–" if value is None else f"{value.equal:.1%} of {value.positions}"
