"""The commands as functions: inspect, compile, verify, run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx

from .attention import AttentionSite, handing_on
from .build import NodeBuilder
from .choose import Overrides
from .cost.profile import Way
from .cost.workload import DEFAULT as DEFAULT_WORKLOAD
from .decide import Activations, Decided, Options, decide
from .edit import Edit
from .errors import ModelError, OptionError, OutputError
from .facts import QuantizedLinear, ReasonCode
from .genai import FolderOutput, GenaiFolder, default_folder, is_genai, merged_report
from .inputs import Feed, NoInputs
from .kv_cache import KvCache, store_caches_as_codes
from .passes.lower_attention import keep_shapes, lower_attention, plan_of_cache
from .passes.lower_linear import lower_linear, plan_of
from .passes.lower_to_float import lower_to_float
from .pricing import Target
from .quantize import WeightRounding
from .report import METADATA_KEY, Method, Outcome, Report, SiteRow, Verification, embedded_report, summarize
from .runtime import SAY_NOTHING, RuntimeRefused, TimedOut, open_model, session
from .runtime import run as run_session
from .runtime_constants import bytes_with_float_constants, with_int8_constants
from .runtime_ops.attention import schema as attention_schema
from .runtime_ops.attention.body import attention_body
from .runtime_ops.matmul import schema as matmul_schema
from .runtime_ops.matmul.body import matmul_body
from .runtime_ops.matmul.layout import ActivationFormat, Codebook, Plan
from .runtime_ops.matmul.reference import LIMITS
from .runtime_ops.matmul_integer_to_float import schema as integer_schema
from .runtime_ops.matmul_integer_to_float.body import matmul_integer_to_float_body
from .save import EMBED_UP_TO, Output, WeightStore, weight_bytes
from .source import Source, is_external, load, model_file, stored_tensors
from .verification import (
    WHOLE_UP_TO,
    Clock,
    Progress,
    Reference,
    RewrittenProduct,
    made_inputs,
    silent,
    verify_sites,
    verify_whole,
)
from .verify_attention import RewrittenAttention

ModelLike: TypeAlias = str | os.PathLike[str] | onnx.ModelProto

DEFAULT_TOLERANCE = 1e-3
DEFAULT_VERIFY_SECONDS = 60.0


class VerificationFailed(Exception):
    """The result is further from the oracle than allowed; nothing was written. ``report`` holds the figures."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Compiled:
    """A compiled model: in memory, or at ``path``, a file or a folder, if an output was named."""

    model: onnx.ModelProto
    """With its weights embedded, or, beside ``path``, in a data file. Of a folder with several: the decoder."""
    report: Report
    path: Path | None = None
    changed: bool = True
    """Whether anything was rewritten; if not, the model is the source's copy."""


def inspect(
    model: ModelLike,
    *,
    terms: int | None = None,
    quantization: WeightRounding | None = None,
    activations: Literal["keep", "upgrade"] = "keep",
    kv_cache: KvCache | None = None,
    target: str | None = None,
    workload: str = DEFAULT_WORKLOAD,
    budget: float | None = None,
    overrides: Sequence[str] = (),
    samples: Sequence[Feed] | None = None,
) -> Report:
    """What `compile` would do with a model, or, for a result of it, what it did.

    Raises:
        ModelError: the model cannot be read.
        OptionError: an option is impossible, or the installed onnxruntime cannot round weights so.
    """
    source = load(model)
    known = embedded_report(source.proto)
    if known is not None:
        return known.model_copy(update={"source": str(source.path) if source.path else None})
    priced = Target(target, workload, budget, samples)
    asked = Options(terms, quantization, Activations(activations), kv_cache, priced, Overrides.parse(overrides))
    decided = decide(source, asked, silent)
    return _report(decided)


def compile(
    model: ModelLike,
    output: str | os.PathLike[str] | None = None,
    *,
    terms: int | None = None,
    quantization: WeightRounding | None = None,
    activations: Literal["keep", "upgrade"] = "keep",
    kv_cache: KvCache | None = None,
    target: str | None = None,
    workload: str = DEFAULT_WORKLOAD,
    budget: float | None = None,
    overrides: Sequence[str] = (),
    samples: Sequence[Feed] | None = None,
    verify: bool = True,
    verify_seconds: float = DEFAULT_VERIFY_SECONDS,
    tolerance: float = DEFAULT_TOLERANCE,
    measure: bool = False,
    progress: Progress = silent,
) -> Compiled:
    """Rewrite the quantized linear layers of a model to multiply the weight's codes directly, and prove the result right.

    Args:
        model: a file, a folder with one model in it, or a parsed model. Never changed.
        output: where to write the result; None: keep it in memory. It appears whole, after verification, or not at all.
            For a folder with a ``genai_config.json``: the folder to make, ready for onnxruntime-genai, or an ``.onnx``
            file for the one model in it.
        terms: INT8 terms of the activation: 1 (8 bits), 2 (16 bits) or 3 (24 bits). None: 2, but 3 for layers whose
            result the model itself rounds to integers further on (an int8 cache).
        quantization: how to round the weights of layers that are float: a `Quantization`, by onnxruntime's own quantizer, or a
            `Float4Quantization`; None: they stay float. The oracle is then the rounded model; how far that is from the float one
            the report says beside it.
        activations: what becomes of activations that the model itself rounds to 8 or 16 bits. ``keep``: their codes are
            multiplied exactly, for that rounding is part of what the model means. ``upgrade``: it is left out, and the
            oracle is the model without it; how far that is from the model with it the report says beside it.
        kv_cache: how to make float caches low-bit, which changes the model's cache inputs and outputs; None: they stay.
            The oracle is then the model with the same rounding of its caches.
        target: what the choice is priced for: a profile that comes with the package (``msd targets``), or a file; None: the
            shipped one of the instruction set that the native library uses here.
        workload: phases and their sizes, ``decode=0.8@batch1,context4096;prefill=0.2@512``, or a file with such.
        budget: largest relative L2 error per layer, as predicted; None: 1e-4, on an accelerator 2e-3, what its bf16 keeps.
        overrides: ``GLOB=WHAT`` of node names, WHAT being one of `Override`: ``keep``, ``float``, ``1``, ``2``, ``3``, ``mxfp4x2``
            ...; the first that matches a layer counts.
        samples: inputs on which the activations are looked at, for the prediction of errors; None: they are taken to be
            Gaussian with one channel 30 times as large as the rest.
        verify: compare the result with the oracle.
        verify_seconds: time for that; what takes longer, or has more than 1 GB of weights, is verified layer by layer.
        tolerance: largest relative L2 distance of any output from the oracle.
        measure: also time every layer, before and after, for the report, where the whole model is verified: some seconds.
        progress: told what is being done.

    Raises:
        ModelError: the model cannot be right.
        OutputError: the result cannot be written.
        VerificationFailed: the result is not right enough; nothing was written.
    """
    if terms is not None and terms not in LIMITS:
        raise OptionError(f"terms is {terms}; it must be 1, 2 or 3")
    if not tolerance > 0 or not verify_seconds > 0:
        raise OptionError(f"tolerance ({tolerance}) and verify seconds ({verify_seconds}) must be positive")
    if output is not None and not isinstance(model, onnx.ModelProto) and makes_folder(model, output):
        options: dict[str, Any] = {"terms": terms, "quantization": quantization, "activations": activations}
        options |= {"kv_cache": kv_cache, "target": target, "workload": workload, "budget": budget}
        options |= {"overrides": overrides, "samples": samples}
        options |= {"verify": verify, "verify_seconds": verify_seconds, "tolerance": tolerance}
        options |= {"measure": measure}
        return _compile_folder(Path(model), Path(output), options | {"progress": progress})
    priced = Target(target, workload, budget, samples)
    asked = Options(terms, quantization, Activations(activations), kv_cache, priced, Overrides.parse(overrides))
    given = load(model)
    path = None if output is None else _target(given, Path(output))
    check = _Check(verify, verify_seconds, tolerance, progress, measure)
    decided = decide(given, asked, progress)
    try:
        return _compile(given, path, decided, check, progress)
    except VerificationFailed as failure:
        looked = _looked_at(given, asked, decided, failure, check)
        if looked is None:
            raise
    return _compile(given, path, looked, replace(check, note=_LOOKED_AT), progress)


_LOOKED_AT = (
    "two terms in every layer were not right enough: activations were looked at on these inputs, "
    "and layers have the terms that they need, or float activations"
)


def _looked_at(
    given: Source, asked: Options, first: Decided, failure: VerificationFailed, check: _Check
) -> Decided | None:
    """Another decision, with activations looked at on the inputs on which a result failed; None if it is no other.

    Massive activations (onnxruntime issue 29849) are what two terms, chosen without having seen any, may not be enough for.
    """
    verification = failure.report.verification
    if asked.terms is not None or asked.target.samples is not None or verification is None or not verification.outputs:
        return None
    assert first.oracle is not None  # or there were no outputs
    samples = made_inputs(first.oracle, Clock(check.seconds))
    try:
        second = decide(given, replace(asked, target=replace(asked.target, samples=samples)), check.progress)
    except (RuntimeRefused, ModelError):
        return None  # these inputs are the oracle's, with caches that the source itself may not take
    chosen = [[(d.choice.terms, d.choice.way) for d in decided.decisions] for decided in (first, second)]
    return second if chosen[0] != chosen[1] else None


def _compile(given: Source, path: Path | None, decided: Decided, check: _Check, progress: Progress) -> Compiled:
    """Rewrite as decided, check, and write."""
    source, report = decided.source, _report(decided)
    if not any(row.outcome is Outcome.REWRITTEN for row in report.sites):
        report = embedded_report(source.proto) or report  # a result says what was done to it
        where = {"source": str(source.path) if source.path else None, "result": str(path) if path else None}
        report = report.model_copy(update=where)
        kept = source if source is given else replace(source, path=None)  # what was rounded and kept is in no file yet
        return Compiled(_copy(kept, path), report, path, changed=False)

    unrounded = given if source is not given and weight_bytes(given.proto) <= WHOLE_UP_TO else None
    reference = _reference(decided, unrounded, report)
    if path is None:
        store = WeightStore(None)
        edited, products = _rewrite(decided, report, store, progress)
        store.adopt(edited, source)
        return Compiled(edited, check(decided, Source(edited, source.folder), reference, products, report))

    packed = sum(row.weight_bytes or 0 for row in report.sites)
    external = max(weight_bytes(source.proto), packed) > EMBED_UP_TO
    with Output(path, source, external=external) as out:
        edited, products = _rewrite(decided, report, out.store, progress)
        aside = out.write(edited)
        report = report.model_copy(update={"result": str(path)})
        report = check(decided, Source(edited, aside.parent), reference, products, report)
        out.commit()
    return Compiled(edited, report, path)


def verify(
    source: ModelLike,
    result: ModelLike,
    *,
    inputs: Mapping[str, np.ndarray] | Sequence[Feed] | None = None,
    runs: int = 5,
    tolerance: float = DEFAULT_TOLERANCE,
    progress: Progress = silent,
) -> Verification:
    """Run two models on the same inputs: how far is the result from what the source means?

    Args:
        inputs: arrays by input name, or several feeds; None: made from the source's signature.
        runs: times each is run for its median time.

    Raises:
        ModelError: a model cannot be read.
        NoInputs: no inputs were found on which the source runs.
        RuntimeRefused: onnxruntime does not load or run one of them.
    """
    if runs < 1:
        raise OptionError(f"runs is {runs}; it must be 1 or more")
    feeds = [Feed("given", dict(inputs))] if isinstance(inputs, Mapping) else inputs
    before, after = load(source), load(result)
    decided = decide(before, _options_of(after), silent)
    return verify_whole(
        before,
        after,
        reference=_reference(decided, None, embedded_report(after.proto)),
        feeds=feeds,
        runs=runs,
        tolerance=tolerance,
        progress=progress,
    )


def _options_of(result: Source) -> Options:
    """What a result was asked to be, as far as it changes what it means.

    Raises:
        OptionError: it cannot be told.
    """
    report = embedded_report(result.proto)
    codes = {row.reason_code for row in report.sites} if report else set()
    upgraded = ReasonCode.ACTIVATION_UPGRADED in codes
    cache: KvCache | None = None
    if report and ReasonCode.CACHE_ROUNDED in codes:
        if not any(value.name.endswith("_scale") for value in result.proto.graph.input):
            raise OptionError(
                "the result's caches are scaled by samples, which it does not hold: only msd compile can verify it, when it makes it"
            )
        formats = {row.format for row in report.sites if row.reason_code is ReasonCode.CACHE_ROUNDED}
        cache = KvCache(4 if "int4 cache" in formats else 8)
    return Options(activations=Activations.UPGRADE if upgraded else Activations.KEEP, kv_cache=cache)


def run(
    model: str | os.PathLike[str], inputs: Mapping[str, np.ndarray], *, portable: bool = False, **options: Any
) -> dict[str, np.ndarray]:
    """Run a model once.

    Args:
        inputs: arrays by input name.
        portable: without the native library: the ops' bodies in standard ops run instead.
        options: as for `session`.

    Returns:
        Arrays by output name.
    """
    opened = session(load(model).path or model, portable=portable, **options)
    names = [o.name for o in opened.get_outputs()]
    return dict(zip(names, run_session(opened, None, dict(inputs)), strict=True))


def makes_folder(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> bool:
    """Whether `compile` would write a folder: a GenAI folder is given, and no ``.onnx`` file asked for."""
    return is_genai(Path(model)) and Path(output).suffix != ".onnx"


def _compile_folder(folder: Path, target: Path, options: dict[str, Any]) -> Compiled:
    cache: KvCache | None = options["kv_cache"]
    if cache is not None and cache.samples is None:
        raise OptionError(
            "onnxruntime-genai carries no scales beside its caches; give --samples FILE.npz to measure them"
        )
    source = GenaiFolder.read(folder)
    done: dict[str, Compiled] = {}
    with FolderOutput(target, source) as out:
        for name in source.models:
            where = {"source": str(folder / name), "result": str(target / name)}
            try:
                one = compile(folder / name, out.model(name), **options)
            except VerificationFailed as failure:
                raise VerificationFailed(f"{name}: {failure}", failure.report.model_copy(update=where)) from None
            done[name] = replace(one, report=one.report.model_copy(update=where))
        out.commit(with_library=any(embedded_report(one.model) for one in done.values()))
    first = done[source.models[0]]
    report = merged_report(folder, target, {name: one.report for name, one in done.items()})
    return Compiled(first.model, report, target, changed=any(one.changed for one in done.values()))


def _report(decided: Decided) -> Report:
    source, rows = decided.source, decided.rows
    return Report(
        source=str(source.path) if source.path else None,
        opset=source.opset,
        summary=summarize(rows),
        sites=rows,
        pricing=decided.pricing,
    )


_BODIES = {
    "Attention": (attention_body, attention_schema.VERSION),
    "MatMul": (matmul_body, matmul_schema.VERSION),
    "MatMulIntegerToFloat": (matmul_integer_to_float_body, integer_schema.VERSION),
}
"""By op, its function body for an opset and the version of it."""


def _functions(ops: set[str], plans: Sequence[Plan], opset: int) -> list[tuple[onnx.FunctionProto, int]]:
    """The bodies of the ops used, each with its version; that of ``msd.MatMul`` as small as its plans allow."""
    parts = {
        "codebooks": any(plan.codebook is not Codebook.INTEGER for plan in plans),
        "formats": any(plan.activation is not ActivationFormat.INT8 for plan in plans),
    }
    return [
        (body(opset, **(parts if op == "MatMul" else {})), version)  # type: ignore[operator]
        for op, (body, version) in _BODIES.items()
        if op in ops
    ]


def _rewrite(
    decided: Decided, report: Report, store: WeightStore, progress: Progress
) -> tuple[onnx.ModelProto, list[RewrittenProduct | RewrittenAttention]]:
    linked = decided.linked
    edit = Edit(linked.source, store.add)
    taken = [d for d in decided.decisions if d.row.outcome is Outcome.REWRITTEN]
    products: list[RewrittenProduct | RewrittenAttention] = []
    ops: set[str] = set()
    plans: list[Plan] = []
    for done, (site, choice) in enumerate((d.site, d.choice) for d in taken):
        progress("packing weights", done, len(taken))
        fact, build = site.found, NodeBuilder(edit, site.name)
        if isinstance(fact, AttentionSite):
            new_cache = decided.caches.get(site.name)
            cache = new_cache or plan_of_cache(fact, linked)
            nodes = lower_attention(fact, cache, build)
            edit.replace(fact.scope, fact.replaced, nodes)
            for node in handing_on(fact):
                if not any(node is known for known in fact.replaced):
                    edit.replace(fact.scope, [node], [])
            products += [RewrittenAttention(site.name, n, fact, cache) for n in nodes if n.domain == "msd"]
            keep_shapes(fact, cache.bits, edit)
            if new_cache is not None:
                store_caches_as_codes(edit, fact, new_cache)
            ops.add("Attention")
            continue
        assert isinstance(fact, QuantizedLinear)
        if choice.way is Way.FLOAT:
            edit.replace(fact.scope, [fact.product], [lower_to_float(fact)])
            continue
        nodes = lower_linear(fact, choice, build)
        edit.replace(fact.scope, fact.replaced, nodes)
        shape = linked.shape(fact.scope, fact.y)
        if shape is not None:
            edit.declare(fact.scope, fact.y.name, fact.element_type, shape)
        ours = [node for node in nodes if node.domain == "msd"]
        ops.update(node.op_type for node in ours)
        plan = plan_of(fact, choice)
        plans += [plan] if isinstance(plan, Plan) else []
        products += [
            RewrittenProduct(site.name, node, weight, fact.codes, fact.alpha, fact.bias)
            for node, weight in zip(ours, fact.weights, strict=True)
        ]
    progress("packing weights", len(taken), len(taken))
    finished = edit.finish(_functions(ops, plans, edit.function_opset))
    proto = with_int8_constants(Source(finished, linked.source.folder), store.add).proto
    stale = [entry for entry in proto.metadata_props if entry.key == METADATA_KEY]
    for entry in stale:
        proto.metadata_props.remove(entry)
    proto.metadata_props.add(key=METADATA_KEY, value=report.portable().model_dump_json(exclude_none=True))
    return proto, products


def _reference(decided: Decided, unrounded: Source | None, report: Report | None) -> Reference | None:
    if decided.oracle is None:
        return None
    if decided.with_float_caches is not None:
        unrounded = unrounded or decided.source
    keeps_rounding = report is not None and any(_keeps_rounding(row) for row in report.sites)
    return Reference(decided.oracle, unrounded, decided.with_float_caches, decided.other_activations, keeps_rounding)


def _keeps_rounding(row: SiteRow) -> bool:
    return row.kind == "linear" and row.reason_code in (ReasonCode.DOES_NOT_PAY, ReasonCode.AS_ASKED)


@dataclass(frozen=True)
class _Check:
    """How a result is verified before it is kept."""

    wanted: bool
    seconds: float
    tolerance: float
    progress: Progress
    measure: bool = False
    """Whether layers are timed, too."""
    note: str | None = None
    """What there is to say beforehand."""

    def __call__(
        self,
        decided: Decided,
        result: Source,
        reference: Reference | None,
        products: list[RewrittenProduct | RewrittenAttention],
        report: Report,
    ) -> Report:
        """The report with what was found.

        Raises:
            VerificationFailed: the result is not right enough.
        """
        if not self.wanted:
            return report
        source = decided.source
        verification: Verification | None = None
        note = "weights above 1 GB: every layer alone"
        if reference is None:
            note = "no standard op keeps such a cache: every layer alone"
        elif bytes_with_float_constants(reference.oracle) <= WHOLE_UP_TO:
            try:
                verification = verify_whole(
                    source,
                    result,
                    reference=reference,
                    tolerance=self.tolerance,
                    clock=Clock(self.seconds),
                    progress=self.progress,
                )
            except TimedOut:
                note = f"the whole model takes more than {self.seconds:g} s: every layer alone"
            except NoInputs as error:
                note = str(error)
            except RuntimeRefused as error:
                note = str(error)
                _result_is_to_blame(source, error)
        # A model that rounds its activations turns differences of 1e-7 into whole codes: there the layers tell.
        if (
            verification is None
            or not verification.passed
            or any(_keeps_rounding(row) for row in report.sites)
            or any(isinstance(p, RewrittenAttention) or p.codes is not None for p in products)
        ):
            layers = verify_sites(
                result, products, tolerance=self.tolerance, clock=Clock(self.seconds), progress=self.progress
            )
            if verification is None:
                both = "; ".join(n for n in (note, layers.note) if n)
                verification = layers.model_copy(update={"note": both})
            else:
                passed = verification.passed and layers.passed
                verification = verification.model_copy(update={"sites": layers.sites, "passed": passed})
        if self.note is not None:
            said = "; ".join(n for n in (self.note, verification.note) if n)
            verification = verification.model_copy(update={"note": said})
        report = report.model_copy(update={"verification": verification})
        if not verification.passed:
            raise VerificationFailed(_failure(verification, report), report)
        if self.measure and verification.method is Method.WHOLE:
            from .bench.sites import with_measured_sites  # here, for it needs this module

            report = with_measured_sites(report, decided, result, progress=self.progress)
        return report


def _result_is_to_blame(source: Source, error: RuntimeRefused) -> None:
    """Raise ``error`` if the source itself runs: then it is the result that does not."""
    try:
        open_model(source.proto, source.folder, name=source.name, portable=True, log_severity_level=SAY_NOTHING)
    except RuntimeRefused:
        return
    raise error


def _failure(verification: Verification, report: Report) -> str:
    parts = []
    outputs = sorted((o for o in verification.outputs if o.relative_l2 > o.tolerance), key=lambda o: -o.relative_l2)
    if outputs:
        worst = outputs[0]
        parts.append(
            f"output {worst.name!r} ({worst.feed}) is {worst.relative_l2:.2g} from the oracle in relative L2, "
            f"allowed are {worst.tolerance:.2g}"
        )
    if verification.sites:
        named = ", ".join(f"{s.node!r} {s.relative_l2:.2g}" for s in verification.sites[:3])
        parts.append(f"worst layers alone: {named}")
    if any(s.activation for s in report.sites):
        parts.append("activations in MX formats keep 3 to 7 bits: raise the tolerance, or leave them out")
    elif any(s.terms == 1 for s in report.sites):
        parts.append("one term keeps 8 bits, about 1 % error a layer: use two terms, or raise the tolerance")
    elif any(s.terms == 2 for s in report.sites):
        parts.append(
            "two terms keep 16 bits: where a few channels are hundreds of times as large, three (--terms 3) may be needed"
        )
    return "; ".join(parts)


def _target(source: Source, path: Path) -> Path:
    refuse_overwriting(source, path)
    return path


def refuse_overwriting(source: Source, path: Path) -> None:
    """See that ``path`` is neither the model nor its data.

    Raises:
        OutputError: it is.
    """
    if path.is_file() and any(path.samefile(file) for file in source.files()):
        raise OutputError(f"output {str(path)!r} is the model itself, or holds its data; name another file")


def _copy(source: Source, target: Path | None) -> onnx.ModelProto:
    """The source as it is: the same bytes, if they are all in one file."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    if target is None:
        WeightStore(None).adopt(proto, source)
        return proto
    with Output(target, source, external=weight_bytes(proto) > EMBED_UP_TO) as out:
        if source.path is not None and not any(is_external(t) for t in stored_tensors(proto)):
            out.write_copy(source.path)
        else:
            out.write(proto)
        out.commit()
    return proto


def default_output(model: str | os.PathLike[str]) -> Path:
    """``model.onnx`` -> ``model.msd.onnx`` beside it; for a folder, beside the model in it, or ``FOLDER-msd``."""
    if is_genai(Path(model)):
        return default_folder(Path(model))
    path = model_file(Path(model))
    return path.with_name(path.name.removesuffix(".onnx") + ".msd.onnx")
