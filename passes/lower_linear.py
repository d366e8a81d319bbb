"""QuantizedLinear -> [Mul] -> msd.MatMul(x, B, scales, zero points, offsets, bias, plan) -> [Add].

Where the model rounds the activation itself, msd.MatMulIntegerToFloat of its codes.
"""

from __future__ import annotations

from math import gcd, prod

import numpy as np
import onnx
from msd_compiler.runtime_ops.matmul.layout import (
    LAYOUT,
    LONGEST_GROUP,
    ActivationFormat,
    Codebook,
    Plan,
    Storage,
    decode,
    pack_codes,
    pack_columns,
)
from msd_compiler.runtime_ops.matmul.mx import BLOCK as MX_BLOCK
from msd_compiler.runtime_ops.matmul_integer_to_float.layout import LONGEST_GROUP as LONGEST_GROUP_OF_CODES
from msd_compiler.runtime_ops.matmul_integer_to_float.layout import LONGEST_SUM, CodesPlan
from onnx import TensorProto, helper

from msd_compiler.build import NodeBuilder
from msd_compiler.choose import Choice
from msd_compiler.facts import ActivationCodes, LowBitWeight, QuantizedLinear, WeightData

DEFAULT_GROUP = 128
"""K-steps per activation scale where the weight has no blocks: an outlier channel then coarsens 128 columns, not the row."""


def plan_of(fact: QuantizedLinear, choice: Choice) -> Plan | CodesPlan:
    """The op's plan for a layer's weights.

    A group is the weight's block, or a part of one that is longer than a group, or a block of an MX format, may be.
    """
    weight, codes = fact.weight, fact.codes
    longest = LONGEST_GROUP if codes is None else LONGEST_GROUP_OF_CODES
    block = weight.block_size
    if choice.activation is not ActivationFormat.INT8:
        block = MX_BLOCK if block is None else _largest_divisor(block, MX_BLOCK)
    elif block is None:
        block = min(DEFAULT_GROUP, weight.k)
    elif block > longest:
        block = gcd(block, DEFAULT_GROUP) if gcd(block, DEFAULT_GROUP) >= 32 else _largest_divisor(block, longest)
    if codes is not None:
        bits = weight.bits if weight.codebook is Codebook.INTEGER else 8
        return CodesPlan(weight.k, bits, block, codes.bits, codes.signed)
    storage = (weight.k, weight.bits, block)
    return Plan(*storage, choice.terms, choice.per_row, codebook=weight.codebook, activation=choice.activation)


def _largest_divisor(block: int, longest: int) -> int:
    return next(d for d in range(longest, 0, -1) if block % d == 0)


def packed_bytes(fact: QuantizedLinear, choice: Choice) -> int:
    """Bytes of the packed codes: what a layer's weights take in the result."""
    return prod(plan_of(fact, choice).packed_shape(fact.weight.n)) * len(fact.weights)


def lower_linear(fact: QuantizedLinear, choice: Choice, build: NodeBuilder) -> list[onnx.NodeProto]:
    """The nodes that compute ``fact.y``.

    Raises:
        ModelError: the weight cannot be read, or its scales are not finite.
    """
    weight_rank = fact.y_rank if len(fact.weights) > 1 or fact.y_rank != fact.x_rank else None
    x, rank = fact.x.name if fact.codes is None else _moved_codes(fact.codes, build), fact.x_rank
    if weight_rank is not None and rank is not None and weight_rank > rank:
        x, rank = build.unsqueeze(x, list(range(weight_rank - rank))), weight_rank
    if fact.swapped[0]:
        assert rank is not None
        x = build.transpose_last_two(x, rank)

    if len(fact.weights) == 1:
        y = _product(fact, fact.weight, x, choice, build)
    else:
        assert rank is not None
        y = _experts(fact, x, rank, choice, build)

    if fact.swapped[1]:
        assert fact.y_rank is not None
        y = build.transpose_last_two(y, fact.y_rank)
    if fact.addend is not None:
        y = build.node("Add", y, _scaled_addend(fact, build))
    return build.finish(fact.y.name)


def _experts(fact: QuantizedLinear, x: str, rank: int, choice: Choice, build: NodeBuilder) -> str:
    """One product per matrix of the weight, joined along the third dimension from the right."""
    axis = rank - 3
    assert fact.x_shape is not None
    shared = len(fact.x_shape) < 3 or fact.x_shape[-3] == 1
    parts = []
    for expert, weight in enumerate(fact.weights):
        index = build.constant("expert", np.array(0 if shared else expert, np.int64))
        rows = build.node("Gather", x, index, axis=axis)
        parts.append(build.unsqueeze(_product(fact, weight, rows, choice, build), [axis]))
    return build.node("Concat", *parts, axis=axis)


def _moved_codes(codes: ActivationCodes, build: NodeBuilder) -> str:
    """The codes where the product wants them: what moved the values they stand for moves them."""
    name = str(codes.codes.name)
    for node in codes.moves:
        if node.op not in ("Cast", "Identity"):
            name = build.node(node.op, name, *(str(t.name) for t in node.inputs[1:]), **node.attrs)
    return name


def _product(fact: QuantizedLinear, weight: LowBitWeight, x: str, choice: Choice, build: NodeBuilder) -> str:
    plan = plan_of(fact, choice)
    data = weight.load()
    bias = np.zeros(weight.n, np.float32) if fact.bias is None else np.ascontiguousarray(fact.bias, np.float32)
    name = fact.product.name if len(fact.weights) == 1 else ""  # a graph's node names must differ
    if fact.codes is not None:
        y, element_type = (
            _product_of_codes(fact, fact.codes, weight, data, x, plan, bias, name, build),
            TensorProto.FLOAT,
        )
    else:
        y, element_type = _product_of_floats(fact, weight, data, x, plan, bias, name, build)
    return y if element_type == fact.element_type else build.node("Cast", y, to=fact.element_type)


def _product_of_floats(
    fact: QuantizedLinear,
    weight: LowBitWeight,
    data: WeightData,
    x: str,
    plan: Plan | CodesPlan,
    bias: np.ndarray,
    name: str,
    build: NodeBuilder,
) -> tuple[str, int]:
    """The result's name and type: float32 where the activation is scaled first."""
    element_type = fact.element_type
    if data.input_scales is not None:
        # In float32: rounding the scaled activation to float16 would cost more than the two terms keep.
        x = x if element_type == TensorProto.FLOAT else build.node("Cast", x, to=TensorProto.FLOAT)
        x = build.node("Mul", x, build.constant("input_scales", data.input_scales))
        element_type = TensorProto.FLOAT
    offsets = np.zeros((1, 1), np.float32) if data.offsets is None else data.offsets
    y = build.node(
        "MatMul",
        x,
        build.constant("B", pack_codes(data.codes, plan)),
        build.constant("scales", pack_columns(_by_group(data.scales * np.float32(fact.alpha), weight, plan))),
        build.constant("zero_points", _columns(data.zero_points, weight, plan)),
        build.constant("offsets", _columns(offsets, weight, plan)),
        build.constant("bias", bias),
        build.constant("plan", plan.tensor()),
        domain="msd",
        name=name,
        layout=LAYOUT,
        output_dtype=element_type,
    )
    return y, element_type


def _product_of_codes(
    fact: QuantizedLinear,
    codes: ActivationCodes,
    weight: LowBitWeight,
    data: WeightData,
    x: str,
    plan: Plan | CodesPlan,
    bias: np.ndarray,
    name: str,
    build: NodeBuilder,
) -> str:
    dtype = helper.tensor_dtype_to_np_dtype(codes.element_type)
    zero_point = (
        build.constant("a_zero_point", np.zeros((), dtype)) if codes.zero_point is None else codes.zero_point.name
    )
    scale = str(codes.scale.name)
    if fact.element_type != TensorProto.FLOAT:
        scale = build.node("Cast", scale, to=TensorProto.FLOAT)
    scales = _by_group(data.scales * np.float32(fact.alpha), weight, plan)
    if len(scales) == 1 and (weight.k > LONGEST_SUM or len(data.zero_points) > 1):
        scales = np.repeat(scales, plan.groups, axis=0)  # then all K is not one sum
    return build.node(
        "MatMulIntegerToFloat",
        x,
        scale,
        str(zero_point),
        build.constant("B", pack_codes(decode(data.codes, weight.codebook), plan)),
        build.constant("scales", pack_columns(scales)),
        build.constant("zero_points", _columns(data.zero_points, weight, plan)),
        build.constant("bias", bias),
        build.constant("plan", plan.tensor()),
        domain="msd",
        name=name,
        layout=LAYOUT,
    )


def _by_group(values: np.ndarray, weight: LowBitWeight, plan: Storage) -> np.ndarray:
    """Values per block of the weight, as values per group of the op."""
    if len(values) == 1 or weight.block_size in (None, plan.block_size):
        return values
    assert weight.block_size is not None
    return np.repeat(values, weight.block_size // plan.block_size, axis=0)[: plan.groups]


def _columns(values: np.ndarray, weight: LowBitWeight, plan: Storage) -> np.ndarray:
    if values.shape == (1, 1):
        return values.reshape(1, 1, 1)
    return pack_columns(_by_group(values, weight, plan))


def _scaled_addend(fact: QuantizedLinear, build: NodeBuilder) -> str:
    assert fact.addend is not None
    if fact.beta == 1.0:
        return str(fact.addend.name)
    beta = np.array(fact.beta, helper.tensor_dtype_to_np_dtype(fact.element_type))
    return build.node("Mul", fact.addend.name, build.constant("beta", beta))
