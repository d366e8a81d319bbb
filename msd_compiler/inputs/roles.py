"""What an input can be for, and what tells: the op that reads it, its name; and the usual layout of its axes."""

from __future__ import annotations

import re
from enum import Enum, auto


class Role(Enum):
    """What an input is for; decides its fill, and its shape where the model leaves the shape open."""

    IDS = auto()
    POSITIONS = auto()
    TYPES = auto()
    MASK = auto()
    CACHE = auto()
    SEQLENS = auto()
    TOTAL_LENGTH = auto()
    PAST_LENGTH = auto()
    MAX_LENGTH = auto()
    MIN_LENGTH = auto()
    NUM_BEAMS = auto()
    NUM_RETURNED = auto()
    SCALE = auto()
    ZERO_POINT = auto()
    ONE = auto()
    ZERO = auto()
    USE_CACHE = auto()
    IMAGE = auto()
    AUDIO = auto()
    VALUES = auto()


_SCALES_AND_ZERO_POINTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "QuantizeLinear": ((1,), (2,)),
    "DequantizeLinear": ((1,), (2,)),
    "QLinearMatMul": ((1, 4, 6), (2, 5, 7)),
    "QLinearConv": ((1, 4, 6), (2, 5, 7)),
    "QLinearAdd": ((1, 4, 6), (2, 5, 7)),
    "QLinearMul": ((1, 4, 6), (2, 5, 7)),
    "QGemm": ((1, 4, 7), (2, 5, 8)),
    "MatMulInteger": ((), (2, 3)),
    "ConvInteger": ((), (2, 3)),
    "MatMulIntegerToFloat": ((2, 3), (4, 5)),
    "DynamicQuantizeMatMul": ((2,), (3,)),
    "MatMulNBits": ((2,), (3,)),
    "QAttention": ((3, 4), (6, 7)),
    "GroupQueryAttention": ((12, 13), ()),
}
_SEARCH = {0: Role.IDS, 1: Role.MAX_LENGTH, 2: Role.MIN_LENGTH}
_BEAMS = {3: Role.NUM_BEAMS, 4: Role.NUM_RETURNED, 5: Role.ONE, 6: Role.ONE, 7: Role.MASK, 8: Role.MASK, 9: Role.MASK}

# (op, slot) -> role. "ai.onnx." where another domain's op of that name has other slots.
SLOTS: dict[tuple[str, int], Role] = {
    (op, slot): role
    for op, slots in {
        "BeamSearch": _SEARCH | _BEAMS | {10: Role.IDS, 11: Role.ZERO},
        "WhisperBeamSearch": _SEARCH | _BEAMS | {0: Role.VALUES, 10: Role.IDS, 11: Role.ZERO, 14: Role.ONE},
        "GreedySearch": _SEARCH | {3: Role.ONE, 4: Role.MASK, 5: Role.MASK, 6: Role.MASK},
        "Sampling": _SEARCH | {3: Role.ONE, 4: Role.MASK, 5: Role.MASK, 6: Role.MASK, 7: Role.ZERO, 8: Role.ZERO},
        "GroupQueryAttention": {
            3: Role.CACHE,
            4: Role.CACHE,
            5: Role.SEQLENS,
            6: Role.TOTAL_LENGTH,
            7: Role.VALUES,
            8: Role.VALUES,
            9: Role.POSITIONS,
        },
        "MultiHeadAttention": {4: Role.MASK, 6: Role.CACHE, 7: Role.CACHE, 8: Role.PAST_LENGTH, 9: Role.ZERO},
        "DecoderMaskedMultiHeadAttention": {
            3: Role.MASK,
            5: Role.CACHE,
            6: Role.CACHE,
            7: Role.PAST_LENGTH,
            8: Role.ONE,
            9: Role.ZERO,
        },
        "DecoderMaskedSelfAttention": {
            3: Role.MASK,
            4: Role.CACHE,
            6: Role.PAST_LENGTH,
            7: Role.ONE,
            8: Role.ZERO,
        },
        "Attention": {3: Role.MASK, 4: Role.CACHE, 6: Role.PAST_LENGTH},
        "ai.onnx.Attention": {3: Role.MASK, 4: Role.CACHE, 5: Role.CACHE, 6: Role.TOTAL_LENGTH},
        "msd.Attention": {3: Role.CACHE, 4: Role.CACHE, 5: Role.CACHE, 6: Role.CACHE, 7: Role.MASK},
        "QAttention": {5: Role.MASK, 8: Role.CACHE},
        "EmbedLayerNormalization": {0: Role.IDS, 1: Role.TYPES, 7: Role.MASK, 8: Role.POSITIONS},
        "RotaryEmbedding": {1: Role.POSITIONS, 2: Role.VALUES, 3: Role.VALUES},
        "ai.onnx.RotaryEmbedding": {1: Role.VALUES, 2: Role.VALUES, 3: Role.POSITIONS},
        "TopK": {1: Role.ONE},
        "Dropout": {1: Role.ZERO, 2: Role.ZERO},
    }.items()
    for slot, role in slots.items()
} | {
    (op, slot): role
    for op, kinds in _SCALES_AND_ZERO_POINTS.items()
    for role, slots in zip((Role.SCALE, Role.ZERO_POINT), kinds, strict=True)
    for slot in slots
}

# (op, slot of indices) -> (slot of the table they index, its axis; None: the op's own axis attribute)
TABLES: dict[tuple[str, int], tuple[int, int | None]] = {
    ("Gather", 1): (0, None),
    ("GatherElements", 1): (0, None),
    ("GatherBlockQuantized", 1): (0, None),
    ("GatherND", 1): (0, 0),
    ("EmbedLayerNormalization", 0): (2, 0),
    ("EmbedLayerNormalization", 1): (4, 0),
    ("EmbedLayerNormalization", 8): (3, 0),
    ("RotaryEmbedding", 1): (2, 0),
    ("ai.onnx.RotaryEmbedding", 3): (1, 0),
    ("GroupQueryAttention", 9): (7, 0),
}

# (pattern on the lower-case name, dtype kinds, ranks or None for any, role). The first match counts.
NAMES: tuple[tuple[re.Pattern[str], str, tuple[int, ...] | None, Role], ...] = tuple(
    (re.compile(pattern), kinds, ranks, role)
    for pattern, kinds, ranks, role in (
        (r"indir", "iu", None, Role.ZERO),
        (r"beam_width|temperature|penalty", "iuf", None, Role.ONE),
        (r"use_cache", "b", None, Role.USE_CACHE),
        (r"mask", "iufb", None, Role.MASK),
        (r"past.*len", "iu", (0, 1), Role.PAST_LENGTH),
        (r"seqlens?_k|key_lengths", "iu", None, Role.SEQLENS),
        (r"total.*len", "iu", (0, 1), Role.TOTAL_LENGTH),
        (r"position|pos_id", "iu", None, Role.POSITIONS),
        (r"type_id|segment", "iu", None, Role.TYPES),
        (r"_to_keep", "iu", None, Role.ONE),
        (r"past|cache|key_value|conv_state|recurrent_state", "fiu", (3, 4, 5, 6), Role.CACHE),
        (r"scale", "f", (0, 1), Role.SCALE),
        (r"zero_?point|(^|_)zp(_|$)", "iu", (0, 1), Role.ZERO_POINT),
        (r"ids$|token", "iu", (1, 2, 3), Role.IDS),
        (r"pixel|image", "fu", (4, 5), Role.IMAGE),
        (r"audio|wave|speech|input_values|input_features", "f", None, Role.AUDIO),
    )
)

# role -> {rank: the quantity of each axis, "" where nothing is usual}
LAYOUTS: dict[Role, dict[int, tuple[str, ...]]] = {
    Role.IDS: {1: ("seq",), 2: ("batch", "seq")},
    Role.TYPES: {1: ("seq",), 2: ("batch", "seq")},
    Role.POSITIONS: {1: ("seq",), 2: ("batch", "seq"), 3: ("", "batch", "seq")},
    Role.MASK: {
        1: ("batch",),
        2: ("batch", "total"),
        3: ("batch", "seq", "total"),
        4: ("batch", "one", "seq", "total"),
    },
    Role.CACHE: {3: ("batch", "past", ""), 4: ("batch", "", "past", ""), 5: ("", "batch", "", "past", "")},
    Role.SEQLENS: {1: ("batch",)},
    Role.ZERO: {3: ("batch", "one", "buffer")},
    Role.IMAGE: {4: ("batch", "channels", "image", "image"), 5: ("batch", "one", "channels", "image", "image")},
    Role.AUDIO: {2: ("batch", "samples"), 3: ("batch", "", "frames")},
    Role.VALUES: {3: ("batch", "seq", ""), 4: ("batch", "", "", "")},
}
SCALARS = frozenset(
    {Role.TOTAL_LENGTH, Role.PAST_LENGTH, Role.MAX_LENGTH, Role.MIN_LENGTH, Role.NUM_BEAMS, Role.NUM_RETURNED, Role.ONE}
)
