"""Devices as data: what a target can do, every figure with its source.

A profile is a TOML file. Two kinds: of a CPU, whose kernels are priced by measured curves over the number of rows, and of an
accelerator, priced by the rates of its units and the closed forms of the paper (section 3.9).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from bisect import bisect_right
from collections.abc import Sequence
from enum import StrEnum
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import OptionError

Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Figure(_Table):
    """A number and where it comes from."""

    value: Positive
    source: str = Field(min_length=1)


class Curve(_Table):
    """A cost at some sizes, linear between them; beyond the last it grows as the size does."""

    at: tuple[Positive, ...] = Field(min_length=1, strict=False)
    """Ascending."""
    seconds: tuple[NotNegative, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _is_a_curve(self) -> Curve:
        _check_points(self.at, self.seconds)
        return self

    def __call__(self, size: float) -> float:
        """The cost at a size."""
        beyond = max(size / self.at[-1], 1.0)
        return beyond * _between(self.at, self.seconds, size)


class Reads(_Table):
    """How fast memory is read, by how many bytes are read again and again: they lie in a cache, or do not."""

    bytes: tuple[Positive, ...] = Field(min_length=1, strict=False)
    """Ascending."""
    bytes_per_second: tuple[Positive, ...] = Field(min_length=1, strict=False)
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_curve(self) -> Reads:
        _check_points(self.bytes, self.bytes_per_second)
        return self

    def rate(self, footprint: float) -> float:
        """Bytes per second; constant before the first size and after the last."""
        seconds_per_byte = [1 / rate for rate in self.bytes_per_second]
        return 1 / _between(self.bytes, seconds_per_byte, footprint)

    def waiting(self, size: float, footprint: float) -> float:
        """Seconds that reading so many bytes takes longer than it does from a cache, where kernels were measured."""
        return size * max(0.0, 1 / self.rate(footprint) - 1 / self.bytes_per_second[0])


def _check_points(sizes: Sequence[float], values: Sequence[float]) -> None:
    if len(sizes) != len(values):
        raise ValueError(f"{len(sizes)} sizes and {len(values)} figures; a figure for each size is needed")
    if any(a >= b for a, b in pairwise(sizes)):
        raise ValueError("sizes must ascend")


def _between(sizes: Sequence[float], values: Sequence[float], size: float) -> float:
    """Linear between sizes, the nearest one's value outside."""
    right = bisect_right(sizes, size)
    if right in (0, len(sizes)):
        return values[0 if right == 0 else -1]
    (a, b), (x, y) = sizes[right - 1 : right + 1], values[right - 1 : right + 1]
    return x + (y - x) * (size - a) / (b - a)


class Way(StrEnum):
    """How a layer can be computed on a CPU."""

    MSD = "msd"
    """Our op: the activation in INT8 terms, multiplied with the codes."""
    SESSION = "session"
    """As the model stands, in a default session of onnxruntime: the activation is rounded to 8 bits (level 4)."""
    FLOAT = "float"
    """``MatMulNBits`` at accuracy level 0: weights dequantized, activations float."""
    FLOAT_WEIGHT = "float weight"
    """A float32 ``MatMul``."""


class LinearKernel(_Table):
    """What products take, one thread.

    ``seconds = node + call + M * K * per_activation + M * N * per_output + K * N * per_weight(M) + N * groups * per_group(M)``,
    and what reading the weight takes longer than from a cache, for these kernels wait for memory: `Reads.waiting` over
    read_share.
    """

    way: Way = Field(strict=False)
    bits: Literal[2, 4, 8, 32]
    per_channel: bool = False
    """Of a weight with one scale per column, where that goes another way."""
    least_group: int = Field(default=1, ge=1)
    """Of groups of so many steps of K or more, where short ones go another way."""
    terms: Literal[1, 2, 3] | None = None
    """Of `Way.MSD`; 1 and 2 are one pass of the same code."""
    call: NotNegative = 0.0
    """Seconds more than a node that does next to nothing."""
    per_activation: NotNegative
    """Seconds to round or decompose a value."""
    per_output: NotNegative = 0.0
    """Seconds to finish a value of the result."""
    per_weight: Curve
    """Seconds for a weight, by M."""
    per_group: Curve
    """Seconds for a column of a group, by M."""
    read_share: Positive = 1.0
    """How much of the wait for memory is felt, inverted: above 1 where prefetching hides a part."""
    source: str = Field(min_length=1)


class AttentionKernel(_Table):
    """What attention over a cache takes, one thread.

    ``seconds = node + call + values * per_activation + pairs * (D * per_cached(rows) + per_logit(rows))``, and what reading
    the cache takes longer than from a cache of the processor. Values are those of the new tokens' queries, keys and values;
    pairs are of a head and a token that is seen, once for the new tokens together.
    """

    way: Way = Field(strict=False)
    bits: Literal[4, 8, 32]
    shares_heads: bool
    """True: query heads of a KV head go over its cache together: heads are KV heads, rows are query heads of one times
    new tokens. False: each goes for itself: heads are query heads, rows are new tokens."""
    is_causal: bool
    """Whether work ends with the token itself; else every new token costs as much as the last one."""
    call: NotNegative = 0.0
    """Seconds more than a node that does next to nothing."""
    per_activation: NotNegative = 0.0
    """Seconds to round, move or store a value of a new token."""
    per_cached: Curve
    """Seconds for a value of the key cache (and one of the value cache), by rows."""
    per_logit: Curve
    """Seconds for all rows' logits of a token, by rows: the softmax."""
    read_share: Positive = 1.0
    """As that of `LinearKernel`."""
    source: str = Field(min_length=1)


class CpuProfile(_Table):
    """A CPU."""

    family: Literal["cpu"]
    name: str = Field(min_length=1)
    description: str
    instruction_set: str
    """As `msd doctor` names it."""
    node: Figure
    """Seconds to run a node that does next to nothing."""
    products: Figure
    """int16 operations per second, two per multiply-add, on registers: the roof of the roofline."""
    reads: Reads
    linear: tuple[LinearKernel, ...] = Field(strict=False)
    attention: tuple[AttentionKernel, ...] = Field(default=(), strict=False)


NumberFormat: TypeAlias = Literal["fp32", "bf16", "fp8", "int8", "fp4"]
"""Of a matrix unit's operands."""


class Rules(_Table):
    """Where the device's own public kernels decompose activations; for comparison only."""

    most_rows: Figure | None = None
    """Of a weight with one scale per column."""
    dimension_multiple: Figure | None = None
    """Of K and N."""
    group_steps_per_row: Figure | None = None
    """Of a weight with scales per group: at most group / this many rows."""
    most_attention_rows: Figure | None = None
    """Query rows of a KV head."""


class AcceleratorProfile(_Table):
    """A device with matrix and vector units."""

    family: Literal["accelerator"]
    name: str = Field(min_length=1)
    description: str
    matrix: dict[NumberFormat, Figure]
    """Operations per second by number format, two per multiply-add, dense."""
    vector: Figure
    """FLOP per second of the vector units, two per multiply-add."""
    read: Figure
    """Bytes per second from device memory."""
    on_chip_bytes: Figure
    """Of the largest memory on the chip: an activation whose terms fit lets every weight be read once for all of them."""
    node: Figure
    """Seconds to launch a kernel (the paper's T_sync)."""
    dequantized: Literal["memory", "registers"]
    """How vector and matrix units hand on what they share (dequantized weights, partial sums): through memory or on chip."""
    dequantized_source: str = Field(min_length=1)
    rules: Rules = Rules()


Profile: TypeAlias = CpuProfile | AcceleratorProfile

_TARGETS = files("msd_compiler.cost") / "targets"


def target_names() -> list[str]:
    """The profiles that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _TARGETS.iterdir() if entry.name.endswith(".toml"))


def load_target(target: str) -> Profile:
    """A shipped profile by name, or any by file.

    Raises:
        OptionError: there is none, or a figure of it is missing or impossible; key and file are named.
    """
    if target in target_names():
        return parse_profile((_TARGETS / f"{target}.toml").read_text(encoding="utf-8"), f"{target}.toml")
    text = read_text(target)
    if text is None:
        raise OptionError(f"{target}: neither a target ({', '.join(target_names())}) nor a file")
    return parse_profile(text, target)


def read_text(path: str) -> str | None:
    """What a file holds; None: there is no such file.

    Raises:
        OptionError: it cannot be read, or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name that no file can have
        raise OptionError(f"{path}: cannot be read: {error}") from error


def parse_profile(text: str, where: str) -> Profile:
    """A profile from TOML.

    Args:
        where: named in messages.

    Raises:
        OptionError: it is no TOML, or a figure is missing or impossible.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{where}: {error}") from error
    families: dict[object, type[CpuProfile | AcceleratorProfile]] = {
        "cpu": CpuProfile,
        "accelerator": AcceleratorProfile,
    }
    family = table.get("family")
    if not isinstance(family, str) or family not in families:
        raise OptionError(f"{where}: family is {family!r}; it must be one of {', '.join(map(str, families))}")
    try:
        return families[family].model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise OptionError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}") from error


def digest(profile: Profile) -> str:
    """12 hex digits of the profile's figures, for the report."""
    text = json.dumps(profile.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


BY_INSTRUCTION_SET = {"avx512-vnni": "cpu-avx512-vnni", "neon-dotprod": "cpu-arm-dotprod"}
"""Shipped profile by what the native library uses; any other set has that of AVX2."""


def default_target(instruction_set: str | None) -> str:
    """The shipped profile for an instruction set of the native library."""
    return BY_INSTRUCTION_SET.get(instruction_set or "", "cpu-avx2")
