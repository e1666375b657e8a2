"""FkQkNormRope in standard ONNX operators.

Legend: N tokens, H heads, D head dim.
"""

from __future__ import annotations

_SHARED = """
    one = Constant <value_ints: ints = [1]> ()
    last = Constant <value_ints: ints = [-1]> ()
    heads_scalar = Constant <value_int: int = @num_heads> ()
    heads = Reshape (heads_scalar, one)
    zero = Constant <value_ints: ints = [0]> ()
    pair = Constant <value_ints: ints = [2]> ()
    half = Shape <start = 1, end = 2> (cos)
    split_shape = Concat <axis = 0> (zero, heads, half, pair)
    merge_shape = Constant <value_ints: ints = [0, 0, -1]> ()
    eps_scalar = Constant <value_float: float = @eps> ()
    cos_pairs = Unsqueeze (cos, last)
    sin_pairs = Unsqueeze (sin, last)
"""


def _branch(x: str) -> str:
    """Nodes for q or k."""
    return f"""
    {x}32 = Cast <to = 1> ({x})
    {x}_squares = Mul ({x}32, {x}32)
    {x}_mean = ReduceMean <keepdims = 1> ({x}_squares, last)
    {x}_shifted = Add ({x}_mean, eps_scalar)
    {x}_rms = Sqrt ({x}_shifted)
    {x}_inverse = Reciprocal ({x}_rms)
    {x}_normed32 = Mul ({x}32, {x}_inverse)
    {x}_normed = CastLike ({x}_normed32, {x})
    {x}_scale = CastLike ({x}_weight, {x})
    {x}_scaled = Mul ({x}_normed, {x}_scale)
    {x}_scaled32 = Cast <to = 1> ({x}_scaled)
    {x}_split = Reshape ({x}_scaled32, split_shape)
    {x}_pairs = Transpose <perm = [1, 0, 2, 3]> ({x}_split)
    {x}_even, {x}_odd = Split <axis = -1, num_outputs = 2> ({x}_pairs)
    {x}_even_cos = Mul ({x}_even, cos_pairs)
    {x}_odd_sin = Mul ({x}_odd, sin_pairs)
    {x}_even_sin = Mul ({x}_even, sin_pairs)
    {x}_odd_cos = Mul ({x}_odd, cos_pairs)
    {x}_first = Sub ({x}_even_cos, {x}_odd_sin)
    {x}_second = Add ({x}_even_sin, {x}_odd_cos)
    {x}_rotated = Concat <axis = -1> ({x}_first, {x}_second)
    {x}_merged = Reshape ({x}_rotated, merge_shape)
    {x}_out = CastLike ({x}_merged, {x})
"""


BODY = _SHARED + _branch("q") + _branch("k")
