"""Attention of a graph in the form that TensorRT without plugins fuses.

The portable function bodies work in float32 and keep every score, which runs everywhere but not
well. Here each becomes standard `Attention`: in the steady form one for each block of heads, over
exactly the rows that it sees. In the general form one for all heads over a history that is padded
to the widest, with a boolean mask [1, H, 1, K]: no gather, for the heads of a group are a dense
block of the pool. The fused kernel skips runs of masked keys, so padding costs copies, not
products. A mask with a query axis would cost hundreds of megabytes of scratch, and float32 has no
fused kernel at all, so float32 keeps the portable bodies.

Masked rows are finite, never NaN: the runtime fills the pools with zeros when it allocates them and
when a session is reset.

Legend: H heads, G heads of a group, N new tokens, D head dim, R pool rows, M padded history rows,
K = M + N keys.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from forcing_kv.export.bundle.fused_attention import dense_body, replace_attention
from forcing_kv.plugins.op_spec import OpSpec
from forcing_kv.plugins.registry import STEADY_ATTENTION
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import LayerLayout

ATTENTION_OPSET = 23
"""First version of the standard domain with `Attention`; nothing else that we use differs."""


def fuse_attention(model: ir.Model, config: RolloutConfig) -> int:
    """Replace every attention over a history by standard `Attention`; changes the model.

    Args:
        model: a graph as exported, custom nodes with function bodies.
        config: its rollout configuration, not float32.

    Returns:
        Number of nodes replaced.
    """
    assert config.dtype != "float32", "TensorRT has no fused attention in float32"

    def body(layout: LayerLayout, spec: OpSpec) -> str:
        if spec is STEADY_ATTENTION:
            return dense_body(layout, spec, _ATTEND, config.model.head_dim)
        return _nodes(layout, config)

    return replace_attention(model, config, {"": ATTENTION_OPSET}, body)


def inline_bodies(model: ir.Model) -> ir.Model:
    """Inline every function, so that each layer of an engine has a name of its own."""
    result = InlinePass()(model)
    return result.model


_ATTEND = """
    {b}_q4 = Unsqueeze ({b}_q, axis0)
    {b}_k4 = Unsqueeze ({b}_k, axis0)
    {b}_v4 = Unsqueeze ({b}_v, axis0)
    {b}_mixed4 = Attention ({b}_q4, {b}_k4, {b}_v4)
    {b}_mixed = Squeeze ({b}_mixed4, axis0)
"""

_BODY = """
    axis0 = Constant <value_ints: ints = [0]> ()
    axis1 = Constant <value_ints: ints = [1]> ()
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    num_new = Constant <value_int: int = {num_new}> ()
    new_slot = Range (zero, num_new, one)
    new_len64 = Cast <to = 7> (new_len)
    new_valid_N = Less (new_slot, new_len64)
    new_shape = Constant <value_ints: ints = [{heads}, {num_new}]> ()
    new_valid = Expand (new_valid_N, new_shape)
{history}
    mask_H1K = Unsqueeze (valid, axis1)
    mask = Unsqueeze (mask_H1K, axis0)
    q4 = Unsqueeze (q, axis0)
    k4 = Unsqueeze (k, axis0)
    v4 = Unsqueeze (v, axis0)
    mixed4 = Attention (q4, k4, v4, mask)
    mixed_HND = Squeeze (mixed4, axis0)
    out = Transpose <perm = [1, 0, 2]> (mixed_HND)
"""

_WITHOUT_HISTORY = """
    k = Identity (k_new)
    v = Identity (v_new)
    valid = Identity (new_valid)
"""

_WITH_HISTORY = """
    capacity = Constant <value_int: int = {capacity}> ()
    hist_slot = Range (zero, capacity, one)
    hist_len64 = Cast <to = 7> (hist_len)
    hist_len_H1 = Unsqueeze (hist_len64, axis1)
    hist_valid = Less (hist_slot, hist_len_H1)
    valid = Concat <axis = 1> (hist_valid, new_valid)
    pad_value = CastLike (zero, q)
"""


def _nodes(layout: LayerLayout, config: RolloutConfig) -> str:
    """Nodes of the fused form."""
    capacity = layout.max_rows_per_head
    history = _WITHOUT_HISTORY
    if capacity:
        pools = (_padded_rows(layout, part, config.model.head_dim) for part in "kv")
        history = _WITH_HISTORY.format(capacity=capacity) + "".join(pools)
    return _BODY.format(
        heads=config.model.num_heads, num_new=config.chunk.num_tokens, history=history
    )


def _padded_rows(layout: LayerLayout, part: str, dim: int) -> str:
    """Nodes that make {part} [H, K, D]: the pool, padded to the widest head, then the new rows."""
    capacity = layout.max_rows_per_head
    lines, blocks = [], []
    for i, group in enumerate(layout.groups):
        block, rows = f"{part}_{i}", group.rows_per_head
        missing = capacity - rows
        if rows:
            lines.append(f"{block}_begin = Constant <value_ints: ints = [{group.rows.start}]> ()")
            lines.append(f"{block}_end = Constant <value_ints: ints = [{group.rows.stop}]> ()")
            lines.append(f"{block}_flat = Slice (hist_{part}, {block}_begin, {block}_end, axis0)")
            shape = f"[{group.num_heads}, {rows}, {dim}]"
            lines.append(f"{block}_shape = Constant <value_ints: ints = {shape}> ()")
            lines.append(f"{block}_rows = Reshape ({block}_flat, {block}_shape)")
        if missing:
            shape = f"[{group.num_heads}, {missing}, {dim}]"
            lines.append(f"{block}_pad_shape = Constant <value_ints: ints = {shape}> ()")
            lines.append(f"{block}_pad = Expand (pad_value, {block}_pad_shape)")
        sources = [name for name, size in (("rows", rows), ("pad", missing)) if size]
        parts = ", ".join(f"{block}_{name}" for name in sources)
        lines.append(f"{block}_hist = Concat <axis = 1> ({parts})")
        blocks.append(f"{block}_hist")
    lines.append(f"{part}_hist = Concat <axis = 0> ({', '.join(blocks)})")
    lines.append(f"{part} = Concat <axis = 1> ({part}_hist, {part}_new)")
    return "".join(f"    {line}\n" for line in lines)
