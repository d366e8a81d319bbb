"""The weight of a ``MatMulNBits`` node, as a `LowBitWeight`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from msd_compiler.errors import ModelError
from msd_compiler.facts import LowBitWeight, ReasonCode, Reject, WeightData, describe_format
from msd_compiler.linked import Linked, Scope
from msd_compiler.source import Source, type_name, unpacked

from .codes import FLOAT_TYPES, shared


@dataclass(frozen=True)
class NBitsWeight(LowBitWeight):
    """Weight of a ``com.microsoft.MatMulNBits``: ``B [N, ceil(K / block), block * bits / 8]``.

    Source: onnxruntime's operator documentation (ContribOperators, MatMulNBits).
    """

    source: Source
    where: str
    k: int
    n: int
    bits: int
    block: int
    b: TensorProto
    scales: TensorProto
    zero_points: TensorProto | None

    @property
    def blocks(self) -> int:
        """Blocks along K, the last one perhaps incomplete."""
        return -(-self.k // self.block)

    @property
    def block_size(self) -> int | None:  # type: ignore[override]
        """See `LowBitWeight`."""
        return self.block if self.blocks > 1 else None

    @property
    def format(self) -> str:  # type: ignore[override]
        """See `LowBitWeight`."""
        zero_points = "" if self.zero_points is None else "zero points"
        if self.zero_points is not None and self.zero_points.data_type in FLOAT_TYPES:
            zero_points = "float zero points"
        return describe_format(f"uint{self.bits}" if zero_points else f"int{self.bits}", self.block, "", zero_points)

    @property
    def is_plain(self) -> bool:  # type: ignore[override]
        """See `LowBitWeight`."""
        return self.zero_points is None or self.zero_points.data_type not in FLOAT_TYPES

    @property
    def _scales_are_in(self) -> str:
        return f"{self.source.name}: {self.where}, scales {self.scales.name!r}"

    def load(self) -> WeightData:
        """See `LowBitWeight`."""
        packed = self.source.array(self.b).reshape(self.n, self.blocks, -1)
        codes = unpacked(packed, self.bits).reshape(self.n, -1)[:, : self.k].T
        scales = self.source.array(self.scales).astype(np.float32).reshape(self.n, self.blocks).T
        offsets = None
        if self.zero_points is None:
            zero_points = np.full((1, 1), 1 << (self.bits - 1), np.uint8)
        elif self.zero_points.data_type in FLOAT_TYPES:
            exact = self.source.array(self.zero_points).astype(np.float32).reshape(self.n, self.blocks).T
            zero_points = np.clip(np.rint(np.nan_to_num(exact)), 0, 255).astype(np.uint8)
            offsets = exact - zero_points
            if not offsets.any():
                offsets = None
        else:
            stored = self.source.array(self.zero_points).view(np.uint8).reshape(self.n, -1)
            zero_points = unpacked(stored, self.bits)[:, : self.blocks].T
        contiguous = np.ascontiguousarray
        return WeightData(codes, contiguous(scales), shared(contiguous(zero_points)), offsets).checked(
            self._scales_are_in
        )


def nbits_weight(scope: Scope, linked: Linked, node: gs.Node) -> NBitsWeight:
    """The weight of a ``MatMulNBits`` node.

    Raises:
        Reject: it is no constant, or of a width that is not read.
        ModelError: attributes and tensors disagree.
    """
    source = linked.source
    where = f"MatMulNBits {node.name or node.outputs[0].name!r}"
    k, n, bits, block = (int(node.attrs.get(a, d)) for a, d in (("K", 0), ("N", 0), ("bits", 4), ("block_size", 0)))
    known: dict[str, int | str] = {"k": k, "n": n}
    if bits not in (2, 4, 8):
        raise Reject(ReasonCode.WEIGHT_TYPE, f"its weight has {bits} bits; 2, 4 or 8 are multiplied directly", **known)
    inputs = [None if t.is_empty() else t for t in node.inputs] + [None] * 6
    stored = [scope.constant(t) if t is not None else None for t in inputs[:5]]
    for position, what in ((1, "weight"), (2, "scales"), (3, "zero points")):
        tensor = inputs[position]
        if tensor is not None and stored[position] is None:
            raise Reject(ReasonCode.RUNTIME_WEIGHT, f"its {what} {tensor.name!r} are not stored in the file", **known)
    b, scales, zero_points, group_index = stored[1:5]
    if b is None or scales is None or k < 1 or n < 1 or block < 1:
        raise ModelError(
            f"{source.name}: {where} needs a weight, scales, K, N and block_size; it has K={k}, N={n}, block_size={block}"
        )
    for what, tensor, allowed in (
        ("weight", b, {TensorProto.UINT8}),
        ("scales", scales, FLOAT_TYPES),
        ("zero points", zero_points, {TensorProto.UINT8, *FLOAT_TYPES}),
    ):
        if tensor is not None and tensor.data_type not in allowed:
            names = ", ".join(sorted(type_name(t) for t in allowed))
            raise Reject(
                ReasonCode.WEIGHT_TYPE,
                f"its {what} {tensor.name!r} are {type_name(tensor.data_type)}; what is read is {names}",
                **known,
            )
    blocks = -(-k // block)
    for what, tensor, needed in (("weight", b, n * blocks * (block * bits // 8)), ("scales", scales, n * blocks)):
        if prod(tensor.dims) != needed:
            raise ModelError(
                f"{source.name}: {where}: {what} {tensor.name!r} have shape {list(tensor.dims)}, expected {needed} elements "
                f"(K={k}, N={n}, block_size={block}, bits={bits})"
            )
    if zero_points is not None:
        in_float = zero_points.data_type in FLOAT_TYPES
        needed = n * blocks if in_float else n * -(-blocks * bits // 8)
        if prod(zero_points.dims) != needed:
            raise ModelError(
                f"{source.name}: {where}: zero points {zero_points.name!r} have shape {list(zero_points.dims)}, expected {needed} elements"
            )
    if inputs[4] is not None:
        order = source.array(group_index) if group_index is not None else None
        if order is None or not np.array_equal(order.reshape(-1)[:k], np.arange(k) // block):
            raise Reject(ReasonCode.COLUMN_ORDER, f"its columns are assigned to groups by {inputs[4].name!r}", **known)
    return NBitsWeight(source, where, k, n, bits, block, b, scales, zero_points)
