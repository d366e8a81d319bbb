"""Codes and scales, arranged by shapes alone, against NumPy doing the same to the dequantized weight."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import dequantize

from msd_compiler.weight_view import Atom, NotAligned, WeightView

SIZES = (1, 2, 3, 4, 6, 8, 12)


@st.composite
def stored(draw):
    """Codes, scales, axis and block size of a DequantizeLinear."""
    shape = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4).map(tuple))
    axis = draw(st.integers(0, len(shape) - 1))
    layout = draw(st.sampled_from(("tensor", "[1]", "axis", "blocks")))
    block = draw(st.integers(1, 14)) if layout == "blocks" else 0
    scale_shape = {
        "tensor": (),
        "[1]": (1,),
        "axis": (shape[axis],),
        "blocks": tuple(-(-size // block) if d == axis else size for d, size in enumerate(shape)) if block else (),
    }[layout]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.integers(-8, 8, shape), rng.integers(1, 100, scale_shape), axis, block


@st.composite
def splits(draw, size):
    """A shape with ``size`` elements."""
    dims = []
    while size > 1:
        part = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        dims.append(part)
        size //= part
    dims += [1] * draw(st.integers(0, 1))
    return tuple(draw(st.permutations(dims))) or (1,)


def rebuilt(view, codes, scales, dim):
    """The weight from arranged codes and the scales of the blocks of ``dim``."""
    block = view.block_size(dim) or view.shape[dim]
    by_block = view.arrange_scales(scales, dim)
    assert by_block.shape[dim] * block == view.shape[dim]
    whole = view.arrange_codes(codes) * np.repeat(by_block, block, axis=dim)
    return whole[tuple(slice(view.real_size(d)) for d in range(whole.ndim))]


@settings(max_examples=250, deadline=None)
@given(stored(), st.data())
def test_follows_the_weight(tensor, data):
    codes, scales, axis, block = tensor
    view = WeightView.stored_as(codes.shape, scales.shape, axis, block)
    weight = dequantize(codes, scales, axis=axis, block_size=block)
    for _ in range(data.draw(st.integers(0, 4))):
        if data.draw(st.booleans()):
            permutation = tuple(data.draw(st.permutations(range(weight.ndim))))
            view, weight = view.transposed(permutation), weight.transpose(permutation)
        else:
            shape = data.draw(splits(weight.size))
            try:
                view = view.reshaped(shape)
            except NotAligned:
                continue
            weight = weight.reshape(shape)
        assert tuple(view.real_size(d) for d in range(weight.ndim)) == weight.shape
    for dim in range(weight.ndim):
        assert np.array_equal(rebuilt(view, codes, scales, dim), weight)


@settings(max_examples=100, deadline=None)
@given(stored(), st.data())
def test_block_is_the_longest(tensor, data):
    """Steps of a dimension that share a scale, by comparing scales: with distinct ones, none shares beyond the block."""
    codes, scales, axis, block = tensor
    distinct = np.arange(1, scales.size + 1).reshape(scales.shape)
    view = WeightView.stored_as(codes.shape, scales.shape, axis, block)
    permutation = tuple(data.draw(st.permutations(range(codes.ndim))))
    view = view.transposed(permutation)
    spread = dequantize(np.ones(codes.shape), distinct, axis=axis, block_size=block).transpose(permutation)
    for dim, size in enumerate(spread.shape):
        assume(size > 1)
        changes = np.flatnonzero(
            np.any(np.diff(spread, axis=dim), axis=tuple(d for d in range(spread.ndim) if d != dim))
        )
        found = view.block_size(dim)
        if changes.size:
            assert found == changes[0] + 1
        else:
            assert found is None or found >= size


@settings(max_examples=60, deadline=None)
@given(stored(), st.data())
def test_one_scale_follows_anywhere(tensor, data):
    codes = tensor[0].reshape(-1)
    shape = data.draw(splits(codes.size))
    view = WeightView.stored_as(codes.shape, (), 0, 0).reshaped(shape)
    assert (view.shape, view.block_size(0)) == (shape, None)
    assert np.array_equal(view.arrange_codes(codes), codes.reshape(shape))


@settings(max_examples=100, deadline=None)
@given(stored(), st.data())
def test_reshape_and_back(tensor, data):
    codes, scales, axis, block = tensor
    view = WeightView.stored_as(codes.shape, scales.shape, axis, block)
    try:
        there = view.reshaped(data.draw(splits(codes.size)))
    except NotAligned:
        assume(False)
    back = there.reshaped(codes.shape)
    for dim in range(codes.ndim):
        assert np.array_equal(rebuilt(back, codes, scales, dim), rebuilt(view, codes, scales, dim))


@pytest.mark.parametrize(
    ("shape", "scales", "axis", "block", "blocks"),
    [
        ((40, 20), (), 1, 0, (None, None)),
        ((40, 20), (1,), 1, 0, (None, None)),
        ((40, 20), (20,), 1, 0, (None, 1)),
        ((40, 20), (40,), 0, 0, (1, None)),
        ((40, 20), (3, 20), 0, 16, (16, 1)),
        ((40, 20), (40, 3), 1, 8, (1, 8)),
        ((40, 20), (1, 20), 0, 512, (None, 1)),
        ((4, 40, 20), (4, 5, 20), 1, 8, (1, 8, 1)),
    ],
)
def test_block_size(shape, scales, axis, block, blocks):
    view = WeightView.stored_as(shape, scales, axis, block)
    assert tuple(view.block_size(d) for d in range(len(shape))) == blocks


def test_atoms_of_the_docstring():
    view = WeightView.stored_as((512, 1024), (16, 1024), 0, 32)
    assert view.dims == ((Atom(16, True, (0, 32)), Atom(32, False, (0, 1))), (Atom(1024, True, (1, 1)),))


@pytest.mark.parametrize(
    ("shape", "scales", "axis", "block", "words"),
    [
        ((40, 20), (19,), 1, 0, "shape [19], expected [20] (one per slice of axis 1), or one"),
        ((40, 20), (20,), 0, 0, "shape [20], expected [40] (one per slice of axis 0), or one"),
        ((40, 20), (1, 20), 1, 0, "shape [1, 20], expected [20]"),
        ((40, 20), (1, 1), 1, 0, "shape [1, 1], expected a scalar or one dimension"),
        ((40, 20), (0,), 1, 0, "shape [0], expected [20]"),
        ((40, 20), (2, 20), 0, 16, "shape [2, 20], expected [3, 20] (blocks of 16 on axis 0)"),
        ((40, 20), (), 0, 16, "shape [], expected [3, 20] (blocks of 16 on axis 0)"),
        ((40, 20), (3,), 0, 16, "shape [3], expected [3, 20] (blocks of 16 on axis 0)"),
    ],
)
def test_scales_that_do_not_fit(shape, scales, axis, block, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        WeightView.stored_as(shape, scales, axis, block)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("scales", "axis", "block", "shape", "words"),
    [
        ((20,), 1, 0, (20, 40), None),
        ((20,), 1, 0, (25, 32), "[40, 20] to [25, 32] cuts through a run of 40 that shares a scale"),
        ((5, 20), 0, 8, (10, 4, 20), None),
        ((5, 20), 0, 8, (4, 10, 20), "cuts through a run of 5 that shares a scale"),
        ((3, 20), 0, 16, (800,), "its last block is incomplete"),
        ((3, 20), 0, 16, (40, 20), None),
        ((), 0, 0, (40, 40), "[40, 20] has too few elements for [40, 40]"),
        ((), 0, 0, (40, 10), "[40, 20] has too many elements for [40, 10]"),
    ],
)
def test_reshape(scales, axis, block, shape, words):
    view = WeightView.stored_as((40, 20), scales, axis, block)
    if words is None:
        assert tuple(view.reshaped(shape).real_size(d) for d in range(len(shape))) == shape
        return
    with pytest.raises(NotAligned) as error:
        view.reshaped(shape)
    assert words in str(error.value)
