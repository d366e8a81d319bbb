"""The op's signature, for tools that ask onnx for it (checker, shape inference)."""

from __future__ import annotations

from onnx import defs

DOMAIN = "msd"
NAME = "MatMulIntegerToFloat"
VERSION = 1

_Schema = defs.OpSchema
_CODES = ["tensor(uint8)", "tensor(int8)", "tensor(uint16)", "tensor(int16)"]

SCHEMA = _Schema(
    NAME,
    DOMAIN,
    VERSION,
    doc="Y = a_scale * (A - a_zero_point) @ W + bias, W low-bit, in exact integer products whatever the codes. "
    "See msd_compiler.runtime_ops.matmul_integer_to_float.reference for the meaning and .matmul.layout for B.",
    inputs=[
        _Schema.FormalParameter("A", "T", "activation codes, [..., K]"),
        _Schema.FormalParameter("a_scale", "tensor(float)", "activation units per code, one value"),
        _Schema.FormalParameter("a_zero_point", "T", "the code that stands for 0, one value"),
        _Schema.FormalParameter("B", "tensor(uint8)", "packed weight codes, [tiles, groups, lines, 64]"),
        _Schema.FormalParameter("scales", "tensor(float)", "weight units per code, [tiles, groups or 1, 16]"),
        _Schema.FormalParameter("zero_points", "tensor(uint8)", "[tiles, groups or 1, 16] or [1, 1, 1]"),
        _Schema.FormalParameter("bias", "tensor(float)", "[N]"),
        _Schema.FormalParameter("plan", "tensor(int64)", "[5]: K, bits, block_size, code_bits, signed"),
    ],
    outputs=[_Schema.FormalParameter("Y", "tensor(float)", "[..., N]")],
    type_constraints=[("T", _CODES, "type of the activation's codes")],
    attributes=[
        _Schema.Attribute(
            "layout", _Schema.AttrType.STRING, "name and number of B's layout; a kernel refuses any other"
        ),
    ],
)
