"""The op's signature, for tools that ask onnx for it (checker, shape inference)."""

from __future__ import annotations

from onnx import defs

DOMAIN = "msd"
NAME = "MatMul"
VERSION = 1

_Schema = defs.OpSchema
_ACTIVATIONS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

SCHEMA = _Schema(
    NAME,
    DOMAIN,
    VERSION,
    doc="Y = A @ W + bias, W low-bit: A is split into INT8 terms that multiply W's codes; nothing is dequantized. "
    "See msd_compiler.runtime_ops.matmul.reference for the meaning and .layout for the storage of B.",
    inputs=[
        _Schema.FormalParameter("A", "T", "activation, [..., K]"),
        _Schema.FormalParameter("B", "tensor(uint8)", "packed weight codes, [tiles, groups, lines, 64]"),
        _Schema.FormalParameter("scales", "tensor(float)", "weight units per code, [tiles, groups or 1, 16]"),
        _Schema.FormalParameter("zero_points", "tensor(uint8)", "[tiles, groups or 1, 16] or [1, 1, 1]"),
        _Schema.FormalParameter("offsets", "tensor(float)", "what a zero point has beyond its integer; same shapes"),
        _Schema.FormalParameter("bias", "tensor(float)", "[N]"),
        _Schema.FormalParameter(
            "plan", "tensor(int64)", "[7]: K, bits, block_size, terms, per_row, codebook, activation"
        ),
    ],
    outputs=[_Schema.FormalParameter("Y", "T", "[..., N]")],
    type_constraints=[("T", _ACTIVATIONS, "type of the activation and the result")],
    attributes=[
        _Schema.Attribute(
            "layout", _Schema.AttrType.STRING, "name and number of B's layout; a kernel refuses any other"
        ),
        _Schema.Attribute("output_dtype", _Schema.AttrType.INT, "TensorProto type of Y, which is that of A"),
    ],
)
