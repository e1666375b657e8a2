"""`fkv verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from forcing_kv.export.request.flags import Json, PositiveInt, Seed, YesNo, flags
from forcing_kv.runtime_trt.console import ExitCode, print_json, talk
from forcing_kv.runtime_trt.errors import InputError


@flags()
@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What is verified, and against what."""

    golden: Path | None = None
    """Case directory: config.json and golden.npz, weights beside it."""
    backend: str | None = None
    """A backend's name. Default: auto for a bundle, onnxruntime for a decoder, eager for a golden
    case."""
    checkpoint: Path | None = None
    """Weights to use instead of the case's own."""
    num_chunks: PositiveInt | None = None
    """Chunks of a bundle's rollout."""
    seed: Seed = 0
    """Key of a bundle's prompt and noise."""
    decoder: str | None = None
    """vae or tae: check this decoder of the bundle, not the denoiser."""
    digest: str | None = None
    """Refuse a bundle with another, which `fkv export` and `fkv inspect` print."""
    cuda_graph: YesNo = True
    """Replay captured chunks."""
    as_json: Json = False
    """Print the report."""


class _Report(Protocol):
    """What every verification ends with."""

    @property
    def passed(self) -> bool: ...

    def to_json(self) -> dict[str, Any]: ...


def verify(bundle: Path | None = None, /, *, options: VerifyOptions = VerifyOptions()) -> ExitCode:
    """Compare a backend with numerical truth; exit 0 within tolerance, 1 not, 2 bad use.

    Args:
        bundle: Bundle: compare with eager PyTorch on its own weights.
    """
    if (bundle is None) == (options.golden is None):
        raise InputError("give either a bundle or --golden CASE_DIR")
    if options.decoder is not None and bundle is None:
        raise InputError("--decoder is for a bundle's decoder; give the bundle")
    if options.digest is not None and bundle is None:
        raise InputError("--digest is a bundle's; give the bundle")
    report: _Report
    if options.golden is not None:
        report, worst = _verify_golden(options.golden, options)
    elif bundle is not None and options.decoder is not None:
        report, worst = _verify_decoder(bundle, options.decoder, options)
    else:
        assert bundle is not None
        report, worst = _verify_bundle(bundle, options)
    talk(f"{'PASS' if report.passed else 'FAIL'} {worst}", style="bold")
    if options.as_json:
        print_json(report.to_json())
    return ExitCode.GOOD if report.passed else ExitCode.CHECK_FAILED


def _verify_bundle(bundle: Path, options: VerifyOptions) -> tuple[_Report, str]:
    from forcing_kv.export.verify.bundle import verify_bundle
    from forcing_kv.runtime_trt.bundle.manifest import read_manifest
    from forcing_kv.runtime_trt.open import open_backend

    manifest, backend = read_manifest(bundle, options.digest), options.backend or "auto"
    graphs = options.cuda_graph
    opened = open_backend(bundle, backend, digest=manifest.digest, use_graphs=graphs)
    try:
        talk(f"{opened.name} ({opened.chosen_because}) against eager PyTorch")
        report = verify_bundle(
            bundle, opened, manifest, num_chunks=options.num_chunks, seed=options.seed
        )
    finally:
        opened.close()
    for check in report.rollout:
        talk(check.line(), style=None if check.passed else "red")
    for note in report.notes:
        talk(note)
    return report, report.verdict


def _verify_decoder(bundle: Path, kind: str, options: VerifyOptions) -> tuple[_Report, str]:
    from forcing_kv.export.verify.decoder import verify_decoder
    from forcing_kv.runtime_trt.bundle.manifest import read_manifest
    from forcing_kv.runtime_trt.decoder import VideoDecoder

    manifest, backend = read_manifest(bundle, options.digest), options.backend or "onnxruntime"
    graphs = options.cuda_graph
    with VideoDecoder.open(
        bundle, manifest, kind, backend, use_graphs=graphs, allow_non_finite=True
    ) as decoder:
        talk(f"{kind} on {decoder.backend_name} against eager PyTorch")
        report = verify_decoder(bundle, manifest, kind, decoder, seed=options.seed)
    return report, f"worst tensor: {report.tensors[0].line()}"


def _verify_golden(golden: Path, options: VerifyOptions) -> tuple[_Report, str]:
    from forcing_kv.export.verify.golden import (
        GoldenReport,
        golden_session,
        schedule_error,
        verify_golden,
    )
    from forcing_kv.export.verify.golden_case import GoldenCase

    case = GoldenCase.load(golden)
    with golden_session(case, options.backend or "eager", options.checkpoint) as session:
        report = GoldenReport(
            golden.name, session.backend_name, schedule_error(case, session.config.schedule)
        )
        for check in verify_golden(case, session):
            report.chunks.append(check)
            talk(check.line(), style=None if check.passed else "red")
    worst = max((check.worst for check in report.chunks), default=0.0)
    return report, f"{report.case} on {report.backend}: worst error {worst:.2e}"
