"""Whether a calibration file was measured on the checkpoint that it is used with.

A calibration records the hash of the checkpoint's weight files (`checkpoint_sha256`); an adapter is
not part of it. Partitions in the published forms record none, and are taken as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forcing_kv.runtime_trt.errors import InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """A calibration file and the checkpoint that it says it was measured on."""

    path: Path
    kind: Literal["heads", "fp8"]
    """What `fkv calibrate` made."""
    sha256: str | None
    """Hash of that checkpoint, hexadecimal; None where the file holds none."""

    def _mismatch(self, checkpoint: Path, sha256: Callable[[], str]) -> str | None:
        if self.sha256 is None or self.sha256 == (found := sha256()):
            return None
        return (
            f"{self.path}: was calibrated on another checkpoint (SHA-256 {self.sha256}) than "
            f"{checkpoint} ({found}); calibrate this one with `fkv calibrate {self.kind}`"
        )

    def warn_of_other(self, checkpoint: Path, sha256: Callable[[], str]) -> None:
        """Say on stderr if the file belongs to another checkpoint, and go on.

        Args:
            sha256: gives its hash; called where there is one to compare with.
        """
        if message := self._mismatch(checkpoint, sha256):
            _log.warning("warning: %s", message)

    def refuse_other(self, checkpoint: Path, sha256: Callable[[], str]) -> None:
        """The same, but refuse the file.

        Raises:
            InputError: it belongs to another checkpoint.
        """
        if message := self._mismatch(checkpoint, sha256):
            raise InputError(f"{message}, or take the file as it is with --allow-other-checkpoint")
