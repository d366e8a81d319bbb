"""How each layer is computed: the cheapest way within the accuracy budget, unless somebody said otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

import networkx as nx
from onnx import TensorProto

from .attention import AttentionSite
from .cost.candidates import (
    Candidate,
    Decided,
    Pricing,
    attention_candidates,
    decide,
    in_format,
    linear_candidates,
)
from .cost.error import Activation
from .cost.profile import Way
from .cost.rules import explain
from .cost.work import AttentionWork, LinearWork
from .cost.workload import Phase
from .errors import OptionError
from .facts import QuantizedLinear
from .linked import Linked, Scope
from .reader import Site
from .runtime_ops.matmul.layout import ActivationFormat, Codebook

DEFAULT_TERMS = 2
"""16 bits of the activation."""

TERMS_BEFORE_ROUNDING = 3
"""Where the model itself rounds a value that a layer has a part in: there an error of 2e-5 moves a code now and then, and
that jump, not the error, is what comes out. With three terms (24 bits, as much as float32 holds) the codes stay."""

_ROUNDING_OPS = frozenset(
    {
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "QAttention",
        "QLinearMatMul",
        "ExtendedQuantizeLinear",
    }
)
_CACHE_ROUNDING = ("k_quant_type", "v_quant_type")
"""Attributes of an attention op that keeps its cache in integers."""


class Override(StrEnum):
    """What a user can say of a layer."""

    KEEP = "keep"
    FLOAT = "float"
    """Activations stay float where the file can say so: ``accuracy_level`` 0."""
    ONE = "1"
    TWO = "2"
    THREE = "3"
    MXFP4_E1M2_X2 = "mxfp4x2"
    """Two passes of MXFP4, 6.6 effective bits: what a device with FP4 units would compute. The others are for comparison."""
    MXFP4_E1M2 = "mxfp4"
    MXFP4_E2M1_X2 = "mxfp4x2-e2m1"
    MXFP4_E2M1 = "mxfp4-e2m1"
    MXFP8 = "mxfp8"


_FORMATS = {Override(f.label): f for f in ActivationFormat if f is not ActivationFormat.INT8}


@dataclass(frozen=True)
class Overrides:
    """By glob of node names; the first that matches a layer counts."""

    rules: tuple[tuple[str, Override], ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Overrides:
        """``GLOB=WHAT``, each; WHAT is an `Override`.

        Raises:
            OptionError: one says something else.
        """
        rules = []
        for text in texts:
            glob, _, what = text.rpartition("=")
            if not glob or what not in list(Override):
                raise OptionError(f"override {text!r}; needed GLOB=WHAT, WHAT being one of {', '.join(Override)}")
            rules.append((glob, Override(what)))
        return cls(tuple(rules))

    def of(self, name: str) -> Override | None:
        """What was said of a layer."""
        return next((what for glob, what in self.rules if fnmatchcase(name, glob)), None)

    def check(self, names: Sequence[str]) -> None:
        """See that every rule is about some layer.

        Raises:
            OptionError: one is not.
        """
        for glob, what in self.rules:
            if not any(fnmatchcase(name, glob) for name in names):
                known = f"; there are {', '.join(map(repr, names[:3]))} ..." if names else ""
                raise OptionError(f"override '{glob}={what}' is about no layer of the model{known}")


@dataclass(frozen=True)
class Choice:
    """How a layer is computed."""

    terms: int = DEFAULT_TERMS
    per_row: bool = False
    """One activation scale for the row instead of one per group."""
    activation: ActivationFormat = ActivationFormat.INT8
    """What a term is."""
    way: Way = Way.MSD
    rounded_by: str | None = None
    """The node downstream that made it three terms."""
    override: Override | None = None
    decided: Decided | None = None
    """The candidates; None where there is no choice."""
    device_rule: str | None = None
    """What the device's own public kernels would do, where that is something else, and why."""


def choose(
    linked: Linked,
    sites: Sequence[Site],
    pricing: Pricing,
    *,
    terms: int | None,
    overrides: Overrides,
    work_of: Callable[[QuantizedLinear], LinearWork],
    new_caches: Mapping[str, int],
) -> list[Choice]:
    """A choice per site.

    Args:
        pricing: target, workload and budget.
        work_of: what a layer has to multiply.
        terms: for all sites; None: chosen, and three for a layer whose result the model rounds to integers further on.
        new_caches: by name of an attention whose float cache becomes low-bit, its bits.

    Raises:
        OptionError: an override is about no layer, or cannot be followed.
    """
    overrides.check([site.name for site in sites if isinstance(site.found, QuantizedLinear | AttentionSite)])
    rounded = {scope.index: _rounded_downstream(scope) for scope in {id(s.scope): s.scope for s in sites}.values()}
    choices = []
    for site in sites:
        override = overrides.of(site.name)
        if isinstance(site.found, QuantizedLinear):
            by = rounded[site.scope.index].get(site.scope.position(site.node)) if terms is None else None
            choices.append(_linear(site, site.found, work_of(site.found), pricing, terms, by, override))
        elif isinstance(site.found, AttentionSite):
            choices.append(_attention(site.found, pricing, new_caches.get(site.name), override))
        else:
            choices.append(Choice())
    return choices


def _linear(
    site: Site,
    found: QuantizedLinear,
    work: LinearWork,
    pricing: Pricing,
    terms: int | None,
    by: str | None,
    override: Override | None,
) -> Choice:
    if found.codes is not None:
        if override is not None:
            raise OptionError(
                f"override {override}: {site.name!r} multiplies codes that the model gives; see --activations"
            )
        return Choice(terms or (DEFAULT_TERMS if by is None else TERMS_BEFORE_ROUNDING), rounded_by=by)
    can_be_float = site.node.op == "MatMulNBits"
    candidates = linear_candidates(
        pricing,
        work,
        lambda phase: max(1, phase.rows(found.rows)),
        source_way=source_way(site),
        can_be_float=can_be_float,
        activation=pricing.activations.get(site.name, Activation()),
    )
    if override is not None:
        return _as_said(site, override, candidates, can_be_float)
    if terms is None and by is not None:
        terms = TERMS_BEFORE_ROUNDING
    decided = decide(pricing, candidates, terms=terms)
    rule = _device_rule(pricing, work, lambda phase: max(1, phase.rows(found.rows)), decided)
    return replace(_choice(decided, rounded_by=by), device_rule=rule)


def _as_said(site: Site, override: Override, candidates: Sequence[Candidate], can_be_float: bool) -> Choice:
    if override is Override.FLOAT and not can_be_float:
        raise OptionError(
            f"override {override}: {site.name!r} is a {site.node.op}, which cannot say it; only MatMulNBits has accuracy_level"
        )
    if override in _FORMATS:
        return _choice(Decided(in_format(_FORMATS[override]), tuple(candidates), None), override=override)
    wanted = {Override.KEEP: ("keep",), Override.FLOAT: ("float activations", "keep")}.get(
        override, (f"{override} term{'' if override is Override.ONE else 's'}",)
    )
    chosen = next(c for name in wanted for c in candidates if c.name == name)
    return _choice(Decided(chosen, tuple(candidates), None), override=override)


def _attention(found: AttentionSite, pricing: Pricing, new_bits: int | None, override: Override | None) -> Choice:
    codes = found.key_cache.codes
    bits = new_bits if codes is None else codes.bits
    if bits is None:
        return Choice()
    work = attention_work(found)
    candidates = attention_candidates(pricing, work, bits)
    keep, ours = candidates
    if override is Override.KEEP:
        return _choice(Decided(keep, tuple(candidates), None), override=override)
    if codes is None or override is not None:  # the user asked for it
        return _choice(Decided(ours, tuple(candidates), None), override=override)
    decided = decide(pricing, candidates)
    rule = _device_rule(pricing, work, lambda phase: work.queries_per_head * phase.tokens, decided)
    return replace(_choice(decided), device_rule=rule)


def _device_rule(
    pricing: Pricing, work: LinearWork | AttentionWork, rows: Callable[[Phase], int], decided: Decided
) -> str | None:
    """The sentence of the phase that runs most often, of those where the device's kernels would do otherwise."""
    is_ours = decided.chosen.way is Way.MSD
    for phase in sorted(pricing.workload.phases, key=lambda phase: -phase.share):
        sentence = explain(pricing.profile, work, rows(phase), is_ours, context=phase.context)
        if sentence is not None:
            return f"{phase.name}: {sentence}"
    return None


def _choice(decided: Decided, rounded_by: str | None = None, override: Override | None = None) -> Choice:
    chosen = decided.chosen
    terms = chosen.terms or DEFAULT_TERMS
    return Choice(terms, chosen.per_row, chosen.activation, chosen.way, rounded_by, override, decided)


def source_way(site: Site) -> Way:
    """How a default session computes a product of float activations as it stands: with 8-bit activations, or float ones."""
    if site.node.op == "MatMulNBits" and site.node.attrs.get("accuracy_level", 0) != 4:
        return Way.FLOAT
    if isinstance(site.found, QuantizedLinear) and site.found.weight.codebook is not Codebook.INTEGER:
        return Way.FLOAT  # no kernel takes such codes: beside rewritten layers they are dequantized
    return Way.SESSION


def attention_work(found: AttentionSite) -> AttentionWork:
    """What there is to attend to, as the source has it."""
    codes = found.key_cache.codes
    width = 16 if found.element_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) else 32
    return AttentionWork(found.heads, found.kv_heads, found.head_size, width if codes is None else codes.bits)


def _rounded_downstream(scope: Scope) -> dict[int | None, str]:
    """For every node that a rounding depends on, the name of such a rounding."""
    rounding = {i: node for i, node in enumerate(scope.graph.nodes) if _rounds(node.op, node.attrs)}
    if not rounding:
        return {}
    flow = scope.flow
    found: dict[int | None, str] = {}
    for i, node in rounding.items():
        if i in found:
            continue  # what it depends on is known already
        reached = nx.descendants(flow, i)
        found.update((r, str(node.name or node.op)) for r in reached if r not in found)
    return found


def _rounds(op: str, attributes: dict[str, object]) -> bool:
    return op in _ROUNDING_OPS or any(attributes.get(a, "NONE") not in ("NONE", b"NONE", "") for a in _CACHE_ROUNDING)
