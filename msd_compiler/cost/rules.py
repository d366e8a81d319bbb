"""What a device's own public kernels would do at a site, and why the model would do otherwise."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from .accelerator import dequantized_attention, dequantized_linear, msd_attention, msd_linear
from .candidates import TIE
from .paper import break_even_rows
from .price import NoFigure, Price
from .profile import AcceleratorProfile, Profile, Rules
from .work import AttentionWork, LinearWork

CONTEXT = 4096
"""Cached tokens, where attention's times are compared and no number is given."""

MOST_ROWS = 2**20
"""Up to here a row number is looked for from which both ways are as fast."""

TERMS = 2


def refusal(rules: Rules, work: LinearWork | AttentionWork, rows: int) -> str | None:
    """Why a device's public kernels would dequantize rather than decompose; None: they would decompose.

    Args:
        rows: of the product, or of the queries of a KV head.
    """
    if not work.is_coded:
        return f"the {'cache' if isinstance(work, AttentionWork) else 'weight'} holds floats"
    if isinstance(work, AttentionWork):
        most, what = rules.most_attention_rows, "query rows of a KV head"
    elif work.per_channel:
        most, what = rules.most_rows, "rows"
    else:
        most, what = rules.group_steps_per_row, "rows"
    if most is None:
        return "they have no decomposed kernel for it"
    limit = most.value
    if isinstance(work, LinearWork) and not work.per_channel:
        limit = work.group // limit
        what = f"rows with groups of {work.group}"
    if rows > limit:
        return f"{rows} {what}; they decompose up to {limit:g}"
    if isinstance(work, LinearWork) and rules.dimension_multiple is not None:
        multiple = rules.dimension_multiple.value
        if work.k % multiple or work.n % multiple:
            return f"K = {work.k} and N = {work.n}; they decompose where both are multiples of {multiple:g}"
    return None


def explain(
    profile: Profile, work: LinearWork | AttentionWork, rows: int, rewritten: bool, *, context: int = CONTEXT
) -> str | None:
    """A sentence on a decision that is not the one of the device's public kernels.

    Args:
        rows: of the product, or of the queries of a KV head.
        rewritten: whether the model decided for the decomposed product.
        context: cached tokens of attention.

    Returns:
        None where both agree, or the target has no rules.
    """
    if not isinstance(profile, AcceleratorProfile) or profile.rules == Rules():
        return None
    reason = refusal(profile.rules, work, rows)
    if rewritten == (reason is None):
        return None
    theirs = f"public kernels for {profile.name} would {'decompose' if reason is None else f'dequantize ({reason})'}"
    try:
        return f"{theirs}; {_compared(profile, work, rows, context)}"
    except NoFigure as missing:
        return f"{theirs}; {missing}"


def rows_of_tie(profile: AcceleratorProfile, work: LinearWork | AttentionWork, context: int = CONTEXT) -> int | None:
    """From how many rows on dequantizing is as fast as decomposing, by the closed forms; None: not up to `MOST_ROWS`.

    Raises:
        NoFigure: the profile lacks a unit that one of them needs.
    """

    def is_tie(rows: int) -> bool:
        decomposed, dequantized = _prices(profile, work, rows, context)
        return dequantized.seconds <= decomposed.seconds * (1 + TIE)

    # Where int8 is at most twice as fast as bf16, a row adds no less to the decomposed time than to the other: once a
    # tie, always a tie.
    rows = 1 + bisect_left(range(1, MOST_ROWS), True, key=is_tie)
    return rows if rows < MOST_ROWS else None


def _compared(profile: AcceleratorProfile, work: LinearWork | AttentionWork, rows: int, context: int) -> str:
    decomposed, dequantized = (f"{price.seconds * 1e6:.3g} µs" for price in _prices(profile, work, rows, context))
    times = f"the closed forms give {decomposed} decomposed and {dequantized} dequantized"
    tie = rows_of_tie(profile, work, context)
    if tie is not None and rows >= tie:
        return f"{times}: from {tie} rows on dequantizing is no slower"
    saved = "the way of dequantized values through memory" if profile.dequantized == "memory" else "vector work"
    if tie is None:
        return f"{times}: decomposing saves {saved} at any number of rows"
    unit = _slowest_unit(profile, _prices(profile, work, tie, context)[0])
    by_work = ""
    if isinstance(work, AttentionWork):
        by_work = f" (by vector work alone up to {break_even_rows(context, work.head_size):.0f} rows, the paper's N*)"
    return f"{times}: decomposing saves {saved}, until from {tie} rows on it waits as long for {unit}{by_work}"


def _prices(
    profile: AcceleratorProfile, work: LinearWork | AttentionWork, rows: int, context: int
) -> tuple[Price, Price]:
    """Decomposed and dequantized."""
    if isinstance(work, LinearWork):
        return msd_linear(profile, work, rows, TERMS, per_row=True), dequantized_linear(profile, work, rows)
    seen = replace(work, heads=rows * work.kv_heads)  # as many query heads as rows, for one new token
    return msd_attention(profile, seen, 1, 1, context), dequantized_attention(profile, seen, 1, 1, context)


def _slowest_unit(profile: AcceleratorProfile, price: Price) -> str:
    """What a decomposed product waits for where it saves nothing; in memory, that can be partial sums alone."""
    seconds = {
        "the vector units": price.ops["vector"] / profile.vector.value,
        "the matrix unit": sum(price.ops.get(f"matrix {n}", 0) / rate.value for n, rate in profile.matrix.items()),
        "its groups' partial sums in memory": price.bytes / profile.read.value,
    }
    return max(seconds, key=lambda unit: seconds[unit])
