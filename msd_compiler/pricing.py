"""From a model's sites to the cost model and back: what is priced, with what, and how the report says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from .choose import Choice
from .cost.candidates import BUDGETS, Candidate, Decided, Pricing, total_bytes
from .cost.error import Activation
from .cost.profile import CpuProfile, Profile, default_target, digest, load_target
from .cost.totals import critical_path, sums
from .cost.work import LinearWork
from .cost.workload import DEFAULT, Workload, parse_workload
from .errors import OptionError
from .facts import QuantizedLinear
from .inputs import Feed
from .linked import Linked, Scope
from .reader import Site
from .report import CandidateRow, PhaseRow, PriceRow, PricingRow, SiteRow, Totals


@dataclass(frozen=True)
class Target:
    """What the user asks of the cost model."""

    name: str | None = None
    """A shipped profile or a file; None: the shipped one of the instruction set that the native library uses here."""
    workload: str = DEFAULT
    """Phases and their sizes, or a file with them."""
    budget: float | None = None
    """Largest relative L2 per site; None: by the target's family."""
    samples: Sequence[Feed] | None = None
    """Inputs on which activations are looked at; None: what is usual is assumed."""


def pricing_for(
    asked: Target,
    sites: Sequence[Site],
    work_of: Callable[[QuantizedLinear], LinearWork],
    activations: dict[str, Activation],
) -> Pricing:
    """The target's figures, the workload and the budget, for a model's sites.

    Raises:
        OptionError: there is no such target, or one of the three is impossible.
    """
    profile = load_target(asked.name or default_target(_used_isa()))
    budget = BUDGETS[profile.family] if asked.budget is None else asked.budget
    if not 0 < budget < float("inf"):
        raise OptionError(f"budget is {budget}; it must be a positive number")
    footprint = total_bytes(work_of(site.found) for site in sites if isinstance(site.found, QuantizedLinear))
    return Pricing(profile, parse_workload(asked.workload), budget, footprint, activations)


def _used_isa() -> str | None:
    from .doctor import used_isa  # here, for what needs no target starts without it

    return used_isa()


def add_candidates(row: SiteRow, choice: Choice) -> None:
    """What the site's row says of the choice."""
    if choice.decided is not None:
        row.device_rule = choice.device_rule
        row.choice, row.margin = choice.decided.chosen.name, choice.decided.margin
        row.candidates = [_candidate_row(candidate) for candidate in choice.decided.candidates]


def _candidate_row(candidate: Candidate) -> CandidateRow:
    return CandidateRow(
        name=candidate.name,
        seconds=candidate.seconds if candidate.prices else None,
        error=candidate.error,
        why_not=candidate.why_not,
        phases=[PriceRow(seconds=p.seconds, bytes=p.bytes, ops=dict(p.ops)) for p in candidate.prices],
    )


def pricing_row(linked: Linked, sites: Sequence[Site], choices: Sequence[Choice], pricing: Pricing) -> PricingRow:
    """Sums before and after, and what nobody priced."""
    priced = [
        (site, choice.decided)
        for site, choice in zip(sites, choices, strict=True)
        if choice.decided is not None and choice.decided.chosen.prices and choice.decided.candidates[0].prices
    ]
    return PricingRow(
        target=pricing.profile.name,
        digest=digest(pricing.profile),
        workload=pricing.workload.text,
        phases=[
            PhaseRow(**{field: getattr(p, field) for field in PhaseRow.model_fields}) for p in pricing.workload.phases
        ],
        budget=pricing.budget,
        peak_ops_per_second=_peak(pricing.profile),
        read_bytes_per_second=_read_rate(pricing),
        before=_totals(linked, priced, pricing.workload, lambda decided: decided.candidates[0]),
        after=_totals(linked, priced, pricing.workload, lambda decided: decided.chosen),
        unpriced=_unpriced(linked, [site for site, _ in priced]),
    )


def _peak(profile: Profile) -> float:
    return profile.products.value if isinstance(profile, CpuProfile) else max(f.value for f in profile.matrix.values())


def _read_rate(pricing: Pricing) -> float:
    profile = pricing.profile
    return profile.reads.rate(pricing.footprint) if isinstance(profile, CpuProfile) else profile.read.value


def _totals(
    linked: Linked,
    priced: Sequence[tuple[Site, Decided]],
    workload: Workload,
    taken: Callable[[Decided], Candidate],
) -> Totals:
    seconds, moved, ops = sums((taken(decided) for _, decided in priced), workload)
    main = linked.scopes[0]
    by_position: dict[int, float] = {}
    for site, decided in priced:
        position = main.position(site.node) if site.scope is main else None
        if position is not None:
            by_position[position] = taken(decided).seconds
    return Totals(seconds=seconds, critical_path_seconds=critical_path(main.flow, by_position), bytes=moved, ops=ops)


_COMPUTES_NOTHING = frozenset({"Constant", "Identity", "Shape", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})


def _unpriced(linked: Linked, priced: Iterable[Site]) -> dict[str, int]:
    taken = {id(site.node) for site in priced}
    for site in priced:
        taken.update(id(node) for node in getattr(site.found, "replaced", ()))
    counts = Counter(
        node.op for scope, _, node in linked.nodes() if id(node) not in taken and not _is_constant(scope, node)
    )
    return {op: counts[op] for op in sorted(counts) if op not in _COMPUTES_NOTHING}


def _is_constant(scope: Scope, node: gs.Node, depth: int = 2) -> bool:
    """Whether it is computed once, when the model is opened: of constants, or of what is computed of those."""
    return bool(node.inputs) and all(
        scope.constant(tensor) is not None
        or (depth > 0 and bool(tensor.inputs) and _is_constant(scope, tensor.inputs[0], depth - 1))
        for tensor in node.inputs
        if tensor.name
    )
