"""FkHeadIndexedAttention in standard ONNX operators.

History rows are gathered per head, padded to the largest capacity (at least one row) and masked:
scores to minus infinity and keys and values to zero, for a padded row may hold NaN. The scale is
applied to the scores: ONNX Runtime 1.32 builds an invalid graph of a scaled, cast query.

Legend: H heads, N new tokens, D head dim, R pool rows, M padded history rows.
"""

from __future__ import annotations

_BODY = """
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    axis1 = Constant <value_ints: ints = [1]> ()
    axis2 = Constant <value_ints: ints = [2]> ()
    axis02 = Constant <value_ints: ints = [0, 2]> ()
    zero32 = Constant <value_float: float = 0.0> ()
    one32 = Constant <value_float: float = 1.0> ()
    minus_inf = Constant <value: tensor = float {-inf}> ()
    capacity = Constant <value_int: int = @max_history> ()

    padded = Max (capacity, one)
    slot_M = Range (zero, padded, one)
    hist_len64 = Cast <to = 7> (hist_len)
    clamped_H = Min (hist_len64, capacity)
    clamped_H1 = Unsqueeze (clamped_H, axis1)
    hist_valid_HM = Less (slot_M, clamped_H1)
    offset64 = Cast <to = 7> (head_offset)
    offset_H1 = Unsqueeze (offset64, axis1)
    row_HM = Add (offset_H1, slot_M)
    safe_row_HM = Where (hist_valid_HM, row_HM, zero)

    new_shape = Shape (k_new)
    heads = Slice (new_shape, first0, first1)
    num_new_1 = Slice (new_shape, first1, first2)
    num_new = Squeeze (num_new_1)
    slot_N = Range (zero, num_new, one)
    new_len64 = Cast <to = 7> (new_len)
    new_valid_N = Less (slot_N, new_len64)
    new_mask_shape = Concat <axis = 0> (heads, num_new_1)
    new_valid_HN = Expand (new_valid_N, new_mask_shape)
    valid_HK = Concat <axis = 1> (hist_valid_HM, new_valid_HN)
    valid_HK1 = Unsqueeze (valid_HK, axis2)
    valid_H1K = Unsqueeze (valid_HK, axis1)
    bias_H1K = Where (valid_H1K, zero32, minus_inf)

    q32 = Cast <to = 1> (q)
    q_shape = Shape (q)
    dim = Slice (q_shape, first2, first3)
    dim32 = Cast <to = 1> (dim)
    root = Sqrt (dim32)
    scale = Div (one32, root)

    hist_k_HMD = Gather <axis = 0> (hist_k, safe_row_HM)
    k_raw = Concat <axis = 1> (hist_k_HMD, k_new)
    k_raw32 = Cast <to = 1> (k_raw)
    k_HKD = Where (valid_HK1, k_raw32, zero32)
    k_HDK = Transpose <perm = [0, 2, 1]> (k_HKD)
    hist_v_HMD = Gather <axis = 0> (hist_v, safe_row_HM)
    v_raw = Concat <axis = 1> (hist_v_HMD, v_new)
    v_raw32 = Cast <to = 1> (v_raw)
    v_HKD = Where (valid_HK1, v_raw32, zero32)

    products = MatMul (q32, k_HDK)
    scores = Mul (products, scale)
    masked = Add (scores, bias_H1K)
    weights = Softmax <axis = -1> (masked)
    mixed_HND = MatMul (weights, v_HKD)
    mixed_NHD = Transpose <perm = [1, 0, 2]> (mixed_HND)
    out = CastLike (mixed_NHD, q)
"""

_INDICES = """
    first0 = Constant <value_ints: ints = [0]> ()
    first1 = Constant <value_ints: ints = [1]> ()
    first2 = Constant <value_ints: ints = [2]> ()
    first3 = Constant <value_ints: ints = [3]> ()
"""


BODY = _INDICES + _BODY
