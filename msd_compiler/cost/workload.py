"""What a model is used for: phases, how often each is, and the sizes that its symbolic dimensions take."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import OptionError
from .profile import read_text

MOST = 2**31


@dataclass(frozen=True)
class Phase:
    """One kind of run."""

    name: str
    """"decode": a token at a time; any other: as many as said."""
    share: float
    """Of all runs."""
    batch: int
    tokens: int
    """New ones of a sequence."""
    context: int
    """Tokens that attention sees, new ones included."""

    def rows(self, symbolic: int | str | None) -> int:
        """M of a layer whose rows are a number, or a product of dimension names; unknown: batch times tokens."""
        if isinstance(symbolic, int):
            return symbolic
        if symbolic is None:
            return self.batch * self.tokens
        factors = re.split(r"\s*[*×]\s*", symbolic)
        names = [factor for factor in factors if not factor.isdecimal()]
        return math.prod(
            int(factor) if factor.isdecimal() else self._dimension(factor, factor == names[-1]) for factor in factors
        )

    def _dimension(self, name: str, is_last: bool) -> int:
        """Of dimensions whose names say nothing, the last one is that of the tokens."""
        lower = name.lower()
        if "batch" in lower:
            return self.batch
        if any(word in lower for word in ("past", "total", "cache", "context")):
            return self.context
        return self.tokens if is_last or any(word in lower for word in ("seq", "token", "len")) else self.batch


@dataclass(frozen=True)
class Workload:
    """Phases whose shares sum to 1."""

    phases: tuple[Phase, ...]
    text: str
    """As the user gave it."""


DEFAULT = "decode=0.9@batch1,context1024;prefill=0.1@512"

_PART = re.compile(r"(?P<name>[A-Za-z][\w-]*)=(?P<share>[^@]+)@(?P<sizes>.+)")
_SIZE = re.compile(r"(?P<key>batch|tokens|context)?(?P<number>[0-9]{1,18})")


def parse_workload(text: str) -> Workload:
    """``decode=0.8@batch1,context4096;prefill=0.2@512``: name=share@sizes, sizes being ``batchN``, ``contextN`` and ``N`` tokens.

    Args:
        text: such a text, or a file that holds one, phases on lines of their own or separated by semicolons; lines that
            begin with # are comments.

    Raises:
        OptionError: it says something else, or something impossible.
    """
    where = ""
    if "=" not in text and (content := read_text(text)) is not None:
        where, text = f"{text}: ", content
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    parts = [part.strip() for line in lines for part in line.split(";") if part.strip()]
    if not parts:
        raise OptionError(f"{where}workload is empty; needed like {DEFAULT!r}")
    phases = [_phase(part, where) for part in parts]
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise OptionError(f"{where}workload names a phase twice: {', '.join(names)}")
    total = sum(phase.share for phase in phases)
    shares = [Phase(p.name, p.share / total, p.batch, p.tokens, p.context) for p in phases]
    return Workload(tuple(shares), ";".join(parts))


def _phase(part: str, where: str) -> Phase:
    match = _PART.fullmatch(part)
    if match is None:
        raise OptionError(
            f"{where}workload has {part!r}; needed name=share@sizes, like 'decode=0.8@batch1,context4096'"
        )
    name = match["name"]
    try:
        share = float(match["share"])
    except ValueError:
        share = math.nan
    if not 0 < share < MOST:
        problem = f"it must be a number above 0 and below {MOST}"
        raise OptionError(f"{where}workload: the share of {name!r} is {match['share']!r}; {problem}")
    sizes: dict[str, int] = {}
    for size in match["sizes"].split(","):
        found = _SIZE.fullmatch(size.strip())
        if found is None:
            raise OptionError(f"{where}workload: {name!r} has the size {size!r}; needed batchN, contextN or N tokens")
        key, number = found["key"] or "tokens", int(found["number"])
        if key in sizes or not 1 <= number < MOST:
            problem = "twice" if key in sizes else f"as {number}, needed 1 to {MOST - 1}"
            raise OptionError(f"{where}workload: {name!r} has {key} {problem}")
        sizes[key] = number
    tokens = sizes.get("tokens", 1)
    context = sizes.get("context", tokens)
    if context < tokens:
        raise OptionError(
            f"{where}workload: {name!r} has {tokens} new tokens and a context of {context}, which holds them"
        )
    if sizes.get("batch", 1) * tokens >= MOST:
        raise OptionError(
            f"{where}workload: {name!r} has {sizes['batch']} times {tokens} rows, needed fewer than {MOST}"
        )
    return Phase(name, share, sizes.get("batch", 1), tokens, context)
