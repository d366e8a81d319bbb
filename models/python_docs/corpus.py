"""The text: the documentation and the licence that every installation of Python carries. Nothing is downloaded."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

REFERENCE = "pydoc_data.topics"
"""The source that is the language reference."""

SHORTEST = 160
"""Characters of a document: what is shorter teaches "Return the foo." and little else."""

VALIDATION = 25
"""One document in this many is held out."""

_OTHERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "_bundled"}
_TYPOGRAPHY = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\u00a0": " "})
_TITLE = re.compile(r"^(?P<title>\S.*)\n(?P<line>\*{3,}|={3,}|-{3,}|~{3,})\n", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A text that stands for itself: a section of the reference, a docstring, a licence."""

    source: str
    text: str

    @property
    def is_reference(self) -> bool:
        """Whether it is of the language reference, the best prose here."""
        return self.source == REFERENCE

    @property
    def held_out(self) -> bool:
        """Whether it is for validation: by its own hash, so that no other document changes the answer."""
        return int(hashlib.sha256(self.text.encode()).hexdigest(), 16) % VALIDATION == 0


def documents() -> list[Document]:
    """All there is, in an order that only the version of Python decides, nothing twice."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [*_topics(), *_docstrings(library), *_licence(library)]
    return list(_without_repeats(d for d in found if len(d.text) >= SHORTEST))


def normalised(text: str) -> str:
    """Plain quotes, no tabs, nothing at the ends of lines, one blank line at most."""
    lines = [line.rstrip() for line in text.translate(_TYPOGRAPHY).expandtabs(4).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def sections(text: str) -> Iterator[str]:
    """A topic cut at its underlined titles; a title keeps its line and loses what underlines it."""
    marks = list(_TITLE.finditer(text))
    starts = [*(m.start() for m in marks), len(text)]
    if text[: starts[0]].strip():
        yield text[: starts[0]]
    for mark, end in zip(marks, starts[1:], strict=True):
        body = text[mark.end() : end]
        if body.strip():
            yield f"{mark['title']}\n\n{body.strip(chr(10))}"


def _topics() -> Iterator[Document]:
    for name in sorted(topics):
        for section in sections(topics[name]):
            yield Document(REFERENCE, normalised(section))


def _docstrings(library: Path) -> Iterator[Document]:
    """Docstrings of the standard library's modules, classes and functions, read without importing anything."""
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).parts):
        if not _OTHERS.isdisjoint(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield Document("docstrings of the standard library", normalised(ast.get_docstring(node) or ""))


def _licence(library: Path) -> Iterator[Document]:
    path = library / "LICENSE.txt"
    if path.exists():
        for part in re.split(r"\n(?=[A-Z. ]+\n=+\n)", path.read_text("utf-8")):
            yield Document("LICENSE.txt", normalised(re.sub(r"\n[=-]{3,}\n", "\n", part)))


def _without_repeats(found: Iterator[Document]) -> Iterator[Document]:
    """Leaves out what has mostly been said: topics contain one another, and what is held out must not be known already."""
    seen: set[str] = set()
    for document in found:
        lines = {line.strip() for line in document.text.splitlines() if len(line.strip()) >= 40}
        if len(lines & seen) <= len(lines) / 5:
            yield document
        seen |= lines
