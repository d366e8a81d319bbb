"""reference.py of ``msd.Attention`` against float64, and its parts on their own."""

import numpy as np
import pytest
from attention_support import Native, make_case
from msd_compiler.runtime_ops.attention.layout import Plan, pack_codes, unpack_codes
from msd_compiler.runtime_ops.attention.reference import exp, quantize, soft_cap


def relative_l2(y: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def test_exp():
    x = -np.concatenate([np.linspace(0, 87, 200001), 10.0 ** np.linspace(-9, 0, 20001)]).astype(np.float32)
    y = exp(x)
    exact = np.exp(x.astype(np.float64))
    assert np.abs((y - exact) / np.spacing(exact.astype(np.float32))).max() <= 1
    assert y.max() == 1
    below = np.array([np.nextafter(np.float32(-87), np.float32(-88)), -100, -1e30, -np.inf], np.float32)
    assert (exp(below) == 0).all()
    assert exp(np.float32(-87)) >= 2.0**-126
    assert exp(np.array([0, -0.0], np.float32)).tolist() == [1, 1]
    assert np.isnan(exp(np.float32(np.nan)))


def test_soft_cap():
    s = np.linspace(-300, 300, 10001).astype(np.float32)
    for cap in (1, 30, 50):
        exact = cap * np.tanh(s.astype(np.float64) / cap)
        assert np.abs(soft_cap(s, np.float32(cap)) - exact).max() <= cap * 2.0**-22
    infinite = soft_cap(np.array([np.inf, -np.inf], np.float32), np.float32(30))
    assert infinite.tolist() == [30, -30]


@pytest.mark.parametrize("columns", [1, 2, 7, 8])
def test_packing(columns):
    codes = np.random.default_rng(0).integers(-8, 8, (2, 3, columns)).astype(np.int8)
    packed = pack_codes(codes, 4)
    assert packed.shape == (2, 3, -(-columns // 2))
    assert packed[0, 0, 0] & 15 == codes[0, 0, 0] + 8
    np.testing.assert_array_equal(unpack_codes(packed, columns, 4), codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_per_token(bits):
    plan = Plan(bits, True, False, True, 0)
    x = np.random.default_rng(0).normal(size=(1, 2, 50, 16)).astype(np.float32)
    x[0, 0, 0], x[0, 0, 1, 3], x[0, 0, 2, 0], x[0, 0, 3] = 0, np.nan, np.inf, 2.0**-101
    codes, scales = quantize(x, np.zeros(0, np.float32), plan)
    assert np.isnan(scales[0, 0, 1:3]).all()
    assert (scales[0, 0, [0, 3]] == 0).all()
    assert (codes[0, 0, :4] == 0).all()
    assert np.abs(codes).max() == plan.largest
    error = np.abs(x - codes * scales)[0, :, 4:]
    assert (error <= scales[0, :, 4:] * 0.50001).all()


@pytest.mark.parametrize("scales", ["tensor", "channel", "dynamic"])
@pytest.mark.parametrize("bits", [8, 4])
def test_accuracy(scales, bits):
    mask = np.random.default_rng(9).normal(size=(2, 1, 9, 700))
    for changes in [{}, {"causal": False}, {"cap": 20}, {"window": 100}, {"mask": mask}, {"sinks": [1, 2, 0, -1]},
                    {"lengths": [600, 3]}, {"shared": True, "lengths": [255, 512]}]:  # fmt: skip
        case = make_case(
            **{
                "batch": 2,
                "heads": 2,
                "group": 2,
                "queries": 9,
                "past": 650,
                "columns": 64,
                "bits": bits,
                "scales": scales,
            }
            | changes
        )
        assert relative_l2(case.reference().y, case.exact()) <= 5e-4, changes


SIGMAS = [(0.3, 2e-5), (1.3, 9e-5), (2.6, 1.3e-4)]


def probabilities_error(native, sigma, seed, scales):
    """Error that rounding P alone makes: length 16384, 64 columns, random values, logits of this deviation."""
    rng = np.random.default_rng(seed)
    length, columns = 16384, 64
    case = make_case(past=length, columns=columns, queries=1, new=0, scales=scales, scale=1, causal=False, seed=seed)
    logits = rng.normal(scale=sigma, size=length).astype(np.float32)
    case = case.but(query=np.zeros_like(case.operands["query"]), mask=logits[None, None, None, :])
    return relative_l2(native(case).y, case.exact())


@pytest.mark.parametrize(("sigma", "target"), SIGMAS)
def test_accuracy_of_probabilities(sigma, target):
    errors = [probabilities_error(Native(), sigma, seed, "tensor") for seed in range(3)]
    assert np.median(errors) <= 1.5 * target


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "target"), SIGMAS)
@pytest.mark.parametrize("scales", ["tensor", "dynamic"])
def test_accuracy_of_probabilities_over_many_draws(sigma, target, scales):
    native = Native()
    errors = [probabilities_error(native, sigma, seed, scales) for seed in range(20)]
    # Scales of 0.5 to 2: a token's weight is coded below the tile's largest.
    spread = 1 if scales == "tensor" else 1.6
    assert target / 1.5 <= np.mean(errors) <= 1.5 * target * spread


@pytest.mark.parametrize("length", [64, 256, 1024, 4096, 16384])
@pytest.mark.parametrize("scales", ["channel", "dynamic"])
def test_accuracy_over_lengths(length, scales):
    """The paper's attention lengths: query and probabilities together, 64 columns, a head's own scales."""
    native = Native()
    errors = []
    for seed in range(3):
        case = make_case(past=length, columns=64, queries=4, new=4, scales=scales, seed=seed)
        errors.append(relative_l2(native(case).y, case.exact()))
    assert np.median(errors) <= 3e-4
