"""Sites on a device with matrix and vector units, by the paper's closed forms (`paper`) and the rates of its units."""

from __future__ import annotations

from . import paper
from .price import NoFigure, Price
from .profile import AcceleratorProfile, NumberFormat
from .work import AttentionWork, LinearWork, mean_seen

PARTIAL_SUM_BYTES = 4


def dequantized_linear(profile: AcceleratorProfile, work: LinearWork, rows: int) -> Price:
    """A product with the weight dequantized to bf16 on the vector units.

    Raises:
        NoFigure: the profile has no bf16 matrix unit.
    """
    values = float(work.k) * work.n
    vector = paper.dequantizing_flops(values) if work.is_coded else 0.0
    trips = _trips(profile) if work.is_coded else 0
    moved = paper.dequantized_bytes(rows, work.k, work.n, work.weight_bytes, trips)
    return _on_units(profile, work.copies, "bf16", vector, paper.matrix_ops(rows, work.k, work.n), moved)


def msd_linear(profile: AcceleratorProfile, work: LinearWork, rows: int, terms: int, *, per_row: bool = False) -> Price:
    """A product with the activation in INT8 terms, each multiplied with the codes.

    Beyond the paper: where units meet in memory, so do the partial sums of all groups but the last.

    Args:
        per_row: one activation scale for the row; with one weight scale per column nothing is scaled per group then.

    Raises:
        NoFigure: the profile has no int8 matrix unit.
    """
    groups = 1 if per_row and work.per_channel else work.groups
    partial_sums = _trips(profile) * PARTIAL_SUM_BYTES * terms * rows * work.n * (groups - 1)
    return _decomposed(profile, work, rows, terms, "int8", groups, partial_sums)


def msd_fp4_linear(profile: AcceleratorProfile, work: LinearWork, rows: int) -> Price:
    """A product of an MXFP4 weight with the activation in two MXFP4 terms; the matrix unit applies the blocks' scales.

    Raises:
        NoFigure: the profile has no fp4 matrix unit, or the weight is another.
    """
    if not work.is_fp4:
        raise NoFigure("the weight is not MXFP4")
    return _decomposed(profile, work, rows, terms=2, number="fp4", groups=1, partial_sums=0)


def _decomposed(
    profile: AcceleratorProfile,
    work: LinearWork,
    rows: int,
    terms: int,
    number: NumberFormat,
    groups: int,
    partial_sums: float,
) -> Price:
    vector = paper.msd_flops(rows, work.k, work.n, terms, groups)
    matrix = paper.matrix_ops(rows, work.k, work.n, terms)
    fits = paper.TERM_BYTES * terms * rows * work.k <= profile.on_chip_bytes.value
    moved = paper.msd_bytes(rows, work.k, work.n, work.weight_bytes, terms, reads=1 if fits else terms) + partial_sums
    return _on_units(profile, work.copies, number, vector, matrix, moved)


def dequantized_attention(
    profile: AcceleratorProfile, work: AttentionWork, batch: int, tokens: int, context: int, tile: int = paper.TILE
) -> Price:
    """Attention with keys and values dequantized to bf16; a cache of floats is taken as it is.

    Raises:
        NoFigure: the profile has no bf16 matrix unit.
    """
    rows, seen = work.queries_per_head * tokens, mean_seen(tokens, context)
    values = 2.0 * context * work.head_size
    vector = paper.softmax_flops(rows, seen, work.head_size, tile)
    if work.is_coded:
        vector += paper.dequantizing_flops(values)
    moved = paper.dequantized_values_bytes(values * work.bits / 8, values, _trips(profile) if work.is_coded else 0)
    matrix = paper.attention_matrix_ops(rows, seen, work.head_size)
    return _on_units(profile, batch * work.kv_heads, "bf16", vector, matrix, moved)


def msd_attention(
    profile: AcceleratorProfile, work: AttentionWork, batch: int, tokens: int, context: int, tile: int = paper.TILE
) -> Price:
    """Attention with queries and probabilities in two INT8 terms.

    Raises:
        NoFigure: the profile has no int8 matrix unit.
    """
    rows, seen = work.queries_per_head * tokens, mean_seen(tokens, context)
    vector = paper.msd_attention_flops(rows, seen, work.head_size, tile)
    matrix = paper.attention_matrix_ops(rows, seen, work.head_size, terms=2)
    moved = 2.0 * context * work.head_size * work.bits / 8
    return _on_units(profile, batch * work.kv_heads, "int8", vector, matrix, moved)


def _trips(profile: AcceleratorProfile) -> int:
    """How often what one kind of unit makes for the other crosses memory: it is written, and read."""
    return 2 if profile.dequantized == "memory" else 0


def _on_units(
    profile: AcceleratorProfile, count: int, number: NumberFormat, vector: float, matrix: float, moved: float
) -> Price:
    """`count` times so much work on both kinds of unit, launched once; memory works beside them."""
    if number not in profile.matrix:
        raise NoFigure(f"{profile.name} has no figure for a matrix unit in {number}")
    launch = profile.node.value
    vector_seconds, matrix_seconds = vector / profile.vector.value, matrix / profile.matrix[number].value
    seconds = paper.latency(count * vector_seconds, count * matrix_seconds, launch)
    seconds = max(seconds, count * moved / profile.read.value + launch)
    return Price(seconds, count * moved, {"vector": count * vector, f"matrix {number}": count * matrix})
