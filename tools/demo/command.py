"""`fkv demo`: the main job from end to end on the shipped small model, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from forcing_kv.export.request.flags import Int, Json, Seed, Threads, between, flags
from forcing_kv.runtime_trt.bundle.atomic.files import check_names, filled_folder
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed_in
from forcing_kv.runtime_trt.console import console, print_json, progress, talk
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.digits.text import encode_prompt

if TYPE_CHECKING:
    from forcing_kv.runtime_trt.console import Task
    from forcing_kv.tools.demo.pictures import Clip

FILES = (
    "video.mp4", "video.gif", "heads.json", "heads.png", "segments.png", "cost.png", "report.html",
    "summary.json",
)  # fmt: skip
BUNDLES = ("bundle-dense", "bundle-forcing-kv")


@flags()
@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the demo makes, and where."""

    out: Path
    """Folder for everything that the demo makes."""
    prompt: str = "a digit 3 moving left ."
    """What to generate."""
    num_chunks: Annotated[Int, between(3)] = 7
    """Chunks of three frames."""
    seed: Seed = 0
    """Key of the noise generator."""
    num_threads: Threads = 0
    """CPU threads; 0: automatic."""
    force: bool = False
    """Replace an earlier demo."""
    as_json: Json = False
    """Print the summary."""


def demo(*, options: DemoOptions) -> None:
    """Calibrate, export dense and compressed, generate with both, and report with pictures."""
    out, threads = options.out, options.num_threads
    embeds = encode_prompt(options.prompt)
    check_names(out, (*FILES, *BUNDLES), force=options.force)
    with (
        claimed_in(out, FILES[0]),
        filled_folder(out, force=options.force) as work,
        progress("calibrating heads", 4 * options.num_chunks + 9) as bar,
    ):
        _calibrate(work, options.num_chunks, bar)
        _export(work, bar)
        clips = []
        for name in BUNDLES:
            with Session.open(work / name, "onnxruntime", num_threads=threads) as session:
                session.set_prompt(embeds)
                clips.append(_generate(session, options, bar))
        bar.describe("drawing")
        _draw(work, options, clips)
        bar.advance()
    _show(clips, out)
    if options.as_json:
        print_json(json.loads((out / "summary.json").read_text()))


def _calibrate(work: Path, num_chunks: int, bar: Task) -> None:
    from forcing_kv.calibration.heads.calibration import HeadCalibration
    from forcing_kv.calibration.heads.rollouts import ProfilePlan
    from forcing_kv.calibration.heads.rule import HeadRule
    from forcing_kv.calibration.model_source import load_shipped
    from forcing_kv.tools.digits.shipped import CALIBRATION_PROMPTS

    source = load_shipped("digits", CALIBRATION_PROMPTS[:2])
    calibration = HeadCalibration(
        source, ProfilePlan(num_chunks, rule=HeadRule(source.threshold)), seeds=(0,)
    )
    calibration.write(work, calibration.run(bar.advance))


def _export(work: Path, bar: Task) -> None:
    from forcing_kv.export.bundle.write import export_bundle
    from forcing_kv.export.request.options import ExportRequest
    from forcing_kv.export.request.presets import DENSE_WINDOW_FRAMES
    from forcing_kv.export.request.request import resolve

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


def _generate(session: Session, options: DemoOptions, bar: Task) -> Clip:
    from forcing_kv.tools.demo.pictures import Clip

    clip = Clip(session.config, [])
    bar.describe(f"generating with {clip.label}")
    for chunk in session.stream(options.num_chunks, seed=options.seed):
        clip.chunks.append(chunk)
        bar.advance()
    return clip


def _draw(work: Path, options: DemoOptions, clips: Sequence[Clip]) -> None:
    import numpy as np

    from forcing_kv.tools.demo.pictures import draw_cost, draw_kept_segments, side_by_side
    from forcing_kv.tools.demo.report import SUMMARY_COLUMNS, summary_rows, write_report
    from forcing_kv.tools.run.video import open_writer

    frames = side_by_side(clips)
    for name in ("video.mp4", "video.gif"):
        with open_writer(work / name, fps=Fraction(6)) as writer:
            writer.write(np.zeros(0, np.float32), frames)
    draw_kept_segments(clips[1], work / "segments.png")
    draw_cost(clips, work / "cost.png")
    write_report(work / "report.html", options.prompt, options.seed, clips, work)
    rows = [dict(zip(SUMMARY_COLUMNS, row, strict=True)) for row in summary_rows(clips)]
    summary = {"prompt": options.prompt, "seed": options.seed, "clips": rows}
    (work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _show(clips: Sequence[Clip], out: Path) -> None:
    from rich.table import Table

    from forcing_kv.tools.demo.report import SUMMARY_COLUMNS, summary_rows

    table = Table(*SUMMARY_COLUMNS)
    for row in summary_rows(clips):
        table.add_row(*row)
    console().print(table)
    talk(f"open {out / 'report.html'}")
