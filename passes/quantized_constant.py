"""Codes that a model makes of a float constant each time it runs: constant -> [Transpose]* -> QuantizeLinear -> [Clip]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from msd_compiler.errors import ModelError
from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked
from msd_compiler.pattern import DEFAULT_DOMAINS, Any, Chain, Const, Match, Maybe, Op
from msd_compiler.source import Source, release, type_name
from msd_compiler.weight_view import WeightView

from .codes import CODE_BITS, FLOAT_TYPES, SIGNED, Codes, code_range, refuse_type

_AT_ONCE = 2**20
"""Elements divided at a time: what that needs beside the codes stays small."""

QUANTIZE = Op(
    "QuantizeLinear",
    Chain(("Identity", "Transpose"), Const("floats"), name="before"),
    Const("quantize_scales"),
    Maybe(Const("quantize_zero_points")),
    domains=(*DEFAULT_DOMAINS, "com.microsoft"),
    name="quantize",
)
CLIP = Op("Clip", QUANTIZE, Maybe(Any("lowest")), Maybe(Any("highest")), name="clip")


@dataclass(frozen=True)
class QuantizedConstant(Codes):
    """``clip(saturate(round(floats / scales) + zero points))``, computed when it is asked for and not kept.

    Source: ONNX QuantizeLinear, opsets 10 to 25; of a scale or float that is no number onnxruntime makes the lowest code,
    and float16 it divides in float32. So does this.
    """

    source: Source
    floats: TensorProto
    permutation: tuple[int, ...]
    """What was done to the dimensions of ``floats``."""
    scales: TensorProto
    zero_points: TensorProto | None
    axis: int
    block_size: int
    data_type: int
    bounds: tuple[int, int]

    @property
    def name(self) -> str:  # type: ignore[override]
        """See `Codes`."""
        return str(self.floats.name)

    @property
    def dims(self) -> tuple[int, ...]:  # type: ignore[override]
        """See `Codes`."""
        return tuple(self.floats.dims[p] for p in self.permutation)

    def array(self, part: int | None = None) -> np.ndarray:
        """See `Codes`."""
        floats = self.source.array(self.floats).transpose(self.permutation)
        scales = self.source.array(self.scales).astype(np.float32)
        stored = None if self.zero_points is None else self.source.array(self.zero_points)
        zero_points = np.zeros(scales.shape, np.float32) if stored is None else stored.astype(np.float32)
        lowest, highest = code_range(self.data_type)
        codes = np.zeros(floats.shape, np.int8 if self.data_type in SIGNED else np.uint8)
        first, last = (0, len(codes)) if part is None else (part, part + 1)
        step = max(1, _AT_ONCE * len(codes) // max(1, codes.size))
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            with np.errstate(all="ignore"):
                made = floats[rows].astype(np.float32) / self._spread(scales, rows)
            np.rint(made, out=made)
            made += self._spread(zero_points, rows)
            np.fmin(np.fmax(made, lowest, out=made), highest, out=made)  # fmax: the lowest instead of NaN
            np.minimum(np.maximum(made, self.bounds[0], out=made), self.bounds[1], out=made)
            codes[rows] = made
            release(floats)
        return codes

    def _spread(self, values: np.ndarray, rows: slice) -> np.ndarray:
        """Scales or zero points beside the rows that they belong to."""
        if values.size == 1 and not self.block_size:
            return values.reshape(())
        if self.block_size:
            at_axis = np.arange(self.dims[self.axis])[rows if self.axis == 0 else slice(None)] // self.block_size
            return (values if self.axis == 0 else values[rows]).take(at_axis, self.axis)
        along = values.reshape([-1 if d == self.axis else 1 for d in range(len(self.dims))])
        return along[rows] if self.axis == 0 else along


def quantized_constant(m: Match, linked: Linked) -> QuantizedConstant:
    """The codes that the matched `QUANTIZE` or `CLIP` makes.

    Raises:
        Reject: floats, scales or codes are of a type that is not read.
        ModelError: scales, zero points or bounds do not fit the constant.
    """
    node, source = m.op("quantize"), linked.source
    where = f"{source.name}: {node.op} {node.name or node.outputs[0].name!r}"
    floats, scales = (m.scope.constant(m.tensor(name)) for name in ("floats", "quantize_scales"))
    assert floats is not None
    assert scales is not None
    stored = m.maybe("quantize_zero_points")
    zero_points = None if stored is None else m.scope.constant(stored)
    for tensor, what in ((floats, "weight"), (scales, "scales")):
        if tensor.data_type not in FLOAT_TYPES:
            raise Reject(
                ReasonCode.WEIGHT_TYPE,
                f"{what} {tensor.name!r} of {node.op} are {type_name(tensor.data_type)}; a float type is needed",
            )
    data_type = _code_type(node, zero_points, where)
    permutation = _permutation(m.chain("before"), len(floats.dims), where)
    dims = tuple(floats.dims[p] for p in permutation)
    axis, block_size = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    if not dims or not -len(dims) <= axis < max(len(dims), 2) or block_size < 0:
        raise ModelError(f"{where} has axis {axis} and blocks of {block_size}; its constant has shape {list(dims)}")
    axis = axis % len(dims) if axis < len(dims) else len(dims) - 1
    try:
        for tensor in (scales, zero_points):
            if tensor is not None:
                WeightView.stored_as(dims, tuple(tensor.dims), axis, block_size)
    except ValueError as error:
        raise ModelError(f"{where}: scales or zero points have {error}") from error
    bounds = _bounds(m, linked, data_type) if "clip" in m.bound else code_range(data_type)
    return QuantizedConstant(source, floats, permutation, scales, zero_points, axis, block_size, data_type, bounds)


def _code_type(node: gs.Node, zero_points: TensorProto | None, where: str) -> int:
    asked = int(node.attrs.get("output_dtype", 0))
    if zero_points is not None and asked not in (0, zero_points.data_type):
        raise ModelError(
            f"{where}: zero points {zero_points.name!r} are {type_name(zero_points.data_type)}, "
            f"expected the output's type {type_name(asked)}"
        )
    data_type = asked or (TensorProto.UINT8 if zero_points is None else int(zero_points.data_type))
    refuse_type("its weight is quantized to", data_type, CODE_BITS)
    return data_type


def _permutation(chain: tuple[gs.Node, ...], rank: int, where: str) -> tuple[int, ...]:
    permutation = tuple(range(rank))
    for node in chain:
        if node.op == "Transpose":
            perm = tuple(int(p) for p in node.attrs.get("perm", range(rank)[::-1]))
            if sorted(perm) != list(range(rank)):
                raise ModelError(f"{where}: {list(perm)} is no permutation of {rank} dimensions")
            permutation = tuple(permutation[p] for p in perm)
    return permutation


def _bounds(m: Match, linked: Linked, data_type: int) -> tuple[int, int]:
    """Smallest and largest code that a Clip leaves."""
    found = list(code_range(data_type))
    for position, name in enumerate(("lowest", "highest")):
        tensor = m.maybe(name)
        if tensor is None:
            continue
        stored = m.scope.constant(tensor)
        if stored is None:
            raise Reject(ReasonCode.RUNTIME_WEIGHT, f"its {name} code {tensor.name!r} is not stored in the file")
        value = linked.source.array(stored)
        if value.size != 1 or stored.data_type != data_type:
            raise ModelError(
                f"{linked.source.name}: Clip {m.op('clip').outputs[0].name!r}: bound {tensor.name!r} is "
                f"{type_name(stored.data_type)}{list(value.shape)}, expected one {type_name(data_type)}"
            )
        found[position] = int(value.reshape(())[()])
    return found[0], found[1]
