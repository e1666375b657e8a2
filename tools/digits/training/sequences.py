"""Training sequences: a few clean chunks, four noisy chunks, and who may attend to whom.

A sequence holds the clip at some chunk indices. Its clean part is all of them but the last, its
noisy part shows four of them again. A noisy chunk sees earlier clean chunks, as its sample's cache
pattern allows, and itself. *Short* sequences have three clean chunks and half of them have a gap,
which teaches far positions cheaply; in many, two noisy chunks are chunk 0, which is the hardest for
it has no context. *Long* ones are seven chunks in a row, a whole dense window of 21 frames.

Legend: B batch, J clean chunks, Q query chunks (clean + noisy), K clean frames, P segments per
frame, F frames per chunk, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forcing_kv.tools.digits import codec, data, text

FRAMES = 3
"""Frames per chunk."""
NUM_CLEAN_LONG = 6
NUM_NOISY = 4
NUM_SEGMENTS = 4
"""Segments per frame of the shipped cache policy; tokens are dropped by whole segments."""
NUM_LEVELS = 4
"""Noise levels of the few-step schedule."""
HELDOUT_CAPTIONS = ((0, "left"), (3, "right"), (5, "up"), (8, "down"))
"""Pairs never seen in training, each word of which is."""
NEAR_GAP, FAR_GAP = 5, 19
"""Bounds of the second chunk index in most gapped short sequences, and in the far ones."""
DENSE_MIX, COMPRESSED_MIX = (0.40, 0.20, 0.15), (0.20, 0.25, 0.40)
"""Shares of cache patterns in `sample_visible` (dense, one sink and one local frame, the same with
segments; the rest is of random size), at first and in the later part of training."""
LAST_START = 14
"""Bound of the first chunk index of long sequences."""
NOISY_CONTEXT_SHARE, CONTEXT_SIGMA = 0.5, 0.15
"""Share of samples whose clean chunks carry a little noise, and the most of it."""

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One training batch."""

    prompts: Float32
    """[B, text_len, text_dim]."""
    latents: Float32
    """The clip at the sequence's chunk indices, [B, J + 1, F, C, h, w]."""
    styles: Float32
    """[B, STYLE_DIM], what the noise of chunk 0 must say at the first level."""
    chunks: Int
    """Those indices, [B, J + 1]."""
    noisy_source: Int
    """Which of them each noisy chunk shows, [B, 4]."""
    levels: Int
    """Schedule level of each noisy chunk, [B, 4]."""
    clean_sigma: Float32
    """Noise on the clean chunks, [B, J]."""
    visible: Bool
    """Whether a query chunk sees a segment of a clean frame, [B, Q, K, P]."""

    @property
    def query_chunks(self) -> Int:
        """Chunk index of every query chunk, clean then noisy, [B, Q]."""
        noisy = np.take_along_axis(self.chunks, self.noisy_source, axis=1)
        return np.concatenate([self.chunks[:, :-1], noisy], axis=1)

    @property
    def num_clean(self) -> int:
        """Clean chunks, J."""
        return self.chunks.shape[1] - 1


def sample_rng(seed: int, index: int) -> np.random.Generator:
    """The generator of one batch: batches do not depend on where a run was resumed."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))


def training_captions() -> list[tuple[int, str]]:
    """All (digit, direction) pairs but the held-out ones."""
    pairs = [(digit, direction) for digit in range(10) for direction in text.DIRECTIONS]
    return [pair for pair in pairs if pair not in HELDOUT_CAPTIONS]


def _sample_long(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Seven chunk indices in a row and the noisy sources: the last, and three of the others."""
    start = 0 if rng.random() < 0.5 else int(rng.integers(1, LAST_START))
    others = np.sort(rng.permutation(NUM_CLEAN_LONG)[: NUM_NOISY - 1])
    return [start + i for i in range(NUM_CLEAN_LONG + 1)], [*others.tolist(), NUM_CLEAN_LONG]


def _sample_short(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Four chunk indices and the noisy sources: half contiguous, the rest with a gap."""
    if rng.random() < 0.5:
        return [0, 1, 2, 3], [0, int(rng.random() < 0.6), 2, 3]
    far = rng.random() < 0.2
    second = int(rng.integers(NEAR_GAP, FAR_GAP) if far else rng.integers(1, NEAR_GAP))
    return [0, second, second + 1, second + 2], [0, int(rng.random() < 0.25), 2, 3]


def sample_levels(rng: np.random.Generator, size: tuple[int, ...]) -> Int:
    """Schedule levels, all equally likely."""
    return rng.integers(0, NUM_LEVELS, size)


def _dense(frames: Int, query: Int) -> Bool:
    """Every clean frame [K] before each query chunk [Q] -> [Q, K, P]."""
    seen = frames[None] < FRAMES * query[:, None]
    return np.repeat(seen[..., None], NUM_SEGMENTS, axis=-1)


def _window(frames: Int, query: Int, sink: int, local: int) -> Bool:
    """Sink frames and the last local frames before each query chunk, [Q, K, P]."""
    first = FRAMES * query[:, None]
    seen = (frames[None] < sink) | (frames[None] >= first - local)
    seen &= frames[None] < first
    return np.repeat(seen[..., None], NUM_SEGMENTS, axis=-1)


def _segments(frames: Int, query: Int, rng: np.random.Generator) -> Bool:
    """One frame's worth of random segments of the previous selection's candidates, [Q, K, P]."""
    seen = np.zeros((len(query), len(frames), NUM_SEGMENTS), bool)
    for row, chunk in enumerate(query):
        newest = FRAMES * (chunk - 1) + 1
        candidates = np.flatnonzero((frames >= max(newest - 2, 1)) & (frames <= newest))
        slots = [(frame, segment) for frame in candidates for segment in range(NUM_SEGMENTS)]
        if chunk >= 2 and slots:
            kept = rng.permutation(len(slots))[:NUM_SEGMENTS]
            for frame, segment in (slots[index] for index in kept):
                seen[row, frame, segment] = True
    return seen


def sample_visible(
    frames: Int,
    query: Int,
    rng: np.random.Generator,
    mix: tuple[float, float, float] = DENSE_MIX,
) -> Bool:
    """Draw a cache pattern for one sample: what each query chunk sees of the clean frames.

    Dense, one sink and one local frame, the same with random segments (Forcing-KV's dynamic heads),
    or random sink and local sizes, a third of which lose a quarter of the older segments.

    Args:
        frames: absolute index of each clean frame [K].
        query: chunk index of each query chunk [Q].
        rng: generator of the batch.
        mix: shares of the first three patterns.

    Returns:
        [Q, K, P], True where seen.
    """
    kind = rng.random()
    if kind < mix[0]:
        return _dense(frames, query)
    if kind < mix[0] + mix[1]:
        return _window(frames, query, 1, 1)
    if kind < sum(mix):
        return _window(frames, query, 1, 1) | _segments(frames, query, rng)
    sink, local = int(rng.integers(0, 4)), int(rng.integers(1, 7))
    seen = _window(frames, query, sink, local)
    if rng.random() < 1 / 3:
        keep = rng.random((len(frames), NUM_SEGMENTS)) >= 0.25
        seen &= keep[None] | _window(frames, query, min(sink, 1), 1)
    return seen


def make_batch(
    seed: int,
    index: int,
    size: int,
    long: bool = False,
    mix: tuple[float, float, float] = DENSE_MIX,
) -> Batch:
    """A training batch; the same arguments give the same batch.

    Args:
        seed: run seed.
        index: which batch of the run.
        size: samples.
        long: whether the sequences are long ones.
        mix: shares of cache patterns.
    """
    rng = sample_rng(seed, index)
    captions = training_captions()
    picks = rng.integers(0, len(captions), size)
    styles = rng.standard_normal((size, data.STYLE_DIM))
    chunks, sources, clips, visible = [], [], [], []
    for pick, style in zip(picks, styles, strict=True):
        indices, source = _sample_long(rng) if long else _sample_short(rng)
        frames = (np.array(indices)[:, None] * FRAMES + np.arange(FRAMES)).reshape(-1)
        digit, direction = captions[pick]
        clips.append(data.make_clip(digit, direction, style, frames))
        query = np.array(indices[:-1] + [indices[slot] for slot in source])
        visible.append(sample_visible(frames[:-FRAMES], query, rng, mix))
        chunks.append(indices)
        sources.append(source)
    latents = codec.encode(np.stack(clips))
    num_clean = len(chunks[0]) - 1
    noisy = rng.random((size, 1)) < NOISY_CONTEXT_SHARE
    return Batch(
        prompts=np.stack([text.encode_prompt(text.caption_of(*captions[p])) for p in picks]),
        latents=latents.reshape(size, num_clean + 1, FRAMES, *latents.shape[-3:]),
        styles=styles.astype(np.float32),
        chunks=np.array(chunks),
        noisy_source=np.array(sources),
        levels=sample_levels(rng, (size, NUM_NOISY)),
        clean_sigma=(rng.random((size, num_clean)) * CONTEXT_SIGMA * noisy).astype(np.float32),
        visible=np.stack(visible),
    )
