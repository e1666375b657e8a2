"""Options that name a model, the same on every command that takes one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forcing_kv.export.presets import PRESETS
from forcing_kv.runtime_trt.resolution import RESOLUTIONS

_PANEL = "Model"

ModelName = Annotated[
    str,
    typer.Option(
        help=f"The shipped model (digits), one of {', '.join(PRESETS)}, or a .json file.",
        rich_help_panel=_PANEL,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Weights: .safetensors or .pt file, index of shards, or folder.",
        rich_help_panel=_PANEL,
    ),
]
ModelConfig = Annotated[
    Path | None,
    typer.Option(
        help="Official Wan config.json, for an architecture that --model does not name.",
        rich_help_panel=_PANEL,
    ),
]
WeightSet = Annotated[
    str | None,
    typer.Option(
        help="ema, plain or auto: which of the weights that a trainer saved side by side. "
        "Default: the model's own.",
        rich_help_panel=_PANEL,
    ),
]
Lora = Annotated[Path | None, typer.Option(help="Adapter to merge.", rich_help_panel=_PANEL)]
LoraAlpha = Annotated[
    float | None,
    typer.Option(
        help="Alpha of the adapter. Default: the model's own, or its rank.", rich_help_panel=_PANEL
    ),
]
PromptEmbeds = Annotated[
    Path | None,
    typer.Option(
        help="Encoded prompts: of `fkv encode-prompt`, .npz (an array a prompt) or .npy.",
        rich_help_panel=_PANEL,
    ),
]
LatentSize = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(RESOLUTIONS)}, or latent rows x columns. Default: the model's own.",
        rich_help_panel=_PANEL,
    ),
]
ChunkFrames = Annotated[
    int | None, typer.Option(min=1, help="Latent frames a chunk.", rich_help_panel=_PANEL)
]
ComputeDType = Annotated[
    str, typer.Option(help="float32, float16 or bfloat16.", rich_help_panel=_PANEL)
]
