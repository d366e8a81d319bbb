"""The report as one HTML page, which needs nothing but itself: no network, no other file.

`words` and `evaluation` say what it says, `drawing` and `plots` draw; `page.html.jinja` puts them together with `page.css` and
`page.js`.
What comes from a model (names, paths) is untrusted: the template escapes all of it, and the page's script makes text of it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..aside import Aside
from ..errors import OptionError, OutputError
from ..report import Report, SiteRow
from . import evaluation, units, words
from .drawing import Drawing, drawings
from .plots import chosen, measured_seconds, plots

FORMATS = (".json", ".html")


def check_format(path: Path) -> None:
    """See that a report can be written in the format that the file's name asks for.

    Raises:
        OptionError: it ends otherwise.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"report {str(path)!r} must end with {' or '.join(FORMATS)}")


def write_report(report: Report, path: Path) -> None:
    """Write a report as JSON or as a page, by the file's suffix; whole, or not at all.

    Raises:
        OptionError: the file's name asks for another format.
        OutputError: the file cannot be written.
    """
    check_format(path)
    text = page(report) if path.suffix.lower() == ".html" else report.json_text()
    try:
        aside = Aside(path.parent, path.name)
        try:
            written = aside.path / path.name
            written.write_text(text, encoding="utf-8")
            written.replace(path)
        finally:
            aside.remove()
    except OSError as error:
        raise OutputError(f"report {str(path)!r} cannot be written: {error.strerror}") from error


def page(report: Report) -> str:
    """The report as an HTML document; the same text for the same report."""
    distinct: dict[tuple[Drawing, ...], int] = {}
    rows = [(site, distinct.setdefault(drawings(site), len(distinct))) for site in report.sites]
    outputs = [] if report.verification is None else report.verification.outputs
    return _template().render(
        report=report,
        name=words.model_name(report),
        verdict=words.verdict(report),
        headline=words.headline(report),
        counts=words.counts(report),
        tiles=list(words.tiles(report)),
        plots=plots(report),
        rows=rows,
        drawings=list(distinct),
        outputs=sorted(outputs, key=lambda row: (row.argmax is None, -row.relative_l2)),
        flips=words.flips(outputs),
        evaluation=evaluation,
        evaluation_plots=evaluation.evaluation_plots(report),
        noise=evaluation.noise_of_sites(report),
        measured_seconds=measured_seconds,
        data=_embedded(report),
        css=_asset("page.css"),
        js=_asset("page.js"),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "agreement": words.agreement,
        "amount": units.amount,
        "clock": units.clock,
        "distance": units.distance,
        "size": _size,
        "chosen": chosen,
    }
    return environment.get_template("page.html.jinja")


def _asset(name: str) -> Markup:
    """A file of ours, which goes into the page as it is."""
    return Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _embedded(report: Report) -> Markup:
    """The report's JSON for a ``script`` element, which only ``</script>`` and ``<!--`` could end or confuse."""
    return Markup(report.model_dump_json(exclude_none=True).replace("<", "\\u003c"))


def _size(site: SiteRow) -> str:
    if site.kind == "attention" and site.heads:
        return f"{site.heads}/{site.kv_heads or site.heads} heads"
    return f"{site.k} × {site.n}" if site.k and site.n else ""
