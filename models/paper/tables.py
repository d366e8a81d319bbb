"""The paper's tables: what it prints, what its own set-up gives, and what an honest one does.

``python models/paper/tables.py`` computes everything and writes ``README.md`` and its pictures beside this file, or to the folder that
``-o`` names. ``--fast`` computes a part of the same figures, prints them and writes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import attention
import cost
import gemm
import jinja2
import mxfp4
from plots import PICTURES, draw
from rich.console import Console
from rich.progress import track
from rows import Part, Table, shown, shown_miss

HERE = Path(__file__).parent
SECTIONS = {"INT8 products": gemm, "MXFP4 activations": mxfp4, "Attention": attention, "Cost": cost}
COST = "all of it: 3.5 minutes of processor time, 1.4 GB"


def compute(seed: int, fast: bool) -> Sequence[tuple[str, Sequence[Part]]]:
    """Every table by section, in order; fast: a part of them, and of their rows."""
    progress = track(SECTIONS.items(), "computing", console=Console(stderr=True), transient=True)
    return [(name, list(module.tables(seed, fast))) for name, module in progress]


def page(sections: Sequence[tuple[str, Sequence[Part]]], seed: int) -> str:
    """Markdown of the tables."""
    tabled = [(part.title.partition(":")[0], row) for _, parts in sections for part in parts
              if isinstance(part, Table) for row in part.rows]  # fmt: skip
    honest = {(table, row.name): shown(row.honest) for table, row in tabled}
    found = [(table, row) for table, row in tabled if row.printed]
    misses = [(table, row) for table, row in found if row.miss is not None]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["figure"] = shown
    return environment.get_template("README.md.jinja").render(
        sections=sections,
        seed=seed,
        cost=COST,
        honest=honest if ("Table 9", "dequantized") in honest else None,
        misses=misses,
        printed=len(found),
        agreeing=len(found) - len(misses),
        pictures=PICTURES,
        letters="abcdefgh",
        shown=shown,
        shown_miss=shown_miss,
    )


def main() -> None:
    """Compute, and write or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a part of the figures, printed")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("-o", "--output", type=Path, default=HERE, help="folder to write to")
    arguments = parser.parse_args()
    sections = compute(arguments.seed, arguments.fast)
    text = page(sections, arguments.seed)
    if arguments.fast:
        print(text, end="")
        return
    (arguments.output / "README.md").write_text(text, encoding="utf-8")
    draw((part for _, parts in sections for part in parts), arguments.output)
    print(arguments.output / "README.md")


if __name__ == "__main__":
    main()
