"""Sites on a CPU: time by measured curves over the number of rows, and what waiting for memory adds."""

from __future__ import annotations

from .price import NoFigure, Price
from .profile import AttentionKernel, CpuProfile, LinearKernel, Way
from .work import AttentionWork, LinearWork, mean_seen

FLOAT_BYTES = 4


def linear_kernel(profile: CpuProfile, way: Way, work: LinearWork, terms: int | None) -> LinearKernel:
    """The kernel that computes a product so.

    Raises:
        NoFigure: the profile has none.
    """
    plane = None if terms is None else max(2, terms)  # one and two terms are one pass of one code
    found = [k for k in profile.linear if k.way is way and k.bits == work.bits and k.terms == plane]
    if not found:
        raise NoFigure(f"{profile.name} has no figures for {way} with {work.bits} bits")
    alike = [k for k in found if k.per_channel == work.per_channel] or found
    fitting = [k for k in alike if k.least_group <= work.group]
    return max(fitting, key=lambda k: k.least_group) if fitting else min(alike, key=lambda k: k.least_group)


def cpu_linear(
    profile: CpuProfile, way: Way, work: LinearWork, rows: int, terms: int | None = None, *, footprint: float = 0
) -> Price:
    """A product.

    Args:
        terms: of `Way.MSD`.
        footprint: bytes that are read again and again in turn, this weight included: all weights of a model.

    Raises:
        NoFigure: the profile has no kernel for it.
    """
    kernel = linear_kernel(profile, way, work, terms)
    weight_bytes = work.weight_bytes
    waiting = profile.reads.waiting(weight_bytes, max(footprint, weight_bytes)) / kernel.read_share
    moved = weight_bytes + FLOAT_BYTES * rows * (work.k + work.n)
    unit = {Way.MSD: "int16 multiply-add", Way.SESSION: "int8 multiply-add"}.get(way, "float32 multiply-add")
    ops = {unit: 2.0 * rows * work.k * work.n * (2 if terms == 3 else 1)}
    seconds = profile.node.value + linear_seconds(kernel, work, rows) + waiting
    return Price(seconds, moved, ops).times(work.copies)


def linear_seconds(kernel: LinearKernel, work: LinearWork, rows: int) -> float:
    """Of one matrix in a cache, beside what any node takes."""
    return (
        kernel.call
        + rows * work.k * kernel.per_activation
        + rows * work.n * kernel.per_output
        + work.k * work.n * kernel.per_weight(rows)
        + work.n * work.groups * kernel.per_group(rows)
    )


def attention_kernel(profile: CpuProfile, way: Way, work: AttentionWork) -> AttentionKernel:
    """The kernel that computes attention so.

    Raises:
        NoFigure: the profile has none.
    """
    bits = 32 if work.bits == 16 else work.bits
    for kernel in profile.attention:
        if kernel.way is way and kernel.bits == bits:
            return kernel
    raise NoFigure(f"{profile.name} has no figures for attention, {way} with a cache of {work.bits} bits")


def cpu_attention(profile: CpuProfile, way: Way, work: AttentionWork, batch: int, tokens: int, context: int) -> Price:
    """Attention of new tokens, which see the whole cache before them.

    Args:
        tokens: new ones of a sequence.
        context: tokens in the cache, new ones included.

    Raises:
        NoFigure: the profile has no kernel for it.
    """
    kernel = attention_kernel(profile, way, work)
    cache_bytes = attention_bytes(work, batch, context)
    waiting = profile.reads.waiting(cache_bytes, cache_bytes) / kernel.read_share
    queries = batch * tokens * work.heads * work.head_size
    unit = "int16 multiply-add" if way is Way.MSD else "float32 multiply-add"
    ops = {unit: 4.0 * queries * mean_seen(tokens, context)}
    seconds = profile.node.value + attention_seconds(kernel, work, batch, tokens, context) + waiting
    return Price(seconds, cache_bytes + 2 * FLOAT_BYTES * queries, ops)


def attention_bytes(work: AttentionWork, batch: int, context: int) -> float:
    """Of keys and values."""
    return 2 * batch * work.kv_heads * work.head_size * context * work.bits / 8


def new_values(work: AttentionWork, batch: int, tokens: int) -> int:
    """Of queries, keys and values of new tokens."""
    return batch * tokens * (work.heads + 2 * work.kv_heads) * work.head_size


def attention_seconds(kernel: AttentionKernel, work: AttentionWork, batch: int, tokens: int, context: int) -> float:
    """Over a cache that lies in a cache of the processor, beside what any node takes."""
    rows = tokens * work.queries_per_head if kernel.shares_heads else tokens
    seen = mean_seen(tokens, context) if kernel.is_causal else context
    pairs = batch * seen * (work.kv_heads if kernel.shares_heads else work.heads)
    return (
        kernel.call
        + new_values(work, batch, tokens) * kernel.per_activation
        + pairs * (work.head_size * kernel.per_cached(rows) + kernel.per_logit(rows))
    )
