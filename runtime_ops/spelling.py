"""Ops whose form changed between opset 11 and today, spelled for one of them: function bodies are inlined at the model's."""

from __future__ import annotations


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
