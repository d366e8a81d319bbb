"""How long each layer takes, before and after: onnxruntime's profiler, its nodes joined to a report's sites by name.

Both models run on inputs of the workload's own sizes with one thread, which is what predictions are for, so that the two can be
compared. A site's time is that of the nodes that multiply and of those that prepare its stored weight.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from ..cost.workload import Phase
from ..decide import Decided
from ..doctor import cpu_name, used_isa
from ..facts import QuantizedLinear
from ..inline import inlined
from ..inputs import NoInputs
from ..inputs.hypotheses import Guess, plans
from ..inputs.signature import read_signature
from ..linked import Linked, Scope
from ..reader import Site
from ..report import MeasuredPhase, MeasuredRow, Measurement, Outcome, Report, SiteRow
from ..runtime import SAY_NOTHING, RuntimeRefused, TimedOut, open_model, run
from ..source import Source, graphs
from ..verification import Clock, Progress, silent
from .profile import NodeRun, node_runs
from .timing import QUIET

RUNS = 5
"""Of each model and phase, in turns, for a median."""

SECONDS = 30.0
"""For all of it; a phase that takes longer is left out."""

_THREADS = 1
_ATTEMPTS = 8
"""Other layouts of a mask, other head sizes, ..., of the same numbers of tokens."""

_MULTIPLIES = ("MatMul", "Gemm", "Attention", "Gather", "Softmax")
"""Parts of the names of ops that a site cannot do without, also where onnxruntime fused it with others."""


_COMPUTE_NOTHING = frozenset({"Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"})


def with_measured_sites(
    report: Report, decided: Decided, result: Source, *, seconds: float = SECONDS, progress: Progress = silent
) -> Report:
    """The report with what every site took in a run of each phase of its workload; as it is if nothing was priced.

    Args:
        report: of the compilation.
        decided: what it was made from.
        result: what it made.
        seconds: for all of it.
        progress: told what is being done.
    """
    if report.pricing is None or not report.sites:
        return report
    source = _named(inlined(decided.source))
    parts = nodes_of_source(decided.linked, [decision.site for decision in decided.decisions])
    rewritten = {row.node for row in report.sites if row.outcome is Outcome.REWRITTEN}
    named_result = _named(result)
    models = (
        _Model("source", source, parts, is_portable=True),
        _Model("result", named_result, nodes_of_result(named_result.proto, rewritten, parts), is_portable=False),
    )
    clock, rows = Clock(seconds), defaultdict[str, list[MeasuredRow]](list)
    phases: list[MeasuredPhase] = []
    notes: list[str] = []
    for number, row in enumerate(report.pricing.phases):
        progress("timing layers", number, len(report.pricing.phases))
        phase = Phase(**row.model_dump())
        try:
            took = _profiled(models, phase, clock, notes)
        except TimedOut as error:
            notes.append(f"{phase.name} was not measured: {error}")
            continue
        if not any(took):
            continue
        phases.append(_whole(phase, took))
        for site in report.sites:
            ms = [site_ms(site, phase, runs, model.site_of) for runs, model in zip(took, models, strict=True)]
            rows[site.node].append(MeasuredRow(phase=phase.name, before_ms=ms[0], after_ms=ms[1]))
    progress("timing layers", len(report.pricing.phases), len(report.pricing.phases))
    measurement = Measurement(
        cpu=cpu_name(),
        instruction_set=used_isa(),
        onnxruntime=onnxruntime.__version__,
        threads=_THREADS,
        runs=RUNS,
        phases=phases,
        notes=notes,
    )
    sites = [site.model_copy(update={"measured": rows[site.node]}) for site in report.sites]
    return report.model_copy(update={"sites": sites, "measurement": measurement})


@dataclass(frozen=True)
class _Model:
    """A model, and which of its nodes belong to which site."""

    label: str
    source: Source
    site_of: Mapping[str, str]
    is_portable: bool
    """Whether it needs no library."""


def nodes_of_source(linked: Linked, sites: Sequence[Site]) -> dict[str, str]:
    """By name, or first output, of a node the site that it is a part of; nodes of several sites are left out."""
    parts: dict[str, set[str]] = defaultdict(set)
    for site in sites:
        replaced = getattr(site.found, "replaced", ())
        for node in _with_stored(site.scope, (site.node, *replaced)):
            parts[_name(node)].add(site.name)
        if isinstance(site.found, QuantizedLinear):
            parts[_name(site.found.product)].add(site.name)
    twice = _twice(_name(node) for _, _, node in linked.nodes())
    return {name: found for name, (found, *others) in parts.items() if not others and name not in twice}


def nodes_of_result(proto: onnx.ModelProto, rewritten: set[str], before: Mapping[str, str]) -> dict[str, str]:
    """By name of a node of the result the site that it is a part of: what took the site's place, or what was left."""
    names = [node.name for graph in graphs(proto) for node in graph.node]
    found = {}
    for name in names:
        own, ours, _ = name.rpartition("/msd.")  # how new nodes are named, see `build`
        site = name if name in rewritten else own if ours and own in rewritten else None
        kept = before.get(name)
        if site is None and kept not in rewritten:
            site = kept
        if site is not None:
            found[name] = site
    twice = _twice(names)
    return {name: site for name, site in found.items() if name not in twice}


def site_ms(site: SiteRow, phase: Phase, runs: Sequence[Sequence[NodeRun]], site_of: Mapping[str, str]) -> float | None:
    """Median time of a site; None where what multiplies cannot be told, or had other rows than were priced."""
    if not runs:
        return None
    found = [[node for node in run if _site(node.name, site_of) == site.node] for run in runs]
    products = [n for n in found[0] if n.name == site.node or any(word in n.op for word in _MULTIPLIES)]
    if not products or any(not _has_rows(site, phase, node) for node in products):
        return None
    return _median(found)


def _has_rows(site: SiteRow, phase: Phase, node: NodeRun) -> bool:
    if site.kind != "linear" or not node.shape or node.shape[-1] != site.n:
        return True  # nothing says otherwise
    return prod(node.shape[:-1]) == max(1, phase.rows(site.m))


def _site(name: str, site_of: Mapping[str, str]) -> str | None:
    """Of a node as onnxruntime calls it: what it makes of several begins with the name of one of them."""
    name = name.removeprefix("fused ")
    for end in range(len(name), 0, -1):
        if (end == len(name) or not name[end].isalnum()) and name[:end] in site_of:
            return site_of[name[:end]]
    return None


def _with_stored(scope: Scope, nodes: Iterable[gs.Node]) -> Iterator[gs.Node]:
    """The nodes, and those before them that read nothing but what the model stores."""
    known: dict[int, bool] = {}

    def is_stored(node: gs.Node) -> bool:
        if id(node) not in known:
            known[id(node)] = False  # until told otherwise: what reads itself is no constant
            known[id(node)] = bool(node.inputs) and all(
                not t.name or scope.constant(t) is not None or (bool(t.inputs) and all(map(is_stored, t.inputs)))
                for t in node.inputs
            )
        return known[id(node)]

    left = list(nodes)
    seen: set[int] = set()
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        left += [producer for t in node.inputs for producer in t.inputs if is_stored(producer)]


def _name(node: gs.Node) -> str:
    return str(node.name or node.outputs[0].name)


def _twice(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]


def _named(source: Source) -> Source:
    """The model with every node named, those without a name after their first output, as sites are."""
    if all(node.name or not node.output for graph in graphs(source.proto) for node in graph.node):
        return source
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    for node in (node for graph in graphs(proto) for node in graph.node if node.output):
        node.name = node.name or node.output[0]
    return replace(source, proto=proto)


def _profiled(
    models: Sequence[_Model], phase: Phase, clock: Clock, notes: list[str]
) -> list[Sequence[Sequence[NodeRun]]]:
    """By model and run, the nodes that ran; no runs, and a note, of a model that does not run on inputs of these sizes.

    Raises:
        TimedOut: the time is over.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opened: dict[str, tuple[onnxruntime.InferenceSession, dict[str, Any]]] = {}
        for model in models:
            try:
                session = _open(model, Path(folder))
                opened[model.label] = session, _feed(model, session, phase, clock)
            except (NoInputs, RuntimeRefused) as error:
                notes.append(f"{phase.name} of the {model.label} was not measured: {error}")
        for _ in range(RUNS):
            for session, feed in opened.values():
                run(session, None, feed, clock.left())
        files = {label: Path(session.end_profiling()) for label, (session, _) in opened.items()}
        events = {label: json.loads(file.read_text(encoding="utf-8")) for label, file in files.items()}
        return [node_runs(events[m.label])[-RUNS:] if m.label in events else [] for m in models]


def _open(model: _Model, folder: Path) -> onnxruntime.InferenceSession:
    options: dict[str, Any] = QUIET | {"portable": model.is_portable, "intra_op_num_threads": _THREADS}
    options |= {"enable_profiling": True, "profile_file_prefix": str(folder / model.label)}
    return open_model(
        model.source.proto,
        model.source.folder,
        name=f"the {model.label}",
        **options | {"log_severity_level": SAY_NOTHING},
    )


def _feed(model: _Model, session: onnxruntime.InferenceSession, phase: Phase, clock: Clock) -> dict[str, Any]:
    """Inputs of the phase's sizes, on which the model has run once."""
    start = Guess(batch=phase.batch, seq=phase.tokens, past=phase.context - phase.tokens)
    signature = read_signature(model.source.proto)
    sized = (p for g, p in plans(signature, start) if (g.batch, g.seq, g.past) == (start.batch, start.seq, start.past))
    refusal = "they are larger than 256 MiB"
    for planned in islice(sized, _ATTEMPTS):
        arrays = planned.arrays(signature, 0)
        try:
            run(session, None, arrays, clock.left())
        except RuntimeRefused as error:
            refusal = str(error)
            continue
        return arrays
    raise NoInputs(
        f"the {model.label} does not run on a batch of {phase.batch} with {phase.tokens} new tokens of {phase.context}: "
        f"{refusal}"
    )


def _whole(phase: Phase, took: Sequence[Sequence[Sequence[NodeRun]]]) -> MeasuredPhase:
    """Of all nodes, before and after."""
    empty = [node.ms for runs in took for nodes in runs for node in nodes if node.op in _COMPUTE_NOTHING]
    before_ms, after_ms = map(_median, took)
    return MeasuredPhase(
        name=phase.name,
        before_ms=before_ms,
        after_ms=after_ms,
        empty_node_ms=statistics.median(empty) if empty else None,
    )


def _median(runs: Sequence[Sequence[NodeRun]]) -> float | None:
    """Of all nodes of a run together; the profiler's figures are whole microseconds."""
    return round(statistics.median(sum(node.ms for node in nodes) for nodes in runs), 4) if runs else None
