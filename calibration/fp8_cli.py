"""`fkv calibrate fp8`: the scales by which linear layers run in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from forcing_kv.calibration.cli import (
    DryRun,
    Force,
    NumChunks,
    Prompts,
    Seeds,
    TorchDevice,
    WindowFrames,
    parse_integers,
)
from forcing_kv.export.model_options import (
    Checkpoint,
    ChunkFrames,
    ComputeDType,
    LatentSize,
    Lora,
    LoraAlpha,
    ModelConfig,
    ModelName,
    PromptEmbeds,
    WeightSet,
)
from forcing_kv.runtime_trt.console import console, print_json, progress, talk
from forcing_kv.runtime_trt.errors import InputError, require
from forcing_kv.runtime_trt.files import check_folder
from forcing_kv.runtime_trt.resolution import parse_latent_size


def calibrate_fp8(
    out: Annotated[Path, typer.Option(help="Folder that receives fp8.json and fp8.png.")],
    model: ModelName = "digits",
    prompt: Prompts = None,
    checkpoint: Checkpoint = None,
    config: ModelConfig = None,
    weights: WeightSet = None,
    lora: Lora = None,
    lora_alpha: LoraAlpha = None,
    prompt_embeds: PromptEmbeds = None,
    latent_size: LatentSize = None,
    chunk_frames: ChunkFrames = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="Blocks to leave in the compute dtype, such as 0,29.")
    ] = None,
    seeds: Seeds = "0,1",
    num_chunks: NumChunks = 2,
    window_frames: WindowFrames = None,
    dtype: ComputeDType = "float32",
    device: TorchDevice = "cpu",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the content of fp8.json on stdout.")
    ] = False,
) -> None:
    """Measure how large the inputs of a model's linear layers get, for `fkv export --fp8`.

    Generates videos, keeps the largest magnitude of each layer's input, then measures layer by
    layer what rounding inputs and weights to 8 bits (E4M3) changes, and draws it.
    """
    from forcing_kv.calibration.fp8_scales import FP8_FILE, PICTURE_FILE, Fp8Calibration
    from forcing_kv.calibration.model_source import load_source
    from forcing_kv.export.request import ExportRequest

    files = [out / FP8_FILE, out / PICTURE_FILE]
    existing = [str(file) for file in files if file.exists()]
    if existing and not force:
        raise InputError(f"{existing} exist; choose another --out, or overwrite with --force")
    check_folder(out)
    require("matplotlib")
    request = ExportRequest(
        model=model,
        checkpoint=checkpoint,
        config=config,
        weights=cast(Any, weights),
        lora=lora,
        lora_alpha=lora_alpha,
        latent_size=parse_latent_size("--latent-size", latent_size) if latent_size else None,
        chunk_frames=chunk_frames,
        dtype=cast(Any, dtype),
    )
    calibration = Fp8Calibration(
        load_source(request, prompt or [], prompt_embeds),
        num_chunks,
        parse_integers("--seeds", seeds),
        window_frames,
        parse_integers("--skip-layers", skip_layers) if skip_layers else (),
        request.dtype,
        device,
    )
    talk(calibration.description)
    if dry_run:
        return
    with progress("watching linear layers", calibration.num_chunks_in_all) as bar:
        record = calibration.run(bar.advance)
    calibration.write(out, record)
    _show(record)
    talk(f"wrote {files[0]} and {files[1]}")
    if as_json:
        print_json(record)


def _show(record: Mapping[str, Any]) -> None:
    """Print a row for each kind of layer: range of its inputs, error of its outputs."""
    from rich.table import Table

    from forcing_kv.runtime_trt.fp8 import LINEARS

    table = Table("linear layer", "largest input", "mean error", "worst error", "in block")
    for kind in LINEARS:
        found = {
            int(name.split(".")[1]): entry
            for name, entry in record["linears"].items()
            if name.endswith(f".{kind}")
        }
        worst = max(found, key=lambda layer: found[layer]["error"])
        errors = [entry["error"] for entry in found.values()]
        table.add_row(
            kind,
            f"{max(entry['amax'] for entry in found.values()):.3g}",
            f"{sum(errors) / len(errors):.2%}",
            f"{found[worst]['error']:.2%}",
            str(worst),
        )
    console().print(table)
