"""Whether a calibration file was measured on the model that it is used with.

A calibration records `model_sha256` (`load`): the hash of the checkpoint's weight files, or, where
adapters are merged, one of theirs too and of how strongly they are applied. Partitions in the
published forms record none, and are taken as they are.
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
    """A calibration file and the model that it says it was measured on."""

    path: Path
    kind: Literal["heads", "fp8"]
    """What `fkv calibrate` made."""
    sha256: str | None
    """Its `model_sha256`; None where the file holds none."""

    def _mismatch(self, model: str, sha256: Callable[[], str]) -> str | None:
        if self.sha256 is None or self.sha256 == (found := sha256()):
            return None
        return (
            f"{self.path}: was calibrated on another checkpoint, or with other adapters, strengths "
            f"or alphas (SHA-256 {self.sha256}), than {model} ({found}); calibrate this "
            f"one with `fkv calibrate {self.kind}`"
        )

    def warn_of_other(self, model: str, sha256: Callable[[], str]) -> None:
        """Say on stderr if the file belongs to another model, and go on.

        Args:
            model: its name, for the message.
            sha256: gives its hash; called where there is one to compare with.
        """
        if message := self._mismatch(model, sha256):
            _log.warning("warning: %s", message)

    def refuse_other(self, model: str, sha256: Callable[[], str]) -> None:
        """The same, but refuse the file.

        Raises:
            InputError: it belongs to another model.
        """
        if message := self._mismatch(model, sha256):
            raise InputError(f"{message}, or take the file as it is with --allow-other-checkpoint")
