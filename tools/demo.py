"""`fkv demo`: the main job from end to end on the shipped small model, without a GPU."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forcing_kv.runtime_trt.console import console, print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.digits.text import encode_prompt

if TYPE_CHECKING:
    from forcing_kv.runtime_trt.console import Task
    from forcing_kv.tools.demo_pictures import Clip

FILES = (
    "video.mp4", "video.gif", "heads.json", "heads.png", "segments.png", "cost.png", "report.html",
    "summary.json",
)  # fmt: skip
BUNDLES = ("bundle-dense", "bundle-forcing-kv")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")],
    prompt: Annotated[str, typer.Option(help="What to generate.")] = "a digit 3 moving left .",
    num_chunks: Annotated[int, typer.Option(min=3, help="Chunks of three frames.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Key of the noise generator.")] = 0,
    num_threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: automatic.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary.")] = False,
) -> None:
    """Calibrate, export dense and compressed, generate with both, and report with pictures."""
    embeds = encode_prompt(prompt)
    existing = [name for name in (*FILES, *BUNDLES) if (out / name).exists()]
    if existing and not force:
        raise InputError(f"{out}: {existing} exist; choose another folder or give --force")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".demo.", dir=out) as folder,
        progress("calibrating heads", 4 * num_chunks + 9) as bar,
    ):
        work = Path(folder)
        _calibrate(work, num_chunks, bar)
        _export(work, bar)
        clips = []
        for name, label in zip(BUNDLES, ("dense, 21 frames", "Forcing-KV"), strict=True):
            bar.describe(f"generating with {label}")
            with Session.open(work / name, "onnxruntime", num_threads=num_threads) as session:
                clips.append(_generate(session, label, embeds, num_chunks, seed, bar))
        bar.describe("drawing")
        _draw(work, prompt, seed, clips)
        bar.advance()
        for name in (*FILES, *BUNDLES):
            _move(work / name, out / name)
    _show(clips, out)
    if as_json:
        print_json(json.loads((out / "summary.json").read_text()))


def _calibrate(work: Path, num_chunks: int, bar: Task) -> None:
    from forcing_kv.calibration.head_profile import HeadRule
    from forcing_kv.calibration.heads import HeadCalibration
    from forcing_kv.calibration.model_source import load_shipped
    from forcing_kv.calibration.rollouts import ProfilePlan
    from forcing_kv.tools.digits.shipped import CALIBRATION_PROMPTS

    source = load_shipped("digits", CALIBRATION_PROMPTS[:2])
    calibration = HeadCalibration(
        source, ProfilePlan(num_chunks, rule=HeadRule(source.threshold)), seeds=(0,)
    )
    calibration.write(work, calibration.run(bar.advance))


def _export(work: Path, bar: Task) -> None:
    from forcing_kv.export.bundle import export_bundle
    from forcing_kv.export.presets import DENSE_WINDOW_FRAMES
    from forcing_kv.export.request import ExportRequest, resolve

    requests = (
        ExportRequest(dense_window=DENSE_WINDOW_FRAMES),
        ExportRequest(heads=work / "heads.json"),
    )
    for name, request in zip(BUNDLES, requests, strict=True):
        resolved = resolve(request)

        def report(part: str, name: str = name) -> None:
            bar.describe(f"exporting {name}: {part}")
            bar.advance()

        export_bundle(
            resolved.load(), resolved.config, work / name, resolved.labels, consume=True,
            report=report,
        )  # fmt: skip


def _generate(
    session: Session, label: str, embeds: object, num_chunks: int, seed: int, bar: Task
) -> Clip:
    from forcing_kv.tools.demo_pictures import Clip

    session.set_prompt(embeds)  # type: ignore[arg-type]
    chunks = []
    for chunk in session.stream(num_chunks, seed=seed):
        chunks.append(chunk)
        bar.advance()
    return Clip(label, session.config, chunks)


def _draw(work: Path, prompt: str, seed: int, clips: Sequence[Clip]) -> None:
    import numpy as np

    from forcing_kv.tools.demo_pictures import draw_cost, draw_kept_segments, side_by_side
    from forcing_kv.tools.demo_report import SUMMARY_COLUMNS, summary_rows, write_report
    from forcing_kv.tools.video import open_writer

    frames = side_by_side(clips)
    for name in ("video.mp4", "video.gif"):
        with open_writer(work / name, fps=6) as writer:
            writer.write(np.zeros(0, np.float32), frames)
    draw_kept_segments(clips[1], work / "segments.png")
    draw_cost(clips, work / "cost.png")
    write_report(work / "report.html", prompt, seed, clips, work)
    rows = [dict(zip(SUMMARY_COLUMNS, row, strict=True)) for row in summary_rows(clips)]
    summary = {"prompt": prompt, "seed": seed, "clips": rows}
    (work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _move(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def _show(clips: Sequence[Clip], out: Path) -> None:
    from rich.table import Table

    from forcing_kv.tools.demo_report import SUMMARY_COLUMNS, summary_rows

    table = Table(*SUMMARY_COLUMNS)
    for row in summary_rows(clips):
        table.add_row(*row)
    console().print(table)
    talk(f"open {out / 'report.html'}")
