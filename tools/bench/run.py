"""What `fkv bench step`, `chunk`, `rollout` and `load` measure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from forcing_kv.runtime_trt.bundle.manifest import Manifest, read_manifest
from forcing_kv.runtime_trt.dtypes import DType
from forcing_kv.runtime_trt.errors import BackendUnavailableError, InputError
from forcing_kv.runtime_trt.rollout.arguments import check_threads
from forcing_kv.runtime_trt.rollout.layout import HeadPartition
from forcing_kv.tools.bench.measure.options import MeasureOptions
from forcing_kv.tools.bench.measure.subject import measure
from forcing_kv.tools.bench.options import BenchRequest
from forcing_kv.tools.bench.report.rows import Row
from forcing_kv.tools.bench.subjects import SUBJECTS, Subject, bundle_subject, subject
from forcing_kv.tools.bench.workloads import (
    Workload,
    check_fp8_dtype,
    random_prompt,
    workload,
)
from forcing_kv.tools.run.decode import pixel_frames_per_latent

if TYPE_CHECKING:
    from forcing_kv.export.model.denoiser import CausalWanModel

DEFAULT_SUBJECTS = {
    "cuda": ("eager-dense", "eager-forcing-kv", "inductor"),
    "cpu": ("eager-dense", "eager-forcing-kv", "onnxruntime-dense", "onnxruntime"),
}


def list_subjects() -> Iterator[str]:
    """One line for each subject."""
    for each in SUBJECTS.values():
        yield f"{each.name:26} {each.policy:10} {'/'.join(each.devices):8} {each.summary}"


def run(request: BenchRequest) -> Iterator[Row]:
    """Measure everything that was asked for, yielding rows as they are ready.

    Raises:
        InputError: an unknown subject, model, size or dtype, or one that the device cannot run.
        BackendUnavailableError: no CUDA device.
    """
    _prepare(request)
    options = MeasureOptions(
        device=request.device,
        num_chunks=request.chunks,
        warmup_chunks=request.warmup_chunks,
        gate_chunks=request.gate_chunks,
        folder=request.folder,
        commit=request.commit,
    )
    # All are looked up before the first is measured.
    for chosen, work in list(_pairs(request)):
        yield from measure(chosen, work, options)


def _prepare(request: BenchRequest) -> None:
    require_device(request.device)
    if request.device == "cpu":
        import torch

        torch.set_num_threads(check_threads(request.threads, "--threads"))


def require_device(device: str) -> str | None:
    """Refuse a device that is not here.

    Returns:
        The GPU's name; None for the CPU.

    Raises:
        InputError: neither cpu nor cuda.
        BackendUnavailableError: no CUDA device.
    """
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device is {device!r}; give cpu or cuda")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "PyTorch finds no CUDA device here; give --device cpu --model digits to try the "
            "benchmark on the small model"
        )
    return torch.cuda.get_device_name() if device == "cuda" else None


def _pairs(request: BenchRequest) -> Iterator[tuple[Subject, Workload]]:
    if request.bundle is not None:
        manifest = read_manifest(request.bundle, request.digest)
        opened = bundle_subject(request.bundle, request.backend, manifest.digest)
        yield opened, bundle_workload(request.bundle, manifest)
        return
    dtype: DType = request.dtype or ("bfloat16" if request.device == "cuda" else "float32")
    size = request.size or ("480p" if request.model == "wan-1.3b" else "native")
    for name in request.subject or DEFAULT_SUBJECTS[request.device]:
        chosen = subject(name)
        if request.device not in chosen.devices:
            raise InputError(
                f"subject {name} runs on {' or '.join(chosen.devices)}, not on {request.device}"
            )
        yield chosen, workload(request.model, size, chosen.policy, dtype, fp8=chosen.fp8)


def bundle_workload(bundle: Path, manifest: Manifest) -> Workload:
    """The model of a bundle, for its references: heads are sorted already."""
    config = manifest.config
    if manifest.fp8 is not None:
        check_fp8_dtype(config.dtype)
    counts = [len(heads) for heads in config.partition.static_heads]
    static = tuple(tuple(range(count)) for count in counts)
    config = replace(config, partition=HeadPartition(config.partition.num_heads, static))

    def load(device: str) -> CausalWanModel:
        from forcing_kv.export.bundle.read import read_bundle_weights

        return read_bundle_weights(bundle, manifest).model.float().to(device)

    def prompt() -> Any:
        return random_prompt(config.model, max(1, config.model.text_len // 3)).astype(np.float32)

    chunk = config.chunk
    dense = config.policy.num_dynamic_frames == 0 and config.partition.num_layers * (
        config.partition.num_heads
    ) == sum(counts)
    return Workload(
        manifest.name,
        f"{chunk.latent_height}x{chunk.latent_width}",
        cast(Any, "dense" if dense else "forcing-kv"),
        config,
        load,
        prompt,
        pixel_frames_per_latent(manifest),
        fp8=manifest.fp8 is not None,
    )
