"""The weight's numbers as the readers give them, against plain NumPy dequantizers, on random shapes."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from msd_compiler.passes import READERS
from support import dequantize, dequantize_nbits, model, nbits_weight, weight

from msd_compiler.facts import QuantizedLinear
from msd_compiler.linked import Linked
from msd_compiler.reader import find_sites
from msd_compiler.source import Source

KINDS = ("int2", "uint2", "int4", "uint4", "int8", "uint8")


def fact_of(proto):
    (site,) = find_sites(Linked.of(Source(proto, Path())), READERS, ())
    assert isinstance(site.found, QuantizedLinear), site.found
    return site.found


def assert_means(low_bit, expected):
    """What `WeightData` says its numbers mean, in float64."""
    data = low_bit.load()
    block = low_bit.block_size or low_bit.k

    def by_step(values):
        return np.repeat(values.astype(np.float64), block if len(values) > 1 else low_bit.k, axis=0)[: low_bit.k]

    assert data.codes.dtype == data.zero_points.dtype == np.uint8
    assert data.codes.max(initial=0) < 2**low_bit.bits
    assert len(data.scales) in (1, -(-low_bit.k // block))
    offsets = np.zeros((1, 1)) if data.offsets is None else data.offsets
    found = by_step(data.scales) * (data.codes - by_step(data.zero_points) - by_step(offsets))
    if data.input_scales is not None:
        found = found * data.input_scales.astype(np.float64)[:, None]
    assert found.shape == expected.shape == (low_bit.k, low_bit.n)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 9), st.sampled_from((16, 32, 64)), st.sampled_from((2, 4, 8)),
    st.sampled_from((None, "packed", "float32", "float16")), st.sampled_from(("float32", "float16")), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_matmul_nbits(k, n, block, bits, zeros, floats, flat, seed):
    tensors = nbits_weight(k, n, block, bits, zeros, floats=floats, flat=flat, seed=seed)
    node = f"com.microsoft.MatMulNBits<K={k}, N={n}, bits={bits}, block_size={block}>"
    scalar = {"float32": "float", "float16": "float16"}[floats]
    fact = fact_of(
        model(
            f"({scalar}[3,{k}] x) => ({scalar}[3,{n}] y) {{ y = {node}(x, b, s{', z' if zeros else ''}) }}", **tensors
        )
    )
    exact = {name: t.astype(np.int64 if t.dtype == np.uint8 else np.float64) for name, t in tensors.items()}
    assert_means(fact.weight, dequantize_nbits(**exact, K=k, N=n, bits=bits, block_size=block))
    assert (fact.weight.bits, fact.weight.block_size) == (bits, block if block < k else None)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 50), st.integers(1, 9), st.sampled_from((None, 2, 3)), st.sampled_from(KINDS), st.booleans(),
    st.sampled_from(("scalar", "[1]", "n", "k", "blocks")), st.integers(4, 60), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_dequantized(k, n, experts, kind, zeros, layout, block, turned, negative, seed):
    """Stored as [K, N] or [N, K], in front of which stand the experts if there are any."""
    lead = () if experts is None else (experts,)
    k_axis, n_axis = (len(lead) + 1, len(lead)) if turned else (len(lead), len(lead) + 1)
    shape = (*lead, n, k) if turned else (*lead, k, n)
    axis = {"n": n_axis}.get(layout, k_axis)
    blocked = tuple(-(-size // block) if d == k_axis else size for d, size in enumerate(shape))
    scales = {"scalar": (), "[1]": (1,), "n": (n,), "k": (k,), "blocks": blocked}[layout]
    if layout == "k" and "8" in kind:
        zeros = False  # refused, see test_reasons
    tensors = weight(kind, shape, scales, zeros, seed=seed)
    size = f", block_size={block}" if layout == "blocks" else ""
    transpose = f"perm=[{', '.join(map(str, [*range(len(lead)), len(lead) + 1, len(lead)]))}]"
    nodes = f"d = DequantizeLinear<axis={axis - len(shape) if negative else axis}{size}>(w, s{', z' if zeros else ''})"
    nodes += f"  t = Transpose<{transpose}>(d)  y = MatMul(x, t)" if turned else "  y = MatMul(x, d)"
    fact = fact_of(model(f"(float[3,{k}] x) => (float[] y) {{ {nodes} }}", opset=25, **tensors))
    exact = [
        tensors[name].astype(np.float64 if name == "s" else np.int64) for name in ("w", "s", "z") if name in tensors
    ]
    expected = dequantize(*exact, axis=axis, block_size=block if layout == "blocks" else 0)
    expected = expected.reshape(-1, *shape[-2:])
    assert len(fact.weights) == len(expected)
    for low_bit, matrix in zip(fact.weights, expected, strict=True):
        assert_means(low_bit, matrix.T if turned else matrix)
