"""What a row says about the machine, the versions and the commit that it was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "triton", "onnxruntime", "tensorrt", "tensorrt-rtx", "cuda-bindings", "numpy")


def describe_environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and commit."""
    found: dict[str, Any] = {
        "device": device,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "python": platform.python_version(),
        "versions": installed_versions(_PACKAGES),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    import torch

    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_nbytes": properties.total_memory,
            "sm": f"{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
            **_driver(),
        }
    else:
        found |= {
            "cpu": _cpu_name(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    return found


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """Commit of the working tree, with a plus where it differs; None outside of one."""
    folder = Path(__file__).parent
    try:
        run = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0].stdout.strip() + ("+" if run[1].stdout.strip() else "")


_SMI_FIELDS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "max_sm_mhz": "clocks.max.sm",
}
"""Our name of what `nvidia-smi` tells of the first GPU -> its own."""


def _driver() -> dict[str, str | None]:
    """Driver, power limit and highest clock, as `nvidia-smi` prints them."""
    query = f"--query-gpu={','.join(_SMI_FIELDS.values())}"
    words = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(_SMI_FIELDS)
    values = next(iter(done.stdout.splitlines()), "").split(",")
    found = zip(_SMI_FIELDS, values, strict=False)
    return dict.fromkeys(_SMI_FIELDS) | {name: value.strip() or None for name, value in found}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
