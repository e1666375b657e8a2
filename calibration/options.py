"""What the calibrations are asked for: the flags that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from forcing_kv.export.request.flags import Int, Integers, Json, PositiveInt, flags, panel
from forcing_kv.export.request.options import ModelOptions
from forcing_kv.runtime_trt.bundle.atomic.files import check_names, filled_folder
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed_in
from forcing_kv.runtime_trt.console import print_json, progress, talk
from forcing_kv.runtime_trt.errors import require

ROLLOUTS = panel("Rollouts")
T = TypeVar("T")


class Calibration(Protocol[T]):
    """What a command measures, `T`, on a model's rollouts."""

    FILES: ClassVar[tuple[str, str]]
    """The record (.json) and its picture (.png)."""

    @property
    def description(self) -> str:
        """What will run, for people."""

    @property
    def num_ticks(self) -> int:
        """How often `run` calls back."""

    def run(self, on_tick: Callable[[], object]) -> T:
        """Generate and measure."""

    def write(self, folder: Path, measured: T) -> dict[str, Any]:
        """Write `FILES` to a folder; returns the record."""


@flags()
@dataclass(frozen=True, kw_only=True)
class SourceOptions(ModelOptions):
    """The model that is calibrated, and the prompts of its rollouts."""

    prompt: tuple[str, ...] = ()
    """Prompt of a shipped model; repeat it for more. Default: its own set."""
    prompt_embeds: Path | None = None
    """Encoded prompts: of `fkv encode-prompt`, .npz (an array a prompt) or .npy."""


@flags(ROLLOUTS)
@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """The dense videos in which a model is watched."""

    seeds: Integers = (0, 1)
    """Seeds, each with every prompt."""
    num_chunks: PositiveInt = 7
    """Chunks of a rollout."""
    window_frames: Int | None = None
    """Frames that dense attention sees, sink and own chunk included. Default: all."""


@flags()
@dataclass(frozen=True, kw_only=True)
class CalibrationOutput:
    """Where a calibration's files go, and what is said of them."""

    out: Path
    """Folder that receives a .json file and its picture."""
    force: bool = False
    """Overwrite earlier files."""
    dry_run: bool = False
    """Check everything, say what would run, and stop."""
    as_json: Json = False
    """Print the content of the .json file on stdout."""

    def check(self, names: Sequence[str]) -> None:
        """Refuse files that cannot be written, a picture among them, before the work.

        Raises:
            InputError: one exists, or the folder cannot be written to.
            MissingDependencyError: matplotlib is not installed.
        """
        check_names(self.out, names, force=self.force)
        require("matplotlib")

    def carry_out(
        self, calibration: Calibration[T], doing: str, show: Callable[[Mapping[str, Any]], None]
    ) -> None:
        """Say what will run, run it, write it and show it; a dry run stops after the first.

        Args:
            calibration: what to measure.
            doing: for the progress bar.
            show: prints the content of the .json file for people.
        """
        talk(calibration.description)
        if self.dry_run:
            return
        with claimed_in(self.out, calibration.FILES[0]):
            with progress(doing, calibration.num_ticks) as bar:
                measured = calibration.run(bar.advance)
            with filled_folder(self.out, force=self.force) as folder:
                record = calibration.write(folder, measured)
        show(record)
        talk(f"wrote {' and '.join(str(self.out / name) for name in calibration.FILES)}")
        if self.as_json:
            print_json(record)
