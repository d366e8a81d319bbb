"""The op's signature, for tools that ask onnx for it (checker, shape inference)."""

from __future__ import annotations

from onnx import defs

DOMAIN = "msd"
NAME = "Attention"
VERSION = 1

_Schema = defs.OpSchema
_ACTIVATIONS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

SCHEMA = _Schema(
    NAME,
    DOMAIN,
    VERSION,
    doc="Attention over a low-bit KV cache: new tokens are stored as codes, query and probabilities are split into INT8 terms "
    "that multiply the cache's codes; nothing is dequantized. See msd_compiler.runtime_ops.attention.reference for the "
    "meaning and .layout for the storage of the cache.",
    inputs=[
        _Schema.FormalParameter("query", "T", "[B, Hq, S, D]"),
        _Schema.FormalParameter("key", "T", "new tokens, [B, Hkv, L, D]"),
        _Schema.FormalParameter("value", "T", "new tokens, [B, Hkv, L, Dv]"),
        _Schema.FormalParameter("past_key", "C", "[B, Hkv, P, D], or [B, Hkv, P, ceil(D / 2)] for 4 bits"),
        _Schema.FormalParameter("past_value", "C", "likewise with Dv"),
        _Schema.FormalParameter(
            "key_scale", "tensor(float)", "[1, 1, 1, 1] or [1, Hkv, 1, D]; dynamic: [B, Hkv, P, 1], one per token"
        ),
        _Schema.FormalParameter("value_scale", "tensor(float)", "likewise with Dv"),
        _Schema.FormalParameter("mask", "tensor(float)", "added to the logits, [B or 1, Hq or 1, S or 1, T or 1]"),
        _Schema.FormalParameter("sinks", "tensor(float)", "[Hq], or [1] with -Inf for none"),
        _Schema.FormalParameter("lengths", "tensor(int64)", "[B] or [1]: valid tokens of the past"),
        _Schema.FormalParameter("plan", "tensor(int64)", "[5]: bits, dynamic, cache, causal, window"),
        _Schema.FormalParameter("factors", "tensor(float)", "[2]: softmax scale, soft cap"),
    ],
    outputs=[
        _Schema.FormalParameter("Y", "T", "[B, Hq, S, Dv]"),
        _Schema.FormalParameter("present_key", "C", "past_key with the new tokens"),
        _Schema.FormalParameter("present_value", "C", "past_value with the new tokens"),
        _Schema.FormalParameter("present_key_scale", "tensor(float)", "dynamic: key_scale with the new tokens'"),
        _Schema.FormalParameter("present_value_scale", "tensor(float)", "dynamic: value_scale with the new tokens'"),
    ],
    type_constraints=[
        ("T", _ACTIVATIONS, "type of the activations and the result"),
        ("C", ["tensor(int8)", "tensor(uint8)"], "type of the cache: int8 for 8 bits, uint8 for 4"),
    ],
    attributes=[
        _Schema.Attribute(
            "layout", _Schema.AttrType.STRING, "name and number of the cache's layout; a kernel refuses any other"
        ),
        _Schema.Attribute(
            "cache", _Schema.AttrType.STRING, "'append', 'shared' or 'grow': the outputs' shape, as the plan has it"
        ),
        _Schema.Attribute("output_dtype", _Schema.AttrType.INT, "TensorProto type of Y, which is that of query"),
    ],
)
