"""What the benchmarks found, as it goes into JSON."""

from __future__ import annotations

from typing import Literal, TypeAlias

import onnxruntime
from pydantic import BaseModel, ConfigDict, Field

from .. import doctor
from .machine import Limits, LimitShare, Unit
from .timing import Time


class Record(BaseModel):
    """JSON without gaps: an infinite distance is a string."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


class Setting(BaseModel):
    """Where the times were taken."""

    version: str | None
    """Of msd-compiler; None in a checkout that was not installed."""
    onnxruntime: str
    cpu: str
    instruction_set: str | None
    """What the native library uses; None: it cannot be used."""
    threads: int | None
    """In every session; None: onnxruntime's default, one per core."""

    @classmethod
    def here(cls, threads: int | None) -> Setting:
        """This machine."""
        return cls(
            version=doctor.package_version(),
            onnxruntime=onnxruntime.__version__,
            cpu=doctor.cpu_name(),
            instruction_set=doctor.used_isa(),
            threads=threads,
        )


class RunRow(Record):
    """One model on one set of inputs."""

    model: str
    inputs: str
    """"prefill", "decode" or "single", made from the signature; "given"."""
    time: Time
    ratio: float
    """Median time over that of the first model: below 1 is faster."""
    relative_l2: dict[str, float] = Field(default_factory=dict)
    """By output, distance from the first model's oracle; only where both have the inputs, and the output, alike."""


class DecodeRow(Record):
    """One model as a decoder, batch 1."""

    model: str
    tokens: int
    """Fed in a step."""
    cached: int
    """In the cache before it; the steps of a decode row follow each other from here."""
    time: Time
    tokens_per_second: float
    ratio: float
    """Median time over that of the first model."""
    relative_l2: float | None = None
    """Of the last timed step's logits, from those of the model that is said to be exact; None: none is."""
    limit: LimitShare | None = None
    """How much of what this machine can do at best, products of weights alone counted; None: not known."""


class FreshRow(BaseModel):
    """One model in a process of its own."""

    model: str
    open_ms: float
    first_run_ms: float
    peak_bytes: int | None
    """The most memory that the process held, Python and onnxruntime included; None where the system does not say."""
    before_bytes: int | None
    """The same before the model was opened."""


class SiteTime(BaseModel):
    """One node of the optimized graph."""

    node: str
    op: str
    ms: float
    """In a run: median time of an execution, times executions."""
    share: float
    """Of the time of all nodes."""


class ProfileRow(BaseModel):
    """Where one model spends its time, by onnxruntime's profiler."""

    model: str
    inputs: str
    nodes_ms: float
    """All nodes of a run."""
    top: list[SiteTime]
    """Longest first."""


class ModelsReport(Record):
    """Models side by side."""

    kind: Literal["models"] = "models"
    setting: Setting
    models: dict[str, str | None]
    """Files by label; the first one is the measure. None: compiled for the occasion, and not kept."""
    runs: list[RunRow]
    decoding: list[DecodeRow] = Field(default_factory=list)
    fresh: list[FreshRow] = Field(default_factory=list)
    profiles: list[ProfileRow] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    """What was left out, and why."""


class LinearRow(Record):
    """One way to compute one product ``[M, K] x [K, N]``."""

    way: str
    m: int
    k: int
    n: int
    weight: str
    """"int8 per channel", "int8 block 128", "int4 block 32" or "mxfp4 block 32"; ``way`` says where its codes are others."""
    time: Time
    ratio: float
    """Median time over that of the float32 MatMul."""
    relative_l2: float
    """From a product in float64, on a sample of columns."""
    stored_bytes: int
    """Of codes and scales; float32: of the weight."""
    unit: Unit
    """What multiplies."""
    operations: int
    """By that unit; a multiply-add is two."""
    limit: LimitShare | None = None
    """How much of what this machine can do at best; None: not known yet."""


class LinearReport(Record):
    """Products of one layer."""

    kind: Literal["linear"] = "linear"
    setting: Setting
    limits: Limits
    rows: list[LinearRow]
    ramp: list[tuple[int, int]] = Field(default_factory=list)
    """K, N of the layers that are there for the growth of times with K and N: for the plot."""
    notes: list[str] = Field(default_factory=list)
    """What was left out, and why."""


class AttentionRow(Record):
    """One way to compute one step of attention."""

    way: str
    batch: int
    tokens: int
    """New ones, of every sequence."""
    cached: int
    """Tokens before them."""
    time: Time
    ratio: float
    """Median time over that of GroupQueryAttention with a float32 cache."""
    relative_l2: float
    """What the last token of the first sequence gets, from float64 over the same keys and values."""


class AttentionReport(Record):
    """Steps of attention, causal, over caches that are buffers."""

    kind: Literal["attention"] = "attention"
    setting: Setting
    heads: int
    kv_heads: int
    size: int
    """Columns of a head."""
    rows: list[AttentionRow]
    notes: list[str] = Field(default_factory=list)
    """What was left out, and why."""


class DecoderRows(Record):
    """One decoder in several spellings."""

    weight: str
    """"int8 block 32"."""
    stored_bytes: int
    """Of the weights of all products: codes and scales."""
    decoding: list[DecodeRow]
    fresh: list[FreshRow]


class DecodeReport(Record):
    """Decoders of one shape with random weights."""

    kind: Literal["decode"] = "decode"
    setting: Setting
    limits: Limits
    shape: dict[str, int]
    """What the decoders are made of: hidden size, layers, ..."""
    parameters: int
    weights: int
    """Of these, in products: multiply-adds of a token."""
    decoders: list[DecoderRows]
    notes: list[str] = Field(default_factory=list)
    """What was left out, and why."""


Report: TypeAlias = ModelsReport | LinearReport | AttentionReport | DecodeReport
