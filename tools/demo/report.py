"""The demo's report: one HTML file that carries its pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from forcing_kv.tools.demo.pictures import Clip

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; } table { border-collapse: collapse; }
td, th { border: 1px solid #ccc; padding: .3rem .7rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } figcaption { color: #555; }
"""
_HEADS_CAPTION = (
    "Share of each head's attention that stays on the last four frames. Heads above the threshold "
    "are static and keep the sink and the last frames; the others are dynamic."
)
_SEGMENTS_CAPTION = (
    "What the dynamic heads keep beside the sink and the last frames: after every chunk the "
    "segments that differ most from the next frame replace the earlier ones."
)


def write_report(path: Path, prompt: str, seed: int, clips: Sequence[Clip], folder: Path) -> None:
    """Write the report.

    Args:
        path: file to write.
        prompt: what was asked for.
        seed: key of the noise.
        clips: dense first, compressed second.
        folder: where the pictures lie.
    """
    pictures = (
        ("video.gif", "The same prompt and noise, under dense attention and under Forcing-KV."),
        ("heads.png", _HEADS_CAPTION),
        ("segments.png", _SEGMENTS_CAPTION),
        ("cost.png", "K/V cache in memory and denoiser time a chunk, on this machine's CPU."),
    )
    figures = "".join(
        f'<figure><img src="{_data_uri(folder / name)}" alt="{name}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, caption in pictures
    )
    path.write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>forcing_kv demo</title>"
        f"<style>{_STYLE}</style><h1>forcing_kv demo</h1>"
        f"<p>Prompt: <b>{escape(prompt)}</b>, seed {seed}. The shipped model was profiled, "
        "exported dense and compressed, and run by ONNX Runtime; no PyTorch takes part in "
        "generation.</p>"
        f"{_table(clips)}{figures}</html>\n"
    )


def summary_rows(clips: Sequence[Clip]) -> list[list[str]]:
    """Rows of the comparison: label, K/V bytes, time a chunk, difference from the first clip."""
    reference = clips[0].video
    rows = []
    for clip in clips:
        error = float(np.sqrt(np.mean((clip.video - reference) ** 2)))
        static = clip.config.partition.num_static_heads
        total = clip.config.model.num_layers * clip.config.model.num_heads
        compressed = clip.config.policy.num_dynamic_frames > 0
        rows.append([
            clip.label,
            f"{static} / {total - static}" if compressed else "not used",
            f"{clip.config.nbytes_kv / 1e6:.3f} MB",
            f"{np.median(clip.chunk_ms):.1f} ms",
            f"{error:.4f}",
        ])  # fmt: skip
    return rows


SUMMARY_COLUMNS = (
    "cache", "static / dynamic heads", "K/V cache", "denoiser, median chunk", "RMS pixel difference"
)  # fmt: skip


def _table(clips: Sequence[Clip]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in SUMMARY_COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in summary_rows(clips)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _data_uri(path: Path) -> str:
    kind = {".gif": "image/gif", ".png": "image/png"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
