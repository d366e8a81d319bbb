"""What is to be done with a model: its layers found, a choice for each, and the row of the report that says so.

The one place that knows engine and rules alike, with `api`, which carries out what is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

from onnx import TensorProto

from .attention import AttentionSite, CachePlan, bytes_per_token, not_lowered
from .choose import Choice, Override, Overrides, choose
from .cost.candidates import Decided as Priced
from .cost.profile import Way
from .cost.work import LinearWork
from .crests import measure_crests
from .errors import ModelError
from .exact_products import exact_products
from .facts import ActivationCodes, QuantizedLinear, ReasonCode, Reject
from .float_activations import float_activations
from .inline import inlined
from .kv_cache import KvCache, cache_plans, float_caches, has_oracle, why_not, with_rounded_cache
from .linked import Linked
from .oracle_session import Convert
from .passes import ATTENTION_READERS, READERS, REFINERS
from .passes.lower_linear import packed_bytes, plan_of
from .pricing import Target, add_candidates, pricing_for, pricing_row
from .quantize import WeightRounding
from .quantize import quantize as round_weights
from .reader import Site, find_sites
from .report import UNSUPPORTED, Outcome, PricingRow, SiteRow
from .runtime_constants import with_int8_constants
from .runtime_ops.matmul.mx import MX_FORMATS
from .runtime_ops.matmul.reference import LIMITS
from .runtime_ops.spelling import OLDEST_OPSET
from .source import Source, type_name
from .unfuse import Place, gaining_products, unfused
from .verification import Progress


class Activations(StrEnum):
    """What becomes of activations that the model itself rounds to integers."""

    KEEP = "keep"
    """Their codes are multiplied exactly: the rounding is part of what the model means."""
    UPGRADE = "upgrade"
    """The rounding goes, and the float activation gets two terms like any other."""


@dataclass(frozen=True)
class Options:
    """What a user asks of the result."""

    terms: int | None = None
    """INT8 terms of float activations; None: chosen."""
    quantization: WeightRounding | None = None
    """How to round the weights of float layers; None: they stay float."""
    activations: Activations = Activations.KEEP
    kv_cache: KvCache | None = None
    """How to make float caches low-bit; None: they stay."""
    target: Target = field(default_factory=Target)
    """What the choice is priced with."""
    overrides: Overrides = field(default_factory=Overrides)
    """What is said of single layers."""


@dataclass(frozen=True)
class Decision:
    """A layer and what is to be done with it."""

    site: Site
    choice: Choice
    row: SiteRow


@dataclass(frozen=True)
class Decided:
    """A model and what is to be done with it."""

    source: Source
    """The model with its weights rounded, where that was asked: to float4 as int8 codes that mean the same."""
    linked: Linked
    """The same as readers see it: functions inlined, integer products spelled out, activations float where asked."""
    decisions: tuple[Decision, ...]
    oracle: Source | None
    """What the result must mean; it has no product that a CPU saturates. None: no standard ops say it."""
    caches: Mapping[str, CachePlan]
    """By name of an attention whose cache becomes low-bit, how it is kept."""
    with_float_caches: Convert | None
    """Makes a feed of the source, whose caches are float, of one of the oracle's; None: they are the same."""
    pricing: PricingRow
    """What the choices were priced with, and what all take together."""
    other_activations: Source | None
    """The model with the roundings of its activations the other way: left out where kept, left in where left out."""

    @property
    def rows(self) -> list[SiteRow]:
        """The report's."""
        return [decision.row for decision in self.decisions]


def decide(source: Source, options: Options, progress: Progress) -> Decided:
    """Find every linear layer of a model and decide what is done with it.

    Raises:
        ModelError: the model cannot be right.
        OptionError: the installed onnxruntime cannot round weights so.
    """
    rounded: dict[str, str] = {}
    readable = source.opset == 0 or source.opset >= OLDEST_OPSET
    if options.quantization is not None and readable:
        source, rounded = round_weights(source, options.quantization, progress=progress)
    flat = inlined(source)
    with _readable(flat):
        seen = _see(source, flat, options)
    # what is run today is in types that a runtime has, where it was we who rounded
    return _decide(with_int8_constants(source) if rounded else source, seen, options, rounded)


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """What malformed nodes make a rewrite of integer ops stumble over, as an error of the model."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, AttributeError) as error:
        raise ModelError(f"{source.name}: its quantized activations cannot be read: {error}") from error


@dataclass(frozen=True)
class _Seen:
    """What was found in a model, before any choice; names as in `Decided`."""

    linked: Linked
    sites: list[Site]
    forms: dict[str, str]
    """Spelling in the source of layers that are spelled out anew, by name."""
    dropped: dict[str, str]
    """The rounding of its activation that a layer loses, by name."""
    oracle: Source | None
    other_activations: Source | None
    caches: Mapping[str, CachePlan]
    with_float_caches: Convert | None


def _see(source: Source, flat: Source, options: Options) -> _Seen:
    linked = Linked.of(flat)
    kept = exact_products(linked)
    if options.activations is Activations.UPGRADE:
        upgraded, dropped = float_activations(linked)
        linked = linked if upgraded is flat else Linked.of(upgraded)
        sites, forms = _sites(linked), dict[str, str]()
        is_rounded = upgraded is not flat
        oracle, other = (upgraded, kept) if is_rounded else (source, None)
    else:
        as_it_is = linked
        linked, sites, forms = _with_codes(as_it_is)
        dropped = {}
        is_rounded = any(_codes(site) is not None for site in sites)
        oracle = kept if kept is not flat else source
        other = float_activations(as_it_is)[0] if is_rounded else None
    seen = _Seen(linked, sites, forms, dropped, oracle, other, {}, None)
    return seen if options.kv_cache is None else _with_low_bit_caches(seen, oracle, options.kv_cache, options.overrides)


def _with_low_bit_caches(seen: _Seen, oracle: Source, how: KvCache, overrides: Overrides) -> _Seen:
    changeable = _changeable(seen.sites, how, overrides)
    caches = cache_plans(seen.linked.source, changeable, how)
    if not caches:
        return seen
    other = seen.other_activations
    told = has_oracle(changeable, how)
    return replace(
        seen,
        oracle=_with_rounded_cache(oracle, caches) if told else None,
        other_activations=_with_rounded_cache(other, caches) if told and other is not None else None,
        caches=caches,
        with_float_caches=float_caches(changeable, caches),
    )


def _decide(source: Source, seen: _Seen, options: Options, rounded: dict[str, str]) -> Decided:
    linked, sites = seen.linked, seen.sites
    samples = options.target.samples
    activations = {} if samples is None else measure_crests(linked.source, sites, _work_of, samples)
    pricing = pricing_for(options.target, sites, _work_of, activations)
    choices = choose(
        linked,
        sites,
        pricing,
        terms=options.terms,
        overrides=options.overrides,
        work_of=_work_of,
        new_caches={name: plan.bits for name, plan in seen.caches.items()},
    )
    decisions = []
    for site, choice in zip(sites, choices, strict=True):
        row = _row(linked.source, site, choice)
        add_candidates(row, choice)
        if options.kv_cache is not None and row.reason_code is ReasonCode.FLOAT_CACHE:
            assert isinstance(site.found, AttentionSite)
            if site.name in seen.caches:
                _make_low_bit(row, site.found, seen.caches[site.name], options.kv_cache)
            elif options.overrides.of(site.name) is Override.KEEP:
                row.reason, row.reason_code = "its cache stays float, as asked", ReasonCode.AS_ASKED
            else:
                row.reason = f"its cache stays float: {why_not(site.found, options.kv_cache)}"
        if site.name in seen.forms:
            row.form = seen.forms[site.name]
        if row.outcome is Outcome.REWRITTEN:
            if site.name in rounded:
                _note(row, ReasonCode.WEIGHT_ROUNDED, rounded[site.name])
            if site.name in seen.dropped:
                text = f"the model's rounding of its activation ({seen.dropped[site.name]}) is left out, as asked"
                _note(row, ReasonCode.ACTIVATION_UPGRADED, text)
            _say_why(row, site, choice)
        decisions.append(Decision(site, choice, row))
    prices = pricing_row(linked, sites, choices, pricing)
    return Decided(
        source,
        linked,
        tuple(decisions),
        seen.oracle,
        seen.caches,
        seen.with_float_caches,
        prices,
        seen.other_activations,
    )


def _work_of(found: QuantizedLinear) -> LinearWork:
    weight = found.weight
    group = plan_of(found, Choice()).block_size
    is_fp4 = weight.format.startswith("mxfp4 block")
    return LinearWork(weight.k, weight.n, weight.bits, group, weight.block_size is None, len(found.weights), is_fp4)


def _changeable(sites: Sequence[Site], how: KvCache, overrides: Overrides) -> dict[str, AttentionSite]:
    """The attentions whose float cache can become codes, by name."""
    return {
        site.name: site.found
        for site in sites
        if isinstance(site.found, AttentionSite)
        and site.found.key_cache.codes is None
        and overrides.of(site.name) is not Override.KEEP
        and not why_not(site.found, how)
    }


def _with_rounded_cache(oracle: Source, plans: Mapping[str, CachePlan]) -> Source:
    """The oracle with its caches rounded: its own attentions, found anew, for products may be spelled otherwise in it."""
    linked = Linked.of(oracle)
    sites = find_sites(linked, ATTENTION_READERS, ())
    found = {s.name: s.found for s in sites if isinstance(s.found, AttentionSite) and s.name in plans}
    return with_rounded_cache(linked, found, plans)


def _make_low_bit(row: SiteRow, site: AttentionSite, plan: CachePlan, how: KvCache) -> None:
    row.outcome, row.terms = Outcome.REWRITTEN, 2
    row.reason = f"its {row.format} becomes {how}"
    if plan.key_scales is not None:
        past, present = plan.key_scales.past, plan.key_scales.present
        row.reason += f"; the caller's loop must carry the scales too ({present!r} becomes {past!r}, values likewise)"
    row.reason_code = ReasonCode.CACHE_ROUNDED
    row.format = f"int{plan.bits} cache"
    row.cache_bytes = bytes_per_token(site, plan.bits, dynamic=plan.dynamic)


def _sites(linked: Linked) -> list[Site]:
    return find_sites(linked, (*READERS, *ATTENTION_READERS), REFINERS)


def _with_codes(linked: Linked) -> tuple[Linked, list[Site], dict[str, str]]:
    """The sites of a model whose integer products are spelled out where a reader takes them, and only there."""
    refused: set[str] = set()

    def wanted(place: Place, linked: Linked) -> bool:
        name = place.node.name or place.node.outputs[0].name
        return gaining_products(place, linked) and name not in refused

    while True:
        spelled, forms = unfused(linked, wanted)
        seen = linked if spelled is linked.source else Linked.of(spelled)
        sites = _sites(seen)
        taken = {site.name for site in sites if _codes(site) is not None}
        left = {name for name in forms if name not in taken}
        if not left:
            return seen, sites, forms
        refused |= left


def _codes(site: Site) -> ActivationCodes | None:
    return site.found.codes if isinstance(site.found, QuantizedLinear) else None


def _row(source: Source, site: Site, choice: Choice) -> SiteRow:
    found = site.found
    if isinstance(found, Reject):
        outcome = Outcome.UNSUPPORTED if found.code in UNSUPPORTED else Outcome.KEPT
        return SiteRow(
            node=site.name,
            kind=_KINDS.get(found.code, "linear"),
            form=str(site.node.op),
            outcome=outcome,
            reason=found.reason,
            reason_code=found.code,
            **found.known,  # type: ignore[arg-type]
        )
    if isinstance(found, AttentionSite):
        return _attention_row(source, site.name, found, choice)
    weight, codes = found.weight, found.codes
    row = SiteRow(
        node=site.name,
        form=found.form,
        format=weight.format,
        m=found.rows,
        k=weight.k,
        n=weight.n,
        outcome=Outcome.KEPT,
    )
    if 0 < source.opset < OLDEST_OPSET:
        return _too_old(row, source, "msd.MatMul")
    if choice.way is not Way.MSD and choice.decided is not None:
        return _left_float(row, choice)
    row.outcome = Outcome.REWRITTEN
    row.terms = choice.terms if codes is None else codes.terms
    row.group = _group(found, choice) if codes is None else None
    row.error_bound = 0.5 / LIMITS[choice.terms] if codes is None else 0.0
    if choice.activation in MX_FORMATS:
        row.activation, row.error_bound = choice.activation.label, MX_FORMATS[choice.activation].error_bound
    row.weight_bytes = packed_bytes(found, choice)
    return row


def _group(found: QuantizedLinear, choice: Choice) -> int:
    return found.weight.k if choice.per_row else plan_of(found, choice).block_size


def _left_float(row: SiteRow, choice: Choice) -> SiteRow:
    """A layer that stays a product of its source's kind."""
    assert choice.decided is not None
    keep, chosen = choice.decided.candidates[0], choice.decided.chosen
    if chosen.name != keep.name:
        row.outcome, row.reason_code = Outcome.REWRITTEN, ReasonCode.FLOAT_ACTIVATIONS
        row.reason = "accuracy_level becomes 0: its activations stay float"
    elif choice.override is not None:
        row.reason, row.reason_code = "kept, as asked", ReasonCode.AS_ASKED
    else:
        row.reason_code = ReasonCode.DOES_NOT_PAY
        row.reason = _why_kept(choice.decided)
    return row


def _why_kept(decided: Priced) -> str:
    """The numbers that say so."""
    chosen = decided.chosen
    ours = min((c for c in decided.candidates if c.way is Way.MSD), key=lambda c: (c.why_not is not None, c.seconds))
    return (
        f"as it stands it takes {1e6 * chosen.seconds:.3g} us of a run at an error of {chosen.error:.1g}; "
        f"rewritten with {ours.name} it would take {1e6 * ours.seconds:.3g} us at {ours.error:.1g}"
    )


_KINDS: dict[ReasonCode, Literal["embedding", "attention"]] = {
    ReasonCode.EMBEDDING: "embedding",
    ReasonCode.NO_CACHE: "attention",
    ReasonCode.ATTENTION_FORM: "attention",
}
"""By reason code, what was found if it is no linear layer."""


def _attention_row(source: Source, name: str, site: AttentionSite, choice: Choice) -> SiteRow:
    codes = site.key_cache.codes
    row = SiteRow(
        node=name,
        kind="attention",
        form=site.form,
        format=f"{type_name(site.element_type)} cache" if codes is None else f"int{codes.bits} cache",
        m=site.rows,
        heads=site.heads,
        kv_heads=site.kv_heads,
        head_size=site.head_size,
        outcome=Outcome.KEPT,
        source_cache_bytes=bytes_per_token(site, None if codes is None else codes.bits),
    )
    if 0 < source.opset < OLDEST_OPSET:
        return _too_old(row, source, "msd.Attention")
    if codes is None:
        row.reason = "its cache is float: there are no codes to multiply; --kv-cache int8 or int4 makes it low-bit"
        row.reason_code = ReasonCode.FLOAT_CACHE
        return row
    reason = not_lowered(site)
    if reason is not None:
        row.outcome, row.reason, row.reason_code = Outcome.UNSUPPORTED, reason, ReasonCode.ATTENTION_FORM
        return row
    if choice.way is not Way.MSD:
        return _left_float(row, choice)
    row.outcome = Outcome.REWRITTEN
    row.terms = 2
    row.cache_bytes = row.source_cache_bytes
    return row


def _too_old(row: SiteRow, source: Source, op: str) -> SiteRow:
    row.reason = f"the model imports opset {source.opset}; {op} needs {OLDEST_OPSET} or later (onnx.version_converter)"
    row.reason_code = ReasonCode.OPSET_TOO_OLD
    return row


def _say_why(row: SiteRow, site: Site, choice: Choice) -> None:
    """What is remarkable about a layer that is rewritten."""
    codes = _codes(site)
    if codes is not None:
        kind = type_name(codes.element_type)
        text = f"the {kind} codes that the model gives its activation as are multiplied exactly"
        if codes.element_type == TensorProto.UINT8 and (row.format or "").startswith("int8"):
            text += "; onnxruntime's own product of uint8 by int8 saturates on CPUs without VNNI"
        _note(row, ReasonCode.ACTIVATION_CODES, text)
    elif choice.rounded_by is not None and row.kind == "linear":
        text = f"three terms: {choice.rounded_by!r} further on rounds to integers, where a small error becomes a jump"
        _note(row, ReasonCode.ROUNDED_DOWNSTREAM, text)


def _note(row: SiteRow, code: ReasonCode, text: str) -> None:
    row.reason = text if row.reason is None else f"{row.reason}; {text}"
    row.reason_code = code
