"""A weight behind ``DequantizeLinear`` and the ops after it, as a `LowBitWeight`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from msd_compiler.errors import ModelError
from msd_compiler.facts import LowBitWeight, ReasonCode, Reject, WeightData, describe_format
from msd_compiler.linked import Linked
from msd_compiler.pattern import Match
from msd_compiler.source import Source, type_name
from msd_compiler.weight_view import NotAligned, WeightView

from .codes import (
    CODE_BITS,
    FLOAT_TYPES,
    SIGNED,
    Codes,
    StoredCodes,
    code_range,
    integers,
    refuse_type,
    shared,
    unsigned,
)
from .quantized_constant import quantized_constant

MOST_EXPERTS = 1024
"""Matrices of one weight that become a product each."""


@dataclass(frozen=True)
class DequantizedWeight(LowBitWeight):
    """Codes, scales and zero points of a ``DequantizeLinear``, seen through the ops between it and the product.

    Source: ONNX DequantizeLinear, opsets 10 to 25.
    """

    source: Source
    where: str
    codes: Codes
    width: int
    """Bits that the codes and zero points need."""
    scales: TensorProto
    zero_points: TensorProto | None
    view: WeightView
    """Dimensions ``[..., K, N]``."""
    index: tuple[int, ...]
    """Which matrix of the leading dimensions."""

    @property
    def k(self) -> int:  # type: ignore[override]
        """See `LowBitWeight`."""
        return self.view.real_size(-2 % len(self.view.dims))

    @property
    def n(self) -> int:  # type: ignore[override]
        """See `LowBitWeight`."""
        return self.view.real_size(-1 % len(self.view.dims))

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Width of the codes; 8 where zero points along K are taken into them."""
        return 8 if self._scales_are_inputs and self.zero_points is not None else self.width

    @property
    def block_size(self) -> int | None:  # type: ignore[override]
        """See `LowBitWeight`."""
        if self._scales_are_inputs:
            return None
        block = self.view.block_size(len(self.view.dims) - 2)
        return None if block is None or block >= self.k else block

    @property
    def format(self) -> str:  # type: ignore[override]
        """See `LowBitWeight`."""
        varies_along_n = any(a.varies for a in self.view.dims[-1])
        granularity = "per input" if self._scales_are_inputs else "per channel" if varies_along_n else "per tensor"
        zero_points = "zero points" if self.zero_points is not None else ""
        kind = f"{'int' if self.codes.data_type in SIGNED else 'uint'}{self.width}"
        return describe_format(kind, self.block_size, granularity, zero_points)

    @property
    def is_plain(self) -> bool:  # type: ignore[override]
        """See `LowBitWeight`."""
        return not self._scales_are_inputs

    @property
    def _scales_are_inputs(self) -> bool:
        """One scale per step of K and none along N: it multiplies the activation."""
        k, n = self.view.dims[-2:]
        return self.view.block_size(len(self.view.dims) - 2) == 1 and not any(a.varies for a in n) and len(k) > 0

    @property
    def _scales_are_in(self) -> str:
        return f"{self.source.name}: {self.where}, scales {self.scales.name!r}"

    def load(self) -> WeightData:
        """See `LowBitWeight`."""
        bits, signed = self.width, self.codes.data_type in SIGNED
        middle = 1 << (bits - 1) if signed else 0
        codes = self._matrix(self.view.arrange_codes(self.codes.array(self._part)))[: self.k, : self.n]
        scales = self._columns(self.source.array(self.scales).astype(np.float32))
        if self.zero_points is None:
            zero_points = np.zeros((1, 1), np.int16)
        else:
            zero_points = integers(self.source.array(self.zero_points))
            zero_points = self._columns(zero_points) if zero_points.any() else np.zeros((1, 1), np.int16)
        if self._scales_are_inputs:
            return self._scaled_inputs(integers(codes), scales, zero_points, middle).checked(self._scales_are_in)
        return WeightData(
            unsigned(codes, bits, signed=signed), scales, shared((zero_points + middle).astype(np.uint8))
        ).checked(self._scales_are_in)

    def _scaled_inputs(self, codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, middle: int) -> WeightData:
        """Codes centred row by row: zero points along K cannot stay beside them."""
        centred = codes - zero_points if zero_points.any() else codes
        lowest = min(int(centred.min()), 0 if zero_points.any() else -middle)
        if int(centred.max()) - lowest > 255:
            raise ModelError(f"{self.where}: codes less zero points span more than 255")  # read() has seen to that
        ones = np.ones((1, self.n), np.float32)
        zero = np.full((1, 1), -lowest, np.uint8)
        return WeightData((centred - lowest).astype(np.uint8), ones, zero, input_scales=scales[:, 0].copy())

    @property
    def _part(self) -> int | None:
        """Index of the stored codes' first dimension that this matrix lies in, if it is a dimension of the view too."""
        if not self.index or any(a.source[0] == 0 for dim in self.view.dims[1:] for a in dim):
            return None
        first = [a for a in self.view.dims[0] if a.size > 1]
        return self.index[0] if all(a.source[0] == 0 for a in first) and self.codes.dims[0] > 1 else None

    def _matrix(self, values: np.ndarray) -> np.ndarray:
        return values[self.index] if self.index else values

    def _columns(self, values: np.ndarray) -> np.ndarray:
        """Scales or zero points as ``[groups or 1, N]``."""
        matrix = self._matrix(self.view.arrange_scales(values, len(self.view.dims) - 2))
        return np.ascontiguousarray(matrix[:, : self.n])


def read_dequantized(m: Match, linked: Linked, *, transposed: bool) -> tuple[tuple[DequantizedWeight, ...], int]:
    """The weight matrices behind a ``DequantizeLinear`` and the ops after it, and their element type.

    Args:
        m: binds ``dequantize``, whose codes are stored or a `quantized_constant`, with constant ``scales`` and perhaps
            ``zero_points``; and ``chain``, the Cast, Identity, Reshape, Transpose nodes between it and the product.
        linked: the model.
        transposed: the product takes the matrices as ``[N, K]``.

    Raises:
        Reject: codes, scales or shapes that the op cannot hold.
        ModelError: scales or zero points do not fit the codes.
    """
    source, dequantize = linked.source, m.op("dequantize")
    where = f"{dequantize.op} {dequantize.name or dequantize.outputs[0].name!r}"
    scales, stored_zero = m.scope.constant(m.tensor("scales")), m.maybe("zero_points")
    zero_points = None if stored_zero is None else m.scope.constant(stored_zero)
    assert scales is not None
    codes = _codes(m, linked)
    refuse_type(f"weight {codes.name!r} is", codes.data_type)
    if scales.data_type not in FLOAT_TYPES:
        raise Reject(
            ReasonCode.WEIGHT_TYPE, f"scales {scales.name!r} are {type_name(scales.data_type)}; a float type is needed"
        )

    view = _stored_view(source, where, dequantize, codes, scales, zero_points)
    element_type = int(dequantize.attrs.get("output_dtype", 0) or scales.data_type)
    try:
        for node in m.chain("chain"):
            if node.op == "Cast":
                element_type = int(node.attrs["to"])
            elif node.op == "Transpose":
                rank = len(view.dims)
                view = view.transposed(tuple(node.attrs.get("perm", range(rank)[::-1])))
            elif node.op == "Reshape":
                view = view.reshaped(_reshape_target(node, view, linked.array(m.scope, node.inputs[1])))
    except (NotAligned, IndexError, KeyError) as error:
        name = node.name or node.outputs[0].name
        raise Reject(
            ReasonCode.SCALE_LAYOUT, f"its scales cannot be followed through {node.op} {name!r}: {error}"
        ) from error
    if len(view.dims) < 2:
        raise Reject(ReasonCode.SCALE_LAYOUT, f"weight {codes.name!r} has rank {len(view.dims)}, expected 2 or more")
    if transposed:
        view = view.transposed((*range(len(view.dims) - 2), len(view.dims) - 1, len(view.dims) - 2))
    if element_type not in FLOAT_TYPES:
        raise Reject(
            ReasonCode.ACTIVATION_TYPE,
            f"the product is in {type_name(element_type)}; float32, float16 or bfloat16 is needed",
        )
    if prod(view.shape[:-2]) > MOST_EXPERTS:
        raise Reject(
            ReasonCode.SCALE_LAYOUT,
            f"weight {codes.name!r} holds {prod(view.shape[:-2])} matrices; up to {MOST_EXPERTS} are taken apart",
        )
    if any(view.real_size(d) != view.shape[d] for d in range(len(view.dims) - 2)):
        raise Reject(
            ReasonCode.SCALE_LAYOUT,
            f"weight {codes.name!r} has blocks across its {view.real_size(0)} matrices, the last one incomplete",
        )
    indices = list(np.ndindex(*view.shape[:-2])) if len(view.dims) > 2 else [()]
    width = _width(codes, zero_points, source)
    weights = tuple(
        DequantizedWeight(source, where, codes, width, scales, zero_points, view, tuple(index)) for index in indices
    )
    _check_groups(weights[0] if weights else None, codes.name)
    return weights, element_type


def _codes(m: Match, linked: Linked) -> Codes:
    if "quantize" in m.bound:
        return quantized_constant(m, linked)
    stored = m.scope.constant(m.tensor("codes"))
    assert stored is not None
    return StoredCodes(linked.source, stored)


def _width(codes: Codes, zero_points: TensorProto | None, source: Source) -> int:
    """Bits that codes and zero points need: Brevitas keeps 4-bit codes in int8, between two bounds."""
    stored = CODE_BITS[codes.data_type]
    if codes.bounds == code_range(codes.data_type):
        return stored
    used = list(codes.bounds)
    if zero_points is not None:
        used += [int(z) for z in integers(source.array(zero_points)).reshape(-1)]
    for bits in (2, 4):
        half = 1 << (bits - 1)
        lowest, highest = (-half, half - 1) if codes.data_type in SIGNED else (0, 2 * half - 1)
        if lowest <= min(used) and max(used) <= highest:
            return min(bits, stored)
    return stored


def _stored_view(
    source: Source,
    where: str,
    dequantize: gs.Node,
    codes: Codes,
    scales: TensorProto,
    zero_points: TensorProto | None,
) -> WeightView:
    rank = len(codes.dims)
    axis = int(dequantize.attrs.get("axis", 1))
    if not -rank <= axis < max(rank, 2):
        raise ModelError(f"{source.name}: {where} has axis {axis}, but its weight {codes.name!r} has rank {rank}")
    axis = axis % rank if axis < rank else rank - 1
    try:
        view = WeightView.stored_as(codes.dims, tuple(scales.dims), axis, int(dequantize.attrs.get("block_size", 0)))
    except ValueError as error:
        raise ModelError(f"{source.name}: {where}: scales {scales.name!r} have {error}") from error
    if zero_points is not None:
        if zero_points.data_type != codes.data_type:
            raise ModelError(
                f"{source.name}: {where}: zero points {zero_points.name!r} are {type_name(zero_points.data_type)}, "
                f"expected the codes' type {type_name(codes.data_type)}"
            )
        if prod(zero_points.dims) != prod(scales.dims) or (len(scales.dims) > 1 and zero_points.dims != scales.dims):
            raise ModelError(
                f"{source.name}: {where}: zero points {zero_points.name!r} have shape {list(zero_points.dims)}, "
                f"expected that of the scales, {list(scales.dims)}"
            )
    return view


def _reshape_target(node: gs.Node, view: WeightView, shape: np.ndarray | None) -> tuple[int, ...]:
    assert shape is not None  # a Chain passes constants only
    current = [view.real_size(d) for d in range(len(view.dims))]
    target = [int(s) for s in shape.reshape(-1)]
    if not node.attrs.get("allowzero", 0):
        target = [current[i] if s == 0 else s for i, s in enumerate(target)]
    if -1 in target:
        rest = prod(s for s in target if s != -1)
        target[target.index(-1)] = prod(current) // rest if rest else 0
    return tuple(target)


def _check_groups(weight: DequantizedWeight | None, name: str) -> None:
    """See that K falls into groups with a scale each."""
    if weight is None or weight.k == 0 or weight.n == 0:
        raise Reject(ReasonCode.SCALE_LAYOUT, f"weight {name!r} is empty")
    known: dict[str, int | str] = {"k": weight.k, "n": weight.n, "format": weight.format}
    if weight.block_size is not None and weight.block_size < 4:
        raise Reject(
            ReasonCode.SCALE_LAYOUT,
            f"weight {name!r} has blocks of {weight.block_size} along K that differ between columns; 4 or more are needed",
            **known,
        )
    if weight._scales_are_inputs and weight.zero_points is not None:
        span = 2**weight.width - 1
        zero_points = integers(weight.source.array(weight.zero_points))
        if span + int(zero_points.max()) - int(zero_points.min()) > 255:
            raise Reject(
                ReasonCode.SCALE_LAYOUT,
                f"weight {name!r} has 8-bit codes with zero points that differ along K; they share no 8-bit range",
                **known,
            )
