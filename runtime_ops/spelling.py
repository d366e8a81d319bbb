"""What the text of all function bodies has in common.

Ops whose form changed between opset 11 and today are spelled for one of them: bodies are inlined at the model's.
"""

from __future__ import annotations

import onnx
from onnx import parser

OLDEST_OPSET = 11
"""Below it the bodies' ops (``Round``, ``BitShift``, ``Range``, ``ScatterElements``) do not exist."""

INDICES = "\n".join(f"at_{i} = Constant <value = int64[1] {{{i}}}> ()" for i in range(6))
"""Constants ``at_0`` to ``at_5``."""


def parse_body(opset: int, op: str, text: str) -> onnx.FunctionProto:
    """The function ``op`` of domain ``msd``, for a model of default-domain opset ``opset``.

    Args:
        text: attributes, inputs, outputs and steps.

    Raises:
        ValueError: ``opset`` is below `OLDEST_OPSET`.
    """
    if opset < OLDEST_OPSET:
        raise ValueError(f"msd.{op} has a body from opset {OLDEST_OPSET} on, got {opset}")
    return parser.parse_function(f'<domain: "msd", opset_import: ["" : {opset}]>\n{op} {text}')


class Reductions:
    """ReduceMax and ReduceSum over one axis in the form of an opset."""

    def __init__(self, opset: int):
        self.opset = opset

    def __call__(self, y: str, op: str, x: str, axis: int, keep: int = 1) -> str:
        """The text of ``y = op(x)`` over one axis."""
        axes_are_an_input_from = {"ReduceSum": 13, "ReduceMax": 18}[op]
        if self.opset < axes_are_an_input_from:
            return f"{y} = {op} <axes = [{axis}], keepdims = {keep}> ({x})"
        return f"{y}_axes = Constant <value = int64[1] {{{axis}}}> ()\n{y} = {op} <keepdims = {keep}> ({x}, {y}_axes)"


def reshape_with_zeros(opset: int, y: str, x: str, shape: str) -> str:
    """``Reshape`` to a shape in which 0 means zero; ``at_0`` and ``minus_one`` are constants [0] and [-1].

    An attribute says so from opset 14 on. Before, -1 stands for the one empty dimension, being what is left over: nothing.
    """
    if opset >= 14:
        return f"{y} = Reshape <allowzero = 1> ({x}, {shape})"
    return f"""
    is_empty = Equal ({shape}, at_0)
    {shape}_or_rest = Where (is_empty, minus_one, {shape})
    {y} = Reshape ({x}, {shape}_or_rest)"""
