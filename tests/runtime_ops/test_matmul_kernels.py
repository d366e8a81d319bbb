"""Every native kernel against reference.py, bit for bit, through onnxruntime."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from msd_compiler.runtime_ops.matmul.layout import ActivationFormat, pack_codes, pack_columns

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")  # of reference.py

MXFP4_X2, MXFP8 = ActivationFormat.MXFP4_E1M2_X2, ActivationFormat.MXFP8
TILE_ROWS, TILE_COLUMNS, LINE_K = (4, 6, 8), (16, 32), 4  # each kernel has some of these


def around(tiles: tuple[int, ...]) -> list[int]:
    return sorted({size for tile in tiles for size in (1, tile - 1, tile, tile + 1, 2 * tile + 3)})


def activation(rows: int, k: int, dtype: type = np.float32, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, k)).astype(dtype)


def assert_same_bits(y: np.ndarray, expected: np.ndarray) -> None:
    """Equal with the sign of 0, and NaN where NaN is (of any sign and payload)."""
    assert y.dtype == expected.dtype
    y, expected = y.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_array_equal(y, expected)
    is_number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(y[is_number]), np.signbit(expected[is_number]))


@pytest.mark.parametrize("rows", around(TILE_ROWS))
@pytest.mark.parametrize("n", around(TILE_COLUMNS))
def test_rows_and_columns(variant, native, helpers, rows, n):
    for coding in helpers.codings:
        site = helpers.make_site(40, n, **coding, columns="group")
        a = activation(rows, 40)
        assert_same_bits(native(a, site), site.reference(a))


@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 48, 64, 128, 256])
def test_k_and_groups(variant, native, helpers, coding, block_size):
    line = LINE_K * 8 // coding["bits"]
    sizes = {1, 3, 4, 5, line - 1, line, line + 1, block_size - 1, block_size, block_size + 1, 2 * block_size + 3}
    for k in sorted(sizes):
        for terms in (1, 2, 3):
            for per_row in (False, True):
                columns = ("one", "column", "group")[(k + terms) % 3]
                site = helpers.make_site(
                    k, 19, **coding, block_size=block_size, terms=terms, per_row=per_row, columns=columns
                )
                a = activation(3 if per_row else 10, k)
                assert_same_bits(native(a, site), site.reference(a))


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 9, 31, 33, 100, 255])
def test_odd_groups(variant, native, helpers, block_size):
    for coding in helpers.codings:
        site = helpers.make_site(2 * block_size + 1, 5, **coding, block_size=block_size, columns="group")
        a = activation(5, site.plan.k)
        assert_same_bits(native(a, site), site.reference(a))


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize(
    ("coding", "code"), [("int8", 0), ("int8", 255), ("e2m1", 0), ("e2m1", 14)], indirect=["coding"]
)
@pytest.mark.parametrize("zero_point", [0, 255])
@pytest.mark.parametrize("rows", [1, 9])
def test_largest_sums(variant, native, helpers, terms, coding, code, zero_point, rows):
    """256 products of the largest codes: the edge of int32."""
    site = helpers.make_site(512, 17, **coding, block_size=256, terms=terms)
    codes = np.full_like(site.codes, code)
    site = site.but(
        codes=codes,
        B=pack_codes(codes, site.plan),
        zero_points=np.full((1, 1, 1), zero_point, np.uint8),
    )
    for sign in (1, -1):
        a = np.full((rows, 512), sign * 3.5, np.float32)
        a[:, 1::2] *= np.float32(0.99)
        a[-1, 256:] = sign * 3.5
        assert_same_bits(native(a, site), site.reference(a))


@pytest.mark.parametrize("by", [1, 2, 4, 12])
def test_any_address(variant, native, helpers, by):
    """onnxruntime hands arrays on as they are, wherever they begin."""
    for coding in helpers.codings:
        site = helpers.make_site(75, 37, **coding, columns="group")
        weight = {k: helpers.displaced(v, by) for k, v in site.operands().items() if k != "plan"}
        for rows in (1, 9):
            for dtype in (np.float32, np.float16):
                a = activation(rows, 75, dtype)
                assert_same_bits(native(helpers.displaced(a, by), site.but(**weight)), site.reference(a))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_narrow_floats(variant, native, helpers, dtype, rows):
    for terms in (1, 2, 3):
        for k in (7, 64, 75):
            site = helpers.make_site(k, 21, terms=terms, columns="column")
            a = activation(rows, k, dtype)
            assert_same_bits(native(a, site), site.reference(a))


@pytest.mark.parametrize("n", [5, 16])
def test_float16_results_round_to_even_and_overflow(variant, native, helpers, n):
    """With a weight of 0 the output is the bias, cast."""
    edges = [65504, 65519.996, 65520, 1e30, -70000, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-26]
    edges += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-24 * 1.5, 2.0**-24 * 2.5, 6.1e-5, 1023.4999 * 2.0**-24]
    for start in range(0, len(edges), n):
        bias = np.resize(np.array(edges[start:], np.float32), n)
        site = helpers.make_site(8, n).but(scales=np.zeros((1, 1, 16), np.float32), bias=bias)
        for dtype in (np.float16, ml_dtypes.bfloat16):
            a = activation(1, 8, dtype)
            assert_same_bits(native(a, site), site.reference(a))


def test_every_float16_is_read_right(variant, native, helpers):
    finite = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = finite[np.isfinite(finite)]
    a = np.resize(finite, (-(-len(finite) // 64), 64))
    site = helpers.make_site(64, 3, block_size=8)
    assert_same_bits(native(a, site), site.reference(a))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("per_row", [False, True])
def test_guards(variant, native, helpers, dtype, terms, per_row):
    site = helpers.make_site(21, 18, block_size=8, terms=terms, per_row=per_row, columns="group")
    a = activation(12, 21, dtype)
    a[1, 3], a[2, 9], a[3, 20], a[4, 0] = np.nan, np.inf, -np.inf, np.nan
    a[5] = 0
    a[6, 8:16] = 0
    if dtype != np.float16:
        a[7] = 2.0**-101
        a[8, :8] = 1e-40
        a[9, 0] = 1e38
        a[10, 16:] = 2.0**-100
    y = native(a, site)
    assert np.isnan(y).any(axis=1).tolist() == [False, True, True, True, True] + [False] * 7
    assert_same_bits(y, site.reference(a))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_mx_formats(variant, native, helpers, mx_format, dtype):
    for block_size in (1, 8, 9, 32, 100):
        for k in sorted({1, block_size, 2 * block_size + 1, 75}):
            coding = helpers.codings[k % 4]
            site = helpers.make_site(k, 18, **coding, block_size=block_size, activation=mx_format, columns="group")
            for a in (helpers.uneven(13, k, dtype), activation(1, k, dtype)):
                assert_same_bits(native(a, site), site.reference(a))


@pytest.mark.parametrize("columns", ["one", "column", "group"])
@pytest.mark.parametrize("terms", [2, 3])
def test_what_columns_share(variant, native, helpers, columns, terms):
    site = helpers.make_site(96, 35, terms=terms, columns=columns)
    one_offset = site.but(offsets=np.full((1, 1, 1), 0.25, np.float32))
    one_zero_point = site.but(zero_points=np.full((1, 1, 1), 200, np.uint8))
    many_scales = site.but(scales=pack_columns(np.random.default_rng(3).normal(size=(3, 35)).astype(np.float32)))
    for rows in (2, 11):
        a = activation(rows, 96)
        for case in (site, one_offset, one_zero_point, many_scales):
            assert_same_bits(native(a, case), case.reference(a))


@pytest.mark.parametrize("how", [{"terms": 2}, {"terms": 3}, {"activation": MXFP4_X2}, {"activation": MXFP8}], ids=str)
def test_the_same_row_has_the_same_bits(native, helpers, library, how):
    """At every number of rows and threads, and with every kernel: panels, tails and tasks differ."""
    site = helpers.make_site(1000, 200, bits=4, block_size=64, columns="group", **how)
    a = activation(300, 1000)
    expected = site.reference(a)
    for name in library.msd_isa_names().decode().split():
        library.msd_select_isa(name.encode())
        for threads in (1, 2):
            for rows in (1, 7, 128, 300):
                assert_same_bits(native(a[:rows], site, threads), expected[:rows])
    library.msd_select_isa(b"")


@pytest.mark.parametrize(
    ("shape", "rows"), [((24,), 1), ((2, 3, 24), 6), ((2, 1, 3, 24), 6), ((0, 24), 0), ((3, 0, 24), 0)]
)
def test_rank(variant, native, helpers, shape, rows):
    site = helpers.make_site(24, 18)
    a = activation(rows, 24).reshape(shape)
    y = native(a, site)
    assert y.shape == (*shape[:-1], 18)
    assert_same_bits(y, site.reference(a))


def test_flush_to_zero_changes_nothing(helpers, variant):
    """The session option sets the processor's flags; the guard at 2^-100 keeps every step clear of subnormals."""
    chosen = helpers.options()
    chosen.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = ort.InferenceSession(helpers.open_model(np.float32).SerializeToString(), chosen)
    a = activation(4, 64) * np.float32(2.0) ** np.array([[0], [-95], [-100], [-126]], np.float32)
    for form in ActivationFormat:
        site = helpers.make_site(64, 20, block_size=16, activation=form)
        (y,) = session.run(None, {"A": a, **site.operands()})
        assert_same_bits(y, site.reference(a))


# Relative L2 error of one product against float64: the targets of METHOD sections 2 and 5.


@pytest.fixture(scope="module")
def large(helpers):
    return helpers.make_site(4096, 4096, bits=8, block_size=128, columns="one")


def relative_l2(y: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("per_row", [False, True])
def test_accuracy_gaussian(native, large, per_row):
    site = large.but(plan=replace(large.plan, per_row=per_row))
    a = activation(16, 4096)
    exact = a.astype(np.float64) @ site.weight() + site.bias
    assert relative_l2(native(a, site), exact) <= 5e-5


@pytest.mark.parametrize(("block_size", "target"), [(128, 1.2e-4), (32, 6e-5)])
def test_accuracy_with_an_outlier_channel(native, large, block_size, target):
    plan = replace(large.plan, block_size=block_size)
    site = large.but(plan=plan, B=pack_codes(large.codes, plan))
    a = activation(16, 4096)
    a[:, 1234] *= 1000
    exact = a.astype(np.float64) @ site.weight() + site.bias
    assert relative_l2(native(a, site), exact) <= target
