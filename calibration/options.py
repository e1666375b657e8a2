"""What the calibrations are asked for: the flags that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forcing_kv.export.request.flags import Int, Integers, Json, PositiveInt, flags, panel
from forcing_kv.export.request.options import ModelOptions
from forcing_kv.runtime_trt.bundle.files import check_folder
from forcing_kv.runtime_trt.errors import InputError, require

ROLLOUTS = panel("Rollouts")


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
    """Folder that receives the files."""
    force: bool = False
    """Overwrite earlier files."""
    dry_run: bool = False
    """Check everything, say what would run, and stop."""
    as_json: Json = False
    """Print the content of the .json file on stdout."""

    def files(self, names: Sequence[str]) -> list[Path]:
        """Paths of what will be written, a picture among them, checked before the work.

        Raises:
            InputError: one exists, or the folder cannot be written to.
            MissingDependencyError: matplotlib is not installed.
        """
        files = [self.out / name for name in names]
        existing = [str(file) for file in files if file.exists()]
        if existing and not self.force:
            raise InputError(f"{existing} exist; choose another --out, or overwrite with --force")
        check_folder(self.out)
        require("matplotlib")
        return files
