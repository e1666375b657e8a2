"""FkSteadyAttention in standard ONNX operators.

Scores are scaled after the product, as in FkHeadIndexedAttention, which says why.

Legend: G heads of a block, H heads, N new tokens, D head dim, R pool rows, M rows that a head sees.
"""

from __future__ import annotations

_COMMON = """
    axis0 = Constant <value_ints: ints = [0]> ()
    axis1 = Constant <value_ints: ints = [1]> ()
    first0 = Constant <value_ints: ints = [0]> ()
    first1 = Constant <value_ints: ints = [1]> ()
    first2 = Constant <value_ints: ints = [2]> ()
    first3 = Constant <value_ints: ints = [3]> ()
    one32 = Constant <value_float: float = 1.0> ()
    q_shape = Shape (q)
    heads = Slice (q_shape, first0, first1)
    dim = Slice (q_shape, first2, first3)
    dim32 = Cast <to = 1> (dim)
    root = Sqrt (dim32)
    scale = Div (one32, root)

    num_first_0 = Constant <value_int: int = @num_first> ()
    cut = Unsqueeze (num_first_0, axis0)
    num_second = Sub (heads, cut)
    first_capacity_0 = Constant <value_int: int = @first_capacity> ()
    first_capacity = Unsqueeze (first_capacity_0, axis0)
    first_rows_0 = Constant <value_int: int = @first_rows> ()
    first_rows = Unsqueeze (first_rows_0, axis0)
    second_capacity_0 = Constant <value_int: int = @second_capacity> ()
    second_capacity = Unsqueeze (second_capacity_0, axis0)
    second_rows_0 = Constant <value_int: int = @second_rows> ()
    second_rows = Unsqueeze (second_rows_0, axis0)
    first_end = Mul (cut, first_capacity)
    second_size = Mul (num_second, second_capacity)
    second_end = Add (first_end, second_size)
    first_shape = Concat <axis = 0> (cut, first_capacity, dim)
    second_shape = Concat <axis = 0> (num_second, second_capacity, dim)
"""

_BLOCK = """
    {block}_q = Slice (q, {begin}, {end}, axis0)
    {block}_q32 = Cast <to = 1> ({block}_q)
    {block}_k = Slice (k_new, {begin}, {end}, axis0)
    {block}_v = Slice (v_new, {begin}, {end}, axis0)
    {block}_pool_k = Slice (hist_k, {from_row}, {to_row}, axis0)
    {block}_pool_v = Slice (hist_v, {from_row}, {to_row}, axis0)
    {block}_held_k = Reshape <allowzero = 1> ({block}_pool_k, {block}_shape)
    {block}_held_v = Reshape <allowzero = 1> ({block}_pool_v, {block}_shape)
    {block}_past_k = Slice ({block}_held_k, first0, {block}_rows, axis1)
    {block}_past_v = Slice ({block}_held_v, first0, {block}_rows, axis1)
    {block}_k_GMD = Concat <axis = 1> ({block}_past_k, {block}_k)
    {block}_v_GMD = Concat <axis = 1> ({block}_past_v, {block}_v)
    {block}_k32 = Cast <to = 1> ({block}_k_GMD)
    {block}_v32 = Cast <to = 1> ({block}_v_GMD)
    {block}_k_GDM = Transpose <perm = [0, 2, 1]> ({block}_k32)
    {block}_products = MatMul ({block}_q32, {block}_k_GDM)
    {block}_scores = Mul ({block}_products, scale)
    {block}_weights = Softmax <axis = -1> ({block}_scores)
    {block}_mixed = MatMul ({block}_weights, {block}_v32)
"""

_JOINED = """
    mixed_HND = Concat <axis = 0> (first_mixed, second_mixed)
    mixed_NHD = Transpose <perm = [1, 0, 2]> (mixed_HND)
    out = CastLike (mixed_NHD, q)
"""

BODY = "".join(
    (
        _COMMON,
        _BLOCK.format(
            block="first", begin="first0", end="cut", from_row="first0", to_row="first_end"
        ),
        _BLOCK.format(
            block="second", begin="cut", end="heads", from_row="first_end", to_row="second_end"
        ),
        _JOINED,
    )
)
