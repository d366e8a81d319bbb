"""A weight behind ``DequantizeLinear`` and the ops after it, as a `LowBitWeight`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from msd_compiler.runtime_ops.matmul.layout import Codebook
from onnx import TensorProto

from msd_compiler.errors import ModelError
from msd_compiler.facts import LowBitWeight, ReasonCode, Reject, WeightData, describe_format
from msd_compiler.linked import Linked, Scope
from msd_compiler.pattern import Match
from msd_compiler.source import Source, type_name
from msd_compiler.weight_view import NotAligned, WeightView

from .codes import (
    CODEBOOK_OF,
    FLOAT_TYPES,
    SIGNED,
    WEIGHT_BITS,
    Codes,
    StoredCodes,
    code_range,
    integers,
    middle,
    refuse_type,
    shared,
    unit,
    unsigned,
)
from .quantized_constant import quantized_constant
from .scales import Scales, read_scales

MOST_EXPERTS = 1024
"""Matrices of one weight that become a product each."""

FORMAT_KEY = "msd.format"
"""Entry of a node's ``metadata_props`` that names the format of codes for which ONNX has no type."""

FORMATS = {"e1m2": (TensorProto.INT4, TensorProto.INT8)}
"""Its values, and the types that carry them: E1M2 is 0.25 times an integer from -7 to 7, the 0.25 being in the scales."""

_FLOAT4 = {TensorProto.FLOAT8E8M0: "mxfp4", TensorProto.FLOAT8E4M3FN: "nvfp4"}
"""What FLOAT4E2M1 is called, by what its scales are stored as."""

_SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Scales of a float type's codes below it count as zero, as such activations do: flush-to-zero changes nothing."""


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
    scales: Scales
    zero_points: TensorProto | None
    view: WeightView
    """Dimensions ``[..., K, N]``."""
    index: tuple[int, ...]
    """Which matrix of the leading dimensions."""
    named_format: str | None = None
    """What the file says that the codes are."""

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
        return 8 if self._is_centred else self.width

    @property
    def codebook(self) -> Codebook:  # type: ignore[override]
        """See `LowBitWeight`."""
        return Codebook.INTEGER if self._is_centred else CODEBOOK_OF.get(self.codes.data_type, Codebook.INTEGER)

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
        return describe_format(self._kind, self.block_size, granularity, zero_points)

    @property
    def _kind(self) -> str:
        if self.named_format is not None:
            return self.named_format
        if self.codes.data_type == TensorProto.FLOAT4E2M1:
            return _FLOAT4.get(self.scales.stored.data_type, "fp4")
        return f"{'int' if self.codes.data_type in SIGNED else 'uint'}{self.width}"

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
    def _is_centred(self) -> bool:
        """Whether zero points are taken from the codes, for along K they cannot stay beside them."""
        return self._scales_are_inputs and self.zero_points is not None

    def load(self) -> WeightData:
        """See `LowBitWeight`."""
        kind = self.codes.data_type
        codes = self._matrix(self.view.arrange_codes(self.codes.array(self._part)))[: self.k, : self.n]
        scales = self._columns(self.scales.array())
        if kind in CODEBOOK_OF:
            scales = scales * unit(kind)
            scales[np.abs(scales) < _SMALLEST_SCALE] = 0
        data = WeightData(codes, scales, self._zero_points() + middle(kind, self.width))
        data = self._centred(data) if self._is_centred else replace(data, codes=unsigned(codes, kind, self.width))
        if self._scales_are_inputs:
            ones = np.ones((1, self.n), np.float32)
            data = replace(data, scales=ones, input_scales=scales[:, 0].copy())
        data = replace(data, zero_points=shared(data.zero_points.astype(np.uint8)))
        return data.checked(f"{self.source.name}: {self.where}, scales {self.scales.name!r}")

    def _zero_points(self) -> np.ndarray:
        """``[groups or 1, N]``, or ``[1, 1]`` if all are 0."""
        none = np.zeros((1, 1), np.int16)
        if self.zero_points is None:
            return none
        zero_points = integers(self.source.array(self.zero_points), self.codes.data_type)
        return self._columns(zero_points) if zero_points.any() else none

    def _centred(self, data: WeightData) -> WeightData:
        """Codes less zero points, raised to be unsigned."""
        kind = self.codes.data_type
        centred = integers(data.codes, kind) - (data.zero_points - middle(kind, self.width))
        lowest = min(int(centred.min()), 0)
        if int(centred.max()) - lowest > 255:
            raise ModelError(f"{self.where}: codes less zero points span more than 255")  # read() has seen to that
        return replace(data, codes=(centred - lowest).astype(np.uint8), zero_points=np.full((1, 1), -lowest))

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
        m: binds ``dequantize``, whose codes are stored or a `quantized_constant`, with `scales.SCALES` and perhaps constant
            ``zero_points``; and ``chain``, the Cast, Identity, Reshape, Transpose nodes between it and the product.
        linked: the model.
        transposed: the product takes the matrices as ``[N, K]``.

    Raises:
        Reject: codes, scales or shapes that the op cannot hold.
        ModelError: scales or zero points do not fit the codes.
    """
    source, dequantize = linked.source, m.op("dequantize")
    where = f"{dequantize.op} {dequantize.name or dequantize.outputs[0].name!r}"
    stored_zero = m.maybe("zero_points")
    zero_points = None if stored_zero is None else m.scope.constant(stored_zero)
    codes = _codes(m, linked)
    refuse_type(f"weight {codes.name!r} is", codes.data_type)
    scales = read_scales(m, linked)
    view = _stored_view(source, where, dequantize, codes, scales, zero_points)
    element_type = int(dequantize.attrs.get("output_dtype", 0) or scales.element_type)
    if element_type == TensorProto.FLOAT8E8M0:
        raise ModelError(
            f"{source.name}: {where}: its scales {scales.name!r} are float8e8m0, and it has no output_dtype; "
            "with such scales it must say which float type it produces"
        )
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
    named = _named_format(m.scope, dequantize, codes)
    weights = tuple(
        DequantizedWeight(source, where, codes, width, scales, zero_points, view, tuple(index), named)
        for index in indices
    )
    _check_groups(weights[0] if weights else None, codes.name)
    return weights, element_type


def _codes(m: Match, linked: Linked) -> Codes:
    if "quantize" in m.bound:
        return quantized_constant(m, linked)
    stored = m.scope.constant(m.tensor("codes"))
    assert stored is not None
    return StoredCodes(linked.source, stored)


def _named_format(scope: Scope, dequantize: gs.Node, codes: Codes) -> str | None:
    """What the node's metadata says that the codes are, if the codes can be that."""
    at: Scope | None = scope
    while at is not None and at.position(dequantize) is None:
        at = at.parent
    if at is None:
        return None
    node = at.proto.node[at.position(dequantize)]
    named = next((entry.value for entry in node.metadata_props if entry.key == FORMAT_KEY), "")
    return named if codes.data_type in FORMATS.get(named, ()) else None


def _width(codes: Codes, zero_points: TensorProto | None, source: Source) -> int:
    """Bits that codes and zero points need: Brevitas keeps 4-bit codes in int8, between two bounds."""
    stored = WEIGHT_BITS[codes.data_type]
    if codes.bounds == code_range(codes.data_type):
        return stored
    used = list(codes.bounds)
    if zero_points is not None:
        used += [int(z) for z in integers(source.array(zero_points), codes.data_type).reshape(-1)]
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
    scales: Scales,
    zero_points: TensorProto | None,
) -> WeightView:
    rank = len(codes.dims)
    axis = int(dequantize.attrs.get("axis", 1))
    if not -rank <= axis < max(rank, 2):
        raise ModelError(f"{source.name}: {where} has axis {axis}, but its weight {codes.name!r} has rank {rank}")
    axis = axis % rank if axis < rank else rank - 1
    try:
        view = WeightView.stored_as(codes.dims, scales.dims, axis, int(dequantize.attrs.get("block_size", 0)))
    except ValueError as error:
        raise ModelError(f"{source.name}: {where}: scales {scales.name!r} have {error}") from error
    if zero_points is not None:
        if zero_points.data_type != codes.data_type:
            raise ModelError(
                f"{source.name}: {where}: zero points {zero_points.name!r} are {type_name(zero_points.data_type)}, "
                f"expected the codes' type {type_name(codes.data_type)}"
            )
        dims = tuple(zero_points.dims)
        if prod(dims) != prod(scales.dims) or (len(scales.dims) > 1 and dims != scales.dims):
            raise ModelError(
                f"{source.name}: {where}: zero points {zero_points.name!r} have shape {list(dims)}, "
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
        zero_points = integers(weight.source.array(weight.zero_points), weight.codes.data_type)
        if span + int(zero_points.max()) - int(zero_points.min()) > 255:
            raise Reject(
                ReasonCode.SCALE_LAYOUT,
                f"weight {name!r} has 8-bit codes with zero points that differ along K; they share no 8-bit range",
                **known,
            )
