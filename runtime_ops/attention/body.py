"""``msd.Attention`` as an ONNX function of standard ops: what runs where the native library is not.

The codes that are stored, the caches and the integer products of query and key have the bits of `reference.py`. The
probabilities do not: here they stay float32 and have one maximum per row instead of one per tile, and ``Exp`` is the runtime's. So Y
agrees with the reference within what rounding the probabilities to 16 bits costs the reference (METHOD: twice its targets).
All logits exist at once, ``[B, Hq, S, T]`` float32.

For what all bodies have in common see `matmul.body`. Choices of this one that are not obvious:

* a cache is int8 or uint8, and a branch that is not taken must have valid types too: so new tokens become bytes of the cache's
  type by ``QuantizeLinear`` with scale 1 and a zero point cut from the cache itself, the only op of opset 11 that takes its
  type from another tensor;
* one way of storing serves all caches: room behind the past, none if the cache is shared, then a scatter;
* new tokens enter the branches negated: a ``Cast`` that changes nothing is removed, and its name is then missing within them;
* a scale given once is inverted as ``-1 / scale``, for those: ``Div(1, scale)`` then ``Mul`` would get other bits;
* a scale has one of two shapes, and shape inference, which goes into both branches, must find each possible with either:
  hence the ``Pad`` and ``Slice`` of one that is given once, and the ``Slice`` and ``Expand`` of one per token, which change nothing;
* what may be constant is made outside the branches, and a scale that is given once is no branch's result: it is put before one
  without tokens. onnxruntime 1.24 to 1.27 lose a constant of more than 127 bytes that they folded within a branch;
* the nibbles of a token are not interleaved again, which the runtime does byte by byte: its columns stay in the order
  0, 2, 4 ..., 1, 3, 5 ..., the query's codes are put in that order, and Y out of it;
* the sink is a last column of the logits, so that no row is ever empty and ``ReduceMax`` has something to reduce;
* a scale of a value that is NaN or Inf makes the key's scale NaN: so it reaches the rows that see the token, and no other;
* nothing is cut up entirely by ``Slice`` along one axis: onnxruntime 1.20 would make a ``Split`` of them, and refuse the second
  such in a file, for it has the same name;
* dimensions that may be 0 keep their index in every ``Reshape``, where a 0 then means itself at every opset.
"""

from __future__ import annotations

from functools import cache

import onnx

from ..spelling import INDICES, Reductions, parse_body

_CONSTANTS = f"""
    {INDICES}
    minus_one = Constant <value = int64[1] {{-1}}> ()
    no_dim = Constant <value = int64[0] {{}}> ()
    in_last = Constant <value = int64[4] {{1, 1, 1, -1}}> ()
    in_third = Constant <value = int64[4] {{1, 1, -1, 1}}> ()
    in_second = Constant <value = int64[4] {{1, -1, 1, 1}}> ()
    in_first = Constant <value = int64[4] {{-1, 1, 1, 1}}> ()
    none = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    two = Constant <value = int64 {{2}}> ()
    zero_f = Constant <value = float {{0}}> ()
    one_f = Constant <value = float {{1}}> ()
    minus_one_f = Constant <value = float {{-1}}> ()
    eight_f = Constant <value = float {{8}}> ()
    sixteen_f = Constant <value = float {{16}}> ()
    half_byte_f = Constant <value = float {{128}}> ()
    one_everywhere = Constant <value = float[1,1,1,1] {{1}}> ()
    infinity = Constant <value = float {{inf}}> ()
    minus_infinity = Constant <value = float {{-inf}}> ()
    not_a_number = Constant <value = float {{nan}}> ()
    tiny = Constant <value = float {{7.888609052210118e-31}}> ()
"""

_SIZES = """
    bits = Slice (plan, at_0, at_1)
    cache_1 = Slice (plan, at_2, at_3)
    window = Slice (plan, at_4, at_5)
    is_4_bits = Equal (bits, at_4)
    is_appended = Equal (cache_1, at_0)
    is_grown = Equal (cache_1, at_2)
    flags = Cast <to = 9> (plan)
    is_dynamic = Slice (flags, at_1, at_2)
    is_causal = Slice (flags, at_3, at_4)
    has_window = Slice (flags, at_4, at_5)
    softmax_scale = Slice (factors, at_0, at_1)
    has_factors = Cast <to = 9> (factors)
    has_cap = Slice (has_factors, at_1, at_2)

    query_shape = Shape (query)
    key_shape = Shape (key)
    value_shape = Shape (value)
    past_shape = Shape (past_key)
    batch = Slice (key_shape, at_0, at_1)
    heads = Slice (query_shape, at_1, at_2)
    queries = Slice (query_shape, at_2, at_3)
    columns = Slice (query_shape, at_3, at_4)
    kv_heads = Slice (key_shape, at_1, at_2)
    new = Slice (key_shape, at_2, at_3)
    value_columns = Slice (value_shape, at_3, at_4)
    past = Slice (past_shape, at_2, at_3)
    group = Div (heads, kv_heads)
    rows = Mul (group, queries)
"""
"""Every number is int64[1], every flag bool[1]."""


def _positions(reduce: Reductions) -> str:
    """Where new tokens go (``new_at``), how many columns the logits have (``tokens``), and which of them a query does not see."""
    return f"""
    lengths_or_0 = Concat <axis = 0> (at_0, lengths)
    {reduce("longest", "ReduceMax", "lengths_or_0", 0)}
    longest_after = Add (longest, new)
    appended_after = Add (past, new)
    tokens = Where (is_appended, appended_after, longest_after)
    is_beyond = Less (past, longest_after)
    grows = And (is_grown, is_beyond)
    grown_after = Where (grows, longest_after, past)
    capacity = Where (is_appended, appended_after, grown_after)
    extra = Sub (capacity, past)

    length = Reshape (lengths, in_first)
    first_new = Where (is_appended, past, length)
    new_scalar = Reshape (new, no_dim)
    new_range = Range (none, new_scalar, one)
    new_index = Reshape (new_range, in_third)
    new_at = Add (first_new, new_index)

    tokens_scalar = Reshape (tokens, no_dim)
    token_range = Range (none, tokens_scalar, one)
    token = Reshape (token_range, in_last)
    is_past = Less (token, length)
    is_before_new = Less (token, first_new)
    behind_new = Add (first_new, new)
    is_before_end = Less (token, behind_new)
    is_not_before_new = Not (is_before_new)
    is_new = And (is_not_before_new, is_before_end)
    is_valid = Or (is_past, is_new)
    is_invalid = Not (is_valid)
    since_new = Sub (token, first_new)
    position_of_new = Add (since_new, length)
    position = Where (is_past, token, position_of_new)

    queries_scalar = Reshape (queries, no_dim)
    query_range = Range (none, queries_scalar, one)
    query_index = Reshape (query_range, in_third)
    query_shift = Sub (new, queries)
    query_start = Add (length, query_shift)
    query_position = Add (query_start, query_index)
    is_later = Greater (position, query_position)
    is_too_late = And (is_later, is_causal)
    window_start = Sub (query_position, window)
    is_in_window = Greater (position, window_start)
    is_before_window = Not (is_in_window)
    is_too_early = And (is_before_window, has_window)
    is_out_of_sight = Or (is_too_late, is_too_early)
    is_hidden = Or (is_out_of_sight, is_invalid)
    """


def _per_token(side: str, reduce: Reductions) -> str:
    """Codes and scales of new tokens, one scale per token and head."""
    return f"""
    {side}_new = Neg ({side}_negative)
    {side}_magnitude = Abs ({side}_new)
    {reduce(f"{side}_peak", "ReduceMax", f"{side}_magnitude", 3)}
    {side}_nothing = Mul ({side}_new, zero_f)
    {reduce(f"{side}_poison", "ReduceSum", f"{side}_nothing", 3)}
    {side}_is_finite = Equal ({side}_poison, {side}_poison)
    {side}_is_tiny = Less ({side}_peak, tiny)
    {side}_is_not_tiny = Not ({side}_is_tiny)
    {side}_live = And ({side}_is_finite, {side}_is_not_tiny)
    {side}_safe_peak = Where ({side}_live, {side}_peak, one_f)
    {side}_inverse = Div (largest, {side}_safe_peak)
    {side}_steps = Mul ({side}_new, {side}_inverse)
    {side}_rounded = Round ({side}_steps)
    {side}_codes_dynamic = Where ({side}_live, {side}_rounded, zero_f)
    {side}_step = Div ({side}_safe_peak, largest)
    {side}_dead_step = Where ({side}_is_finite, zero_f, {side}_poison)
    {side}_new_scale = Where ({side}_live, {side}_step, {side}_dead_step)
    {side}_scale_1 = Slice ({side}_scale, at_0, at_1, at_3)
    {side}_scale_past = Expand ({side}_scale_1, past_scale_shape)
    {side}_scale_roomy = Concat <axis = 2> ({side}_scale_past, scale_room)
    {side}_scale_dynamic = ScatterElements <axis = 2> ({side}_scale_roomy, scale_at, {side}_new_scale)
    {side}_scale_valid = Slice ({side}_scale_dynamic, at_0, tokens, at_2)
    {side}_scale_row = Transpose <perm = [0, 1, 3, 2]> ({side}_scale_valid)
    """


def _scale_once(side: str) -> str:
    """``..._scale_once``: a scale that is given once as it is, ``[1, Hkv | 1, 1, columns | 1]``; its inverse, negative; and
    ``..._scale_kept``: all of it, or none of the scales of tokens."""
    return f"""
    {side}_scale_padded = Pad ({side}_scale, one_more_batch_and_token)
    {side}_scale_once = Slice ({side}_scale_padded, at_0_and_0, at_1_and_1, batch_and_tokens)
    {side}_inverse_once = Div (minus_one_f, {side}_scale_once)
    {side}_scale_kept = Slice ({side}_scale, at_0, kept, at_2)
    """


def _given(side: str) -> str:
    """Codes of new tokens by scales that are given once."""
    return f"""
    {side}_steps_given = Mul ({side}_negative, {side}_inverse_once)
    {side}_is_number = Equal ({side}_steps_given, {side}_steps_given)
    {side}_steps_sound = Where ({side}_is_number, {side}_steps_given, zero_f)
    {side}_steps_above = Max ({side}_steps_sound, lowest)
    {side}_steps_clipped = Min ({side}_steps_above, largest)
    {side}_codes_static = Round ({side}_steps_clipped)
    {side}_scale_static = Slice ({side}_scale, at_0, at_0, at_2)
    """


def _quantized(reduce: Reductions) -> str:
    """New tokens' codes, the caches' scales, and what multiplies the query, a column of logits, one of probabilities, and Y."""
    return f"""
    largest_8 = Constant <value = float[1] {{127}}> ()
    largest_4 = Constant <value = float[1] {{7}}> ()
    largest = Where (is_4_bits, largest_4, largest_8)
    largest_negative = Neg (largest)
    lowest = Add (largest_negative, minus_one_f)
    key_float = Cast <to = 1> (key)
    key_negative = Neg (key_float)
    value_float = Cast <to = 1> (value)
    value_negative = Neg (value_float)
    past_scale_shape = Concat <axis = 0> (batch, kv_heads, past, at_1)
    scale_room_shape = Concat <axis = 0> (batch, kv_heads, extra, at_1)
    scale_room = Expand (zero_f, scale_room_shape)
    new_scale_shape = Concat <axis = 0> (batch, kv_heads, new, at_1)
    scale_at = Expand (new_at, new_scale_shape)
    one_more_batch_and_token = Constant <value = int64[8] {{0, 0, 0, 0, 1, 0, 1, 0}}> ()
    at_0_and_0 = Constant <value = int64[2] {{0, 0}}> ()
    at_1_and_1 = Constant <value = int64[2] {{1, 1}}> ()
    batch_and_tokens = Constant <value = int64[2] {{0, 2}}> ()
    kept = Where (is_dynamic, at_0, at_1)
    {_scale_once("key")}
    {_scale_once("value")}
    query_factor = Where (is_dynamic, one_everywhere, key_scale_once)
    y_factor = Where (is_dynamic, one_everywhere, value_scale_once)
    key_codes, value_codes, key_scale_stored, value_scale_stored, key_factor, value_factor = If <
        then_branch = scales_of_tokens () => (
            float[?, ?, ?, ?] key_codes_dynamic, float[?, ?, ?, ?] value_codes_dynamic,
            float[?, ?, ?, ?] key_scale_dynamic, float[?, ?, ?, ?] value_scale_dynamic,
            float[?, ?, ?, ?] key_factor_dynamic, float[?, ?, ?, ?] value_factor_dynamic
        ) {{
            {_per_token("key", reduce)}
            {_per_token("value", reduce)}
            value_scale_nothing = Mul (value_scale_row, zero_f)
            value_scale_is_finite = Equal (value_scale_nothing, value_scale_nothing)
            value_scale_counts = And (value_scale_is_finite, is_valid)
            key_factor_dynamic = Add (key_scale_row, value_scale_nothing)
            value_factor_dynamic = Where (value_scale_counts, value_scale_row, zero_f)
        }},
        else_branch = scales_given () => (
            float[?, ?, ?, ?] key_codes_static, float[?, ?, ?, ?] value_codes_static,
            float[?, ?, ?, ?] key_scale_static, float[?, ?, ?, ?] value_scale_static,
            float[?, ?, ?, ?] key_factor_static, float[?, ?, ?, ?] value_factor_static
        ) {{
            {_given("key")}
            {_given("value")}
            key_factor_static = Identity (one_everywhere)
            value_factor_static = Identity (one_everywhere)
        }}
    > (is_dynamic)
    present_key_scale = Concat <axis = 2> (key_scale_kept, key_scale_stored)
    present_value_scale = Concat <axis = 2> (value_scale_kept, value_scale_stored)
    """


def _packed(side: str, columns: str) -> str:
    """Two codes to a byte, the even column in the low bits; a last high nibble without a column is 0."""
    return f"""
    {side}_nibbles = Add ({side}_codes, eight_f)
    {side}_bytes_twice = Add ({columns}, at_1)
    {side}_bytes_count = Div ({side}_bytes_twice, at_2)
    {side}_columns_even = Mul ({side}_bytes_count, at_2)
    {side}_missing = Sub ({side}_columns_even, {columns})
    {side}_pads = Concat <axis = 0> (at_0, at_0, at_0, at_0, at_0, at_0, at_0, {side}_missing)
    {side}_nibbles_even = Pad ({side}_nibbles, {side}_pads)
    {side}_low = Slice ({side}_nibbles_even, at_0, {side}_columns_even, at_3, at_2)
    {side}_high = Slice ({side}_nibbles_even, at_1, {side}_columns_even, at_3, at_2)
    {side}_high_bits = Mul ({side}_high, sixteen_f)
    {side}_bytes_4 = Add ({side}_low, {side}_high_bits)
    """


def _stored(side: str) -> str:
    """``present_...``: the past, room, and the new tokens' bytes scattered into it; ``..._tokens``: those that logits exist for."""
    return f"""
    {side}_none = Slice (past_{side}, at_0, at_0, at_0)
    {side}_none_flat = Reshape ({side}_none, at_0)
    {side}_zero_flat = Pad ({side}_none_flat, none_and_one)
    {side}_zero = Reshape ({side}_zero_flat, no_dim)
    {side}_stored = QuantizeLinear ({side}_bytes, one_f, {side}_zero)
    {side}_stored_shape = Shape ({side}_stored)
    {side}_width = Slice ({side}_stored_shape, at_3, at_4)
    {side}_room_shape = Concat <axis = 0> (batch, kv_heads, extra, {side}_width)
    {side}_room = Expand ({side}_zero, {side}_room_shape)
    {side}_roomy = Concat <axis = 2> (past_{side}, {side}_room)
    {side}_at = Expand (new_at, {side}_stored_shape)
    present_{side} = ScatterElements <axis = 2> ({side}_roomy, {side}_at, {side}_stored)
    {side}_tokens = Slice (present_{side}, at_0, tokens, at_2)
    """


def _unpacked(side: str, columns: str) -> str:
    """Nibbles, uint8: the even columns, then the odd ones."""
    return f"""
    {side}_pairs = Cast <to = 2> ({side}_tokens)
    {side}_pairs_left = BitShift <direction = "LEFT"> ({side}_pairs, four_bits)
    {side}_evens = BitShift <direction = "RIGHT"> ({side}_pairs_left, four_bits)
    {side}_odds = BitShift <direction = "RIGHT"> ({side}_pairs, four_bits)
    {side}_all = Concat <axis = 3> ({side}_evens, {side}_odds)
    {side}_unpacked = Slice ({side}_all, at_0, {columns}, at_3)
    """


_STORED = f"""
    none_and_one = Constant <value = int64[2] {{0, 1}}> ()
    key_bytes, value_bytes = If <
        then_branch = two_to_a_byte () => (float[?, ?, ?, ?] key_bytes_4, float[?, ?, ?, ?] value_bytes_4) {{
            {_packed("key", "columns")}
            {_packed("value", "value_columns")}
        }},
        else_branch = one_a_byte () => (float[?, ?, ?, ?] key_bytes_8, float[?, ?, ?, ?] value_bytes_8) {{
            key_bytes_8 = Identity (key_codes)
            value_bytes_8 = Identity (value_codes)
        }}
    > (is_4_bits)
    {_stored("key")}
    {_stored("value")}
"""

_OPERANDS = f"""
    four_bits = Constant <value = uint8 {{4}}> ()
    shift_8 = Constant <value = int32 {{128}}> ()
    value_columns_scalar = Reshape (value_columns, no_dim)
    value_range = Range (none, value_columns_scalar, one)
    columns_scalar = Reshape (columns, no_dim)
    even_columns = Range (none, columns_scalar, two)
    odd_columns = Range (one, columns_scalar, two)
    key_order = Concat <axis = 0> (even_columns, odd_columns)
    value_half = Div (value_range, at_2)
    value_even = Mul (value_half, at_2)
    value_is_odd = Sub (value_range, value_even)
    value_columns_1 = Add (value_columns, at_1)
    value_evens_count = Div (value_columns_1, at_2)
    value_shift = Mul (value_is_odd, value_evens_count)
    value_order = Add (value_half, value_shift)
    y_order = Where (is_4_bits, value_order, value_range)
    key_zero_1 = Where (is_4_bits, eight_f, half_byte_f)
    key_zero_float = Reshape (key_zero_1, no_dim)
    key_zero_point = Cast <to = 2> (key_zero_float)
    digits, key_operand, value_operand = If <
        then_branch = nibbles () => (
            uint8[?, ?, ?, ?] digits_4, uint8[?, ?, ?, ?] key_operand_4, float[?, ?, ?, ?] value_operand_4
        ) {{
            {_unpacked("key", "columns")}
            {_unpacked("value", "value_columns")}
            digits_4 = Gather <axis = 3> (digits_in_order, key_order)
            key_operand_4 = Identity (key_unpacked)
            value_nibbles_float = Cast <to = 1> (value_unpacked)
            value_operand_4 = Sub (value_nibbles_float, eight_f)
        }},
        else_branch = whole_bytes () => (
            uint8[?, ?, ?, ?] digits_8, uint8[?, ?, ?, ?] key_operand_8, float[?, ?, ?, ?] value_operand_8
        ) {{
            digits_8 = Identity (digits_in_order)
            key_wide = Cast <to = 6> (key_tokens)
            key_shifted = Add (key_wide, shift_8)
            key_operand_8 = Cast <to = 2> (key_shifted)
            value_operand_8 = Cast <to = 1> (value_tokens)
        }}
    > (is_4_bits)
"""
"""The caches' codes as operands of the products, and the order of their columns."""


def _query(reduce: Reductions) -> str:
    """The query's rows as codes, two uint8 digits one above the other (``digits_in_order``), and ``row_factor``."""
    return f"""
    limit = Constant <value = float {{32258}}> ()
    base = Constant <value = float {{254}}> ()
    by_kv_head = Concat <axis = 0> (batch, kv_heads, rows, columns)
    query_float = Cast <to = 1> (query)
    query_rows = Reshape (query_float, by_kv_head)
    x = Mul (query_rows, query_factor)
    magnitude = Abs (x)
    nothing = Mul (x, zero_f)
    {reduce("peak", "ReduceMax", "magnitude", 3)}
    {reduce("poison", "ReduceSum", "nothing", 3)}
    finite = Equal (poison, poison)
    is_tiny = Less (peak, tiny)
    is_not_tiny = Not (is_tiny)
    live = And (finite, is_not_tiny)
    safe_peak = Where (live, peak, one_f)
    inverse = Div (limit, safe_peak)
    scaled = Mul (x, inverse)
    rounded = Round (scaled)
    codes = Where (live, rounded, zero_f)
    step_raw = Div (safe_peak, limit)
    step = Where (live, step_raw, poison)
    row_factor = Mul (step, softmax_scale)
    high_raw = Div (codes, base)
    high = Round (high_raw)
    high_based = Mul (high, base)
    low = Sub (codes, high_based)
    high_and_low = Concat <axis = 2> (high, low)
    digits_float = Add (high_and_low, half_byte_f)
    digits_in_order = Cast <to = 2> (digits_float)
    """


_LOGITS = """
    query_zero_point = Constant <value = uint8 {128}> ()
    base_int = Constant <value = int32 {254}> ()
    key_columns = Transpose <perm = [0, 1, 3, 2]> (key_operand)
    products = MatMulInteger (digits, key_columns, query_zero_point, key_zero_point)
    rows_twice = Add (rows, rows)
    high_ends = Concat <axis = 0> (rows, tokens)
    high_axes = Constant <value = int64[2] {2, 3}> ()
    high_products = Slice (products, at_0_and_0, high_ends, high_axes)
    low_products = Slice (products, rows, rows_twice, at_2)
    high_weighted = Mul (high_products, base_int)
    exact = Add (high_weighted, low_products)
    product = Cast <to = 1> (exact)
    product_scaled = Mul (product, row_factor)
    logits_by_kv_head = Mul (product_scaled, key_factor)
    logits_shape = Concat <axis = 0> (batch, heads, queries, tokens)
    logits = Reshape (logits_by_kv_head, logits_shape)
    capped = If <
        then_branch = with_cap () => (float[?, ?, ?, ?] logits_capped) {
            soft_cap = Slice (factors, at_1, at_2)
            in_caps = Div (logits, soft_cap)
            flattened = Tanh (in_caps)
            in_logits = Mul (flattened, soft_cap)
            is_number = Equal (logits, logits)
            logits_capped = Where (is_number, in_logits, logits)
        },
        else_branch = without_cap () => (float[?, ?, ?, ?] logits_plain) {
            logits_plain = Identity (logits)
        }
    > (has_cap)

    mask_cut = Slice (mask, at_0, tokens, at_3)
    added = Where (is_hidden, minus_infinity, mask_cut)
    is_nothing = Equal (added, minus_infinity)
    masked_raw = Add (capped, added)
    masked = Where (is_nothing, minus_infinity, masked_raw)
"""


def _softmax(reduce: Reductions) -> str:
    """``probability`` (not yet divided by ``total``), ``sees_nothing`` and ``is_unsound`` by row, the sink being a last column."""
    return f"""
    sink_column_shape = Concat <axis = 0> (batch, heads, queries, at_1)
    sinks_by_head = Reshape (sinks, in_second)
    sink_column = Expand (sinks_by_head, sink_column_shape)
    with_sink = Concat <axis = 3> (masked, sink_column)
    is_sound = Less (with_sink, infinity)
    sound = Where (is_sound, with_sink, minus_infinity)
    is_bad = Not (is_sound)
    bad = Cast <to = 1> (is_bad)
    {reduce("any_bad", "ReduceMax", "bad", 3)}
    {reduce("top_raw", "ReduceMax", "sound", 3)}
    sees_nothing = Equal (top_raw, minus_infinity)
    top = Where (sees_nothing, zero_f, top_raw)
    below_top = Sub (sound, top)
    weights = Exp (below_top)
    {reduce("total", "ReduceSum", "weights", 3)}
    probability = Slice (weights, at_0, tokens, at_3)
    """


_Y = """
    probability_shape = Concat <axis = 0> (batch, kv_heads, rows, tokens)
    probability_by_kv_head = Reshape (probability, probability_shape)
    weighted = Mul (probability_by_kv_head, value_factor)
    sums = MatMul (weighted, value_operand)
    sums_in_order = Gather <axis = 3> (sums, y_order)
    row_shape = Concat <axis = 0> (batch, kv_heads, rows, at_1)
    total_by_kv_head = Reshape (total, row_shape)
    y_raw = Div (sums_in_order, total_by_kv_head)
    y_scaled_by_kv_head = Mul (y_raw, y_factor)
    y_shape = Concat <axis = 0> (batch, heads, queries, value_columns)
    y_scaled = Reshape (y_scaled_by_kv_head, y_shape)
    y_or_zero = Where (sees_nothing, zero_f, y_scaled)
    is_unsound = Cast <to = 9> (any_bad)
    y_float = Where (is_unsound, not_a_number, y_or_zero)
    y_typed = Cast <to : int = @output_dtype> (y_float)
"""


@cache
def attention_body(opset: int) -> onnx.FunctionProto:
    """The function ``msd.Attention`` for a model of default-domain opset ``opset``.

    Raises:
        ValueError: ``opset`` is below `spelling.OLDEST_OPSET`.
    """
    reduce = Reductions(opset)
    text = f"""<layout, cache, output_dtype>
        (query, key, value, past_key, past_value, key_scale, value_scale, mask, sinks, lengths, plan, factors)
        => (Y, present_key, present_value, present_key_scale, present_value_scale) {{
    {_CONSTANTS}
    {_SIZES}
    {_positions(reduce)}
    {_quantized(reduce)}
    {_STORED}
    {_query(reduce)}
    {_OPERANDS}
    {_LOGITS}
    {_softmax(reduce)}
    {_Y}
    Y = Reshape (y_typed, y_shape)
}}
"""
    return parse_body(opset, "Attention", text)
