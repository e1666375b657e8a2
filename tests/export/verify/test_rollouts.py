"""The eager backend against a denoiser that keeps a list of K and V for every head.

The denoiser here is written from the paper and the official model, in float64: complex rotary
embeddings, a convolution for the patches, one attention per head over concatenated lists.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.verify.eager import eager_session
from forcing_kv.runtime_trt.rollout.layout import ModelShape

MODEL = ModelShape(
    3, dim=36, ffn_dim=24, num_heads=3, in_channels=2, text_len=4, text_dim=5, freq_dim=8
)
GRID = (4, 6)
NUM_CHUNKS = 6
ATOL = 1e-5
"""Float32 rounding of this model is 1e-6; one wrong row moves latents by more than 1e-3."""


class NaiveDenoiser:
    """Explicit K and V of every head of every frame, and nothing shared with the exporter."""

    def __init__(self, model: CausalWanModel, config, frame_lists, encoded):
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
        self.config, self.encoded = config, encoded
        self.lists = frame_lists(config.policy, config.chunk.num_frames)
        self.margins: list[float] = []
        """Distance between the last kept and the first dropped score of every selection."""

    def linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def mlp(self, x, name):
        return self.linear(F.gelu(self.linear(x, f"{name}.0"), approximate="tanh"), f"{name}.2")

    def norm(self, x, name=None):
        weight, bias = (
            (None, None)
            if name is None
            else (self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
        )
        return F.layer_norm(x, x.shape[-1:], weight, bias, MODEL.eps)

    def rms(self, x, name):
        scale = torch.sqrt((x * x).mean(-1, keepdim=True) + MODEL.eps)
        return x / scale * self.weights[f"{name}.weight"]

    def heads(self, x):
        return list(x.split(MODEL.head_dim, dim=-1))

    def rotate(self, x, frames):
        """Multiply head rows [len(frames) * T, D] by unit complex numbers."""
        rows, columns = self.config.chunk.grid
        half = MODEL.head_dim // 2
        sizes = (half - 2 * (half // 3), half // 3, half // 3)
        turned = []
        for frame in frames:
            for row in range(rows):
                for column in range(columns):
                    angles = [
                        place * 10000.0 ** (-i / size)
                        for place, size in zip((frame, row, column), sizes, strict=True)
                        for i in range(size)
                    ]
                    turned.append(
                        torch.polar(
                            torch.ones(half).double(), torch.tensor(angles, dtype=torch.float64)
                        )
                    )
        numbers = torch.view_as_complex(x.reshape(len(x), half, 2).contiguous())
        return torch.view_as_real(numbers * torch.stack(turned)).flatten(1)

    def attend(self, q, k, v):
        return F.softmax(q @ k.T / math.sqrt(MODEL.head_dim), dim=-1) @ v

    def history(self, layer, head):
        """K and V that a head sees, as lists of row blocks."""
        static = head in self.config.partition.static_heads[layer]
        kind = "static" if static else "dynamic"
        if layer == 0 and not self.config.policy.compress_first_layer:
            kind = "uncompressed"
        seen, segments = self.lists.view(kind)
        blocks = [encoded.content[layer][head] for encoded in seen]
        if segments is not None:
            blocks.append(segments[layer][head])
        return [k for k, _ in blocks], [v for _, v in blocks]

    def forward(self, latents, frames, t, sigma, prompt):
        """Flow of clean-latent prediction: returns x0 and (k, v) by layer, head."""
        tokens = self.config.chunk.tokens_per_frame
        weight = self.weights["patch_embedding.weight"]
        patches = F.conv3d(
            latents.movedim(0, 1)[None], weight, self.weights["patch_embedding.bias"],
            stride=weight.shape[-3:],
        )  # fmt: skip
        x = patches[0].flatten(1).T
        half = MODEL.freq_dim // 2
        angles = float(np.float32(t)) * 10000.0 ** (-torch.arange(half).double() / half)
        time = self.linear(torch.cat([angles.cos(), angles.sin()])[None], "time_embedding.0")
        time = self.linear(F.silu(time), "time_embedding.2")
        six = self.linear(F.silu(time), "time_projection.1").view(6, MODEL.dim)
        new = []
        for layer in range(MODEL.num_layers):
            name = f"blocks.{layer}"
            shift, scale, gate, shift2, scale2, gate2 = self.weights[f"{name}.modulation"][0] + six
            h = self.norm(x) * (1 + scale) + shift
            q, k = (
                self.heads(
                    self.rms(self.linear(h, f"{name}.self_attn.{p}"), f"{name}.self_attn.norm_{p}")
                )
                for p in "qk"
            )
            v = self.heads(self.linear(h, f"{name}.self_attn.v"))
            q, k = ([self.rotate(rows, frames) for rows in heads] for heads in (q, k))
            new.append(list(zip(k, v, strict=True)))
            outputs = []
            for head in range(MODEL.num_heads):
                past_k, past_v = self.history(layer, head)
                keys, values = torch.cat([*past_k, k[head]]), torch.cat([*past_v, v[head]])
                outputs.append(self.attend(q[head], keys, values))
            x = x + self.linear(torch.cat(outputs, -1), f"{name}.self_attn.o") * gate
            x = x + self.cross(x, name, prompt)
            x = x + self.mlp(self.norm(x) * (1 + scale2) + shift2, f"{name}.ffn") * gate2
        shift, scale = self.weights["head.modulation"][0] + time
        out = self.linear(self.norm(x) * (1 + scale) + shift, "head.head")
        rows, columns = self.config.chunk.grid
        side, channels = MODEL.patch_size, MODEL.in_channels
        out = out.view(len(frames), rows, columns, side, side, channels)
        flow = torch.einsum("fhwpqc->fchpwq", out).reshape(latents.shape)
        cut = [slice(i * tokens, (i + 1) * tokens) for i in range(len(frames))]
        encoded = [
            self.encoded(frame, [[(k[rows], v[rows]) for k, v in layer] for layer in new])
            for frame, rows in zip(frames, cut, strict=True)
        ]
        return latents - sigma * flow, encoded

    def cross(self, x, block, prompt):
        name = f"{block}.cross_attn"
        context = self.mlp(prompt, "text_embedding")
        q = self.heads(
            self.rms(self.linear(self.norm(x, f"{block}.norm3"), f"{name}.q"), f"{name}.norm_q")
        )
        k = self.heads(self.rms(self.linear(context, f"{name}.k"), f"{name}.norm_k"))
        v = self.heads(self.linear(context, f"{name}.v"))
        out = [self.attend(*head) for head in zip(q, k, v, strict=True)]
        return self.linear(torch.cat(out, -1), f"{name}.o")

    def select(self, candidates):
        """Segments of every layer and head, or of layer 1 for all."""
        policy, partition = self.config.policy, self.config.partition
        size = self.config.chunk.tokens_per_frame // policy.num_segments
        chosen: dict[int, list[int]] = {}
        for layer in self.config.evicted_layers:
            source = layer if policy.selection == "per_layer" else 1
            heads = [h for h in range(MODEL.num_heads) if h not in partition.static_heads[source]]
            scores = []
            for now, after in itertools.pairwise(candidates):
                a, b = (
                    torch.cat([frame.content[source][h][0] for h in heads], -1)
                    for frame in (now, after)
                )
                cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
                scores += cosine.view(-1, size).mean(-1).tolist()
            order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
            count = policy.num_kept_segments
            chosen[layer] = sorted(order[:count])
            if count < len(order):
                self.margins.append(scores[order[count]] - scores[order[count - 1]])

        def part(layer, head, which):
            rows = []
            for index in chosen.get(layer, []):
                frame, segment = divmod(index, policy.num_segments)
                content = candidates[frame].content[layer][head][which]
                rows.append(content[segment * size : (segment + 1) * size])
            return torch.cat(rows) if rows else None

        layers, heads = range(MODEL.num_layers), range(MODEL.num_heads)
        segments = [[(part(layer, h, 0), part(layer, h, 1)) for h in heads] for layer in layers]
        return segments, chosen.get(1)

    def chunk(self, noise, eps, prompt):
        """x0 of the last step, and layer 1's kept segments or None."""
        schedule, first = self.config.schedule, self.lists.next_chunk * len(noise)
        frames = range(first, first + len(noise))
        sigmas = [5 * u / (1 + 4 * u) for u in (step / 1000 for step in schedule.steps)]
        x = noise
        for i, sigma in enumerate(sigmas):
            x0, _ = self.forward(x, frames, 1000 * sigma, sigma, prompt)
            if i + 1 < len(sigmas):
                x = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * eps[i]
        _, own = self.forward(x0, frames, 0.0, 0.0, prompt)
        candidates, segments, kept = self.lists.candidates(own), None, None
        if candidates is not None:
            segments, kept = self.select(candidates)
        self.lists.end_chunk(own, segments)
        return x0, kept

    def switch(self, video, prompt):
        again = self.lists.switch()
        if again:
            _, own = self.forward(video[again[0] : again[-1] + 1], again, 0.0, 0.0, prompt)
            self.lists.end_switch(own)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    built = CausalWanModel(MODEL).requires_grad_(False).eval()
    for name, value in built.named_parameters():
        if "norm" in name and name.endswith("weight"):
            value.mul_(1 + 0.3 * torch.randn_like(value))
        if name.startswith("head.head"):
            value.mul_(3)
    return built


@settings(max_examples=12)
@given(data=st.data())
def test_pools_equal_lists_of_k_and_v(data, model, configs, frame_lists, encoded):
    torch.set_num_threads(1)
    config = data.draw(configs(MODEL, GRID), "config")
    seed = data.draw(st.integers(0, 99), "seed")
    switch_at = data.draw(st.sampled_from([None, 1, 2, 3, 4]), "switch_at")
    naive = NaiveDenoiser(model, config, frame_lists, encoded)
    session = eager_session(model, config, use_steady=data.draw(st.booleans(), "use_steady"))
    random = np.random.default_rng(seed)
    prompts = random.standard_normal((2, MODEL.text_len, MODEL.text_dim)).astype(np.float32)
    prompt = torch.from_numpy(prompts[0]).double()
    session.set_prompt(prompts[0])
    video = []
    for chunk in range(NUM_CHUNKS):
        if chunk == switch_at and config.switchable:
            prompt = torch.from_numpy(prompts[1]).double()
            naive.switch(torch.cat(video), prompt)
            session.switch_prompt(prompts[1])
        noise = random.standard_normal(config.latent_shape).astype(np.float32)
        draws = config.schedule.num_steps - 1
        eps = random.standard_normal((draws, *config.latent_shape)).astype(np.float32)
        wanted, kept = naive.chunk(
            torch.from_numpy(noise).double(), torch.from_numpy(eps).double(), prompt
        )
        made = session.generate_chunk(noise, eps)
        # A near tie may go either way in float32.
        assume(min(naive.margins, default=1.0) > 1e-5)
        assert (made.kept is None) == (kept is None)
        if kept is not None:
            assert made.kept.tolist() == kept
        np.testing.assert_allclose(made.latents, wanted.numpy(), atol=ATOL, rtol=0)
        video.append(wanted)
