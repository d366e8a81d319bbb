"""QuantizedLinear -> [Mul] -> msd.MatMul(x, B, scales, zero points, offsets, bias, plan) -> [Add]."""

from __future__ import annotations

from math import gcd

import numpy as np
import onnx
from msd_compiler.runtime_ops.matmul.layout import LAYOUT, LONGEST_GROUP, Plan, pack_codes, pack_columns
from onnx import TensorProto, helper

from msd_compiler.build import NodeBuilder
from msd_compiler.choose import Choice
from msd_compiler.facts import LowBitWeight, QuantizedLinear

DEFAULT_GROUP = 128
"""K-steps per activation scale where the weight has no blocks: an outlier channel then coarsens 128 columns, not the row."""


def plan_of(weight: LowBitWeight, choice: Choice) -> Plan:
    """The op's plan for a weight.

    A group is the weight's block, or a part of one that is longer than a group may be.
    """
    block = weight.block_size
    if block is None:
        block = min(DEFAULT_GROUP, weight.k)
    elif block > LONGEST_GROUP:
        block = gcd(block, DEFAULT_GROUP) if gcd(block, DEFAULT_GROUP) >= 32 else _largest_divisor(block)
    return Plan(weight.k, weight.bits, block, choice.terms, choice.per_row)


def _largest_divisor(block: int) -> int:
    return next(d for d in range(LONGEST_GROUP, 0, -1) if block % d == 0)


def packed_bytes(weight: LowBitWeight, choice: Choice) -> int:
    """Bytes of the packed codes: what a weight takes in the result."""
    tiles, groups, lines, width = plan_of(weight, choice).packed_shape(weight.n)
    return tiles * groups * lines * width


def lower_linear(fact: QuantizedLinear, choice: Choice, build: NodeBuilder) -> list[onnx.NodeProto]:
    """The nodes that compute ``fact.y``.

    Raises:
        ModelError: the weight cannot be read, or its scales are not finite.
    """
    weight_rank = fact.y_rank if len(fact.weights) > 1 or fact.y_rank != fact.x_rank else None
    x, rank = fact.x.name, fact.x_rank
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


def _product(fact: QuantizedLinear, weight: LowBitWeight, x: str, choice: Choice, build: NodeBuilder) -> str:
    plan = plan_of(weight, choice)
    data = weight.load()
    element_type = fact.element_type
    if data.input_scales is not None:
        # In float32: rounding the scaled activation to float16 would cost more than the two terms keep.
        x = x if element_type == TensorProto.FLOAT else build.node("Cast", x, to=TensorProto.FLOAT)
        x = build.node("Mul", x, build.constant("input_scales", data.input_scales))
        element_type = TensorProto.FLOAT
    bias = np.zeros(weight.n, np.float32) if fact.bias is None else np.ascontiguousarray(fact.bias, np.float32)
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
        name=fact.product.name if len(fact.weights) == 1 else "",  # a graph's node names must differ
        layout=LAYOUT,
        output_dtype=element_type,
    )
    return y if element_type == fact.element_type else build.node("Cast", y, to=fact.element_type)


def _by_group(values: np.ndarray, weight: LowBitWeight, plan: Plan) -> np.ndarray:
    """Values per block of the weight, as values per group of the op."""
    if len(values) == 1 or weight.block_size in (None, plan.block_size):
        return values
    assert weight.block_size is not None
    return np.repeat(values, weight.block_size // plan.block_size, axis=0)[: plan.groups]


def _columns(values: np.ndarray, weight: LowBitWeight, plan: Plan) -> np.ndarray:
    if values.shape == (1, 1):
        return values.reshape(1, 1, 1)
    return pack_columns(_by_group(values, weight, plan))


def _scaled_addend(fact: QuantizedLinear, build: NodeBuilder) -> str:
    assert fact.addend is not None
    if fact.beta == 1.0:
        return str(fact.addend.name)
    beta = np.array(fact.beta, helper.tensor_dtype_to_np_dtype(fact.element_type))
    return build.node("Mul", fact.addend.name, build.constant("beta", beta))
