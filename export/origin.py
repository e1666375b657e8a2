"""Whether a calibration file was measured on the checkpoint that it is used with.

A calibration records the hash of the checkpoint's weight files (`checkpoint_sha256`); an adapter is
not part of it. Partitions in the published forms record none, and are taken as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forcing_kv.runtime_trt.errors import InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """A calibration file and the checkpoint that it says it was measured on."""

    path: Path
    sha256: str | None
    """Hash of that checkpoint, hexadecimal; None where the file holds none."""
    command: str
    """What makes such a file."""

    def mismatch(self, checkpoint: Path, sha256: Callable[[], str]) -> str | None:
        """What is wrong with the file for a checkpoint; None if it belongs to it, or may.

        Args:
            checkpoint: file or folder of the weights.
            sha256: gives the hash of the checkpoint; called where there is one to compare with.
        """
        if self.sha256 is None or self.sha256 == (found := sha256()):
            return None
        return (
            f"{self.path}: was calibrated on another checkpoint (SHA-256 {self.sha256}) than "
            f"{checkpoint} ({found}); calibrate this one with `{self.command}`"
        )


def heads_origin(path: Path, sha256: str | None) -> Origin:
    """Origin of a head partition."""
    return Origin(path, sha256, "fkv calibrate heads")


def fp8_origin(path: Path, sha256: str | None) -> Origin:
    """Origin of FP8 scales."""
    return Origin(path, sha256, "fkv calibrate fp8")


def warn_of_other(origin: Origin, checkpoint: Path, sha256: Callable[[], str]) -> None:
    """Say on stderr that a file belongs to another checkpoint, and go on."""
    if message := origin.mismatch(checkpoint, sha256):
        _log.warning("warning: %s", message)


def refuse_other(origin: Origin, checkpoint: Path, sha256: Callable[[], str]) -> None:
    """Refuse a file that belongs to another checkpoint.

    Raises:
        InputError: it does.
    """
    if message := origin.mismatch(checkpoint, sha256):
        raise InputError(f"{message}, or take the file as it is with --allow-other-checkpoint")
