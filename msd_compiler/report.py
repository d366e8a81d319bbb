"""What was found, what was done and how right it is: one set of facts, seen as JSON or as a table (`screen`).

The models below are the report's schema; `report.schema.json` beside this file is made from them.
"""

from __future__ import annotations

import json
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic import BaseModel, ConfigDict, Field

from .evaluate.report import Evaluation
from .facts import ReasonCode

METADATA_KEY = "msd.report"
"""Model metadata under which the report travels inside a result, without times and paths."""


class Outcome(StrEnum):
    """What became of a site."""

    REWRITTEN = "rewritten"
    KEPT = "kept"
    """It could be left, and was: nothing would be gained, or its meaning would change."""
    UNSUPPORTED = "unsupported"
    """It would gain, but cannot be taken."""


UNSUPPORTED = frozenset(
    {
        ReasonCode.WEIGHT_TYPE,
        ReasonCode.ACTIVATION_TYPE,
        ReasonCode.SCALE_LAYOUT,
        ReasonCode.UNKNOWN_RANK,
        ReasonCode.COLUMN_ORDER,
        ReasonCode.FUSED_OP,
        ReasonCode.ATTENTION_FORM,
    }
)
"""Reasons for `Outcome.UNSUPPORTED`; the others mean `Outcome.KEPT`."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", use_enum_values=False)


class PriceRow(_Row):
    """What a site takes in a run of one phase."""

    seconds: float
    bytes: float = Field(description="read and written")
    ops: dict[str, float] = Field(description="operations by unit; a multiply-add is two")


class CandidateRow(_Row):
    """One way to compute a site, and what it was expected to take on the target."""

    name: str = Field(description="keep, float activations, 2 terms, ...")
    seconds: float | None = Field(None, description="of a run, mean over the workload; absent: not priced")
    error: float = Field(description="predicted relative L2 of the site's output")
    why_not: str | None = Field(None, description="why it was not chosen from")
    phases: list[PriceRow] = Field(default_factory=list, description="in the order of the workload's phases")


class MeasuredRow(_Row):
    """What a site took in a run of one phase, on the machine that `Measurement` names."""

    phase: str
    before_ms: float | None = Field(
        None, description="in a default session of the source; absent: its nodes could not be told from others"
    )
    after_ms: float | None = Field(None, description="in the result")


class SiteRow(_Row):
    """One linear layer or attention of the source, or one lookup in a low-bit table."""

    node: str = Field(description="name of the node that multiplies, or of its first output")
    kind: Literal["linear", "embedding", "attention"] = "linear"
    form: str = Field(description="spelling in the source, e.g. DequantizeLinear -> Transpose -> MatMul")
    format: str | None = Field(None, description="weight format, e.g. int4 block 32, zero points")
    m: int | str | None = Field(None, description="rows of the activation: a number or a product of dimension names")
    k: int | None = Field(None, description="length of the reduction")
    n: int | None = Field(None, description="output columns")
    heads: int | None = Field(None, description="attention: query heads")
    kv_heads: int | None = Field(None, description="attention: heads of keys and values")
    head_size: int | None = Field(None, description="attention: columns of a head")
    outcome: Outcome
    reason: str | None = Field(None, description="why it was not rewritten, or with what choice, for people")
    reason_code: ReasonCode | None = Field(None, description="the same, stable")
    terms: int | None = Field(None, description="INT8 terms of the activation")
    activation: str | None = Field(
        None, description="MX format of the activation, mxfp4x2 or the like; absent: INT8 terms"
    )
    group: int | None = Field(None, description="K-steps that share an activation scale")
    error_bound: float | None = Field(
        None, description="largest error of an activation element over the largest magnitude of its group"
    )
    weight_bytes: int | None = Field(None, description="bytes of the packed codes in the result")
    cache_bytes: int | None = Field(None, description="attention: bytes of a token in the result's cache")
    source_cache_bytes: int | None = Field(None, description="attention: bytes of a token in the source's cache")
    choice: str | None = Field(None, description="name of the candidate that was chosen")
    margin: float | None = Field(
        None, description="time of the fastest other kind of candidate within the budget over the chosen one's, less 1"
    )
    device_rule: str | None = Field(
        None, description="what the target's own public kernels would do, where that is something else, and why"
    )
    candidates: list[CandidateRow] = Field(default_factory=list, description="absent inside a result")
    measured: list[MeasuredRow] = Field(
        default_factory=list, description="in the order of the measurement's phases; absent inside a result"
    )


class Totals(_Row):
    """All priced sites of a run, mean over the workload."""

    seconds: float
    critical_path_seconds: float = Field(description="of the main graph: what no number of threads does away with")
    bytes: float
    ops: dict[str, float]


class PhaseRow(_Row):
    """One kind of run that the model is used for."""

    name: str
    share: float = Field(description="of all runs")
    batch: int
    tokens: int
    context: int


class PricingRow(_Row):
    """What sites were priced with, and what they take together."""

    target: str
    digest: str = Field(description="of the target's figures")
    workload: str
    phases: list[PhaseRow]
    budget: float = Field(description="largest relative L2 per site")
    peak_ops_per_second: float = Field(description="the target's roof: its fastest unit that multiplies")
    read_bytes_per_second: float = Field(description="its slope: where all weights of the model are read from")
    before: Totals
    after: Totals
    unpriced: dict[str, int] = Field(description="nodes that nobody priced, by op type: they take time, too")


class MeasuredPhase(_Row):
    """All nodes of a run together, those of no site, too, with what the profiler itself takes."""

    name: str = Field(description="of the workload's phase, whose batch, tokens and context the inputs have")
    before_ms: float | None = Field(None, description="absent: it does not run so")
    after_ms: float | None = None
    empty_node_ms: float | None = Field(
        None,
        description="median of nodes that compute nothing (Reshape and the like): so much of any node is the profiler's",
    )


class Measurement(_Row):
    """Times of single nodes, by onnxruntime's profiler: the product of a site, and what prepares its weight.

    A node that several sites share counts for none of them.
    """

    cpu: str
    instruction_set: str | None = Field(None, description="what the native library used")
    onnxruntime: str
    threads: int = Field(description="of either session: as many as predictions are for")
    runs: int = Field(description="that the medians are of")
    phases: list[MeasuredPhase]
    notes: list[str] = Field(default_factory=list, description="what was left out, and why")


class Summary(_Row):
    """Counts over the sites."""

    sites: int
    rewritten: int
    kept: int
    unsupported: int
    reasons: dict[ReasonCode, int] = Field(
        default_factory=dict, description="sites that were not rewritten, by reason code"
    )


class Disagreement(_Row):
    """A place where the arg-max over the last dimension differs from the oracle's."""

    index: list[int] = Field(description="position in the output without its last dimension")
    oracle: int
    found: int
    margin: float = Field(description="oracle's best value less its value at the index found")


class Agreement(_Row):
    """Share of equal arg-max over the last dimension, for outputs that are logits."""

    equal: float
    positions: int
    disagreements: list[Disagreement] = Field(description="at most 20, smallest margins last")


class OutputRow(_Row):
    """One output on one feed: the result, and what the user runs today, against the oracle."""

    name: str
    feed: str
    relative_l2: float
    max_abs: float
    tolerance: float
    source_relative_l2: float | None = Field(
        None, description="the source's own distance with optimizations off: float16's rounding, 0 for float32"
    )
    rounding_relative_l2: float | None = Field(
        None,
        description="the oracle against the model before its weights or caches were rounded: what that rounding did",
    )
    other_activations_relative_l2: float | None = Field(
        None,
        description="the result against the source with its rounding of activations the other way: left out where the "
        "result keeps it, left in where the result leaves it out",
    )
    baseline_relative_l2: float | None = Field(None, description="the source in a default session")
    baseline_max_abs: float | None = None
    portable_relative_l2: float | None = Field(None, description="the result without the native library")
    native_to_portable_l2: float | None = Field(None, description="with the library against without it")
    argmax: Agreement | None = None
    baseline_argmax: Agreement | None = None


class SiteError(_Row):
    """One site alone, against float64."""

    node: str
    relative_l2: float
    max_abs: float
    tolerance: float


class Method(StrEnum):
    """How the result was verified."""

    WHOLE = "whole"
    """Source and result ran on the same inputs."""
    SITES = "sites"
    """Every rewritten layer alone, against float64: the whole would have taken too long or too much memory."""


class Verification(_Row):
    """How far the result is from the oracle."""

    method: Method
    passed: bool
    note: str | None = None
    outputs: list[OutputRow] = Field(default_factory=list)
    sites: list[SiteError] = Field(default_factory=list, description="worst first")
    source_ms: float | None = Field(None, description="median run time of the source in a default session")
    result_ms: float | None = None
    portable_ms: float | None = None


class Report(_Row):
    """Everything that `msd compile` says."""

    version: Literal[1] = 1
    source: str | None = Field(None, description="path of the source; absent inside a result")
    result: str | None = None
    opset: int
    summary: Summary
    sites: list[SiteRow]
    pricing: PricingRow | None = Field(None, description="absent inside a result")
    verification: Verification | None = None
    measurement: Measurement | None = Field(None, description="absent inside a result")
    evaluation: Evaluation | None = Field(
        None, description="on a text: how far source and result are from the oracle; absent inside a result"
    )

    def json_text(self) -> str:
        """The report as a JSON document."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"

    def portable(self) -> Report:
        """Without paths, times, prices and measurements: what travels in a result, whose bytes depend on decisions alone."""
        fields: dict[str, Any] = {"candidates": [], "margin": None, "device_rule": None, "measured": []}
        sites = [site.model_copy(update=fields) for site in self.sites]
        absent = ("source", "result", "pricing", "verification", "measurement", "evaluation")
        return self.model_copy(update={"sites": sites} | dict.fromkeys(absent))


def summarize(sites: list[SiteRow]) -> Summary:
    """Counts over the sites."""
    outcomes = Counter(site.outcome for site in sites)
    reasons = Counter(s.reason_code for s in sites if s.reason_code and s.outcome is not Outcome.REWRITTEN)
    return Summary(
        sites=len(sites),
        rewritten=outcomes[Outcome.REWRITTEN],
        kept=outcomes[Outcome.KEPT],
        unsupported=outcomes[Outcome.UNSUPPORTED],
        reasons={code: reasons[code] for code in sorted(reasons)},
    )


def embedded_report(proto: onnx.ModelProto) -> Report | None:
    """The report that a compiled model carries; None for any other model."""
    for entry in proto.metadata_props:
        if entry.key == METADATA_KEY:
            try:
                return Report.model_validate_json(entry.value)
            except ValueError:
                return None  # written by a later version, or by hand
    return None


def schema_path() -> Path:
    """The JSON Schema of the report."""
    return Path(__file__).parent / "report.schema.json"


def schema_text() -> str:
    """The JSON Schema, made from the models above; the file at `schema_path` is this text."""
    schema = Report.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema, indent=2) + "\n"
