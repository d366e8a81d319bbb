"""The closed forms of the paper's cost model, of layers and of attention, as it gives them.

A layer multiplies ``rows`` activation rows of ``k`` values with ``k x n`` weights (the paper writes b, n, m); attention
has ``rows`` query rows over ``keys`` cached tokens of ``head_size`` values (N, M, d). All work is in FLOP or integer
operations, two per multiply-add, all traffic in bytes, activations are bf16.

Two of its tables count vector work differently: attention in FLOP, layers in operations of which dequantizing takes one a
weight and which it says are 2 FLOP. Here all are FLOP; so ``2kn`` and ``6bk + 4bn`` stand for its ``mn`` and ``(3n + 2m)b``.

Source: arXiv 2605.13915, sections 3.9 (layers), 4.4 (attention) and 5.2 (rates). What goes beyond it is marked *ours*.
"""

from __future__ import annotations

BF16_BYTES = 2
TERM_BYTES = 1
"""Of an INT8 term of an activation. The paper counts as much for a term in MXFP4."""

RATES = {"bf16": 1, "fp8": 2, "int8": 2, "fp4": 4}
"""Of a matrix unit by number format, over bf16 (section 5.2)."""

TILE = 64
"""Cached tokens that attention takes at a time (section 4.4)."""


def latency(vector_seconds: float, matrix_seconds: float, sync_seconds: float) -> float:
    """The units work side by side, and are synchronised once (section 3.9)."""
    return max(vector_seconds, matrix_seconds) + sync_seconds


# ---- Layers (section 3.9) ----------------------------------------------------------------------------------------------


def matrix_ops(rows: int, k: int, n: int, terms: int = 1) -> float:
    """Work of the matrix unit: a product for each term of the activation."""
    return 2.0 * terms * rows * k * n


def dequantizing_flops(values: float) -> float:
    """Vector work to make floats of so many weights or cached values: a subtraction or conversion, and a product."""
    return 2.0 * values


def msd_flops(rows: int, k: int, n: int, terms: int = 2, groups: int = 1) -> float:
    """Vector work of a decomposed product: 6 FLOP an activation, 4 an output.

    *Ours:* other numbers of terms (3 FLOP a term and activation; terms are scaled and added, and the weight's scale
    applied), and ``groups`` of ``k`` with scales of their own, whose outputs are scaled each and added up.
    """
    return 3.0 * terms * rows * k + ((2.0 * terms + 1) * groups - 1) * rows * n


def bf16_bytes(rows: int, k: int, n: int) -> float:
    """Traffic of a product in bf16."""
    return BF16_BYTES * (float(k) * n + rows * (k + n))


def dequantized_values_bytes(code_bytes: float, values: float, trips: int) -> float:
    """Traffic of weights, or of a cache, that is dequantized to bf16 on its way to the matrix unit.

    Args:
        trips: how often the dequantized values cross memory: 0 where they stay in registers, 1 as the paper counts
            layers (they are written), 2 when what it calls the matrix unit's re-read is counted as well.
    """
    return code_bytes + float(BF16_BYTES) * trips * values


def dequantized_bytes(rows: int, k: int, n: int, code_bytes: float, trips: int = 1) -> float:
    """Traffic of a product with a dequantized weight of `code_bytes`."""
    return dequantized_values_bytes(code_bytes, float(k) * n, trips) + BF16_BYTES * rows * (k + n)


def msd_bytes(rows: int, k: int, n: int, code_bytes: float, terms: int = 2, reads: int = 1) -> float:
    """Traffic of a decomposed product: the activation is read, its terms are written, the codes are read.

    Args:
        reads: of the codes: 1 where a tile of them stays on chip for all terms, else as many as there are terms.
    """
    return reads * code_bytes + rows * ((BF16_BYTES + TERM_BYTES * terms) * k + BF16_BYTES * n)


# ---- Attention, a KV head (section 4.4) --------------------------------------------------------------------------------


def softmax_flops(rows: int, keys: float, head_size: int, tile: int = TILE) -> float:
    """Vector work of attention in floats: 4 FLOP a logit, and 3 an output and tile to rescale it."""
    return 4.0 * rows * keys + 3.0 * rows * head_size * keys / tile


def dequantized_attention_flops(rows: int, keys: int, head_size: int, tile: int = TILE) -> float:
    """Vector work of attention whose keys and values are dequantized."""
    return dequantizing_flops(2.0 * keys * head_size) + softmax_flops(rows, keys, head_size, tile)


def msd_attention_flops(rows: int, keys: float, head_size: int, tile: int = TILE) -> float:
    """Vector work of attention whose queries and probabilities are decomposed."""
    return 6.0 * rows * head_size + 12.0 * rows * keys + 7.0 * rows * head_size * keys / tile


def attention_matrix_ops(rows: int, keys: float, head_size: int, terms: int = 1) -> float:
    """Work of the matrix unit: two products for each term."""
    return 4.0 * terms * rows * keys * head_size


def break_even_rows(keys: int, head_size: int, tile: int = TILE) -> float:
    """N*: query rows up to which decomposing is less vector work than dequantizing, from the two sums above."""
    return 4 * keys * head_size / (6 * head_size + 8 * keys + 4 * head_size * keys / tile)


def printed_break_even_rows(keys: int, head_size: int, tile: int = TILE) -> float:
    """N* by the paper's short formula.

    It compares all of MSD's work with the dequantization alone, not with dequantization's softmax too, and drops the
    decomposition of the queries; so it is 40 % lower than what follows from the paper's own sums.
    """
    return 4 * keys * head_size / (12 * keys + 7 * head_size * keys / tile)


def printed_attention_bytes(keys: int, head_size: int) -> tuple[float, float]:
    """Traffic of an int8 cache as the paper prints it, dequantized and decomposed: 5Md and 2Md, its "2.5 times".

    The first is one tensor's way (read, written as bf16, read again), the second that of keys and values. Like for like
    (`dequantized_values_bytes` of ``2Md`` values) it is 5 times with the re-read, 3 times as the paper counts layers, and
    once for a kernel that dequantizes in registers.
    """
    return 5.0 * keys * head_size, 2.0 * keys * head_size
