"""The public class: a prompt in, chunks of latents out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from forcing_kv.runtime_trt.backends.base import Backend, ChunkRequest, Float32, PendingChunk
from forcing_kv.runtime_trt.backends.stream import (
    Begun,
    Chunk,
    Stream,
    StreamSource,
    noise_by_chunk,
    peak,
    require_finite,
)
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError, StateGuard, Turn, shown
from forcing_kv.runtime_trt.rollout.arguments import (
    check_seed,
    float_array,
    whole_number,
    yes_or_no,
)
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.noise import draw_noise
from forcing_kv.runtime_trt.rollout.timeline import Timeline


class Session:
    """Generates one video, chunk by chunk, on one backend.

    One call at a time: a session may go from thread to thread, but a call that comes while another
    thread is in one raises a `ForcingKvError` that names it, at once and without touching the video
    (a stream counts while it makes a chunk, not between). Wait and call again, hold a lock round
    the session, or give each thread a session of its own (`sibling`, or the bundle opened again).

    Args:
        backend: an opened backend; the session closes it.
        allow_non_finite: hand out chunks that hold NaN or infinities too.

    Use `Session.open` for a bundle on disk.

    Raises:
        InputError: no backend.
    """

    def __init__(self, backend: Backend, *, allow_non_finite: bool = False) -> None:
        if not isinstance(backend, Backend):
            raise InputError(f"backend is {shown(backend)}; open a bundle with Session.open")
        self._backend = backend
        self.allow_non_finite = yes_or_no("allow_non_finite", allow_non_finite)
        """See `allow_non_finite` above; may be changed between two chunks."""
        self.config: RolloutConfig = backend.config
        self._timeline = Timeline(self.config.policy, self.config.chunk.num_frames)
        self._has_prompt = False
        self._prompt_peak = 0.0
        self._closed = False
        self._turn = Turn(
            "session", "wait for that call, or give each thread a session of its own (sibling)"
        )
        self._cache = StateGuard(
            "the last call failed half-way, so the cache is not valid; call reset and set_prompt "
            "to begin again"
        )
        self._num_resets = 0
        self._recent: list[PendingChunk] = []
        self._ahead: Begun | None = None
        """Begun by a stream that was abandoned before it handed the chunk out."""

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        *,
        digest: str | None = None,
        num_threads: int = 0,
        use_graphs: bool = True,
        allow_non_finite: bool = False,
    ) -> Session:
        """Open a bundle. One with native engines is code: open what you made, or pin its digest.

        Args:
            bundle: directory written by `fkv export`.
            backend: a backend's name, or `auto` for the best that is present.
            digest: what `fkv export` or `fkv inspect` printed, such as `sha256:0a1b…`; a bundle
                with another is refused before any of it is loaded. None takes any.
            num_threads: CPU threads for backends that run there, at most eight for each CPU of the
                machine; 0 leaves the choice to them.
            use_graphs: replay one captured CUDA graph a chunk, for backends that can.
            allow_non_finite: hand out chunks that hold NaN or infinities too.

        Raises:
            InputError: an argument of another type or out of range, no such backend, or `digest`
                is none.
            BundleError: the bundle is missing, altered, of another version or of another digest.
            BackendUnavailableError: the backend cannot run here.
        """
        from forcing_kv.runtime_trt.open import open_backend

        opened = open_backend(
            bundle, backend, digest=digest, num_threads=num_threads, use_graphs=use_graphs
        )
        return cls(opened, allow_non_finite=allow_non_finite)

    @property
    def backend_name(self) -> str:
        return self._backend.name

    @property
    def backend(self) -> Backend:
        """The backend itself (buffers and graphs), for checks and benchmarks."""
        return self._backend

    @property
    def num_frames(self) -> int:
        """Latent frames generated so far."""
        return self._timeline.num_frames

    def set_prompt(self, prompt_embeds: ArrayLike) -> None:
        """Set the prompt before the first chunk, or after `reset`.

        Args:
            prompt_embeds: [text_len, text_dim] float32, padding rows zero, of
                `fkv encode-prompt`; other floats are rounded to float32.

        Raises:
            InputError: wrong shape, dtype or non-finite values, or chunks already generated.
            ForcingKvError: closed, a call failed half-way, or another thread is in a call.
        """
        with self._turn.of("set_prompt"):
            self._require_open()
            if self._timeline.next_chunk:
                raise InputError(
                    "set_prompt after the first chunk would leave the cache with the old prompt; "
                    "call switch_prompt to continue this video, or reset to begin another"
                )
            self._require_usable()
            self._load_prompt(prompt_embeds)

    def switch_prompt(self, prompt_embeds: ArrayLike) -> None:
        """Change the prompt at this chunk boundary and re-encode the last frames with it.

        Args:
            prompt_embeds: [text_len, text_dim] float32.

        Raises:
            InputError: wrong input, or the policy re-encodes more frames than a chunk has.
            ForcingKvError: see `set_prompt`.
        """
        with self._turn.of("switch_prompt"):
            self._switch_prompt(prompt_embeds)

    def _switch_prompt(self, prompt_embeds: ArrayLike) -> None:
        self._require_usable()
        policy = self.config.policy
        if not self.config.switchable:
            raise InputError(
                f"this policy re-encodes {policy.num_recached_frames} frames at a prompt switch, "
                f"more than a chunk's {self.config.chunk.num_frames}; export with a smaller "
                "sink or local window to switch prompts"
            )
        self._load_prompt(prompt_embeds)
        plan = self._timeline.switch_prompt()
        if plan is None:
            return
        with self._cache.changing():
            latents = np.zeros(self.config.latent_shape, np.float32)
            recent = np.concatenate([chunk.result().latents for chunk in self._recent])
            latents[: plan.num_frames] = recent[-plan.num_frames :]
            self._backend.recache(ChunkRequest(plan, latents, np.zeros(0, np.float32)))

    def generate_chunk(
        self,
        noise: ArrayLike | None = None,
        eps: ArrayLike | None = None,
        *,
        seed: int = 0,
        keep_x0: bool = False,
    ) -> Chunk:
        """Generate the next chunk.

        Args:
            noise: [F, C, h, w] initial noise; drawn from `seed` if None.
            eps: [n - 1, F, C, h, w] re-noise; drawn from `seed` if None.
            seed: key of the noise generator, 0 to 2**64 - 1.
            keep_x0: return x0 of every denoise step too.

        Raises:
            InputError: wrong input, or other noise than that of a chunk which an abandoned
                `stream(run_ahead=True)` has begun.
            NonFiniteError: the chunk holds NaN or infinities; `reset` begins again.
            ForcingKvError: see `set_prompt`.
        """
        shape = self.config.latent_shape
        draws = self.config.schedule.num_steps - 1
        seed, keep_x0 = check_seed(seed), yes_or_no("keep_x0", keep_x0)
        given_noise = None if noise is None else float_array("noise", noise, shape)
        given_eps = None if eps is None else float_array("eps", eps, (draws, *shape))
        with self._turn.of("generate_chunk"):
            return self._finish(self._begin(given_noise, given_eps, seed, keep_x0))

    def _begin(
        self, noise: Float32 | None, eps: Float32 | None, seed: int, keep_x0: bool = False
    ) -> Begun:
        """Hand the next chunk to the backend, or take the one that it was handed before."""
        self._require_usable()
        if not self._has_prompt:
            raise InputError("no prompt is set; call set_prompt(prompt_embeds) first")
        index = self._timeline.next_chunk if self._ahead is None else self._ahead.plan.index
        shape = self.config.latent_shape
        draws = self.config.schedule.num_steps - 1
        if noise is None:
            noise = draw_noise(seed, index, 0, shape)
        if eps is None:
            eps = np.empty((draws, *shape), np.float32)
            for draw in range(draws):
                eps[draw] = draw_noise(seed, index, draw + 1, shape)
        if self._ahead is not None:
            begun = self._ahead
            if not begun.is_of(ChunkRequest(begun.plan, noise, eps, keep_x0)):
                raise InputError(
                    f"chunk {index} was begun by stream(run_ahead=True) with other noise, another "
                    "seed or without keep_x0; ask for it as that stream did, or call reset"
                )
            self._ahead = None
            return begun
        plan = self._timeline.advance()
        request = ChunkRequest(plan, noise, eps, keep_x0)
        with self._cache.changing():
            pending = self._backend.submit(request)
        self._remember(pending)
        return Begun(plan, request, pending)

    def _keep(self, begun: Begun) -> None:
        """Take what an abandoned stream has begun, unless the video has gone on or is going on."""
        with suppress(ForcingKvError), self._turn.of("the end of a stream"):
            if self._recent[-1:] == [begun.pending]:
                self._ahead = begun

    def _finish(self, begun: Begun) -> Chunk:
        self._require_open()
        with self._cache.changing():
            result = begun.pending.result()
            if not self.allow_non_finite:
                require_finite(begun, result.latents, self._prompt_peak, self.config.dtype)
        return Chunk(begun.plan.index, **vars(result))

    def stream(
        self,
        num_chunks: int | None = None,
        *,
        seed: int = 0,
        noise: ArrayLike | None = None,
        eps: ArrayLike | None = None,
        run_ahead: bool = False,
    ) -> Iterator[Chunk]:
        """Generate chunks one after another; endlessly if `num_chunks` is None.

        Args:
            num_chunks: chunks to generate, at least 1.
            seed: key of the noise generator, 0 to 2**64 - 1.
            noise: [num_chunks, F, C, h, w] explicit initial noise.
            eps: [num_chunks, n - 1, F, C, h, w] explicit re-noise.
            run_ahead: begin the next chunk before this one is handed out, so that a device computes
                while the caller works and results are copied out meanwhile. A prompt switch then
                takes effect one chunk later. The chunks are the same. If the stream is abandoned,
                the next call hands out the chunk that it had begun.

        Returns:
            An iterator that yields each chunk as soon as it is ready; its `close` abandons it, as
            forgetting it does. What it raises leaves it as it was: the next call tries again.

        Raises:
            InputError: wrong input.
            ForcingKvError: by the iterator, see `set_prompt`.
        """
        shape = self.config.latent_shape
        draws = self.config.schedule.num_steps - 1
        if num_chunks is not None:
            num_chunks = whole_number("num_chunks", num_chunks, 1, hint=", or None for no end")
        source = StreamSource(
            turn=partial(self._turn.of, "stream"),
            check=partial(self._require_not_reset, self._num_resets),
            begin=partial(self._begin, seed=check_seed(seed)),
            finish=self._finish,
            keep=self._keep,
        )
        return Stream(
            source,
            num_chunks,
            noise_by_chunk("noise", noise, num_chunks, shape),
            noise_by_chunk("eps", eps, num_chunks, (draws, *shape)),
            yes_or_no("run_ahead", run_ahead),
        )

    def sibling(self) -> Session:
        """Another session, of another video, on the same loaded weights.

        Close each; the last one frees the weights.

        Raises:
            InputError: this backend cannot share its weights.
            ForcingKvError: closed, or another thread is in a call of this session.
        """
        with self._turn.of("sibling"):
            self._require_open()
            return Session(self._backend.sibling(), allow_non_finite=self.allow_non_finite)

    def reset(self) -> None:
        """Forget every frame and the prompt; buffers stay allocated.

        Raises:
            ForcingKvError: closed, or another thread is in a call.
        """
        with self._turn.of("reset"):
            self._require_open()
            self._num_resets += 1
            with self._cache.changing():
                self._timeline.reset()
                self._recent.clear()
                self._ahead = None
                self._has_prompt = False
                self._backend.reset()
            self._cache.renew()

    def close(self) -> None:
        """Release the backend; may be called twice.

        Raises:
            ForcingKvError: another thread is in a call; the session stays open.
        """
        if self._closed:
            return
        with self._turn.of("close"):
            self._closed = True
            self._backend.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ForcingKvError("the session is closed; open the bundle again")

    def _require_usable(self) -> None:
        self._require_open()
        self._cache.require_valid()

    def _require_not_reset(self, num_resets: int) -> None:
        self._require_open()
        if self._num_resets != num_resets:
            raise InputError("the session was reset, which ends this stream; begin another")

    def _load_prompt(self, prompt_embeds: ArrayLike) -> None:
        model = self.config.model
        shape = (model.text_len, model.text_dim)
        hint = (
            f" [{shape[0]}, {shape[1]}], an encoded prompt: encode text with `fkv encode-prompt` "
            "and take `read_prompts(file).embeds[0]` (runtime_trt.bundle.prompt_file)"
        )
        embeds = float_array("prompt_embeds", prompt_embeds, shape, hint)
        with self._cache.changing(InputError):  # Raised before anything was changed.
            self._backend.set_prompt(embeds)
        self._has_prompt, self._prompt_peak = True, peak(embeds)

    def _remember(self, pending: PendingChunk) -> None:
        """Keep the clean frames that a prompt switch may re-encode."""
        self._recent.append(pending)
        chunks = -(-self.config.policy.num_recached_frames // self.config.chunk.num_frames)
        del self._recent[: -max(1, chunks)]
