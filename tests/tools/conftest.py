"""A bundle of the digits shape with random weights, and the command line in this process."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from forcing_kv.tools import cli


class Result(NamedTuple):
    """What one run of `fkv` did."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed bundle of the digits shape; half of the heads static."""
    from shared_exports import export_once

    from forcing_kv.export.bundle.write import BundleLabels
    from forcing_kv.export.model.denoiser import CausalWanModel
    from forcing_kv.runtime_trt.rollout.config import RolloutConfig
    from forcing_kv.runtime_trt.rollout.layout import HeadPartition
    from forcing_kv.tools.digits.shipped import CHUNK, MODEL, POLICY, SCHEDULE

    torch.manual_seed(0)
    partition = HeadPartition(MODEL.num_heads, ((0, 2), (1, 3), (0, 1, 2, 3, 4), ()))
    config = RolloutConfig(MODEL, CHUNK, POLICY, partition, SCHEDULE)
    folder = tmp_path_factory.mktemp("bundles") / "digits"
    labels = BundleLabels("random digits", text_encoder="digits", decoder="digits")
    model = CausalWanModel(MODEL).requires_grad_(False)
    export_once(model, config, folder, labels)
    return folder


@pytest.fixture
def run_fkv(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `fkv` with arguments in this process."""

    def run(*arguments: object) -> Result:
        code = 0
        capfd.readouterr()
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                cli.main([str(argument) for argument in arguments])
            except SystemExit as stop:
                code = int(stop.code or 0)
        return Result(code, out.getvalue(), capfd.readouterr().err)

    return run
