"""`fkv inspect`: what is inside a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forcing_kv.export.request.flags import Json, YesNo
from forcing_kv.export.request.presets import DENSE_WINDOW_FRAMES
from forcing_kv.runtime_trt.bundle.engines import EngineRecord
from forcing_kv.runtime_trt.bundle.manifest import Bundle, Manifest
from forcing_kv.runtime_trt.console import print_json, screen
from forcing_kv.runtime_trt.dtypes import DTYPES
from forcing_kv.runtime_trt.rollout.layout import pool_nbytes
from forcing_kv.runtime_trt.rollout.policy import CachePolicy


def inspect(
    bundle: Path,
    /,
    *,
    digest: str | None = None,
    check: YesNo = True,
    as_json: Json = False,
) -> None:
    """Show what is inside a bundle: digest, shapes, policy, heads, graphs, engines, hashes, sizes.

    Args:
        bundle: Bundle directory.
        digest: Refuse a bundle with another.
        check: Compare every file with its recorded hash.
        as_json: Print the manifest.
    """
    with Bundle(bundle, digest) as opened:
        manifest = opened.manifest
        if check:
            opened.check_exported()
            opened.check(opened.recorded)
    if as_json:
        print_json({**manifest.to_json(), "nbytes_kv": manifest.config.nbytes_kv})
        return
    out = screen()
    out.print(f"digest: {manifest.digest}", soft_wrap=True)
    for table in (_summary(manifest), _heads(manifest), _graphs(bundle, manifest)):
        out.print(table)
    for engine in manifest.engines:
        out.print(_engine(bundle, engine))
    if not manifest.engines:
        out.print("engines: none built (`fkv build` makes them; ONNX Runtime needs none)")


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", title_style="bold")


def _summary(manifest: Manifest) -> Any:
    config = manifest.config
    model, chunk, policy = config.model, config.chunk, config.policy
    dense = CachePolicy.dense(max(DENSE_WINDOW_FRAMES, chunk.num_frames), chunk.num_frames)
    dense_rows = model.num_layers * model.num_heads * dense.num_static_frames
    dense_nbytes = 2 * dense_rows * chunk.tokens_per_frame * model.head_dim
    dense_nbytes *= DTYPES[config.dtype].nbytes
    table = _table(manifest.name, "what", "value")
    shape = f"{model.num_layers} layers, {model.num_heads} heads x {model.head_dim}"
    table.add_row("model", f"{shape}, ffn {model.ffn_dim}, text {model.text_len}x{model.text_dim}")
    table.add_row(
        "chunk",
        f"{chunk.num_frames} frames of {chunk.latent_height}x{chunk.latent_width} latents, "
        f"{chunk.tokens_per_frame} tokens a frame",
    )
    steps = ", ".join(f"{t:.4g}" for t in config.schedule.timesteps.tolist())
    table.add_row("timesteps", f"{steps}, then a clean pass")
    fp8 = "" if manifest.fp8 is None else f", {len(manifest.fp8.linears)} linear layers in FP8"
    table.add_row("dtype", config.dtype + fp8)
    table.add_row(
        "policy",
        f"sink {policy.num_sink_frames}, static {policy.num_static_frames}, temporal "
        f"{policy.num_temporal_frames}, dynamic {policy.num_dynamic_frames} frames of "
        f"{policy.num_segments} segments, warm-up to chunk {policy.last_warmup_chunk}",
    )
    table.add_row("K/V cache", f"{config.nbytes_kv / 1e6:.3f} MB allocated")
    table.add_row(
        f"dense {DENSE_WINDOW_FRAMES}-frame cache",
        f"{dense_nbytes / 1e6:.3f} MB (history alone, for comparison)",
    )
    table.add_row("weights", f"{manifest.weights_nbytes / 1e6:.1f} MB")
    for key, value in manifest.provenance.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(key, str(text))
    return table


def _heads(manifest: Manifest) -> Any:
    """A row a layer: kinds of heads and bytes of their pools."""
    config = manifest.config
    table = _table(
        "cache by layer", "layer", "heads (S static, D dynamic, U uncompressed)", "rows", "K+V MB"
    )
    for layer, layout in enumerate(config.layouts):
        marks = {}
        order = config.partition.head_order(layer)
        for group in layout.groups:
            for head in order[group.heads]:
                marks[head] = group.kind[0].upper()
        nbytes = pool_nbytes([layout], config.model.head_dim, DTYPES[config.dtype].nbytes)
        heads = "".join(marks[head] for head in sorted(marks))
        table.add_row(str(layer), heads, str(layout.num_rows), f"{nbytes / 1e6:.3f}")
    return table


def _graphs(bundle: Path, manifest: Manifest) -> Any:
    table = _table("graphs", "graph", "inputs", "outputs", "file", "kB", "sha256")
    decoders = {
        f"{kind}: {name}": graph
        for kind, decoder in manifest.decoders.items()
        for name, graph in decoder.graphs.items()
    }
    for name, graph in {**manifest.graphs, **decoders}.items():
        size = (bundle / graph.file).stat().st_size / 1e3
        table.add_row(
            name, str(len(graph.inputs)), str(len(graph.outputs)), graph.file, f"{size:.0f}",
            graph.sha256[:12],
        )  # fmt: skip
    return table


def _engine(bundle: Path, engine: EngineRecord) -> Any:
    """A row a part: the denoiser, and each decoder."""
    built_for = engine.target or engine.environment.get("device", "")
    versions = ", ".join(f"{key} {value}" for key, value in engine.environment.items())
    given = {k: v for k, v in engine.options.items() if v and k not in ("backend", "target")}
    options = ", ".join(f"{key} {value}" for key, value in given.items()) or "default options"
    title = f"{engine.folder}: {engine.backend} for {built_for}, {options}; built with"
    table = _table(f"{title} {versions}", "graphs", "MB", "seconds", "sha256")
    for part in engine.parts:
        files = [bundle / file for file in part.files]
        nbytes = sum(file.stat().st_size for file in files if file.is_file())
        table.add_row(
            " ".join(part.graphs), f"{nbytes / 1e6:.1f}", str(part.build_seconds),
            " ".join(sha256[:12] for sha256 in part.files.values()),
        )  # fmt: skip
    return table
