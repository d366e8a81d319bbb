"""The part of a function body that reads a stored weight and cuts an activation into its groups: shared by all ops on `layout`.

Steps of the function text, over the op's inputs ``B``, ``scales``, ``zero_points``, ``bias`` and ``plan``.
B is unpacked with long inner runs, the codes of a byte outermost and the quads turned before the tiles: the runtime folds
that when a session starts, and a broadcast or transpose of single bytes is twenty times slower.
"""

from __future__ import annotations

from ..spelling import INDICES

WEIGHT = f"""
    {INDICES}
    minus_one = Constant <value = int64[1] {{-1}}> ()
    k = Slice (plan, at_0, at_1)
    bits = Slice (plan, at_1, at_2)
    block = Slice (plan, at_2, at_3)
    n = Shape (bias)
    b_shape = Shape (B)
    tiles = Slice (b_shape, at_0, at_1)
    groups = Slice (b_shape, at_1, at_2)

    scalar = Constant <value = int64[1] {{0}}> ()
    eight = Constant <value = int64 {{8}}> ()
    none = Constant <value = int64 {{0}}> ()
    no_dim = Constant <value = int64[0] {{}}> ()
    bits_scalar = Reshape (bits, no_dim)
    right_shifts = Range (none, eight, bits_scalar)
    spare = Sub (eight, bits)
    left_shifts = Sub (spare, right_shifts)
    left = Cast <to = 2> (left_shifts)
    right = Cast <to = 2> (spare)
    outermost = Constant <value = int64[5] {{-1, 1, 1, 1, 1}}> ()
    left_outermost = Reshape (left, outermost)
    bytes_shape = Concat <axis = 0> (at_1, b_shape)
    b_bytes = Reshape (B, bytes_shape)
    b_left = BitShift <direction = "LEFT"> (b_bytes, left_outermost)
    b_codes = BitShift <direction = "RIGHT"> (b_left, right)
    quad_shape = Constant <value = int64[6] {{0, 0, 0, 0, 16, 4}}> ()
    b_quads = Reshape (b_codes, quad_shape)
    b_by_step = Transpose <perm = [0, 1, 2, 3, 5, 4]> (b_quads)
    b_ordered = Transpose <perm = [2, 3, 0, 4, 1, 5]> (b_by_step)
    sixteen = Constant <value = int64[1] {{16}}> ()
    n_padded = Mul (tiles, sixteen)
    w_shape = Concat <axis = 0> (groups, minus_one, n_padded)
    w_padded = Reshape (b_ordered, w_shape)
    w_starts = Concat <axis = 0> (at_0, at_0)
    w_ends = Concat <axis = 0> (block, n)
    w_axes = Concat <axis = 0> (at_1, at_2)
    w_GBN = Slice (w_padded, w_starts, w_ends, w_axes)

    middle_shape = Constant <value = int64[3] {{0, 1, -1}}> ()
    columns_shape = Constant <value = int64[2] {{0, -1}}> ()
    per_column = Concat <axis = 0> (groups, at_1, n)
    zero_points_shape = Concat <axis = 0> (groups, n)
    scales_t = Transpose <perm = [1, 0, 2]> (scales)
    scales_2d = Reshape (scales_t, columns_shape)
    scales_cut = Slice (scales_2d, at_0, n, at_1)
    scales_3d = Reshape (scales_cut, middle_shape)
    zero_points_t = Transpose <perm = [1, 0, 2]> (zero_points)
    zero_points_2d = Reshape (zero_points_t, columns_shape)
    zero_points_cut = Slice (zero_points_2d, at_0, n, at_1)
    zero_points_GN = Expand (zero_points_cut, zero_points_shape)
    scales_float = Expand (scales_3d, per_column)
"""
"""Makes ``w_GBN`` (uint8 codes), ``zero_points_GN`` and ``scales_float`` ([G, 1, N]), and the plan's ``k``, ``bits``, ``block``,
with ``n`` and ``groups``."""

GROUPS = """
    rows_shape = Concat <axis = 0> (minus_one, k)
    x_rows = Reshape (x, rows_shape)
    k_padded = Mul (groups, block)
    k_tail = Sub (k_padded, k)
    pads = Concat <axis = 0> (at_0, at_0, at_0, k_tail)
    x_padded = Pad (x_rows, pads)
    groups_shape = Concat <axis = 0> (minus_one, groups, block)
    x_groups = Reshape (x_padded, groups_shape)
"""
"""Makes ``x_groups`` [M, G, block] of a float ``x`` [..., K], the tail of K filled with 0."""
