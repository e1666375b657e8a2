"""The models that the project knows: architecture, schedule, cache policy and resolution.

Nothing heavy is imported: `fkv plan` and `--help` read presets too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

from forcing_kv.export.checkpoint.names import Weights
from forcing_kv.export.request.model_config import model_shape_from_official
from forcing_kv.runtime_trt.bundle.schema import load_as, read_json
from forcing_kv.runtime_trt.errors import InputError, unknown_name
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.resolution import RESOLUTIONS
from forcing_kv.runtime_trt.rollout.schedule import Schedule

WAN_1_3B = ModelShape(num_layers=30, dim=1536, ffn_dim=8960, num_heads=12)
"""Wan2.1-T2V-1.3B."""
WAN_14B = ModelShape(num_layers=40, dim=5120, ffn_dim=13824, num_heads=40)
"""Wan2.1-T2V-14B."""

DENSE_WINDOW_FRAMES = 21
"""Frames that Self Forcing attends to uncompressed: seven chunks, the running one included."""
PIXEL_FRAMES_PER_LATENT = 4
"""Pixel frames that Wan's VAE makes of a latent frame, as every published FPS counts them."""
PUBLISHED_THRESHOLD = 0.8
"""Score from which a head counts as static in the published partitions."""
MAX_FPS = 1000
"""Most frames per second of a video, as `fkv run --fps` has it."""

FPS = 16
"""Pixel frames per second of the videos that Wan was trained on."""

UMT5 = "umt5-xxl"
WAN_VAE = "wan-vae"


@dataclass(frozen=True)
class Preset:
    """One model as its authors run it, with the cache policy published for it."""

    name: str
    title: str
    """For people."""
    model: ModelShape
    schedule: Schedule = field(default_factory=Schedule)
    policy: CachePolicy = field(default_factory=CachePolicy)
    dense_window: int = DENSE_WINDOW_FRAMES
    """Frames that the uncompressed model attends to, sink and own chunk included."""
    dense_sink: int = 0
    """First frames of that window that stay."""
    chunk_frames: int = 3
    """Latent frames per chunk."""
    latent_size: tuple[int, int] = RESOLUTIONS["480p"]
    """Latent rows and columns."""
    weights: Weights = "auto"
    """Which state dict of the checkpoint its authors generate with: ema, plain or auto."""
    lora: tuple[str, ...] = ()
    """Files of the adapter that goes with the checkpoint: ends of their paths."""
    lora_alpha: float | None = None
    """Alpha of that adapter, and of no other; None for its rank."""
    threshold: float = PUBLISHED_THRESHOLD
    """Score from which a head counts as static in the published partition."""
    text_encoder: str = UMT5
    decoder: str = WAN_VAE
    fps: int = FPS
    """Pixel frames per second that the model was trained on."""
    download: str = ""
    """Command that fetches the checkpoint."""

    @property
    def chunk(self) -> ChunkShape:
        return ChunkShape(self.chunk_frames, *self.latent_size, self.model.patch_size)

    def check(self) -> None:
        """Refuse entries that no export could use.

        Raises:
            InputError: the first of them.
        """
        CachePolicy.dense(self.dense_window, self.chunk.num_frames, self.dense_sink)
        if not 1 <= self.fps <= MAX_FPS:
            raise InputError(f"fps is {self.fps}; it must be 1 to {MAX_FPS}")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold is {self.threshold}; it must be 0 to 1")


_HUB = "hf download"
_PRESETS = (
    Preset(
        "self-forcing-1.3b",
        "Self Forcing (Wan2.1-T2V-1.3B, DMD)",
        WAN_1_3B,
        weights="ema",
        download=f"{_HUB} gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir .",
    ),
    # configs/longlive_inference.yaml of LongLive 1: sink 3, window 12, use_ema false, alpha 256.
    Preset(
        "longlive-1.3b",
        "LongLive (Wan2.1-T2V-1.3B, base and LoRA)",
        WAN_1_3B,
        policy=CachePolicy(last_warmup_chunk=2),
        dense_window=12,
        dense_sink=3,
        weights="plain",
        lora=("models/lora.pt",),
        lora_alpha=256,
        download=f"{_HUB} Efficient-Large-Model/LongLive-1.3B --local-dir longlive_models",
    ),
    Preset(
        "causal-forcing-1.3b",
        "Causal Forcing, chunk-wise (Wan2.1-T2V-1.3B)",
        WAN_1_3B,
        weights="plain",
        download=f"{_HUB} zhuhz22/Causal-Forcing chunkwise/causal_forcing.pt "
        "--local-dir checkpoints",
    ),
    # configs/self_forcing_server_14b.yaml of krea-ai/realtime-video: five values, not warped; its
    # server attends to 3 cached frames and the chunk's own.
    Preset(
        "krea-14b",
        "Krea Realtime 14B (Wan2.1-T2V-14B)",
        WAN_14B,
        schedule=Schedule((1000, 937, 833, 625, 0), warped=False),
        policy=CachePolicy(
            num_sink_frames=0,
            num_static_frames=1,
            num_temporal_frames=3,
            num_dynamic_frames=0,
            compress_first_layer=True,
        ),
        dense_window=6,
        download=f"{_HUB} krea/krea-realtime-video krea-realtime-video-14b.safetensors "
        "--local-dir checkpoints",
    ),
    # TrailingSamplingTimesteps(T=1000, shift=5) of RAVEN rounds to whole timesteps, and its noise
    # level is t / T.
    Preset(
        "raven-1.3b",
        "RAVEN (Wan2.1-T2V-1.3B)",
        WAN_1_3B,
        schedule=Schedule((1000, 938, 833, 625), warped=False, exact_sigma=True),
        lora=("cmgrpo_raven_lora.safetensors", "cmgrpo_raven_full.pt"),
        lora_alpha=256,
        download=f"{_HUB} mvp-lab/RAVEN raven_model.pt --local-dir .",
    ),
    Preset(
        "wan-1.3b",
        "Wan2.1-T2V-1.3B architecture with Self Forcing's schedule",
        WAN_1_3B,
        download=f"{_HUB} Wan-AI/Wan2.1-T2V-1.3B --local-dir Wan2.1-T2V-1.3B",
    ),
    Preset(
        "wan-14b",
        "Wan2.1-T2V-14B architecture with Self Forcing's schedule",
        WAN_14B,
        download=f"{_HUB} Wan-AI/Wan2.1-T2V-14B --local-dir Wan2.1-T2V-14B",
    ),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _PRESETS})
"""Every preset by name."""

PUBLISHED_STATIC_HEADS: Mapping[str, int] = MappingProxyType(
    {"self-forcing-1.3b": 134, "longlive-1.3b": 154, "krea-14b": 800}
)
"""Static heads of the partitions published for these models (Forcing-KV, configs_head/)."""


def load_preset(name: str) -> Preset:
    """A preset by name, or one from a JSON file.

    A file has the fields of `Preset`; `model` is the content of an official `config.json`, and
    `schedule` and `policy` are objects with the fields of those classes.

    Raises:
        InputError: no such preset or file, or an entry that is unknown or wrong.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".json"):
        raise InputError(
            f"{unknown_name('model', name, PRESETS)}, or describe another one in a .json file"
        )
    path = Path(name)
    content = read_json(path, "model description", "its `model` entry is the official config.json")
    if not isinstance(content, Mapping) or "model" not in content:
        raise InputError(f"{name}: entry 'model' (an official Wan config) is missing")
    model = model_shape_from_official(content["model"], f"{name}: model")
    parts = {"name": path.stem, "title": path.stem, **content, "model": asdict(model)}
    preset = load_as(Preset, parts, name)
    try:
        preset.check()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return preset
