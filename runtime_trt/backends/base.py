"""What a backend does, and what it is given and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forcing_kv.runtime_trt.bundle.graph_info import GraphInfo
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.policy import HeadKind
from forcing_kv.runtime_trt.rollout.ports import POSITIONS, STEP_SCALARS, kv_names, steady_name
from forcing_kv.runtime_trt.rollout.schedule import rope_table, time_sinusoid
from forcing_kv.runtime_trt.rollout.timeline import ChunkPlan

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class StepScalars:
    """Small per-step inputs, host arrays in float32."""

    index: int
    """Denoise step; n for the clean pass."""
    time_sinusoid: Float32
    """[1, freq_dim]."""
    sigma: Float32
    """[1]: noise level of the step's input."""
    next_sigma: Float32
    """[1]: noise level of the next step's input; 0 after the last."""

    @property
    def step_index(self) -> NDArray[np.int32]:
        return np.asarray([self.index], np.int32)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in STEP_SCALARS}


@dataclass(frozen=True)
class ChunkRequest:
    """One chunk to run."""

    plan: ChunkPlan
    noise: Float32
    """[F, C, h, w]: initial noise; for a re-encode the clean latents, zero-padded."""
    eps: Float32
    """[n - 1, F, C, h, w]: noise added between denoise steps; not read by a re-encode."""
    keep_x0: bool = False
    """Whether to return x0 of every denoise step."""


@dataclass
class ChunkResult:
    """What one chunk produced, in host memory."""

    latents: Float32
    """[F, C, h, w]: x0 of the last denoise step."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    """Wall-clock time by part: steps, clean, evict, commit."""
    x0_steps: list[Float32] | None = None
    scores: Float32 | None = None
    """[F, P]: segment similarities, if the chunk selected."""
    kept: NDArray[np.int32] | None = None
    """[B * P]: kept segments (frame * P + segment), ascending, if the chunk selected."""


class PendingChunk(ABC):
    """A chunk that has been handed to a backend."""

    @abstractmethod
    def result(self) -> ChunkResult:
        """Wait for the chunk; may be called again and then returns the same object."""


class Backend(ABC):
    """Runs prompt, step and evict graphs over buffers that it owns.

    `StepwiseBackend` runs a chunk call by call, `ChunkGraphBackend` as one CUDA graph; either can
    run single graphs, for checks.
    """

    name: str
    chosen_because: str = "given"
    """Why this backend runs, and what keeps the better ones from it."""

    def __init__(self, config: RolloutConfig) -> None:
        self.config = config
        model, schedule = config.model, config.schedule
        sigmas = [*schedule.sigmas.tolist(), 0.0]
        self.step_scalars = [
            StepScalars(
                i,
                time_sinusoid(timestep, model.freq_dim),
                np.asarray([sigmas[i]], np.float32),
                np.asarray([sigmas[i + 1]], np.float32),
            )
            for i, timestep in enumerate(schedule.timesteps.tolist())
        ]
        zero = np.zeros(1, np.float32)
        clean_sinusoid = time_sinusoid(0.0, model.freq_dim)
        self.clean_scalars = StepScalars(schedule.num_steps, clean_sinusoid, zero, zero)

    @abstractmethod
    def set_prompt(self, prompt_embeds: Float32) -> None:
        """Compute cross-attention K/V of [text_len, text_dim] embeddings."""

    @abstractmethod
    def run_step(
        self, x: Any, eps: Float32 | None, scalars: StepScalars, positions: ChunkPositions
    ) -> tuple[Any, Any]:
        """Run the step graph; keeps the new rows and returns (x0, x_next) as the backend's own."""

    def to_host(self, x: Any) -> Float32:
        """Copy what `run_step` returned to host memory."""
        return np.array(x)

    @abstractmethod
    def run_evict(self) -> tuple[Float32, NDArray[np.int32]]:
        """Run the evict graph; keeps the dynamic rows and returns (scores, kept)."""

    @abstractmethod
    def commit(self, plan: ChunkPlan) -> None:
        """Copy dynamic, local and sink rows into the pools as the plan says."""

    @abstractmethod
    def close(self) -> None:
        """Release engines and buffers; may be called twice."""

    @abstractmethod
    def submit(self, request: ChunkRequest) -> PendingChunk:
        """Begin a chunk: denoise it, run the clean pass, evict and commit.

        A backend that works beside the host returns before it is done.
        """

    @abstractmethod
    def recache(self, request: ChunkRequest) -> None:
        """Re-encode clean latents at t = 0 with the current prompt, and commit their rows."""

    def read_tensor(self, name: str) -> NDArray[Any]:
        """Input or output of a graph by its manifest name, copied to the host (for checks)."""
        raise ForcingKvError(
            f"{self.name} does not show single tensors; check with a backend that does, such as "
            "onnxruntime"
        )

    def read_pool(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """K and V pool [R, D] of `layer`, copied to the host (for checks)."""
        k, v = (self.read_tensor(name) for name in kv_names("hist", [layer]))
        return k, v

    def outputs_of(self, graph: str) -> Collection[str] | None:
        """Outputs that a graph leaves in memory (for checks); None if those of the bundle's graph.

        Args:
            graph: prompt, step, evict, or `clean` for the clean pass.
        """
        return None

    @property
    def num_text_rows(self) -> int:
        """Rows of a prompt that the engine attends to, padding included."""
        return self.config.model.text_len

    def sibling(self) -> Backend:
        """Another backend for another session on the same loaded weights.

        Raises:
            InputError: this backend cannot share its weights.
        """
        raise InputError(
            f"the {self.name} backend loads its weights for each session; open the bundle again"
        )

    def reset(self) -> None:  # noqa: B027 - most have nothing to do
        """Forget the video, where a graph touches rows that are not valid (any more)."""


@dataclass(frozen=True)
class ChunkPositions:
    """Small per-chunk inputs: rotary angles and valid lengths."""

    plan: ChunkPlan
    rope_cos: Float32
    """[F, temporal pairs]."""
    rope_sin: Float32
    hist_len: NDArray[np.int32]
    """[L, H]: valid history rows of every head, in exported head order."""
    new_len: NDArray[np.int32]
    """[1]: valid rows of the chunk itself."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in POSITIONS}

    @classmethod
    def of(cls, plan: ChunkPlan, config: RolloutConfig) -> ChunkPositions:
        frames = range(plan.first_frame, plan.first_frame + config.chunk.num_frames)
        cos, sin = rope_table(frames, config.model.rope_pairs[0])
        tokens = config.chunk.tokens_per_frame
        history: Mapping[HeadKind, int] = {
            kind: group.history_frames * tokens for kind, group in plan.groups.items()
        }
        hist_len = np.zeros((config.model.num_layers, config.model.num_heads), np.int32)
        for layer, layout in enumerate(config.layouts):
            for group in layout.groups:
                hist_len[layer, group.heads] = history[group.kind]
        return cls(plan, cos, sin, hist_len, np.asarray([plan.num_frames * tokens], np.int32))


def form_of(graph: str, plan: ChunkPlan, graphs: Collection[str]) -> str:
    """The form of a pass that a chunk takes: the steady one if it may and there is one."""
    steady = steady_name(graph)
    return steady if plan.steady and steady in graphs else graph


def outputs_of(graphs: Mapping[str, GraphInfo], graph: str) -> Collection[str]:
    """Outputs of a graph by name; the clean pass is the step graph unless it has its own."""
    info = graphs["step"] if graph not in graphs else graphs[graph]
    return [port.name for port in info.outputs]
