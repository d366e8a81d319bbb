"""Every way to compute a site on a target, priced over a workload, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..runtime_ops.matmul.layout import ActivationFormat
from . import error as law
from .accelerator import dequantized_attention, dequantized_linear, msd_attention, msd_fp4_linear, msd_linear
from .cpu import cpu_attention, cpu_linear
from .instructions import two_passes_over_fused
from .price import NoFigure, Price
from .profile import CpuProfile, Profile, Way
from .work import AttentionWork, LinearWork
from .workload import Phase, Workload

BUDGETS = {"cpu": 1e-4, "accelerator": 2e-3}
"""Relative L2 per site, by family: what two terms keep; what an accelerator's own bf16 keeps."""

TIE = 0.05
"""Candidates whose times differ by less are taken to be as fast: no figure is better than that."""

LEAST = 5e-6
"""Seconds by which candidates must differ as well: what a call of a node takes varies by as much."""


@dataclass(frozen=True)
class Candidate:
    """A way to compute a site."""

    name: str
    """"keep", "float activations", "2 terms", "2 terms, a scale per row"."""
    way: Way
    error: float
    """Predicted relative L2 of the site's output."""
    terms: int | None = None
    per_row: bool = False
    prices: tuple[Price, ...] = ()
    """By phase of the workload; empty: the target has no figure for it."""
    seconds: float = float("inf")
    """Mean over the workload's runs."""
    why_not: str | None = None
    """Why it is not chosen from."""
    activation: ActivationFormat = ActivationFormat.INT8
    """What a term is."""


@dataclass(frozen=True)
class Decided:
    """A choice among candidates."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    margin: float | None
    """Time of the fastest other candidate within the budget, over the chosen one's, less 1; None: there is no other."""


@dataclass(frozen=True)
class Pricing:
    """What sites are priced with."""

    profile: Profile
    workload: Workload
    budget: float
    footprint: float = 0
    """Bytes of all weights of the model: more than a cache, and every run reads them from memory."""
    activations: dict[str, law.Activation] = field(default_factory=dict)
    """By site, what samples say."""


def linear_candidates(
    pricing: Pricing,
    work: LinearWork,
    rows: Callable[[Phase], int],
    *,
    source_way: Way,
    can_be_float: bool,
    activation: law.Activation,
) -> list[Candidate]:
    """Every way to compute a product.

    Args:
        rows: M in a phase.
        source_way: how the model as it stands computes it in a default session of a CPU.
        can_be_float: whether the file can say "float activations" (an `accuracy_level` to set).
        activation: what is known of the values.
    """
    profile = pricing.profile
    found = []
    if isinstance(profile, CpuProfile):

        def on_cpu(way: Way, terms: int | None = None) -> Callable[[Phase], Price]:
            return lambda phase: cpu_linear(profile, way, work, rows(phase), terms, footprint=pricing.footprint)

        rounded = law.relative_l2(1, work.k, work.group, activation)
        kept = rounded if source_way is Way.SESSION else law.FLOAT_ERROR
        found.append(_priced(pricing, Candidate("keep", source_way, kept), on_cpu(source_way)))
        if can_be_float and source_way is Way.SESSION:
            in_floats = Candidate("float activations", Way.FLOAT, law.FLOAT_ERROR)
            found.append(_priced(pricing, in_floats, on_cpu(Way.FLOAT)))
        found += [_priced(pricing, c, on_cpu(Way.MSD, c.terms)) for c in _decomposed(work, activation)]
        fused = next(c for c in found if c.terms == 2 and not c.per_row)
        return [*found, *_in_two_passes(pricing, fused, rows)]

    def decomposed(terms: int, per_row: bool) -> Callable[[Phase], Price]:
        return lambda phase: msd_linear(profile, work, rows(phase), terms, per_row=per_row)

    keep = Candidate("keep", Way.SESSION, law.BF16_ERROR)
    found.append(_priced(pricing, keep, lambda phase: dequantized_linear(profile, work, rows(phase))))
    for candidate in _decomposed(work, activation):
        assert candidate.terms is not None
        found.append(_priced(pricing, candidate, decomposed(candidate.terms, candidate.per_row)))
    if work.is_fp4:
        # the weight's own grid: a matrix unit multiplies two operands of one type
        in_fp4 = in_format(ActivationFormat.MXFP4_E2M1_X2)
        found.append(_priced(pricing, in_fp4, lambda phase: msd_fp4_linear(profile, work, rows(phase))))
    return found


def in_format(activation: ActivationFormat) -> Candidate:
    """A product of activations in a format that is not INT8 terms, without prices."""
    # "terms" are the INT8 digits that hold a code: one, but 18 bits of MXFP8 take three
    terms = 3 if activation is ActivationFormat.MXFP8 else 1
    error = law.FORMAT_ERRORS[activation]
    return Candidate(activation.label, Way.MSD, error, terms, activation=activation)


def _in_two_passes(pricing: Pricing, fused: Candidate, rows: Callable[[Phase], int]) -> Iterator[Candidate]:
    """Two terms in a pass of INT8 products each, by the instructions that takes: the same result, for comparison."""
    assert isinstance(pricing.profile, CpuProfile)
    instruction_set, reads = pricing.profile.instruction_set, pricing.profile.reads
    if not fused.prices or two_passes_over_fused(instruction_set, 1) is None:
        return
    by_phase = dict(zip(pricing.workload.phases, fused.prices, strict=True))

    def price(phase: Phase) -> Price:
        ratio = two_passes_over_fused(instruction_set, rows(phase))
        assert ratio is not None
        reading = by_phase[phase].bytes / reads.rate(max(pricing.footprint, by_phase[phase].bytes))
        return replace(by_phase[phase], seconds=max(by_phase[phase].seconds * ratio, reading))

    why_not = "the library multiplies the fused code, with the same result"
    yield _priced(pricing, replace(fused, name="2 terms, two passes", prices=(), why_not=why_not), price)


def _decomposed(work: LinearWork, activation: law.Activation) -> list[Candidate]:
    candidates = []
    for terms in (1, 2, 3):
        for per_row in (False, True):
            error = law.relative_l2(terms, work.k, work.k if per_row else work.group, activation)
            name = f"{terms} term{'s' if terms > 1 else ''}{', a scale per row' if per_row else ''}"
            candidates.append(Candidate(name, Way.MSD, error + law.FLOAT_ERROR, terms, per_row))
    return candidates


ATTENTION_ERRORS = {8: 1e-3, 4: 1e-2}
"""Of a cache in so many bits against a float one, by METHOD section 7: rough, for a cache is a user's choice, not ours."""


def attention_candidates(pricing: Pricing, work: AttentionWork, rewritten_bits: int | None) -> list[Candidate]:
    """Attention as it stands, and with products of codes.

    Args:
        rewritten_bits: of the cache of the rewritten attention; None: it cannot be rewritten.
    """
    profile = pricing.profile
    after = work if rewritten_bits is None else AttentionWork(work.heads, work.kv_heads, work.head_size, rewritten_bits)

    def price(way: Way, work: AttentionWork) -> Callable[[Phase], Price]:
        if isinstance(profile, CpuProfile):
            return lambda p: cpu_attention(profile, way, work, p.batch, p.tokens, p.context)
        ours = way is Way.MSD
        closed_form = msd_attention if ours else dequantized_attention
        return lambda p: closed_form(profile, work, p.batch, p.tokens, p.context)

    found = [_priced(pricing, Candidate("keep", Way.SESSION, law.FLOAT_ERROR), price(Way.SESSION, work))]
    if rewritten_bits is not None:
        extra = 0.0 if rewritten_bits == work.bits else ATTENTION_ERRORS[rewritten_bits]
        error = law.relative_l2(2, work.head_size, work.head_size) + extra
        name = f"2 terms, int{rewritten_bits} cache"
        found.append(_priced(pricing, Candidate(name, Way.MSD, error, 2), price(Way.MSD, after)))
    return found


def _priced(pricing: Pricing, candidate: Candidate, price: Callable[[Phase], Price]) -> Candidate:
    try:
        prices = tuple(price(phase) for phase in pricing.workload.phases)
    except NoFigure as missing:
        return replace(candidate, why_not=str(missing))
    seconds = sum(phase.share * p.seconds for phase, p in zip(pricing.workload.phases, prices, strict=True))
    return replace(candidate, prices=prices, seconds=seconds)


def decide(pricing: Pricing, candidates: Sequence[Candidate], *, terms: int | None = None) -> Decided:
    """The fastest candidate within the accuracy budget, the more accurate one of two; but ours if it is about as fast on a CPU.

    For our results do not depend on the number of rows or threads. Where nothing is within the budget, the most accurate.

    Args:
        terms: choose among candidates of so many terms only.
    """

    def why_not(candidate: Candidate) -> str | None:
        is_int8 = candidate.activation is ActivationFormat.INT8
        if candidate.why_not is None and terms is not None and (candidate.terms != terms or not is_int8):
            return f"{terms} terms are needed"
        if candidate.why_not is None and terms is None and candidate.error > pricing.budget:
            return f"its error is above the budget of {pricing.budget:g}"
        return candidate.why_not

    judged = [replace(c, why_not=why_not(c)) for c in candidates]
    open_ = [c for c in judged if c.why_not is None]
    if not open_:
        asked = [c for c in judged if terms is None or c.terms == terms] or judged
        open_ = [min(asked, key=lambda c: (not c.prices, c.error))]
    fastest = min(open_, key=lambda c: (c.seconds, c.error))
    ours = min((c for c in open_ if c.way is Way.MSD), key=lambda c: (c.seconds, c.error), default=fastest)
    is_cpu = isinstance(pricing.profile, CpuProfile)  # whose kernels are ours
    allowance = max(TIE * fastest.seconds, LEAST) if is_cpu else 0
    chosen = ours if ours.seconds <= fastest.seconds + allowance else fastest
    others = [c.seconds for c in open_ if c.way is not chosen.way]
    margin = min(others) / chosen.seconds - 1 if others and chosen.seconds > 0 else None
    return Decided(chosen, tuple(judged), margin)


def total_bytes(works: Iterable[LinearWork]) -> float:
    """Of all weights: what a run reads."""
    return sum(work.weight_bytes * work.copies for work in works)
