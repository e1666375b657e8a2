"""The demo's pictures and report on clips of known content; the README's test runs the command."""

import numpy as np
import pytest

from forcing_kv.runtime_trt.backends.stream import Chunk
from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import HeadPartition
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.tools.demo.pictures import (
    Clip,
    draw_cost,
    draw_kept_segments,
    kv_nbytes_by_kind,
    side_by_side,
)
from forcing_kv.tools.demo.report import summary_rows, write_report
from forcing_kv.tools.digits import codec
from forcing_kv.tools.digits.shipped import CHUNK, MODEL, POLICY, SCHEDULE


def clip(policy, brightness):
    partition = HeadPartition(MODEL.num_heads, ((0, 1),) * MODEL.num_layers)
    config = RolloutConfig(MODEL, CHUNK, policy, partition, SCHEDULE)
    latents = codec.encode(np.full((3, 32, 32), brightness, np.float32))
    kept = np.array([0, 1, 5, 10], np.int32) if policy.num_dynamic_frames else None
    chunks = [
        Chunk(i, latents, {"steps": 3.0, "clean": 1.0}, None, kept if i > 1 else None)
        for i in range(4)
    ]
    return Clip(config, chunks)


@pytest.fixture
def clips():
    return [clip(CachePolicy.dense(21, 3), 0.2), clip(POLICY, 0.5)]


def test_a_clip_is_named_by_its_cache(clips):
    assert [made.label for made in clips] == ["dense, 21 frames", "Forcing-KV"]
    assert clip(CachePolicy.dense(16, 3, 1), 0.2).label == "dense, 16 frames"


def test_side_by_side_places_each_clip_in_its_column(clips):
    frames = side_by_side(clips, scale=2)
    assert frames.shape[0] == 12
    left, right = frames[5, -1, 10, 0], frames[5, -1, -10, 0]
    assert abs(int(left) - 51) <= 1
    assert abs(int(right) - 128) <= 1


def test_bytes_by_kind_add_up_to_the_pools(clips):
    for made in clips:
        by_kind = kv_nbytes_by_kind(made.config)
        assert sum(by_kind.values()) == made.config.nbytes_kv
    assert set(kv_nbytes_by_kind(clips[1].config)) == {"uncompressed", "static", "dynamic"}


def test_summary_compares_with_the_first_clip(clips):
    rows = summary_rows(clips)
    assert rows[0][-1] == "0.0000"
    assert rows[1][-1] == "0.3000"
    assert rows[1][3] == "4.0 ms"


def test_the_report_carries_every_picture(clips, tmp_path):
    draw_kept_segments(clips[1], tmp_path / "segments.png")
    draw_cost(clips, tmp_path / "cost.png")
    for name in ("video.gif", "heads.png"):
        (tmp_path / name).write_bytes(b"a picture")
    write_report(tmp_path / "report.html", "<prompt>", 3, clips, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert text.count("base64,") == 4
    assert "&lt;prompt&gt;" in text
