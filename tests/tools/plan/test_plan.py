"""`fkv plan`: its numbers, its picture, and its refusals."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcing_kv.export.cost.memory import buffer_nbytes
from forcing_kv.export.request.presets import PRESETS
from forcing_kv.export.request.request import ExportRequest, resolve
from forcing_kv.runtime_trt import Session
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.cuda.chunk_program import plan_memory
from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.resolution import parse_latent_size
from forcing_kv.tools.plan.request import PlanRequest, spread
from forcing_kv.tools.plan.request import resolve as resolve_plan


def plan(run_fkv, *options):
    done = run_fkv("plan", *options, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_numbers_of_the_default(run_fkv):
    record = plan(run_fkv, "--compare", "dense", "--device", "h200")
    assert record["num_parameters"] == 1_418_996_800
    assert record["heads"] == {
        "static": 134, "total": 360, "source": "the published count, spread evenly",
    }  # fmt: skip
    parts = record["steady_step"]["parts"]
    attention = parts.pop("self-attention")["tflop"]
    assert attention == pytest.approx(7.55, rel=0.01)
    assert sum(part["tflop"] for part in parts.values()) == pytest.approx(12.15, rel=0.01)
    assert record["kv_nbytes"]["attended"] / 1e9 == pytest.approx(1.61, rel=0.01)
    assert 96 <= record["fps_bound"]["steady"] <= 100
    assert "denoiser alone" in record["fps_bound"]["definition"]
    dense = record["compare"]
    assert dense["policy"]["num_dynamic_frames"] == 0
    assert dense["mean_step"]["num_chunks"] == 7
    assert dense["mean_step"]["parts"]["self-attention"]["tflop"] == pytest.approx(16.15, rel=0.01)
    memory = record["memory_nbytes"]
    assert memory["total"] == (
        sum(memory["engines"].values())
        + sum(memory["buffers"].values())
        + memory["replay_copies"]
        + memory["activations_estimate"]
        + memory["overhead_assumed"]
    )
    assert set(record["fits_gib"]) == {"16", "24", "32", "80", "141"}


@pytest.mark.parametrize("model", PRESETS)
def test_every_preset_and_size(run_fkv, model):
    for resolution in ("480p", "720p", "1080p", "32x48"):
        record = plan(run_fkv, "--model", model, "--resolution", resolution, "--device", "rtx4090")
        assert record["steady_step"]["ideal_ms"] > 0
        assert "24" in record["fits_gib"]


def test_krea_shows_both_warm_ups(run_fkv):
    warmup = plan(run_fkv, "--model", "krea-14b")["kv_nbytes"]["warmup"]
    assert warmup["exact"] / 1e9 == pytest.approx(3.83, rel=0.01)
    assert warmup["steady"] / 1e9 == pytest.approx(2.56, rel=0.01)


def test_policies_may_be_changes_or_files(run_fkv, tmp_path):
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"num_static_frames": 2, "num_temporal_frames": 2}))
    changed = plan(run_fkv, "--policy", "num_static_frames=2, num_temporal_frames=2")
    assert changed["policy"] == plan(run_fkv, "--policy", file)["policy"]
    assert plan(run_fkv, "--policy", "warmup=steady,global_sink=false")["policy"]["warmup"]
    assert changed["kv_nbytes"]["pools"] > plan(run_fkv)["kv_nbytes"]["pools"]


def test_partition_files_and_counts(run_fkv, tmp_path):
    shape = PRESETS["self-forcing-1.3b"].model
    layers = [
        {"static_head": list(heads), "dynamic_head": [h for h in range(12) if h not in heads]}
        for heads in spread(shape, 90).static_heads
    ]
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"layers": layers}))
    from_file = plan(run_fkv, "--heads", file)
    counted = plan(run_fkv, "--static-heads", 90)
    assert from_file["heads"]["static"] == counted["heads"]["static"] == 90
    assert from_file["heads"]["source"] == "heads.json"
    assert from_file["memory_nbytes"] == counted["memory_nbytes"]
    for count in (0, 1, 29, 134, 311, 360):
        sizes = [len(heads) for heads in spread(shape, count).static_heads]
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1


def test_tables_and_picture(run_fkv, tmp_path):
    from PIL import Image

    picture = tmp_path / "p.png"
    done = run_fkv("plan", "--compare", "dense", "--plot", picture)
    assert done.code == 0, done.err
    for word in ("Memory of one session", "K/V static", "self-attention", "FPS bound", "dense"):
        assert word in done.out
    assert "134 static heads of 360" in done.err
    assert min(Image.open(picture).size) > 300


def test_bytes_are_those_that_onnxruntime_allocates(run_fkv, digits_bundle):
    record = plan(run_fkv, "--bundle", digits_bundle)
    manifest = read_manifest(digits_bundle)
    with Session.open(digits_bundle, "onnxruntime") as session:
        buffers = {name: array.nbytes for name, array in session.backend.buffers.items()}
    predicted = record["memory_nbytes"]["buffers"]
    assert predicted == buffer_nbytes(manifest.config)
    assert sum(predicted.values()) == sum(buffers.values()), buffers
    pools = sum(size for name, size in buffers.items() if name.startswith(("hist_k.", "hist_v.")))
    assert pools == record["kv_nbytes"]["pools"] == manifest.config.nbytes_kv
    weights = sum(record["memory_nbytes"]["engines"].values())
    # Equal norm weights are stored once, small ones in the graphs; every tensor starts on a page.
    assert 0.98 * weights <= manifest.weights_nbytes <= 1.1 * weights + 2**20


def test_bytes_are_those_that_the_chunk_graph_runtime_allocates(run_fkv, digits_bundle):
    memory = plan(run_fkv, "--bundle", digits_bundle)["memory_nbytes"]
    manifest = read_manifest(digits_bundle)
    specs = plan_memory(manifest.config, manifest.graphs, {}).specs.values()
    predicted = sum(memory["buffers"].values()) + memory["replay_copies"]
    assert predicted == sum(spec.nbytes for spec in specs)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--model", "gpt"), "self-forcing-1.3b"),
        (("--device", "tpu"), "rtx4090"),
        (("--device", "5090"), "did you mean rtx5090"),
        (("--model", "self-forcing"), "did you mean self-forcing-1.3b"),
        (("--policy", "forcing_kv"), "did you mean forcing-kv"),
        (("--resolution", "4k"), "1080p"),
        (("--resolution", "61x104"), "nearest sizes"),
        (("--resolution", "480x832"), "832x480px"),
        (("--resolution", "100000x100000px"), "up to 2048"),
        (("--num-chunks", "1000000000"), "10000"),
        (("--num-chunks", "0"), "1"),
        (("--num-chunks", "-3"), "1"),
        (("--policy", "last_warmup_chunk=2000"), "at most 1000"),
        (("--policy", "num_segments=1000003"), "fewer segments"),
        (("--policy", "last_warmup_chunk=1000000000"), "at most 65536"),
        (("--policy", "num_segments=" + "9" * 5000), "num_segments"),
        (("--dtype", "int8"), "bfloat16"),
        (("--policy", "magic"), "dense"),
        (("--policy", "sinks=1"), "num_sink_frames"),
        (("--policy", "num_sink_frames=x"), "num_sink_frames"),
        (("--policy", "num_sink_frames=true"), "num_sink_frames"),
        (("--policy", "global_sink=maybe"), "global_sink"),
        (("--policy", "missing.json"), "missing.json"),
        (("--static-heads", "361"), "360 heads"),
        (("--static-heads", "360"), "layer 1 has no dynamic head"),
        (("--heads", "none.json"), "none.json"),
        (("--plot", "p.pdf"), ".png"),
        (("--bundle", "nothing"), "not a bundle"),
    ],
)
def test_mistakes_are_named(run_fkv, options, told):
    done = run_fkv("plan", *options)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err


@given(
    st.integers(1, 199), st.integers(1, 400),
    st.sampled_from(["forcing-kv", "dense", "num_segments=5", "num_segments=8"]),
)  # fmt: skip
def test_a_size_that_is_proposed_is_planned(rows, columns, policy):
    def subject(text):
        request = PlanRequest(resolution=parse_latent_size("--resolution", text))
        resolve_plan(request, [policy, "forcing-kv"]).config(policy)

    try:
        subject(f"{rows}x{columns}")
    except InputError as error:
        told = str(error).partition("nearest sizes are ")[2].split(", ")
        assert told
        for text in told:
            subject(text)


def test_sizes_in_pixels_and_portrait(run_fkv):
    landscape = plan(run_fkv, "--resolution", "832x480px")
    portrait = plan(run_fkv, "--resolution", "480p-portrait")
    assert landscape["latent_size"] == [60, 104]
    assert portrait["latent_size"] == [104, 60]
    assert portrait["memory_nbytes"] == landscape["memory_nbytes"]
    assert "60x104 latents (832x480 pixels)" in run_fkv("plan").err


def test_a_device_is_found_as_people_write_it(run_fkv):
    for name in ("RTX4090", "NVIDIA GeForce RTX 4090", "rtx-4090"):
        assert plan(run_fkv, "--device", name)["device"]["name"] == "rtx4090"


def test_a_bundle_has_its_own_model(run_fkv, digits_bundle):
    done = run_fkv("plan", "--bundle", digits_bundle, "--resolution", "480p")
    assert done.code == 2
    assert "resolution" in done.err


def test_a_preset_file_is_planned_as_it_is_exported(run_fkv, tmp_path):
    """At its own size, unless another is asked for."""
    config = {"dim": 24, "ffn_dim": 16, "num_heads": 2, "num_layers": 2}
    preset, heads = tmp_path / "tiny.json", tmp_path / "heads.json"
    preset.write_text(json.dumps({"model": config, "latent_size": [8, 12]}))
    heads.write_text(json.dumps({"layers": [{"static_head": [0], "dynamic_head": [1]}] * 2}))
    (tmp_path / "weights.pt").touch()
    for size in (None, "720p"):
        asked = [] if size is None else ["--latent-size", size]
        record = plan(run_fkv, "--model", preset, "--heads", heads, "--dtype", "float32", *asked)
        request = ExportRequest(
            model=str(preset), checkpoint=tmp_path / "weights.pt", heads=heads,
            latent_size=parse_latent_size("size", size) if size else None,
        )  # fmt: skip
        exported = resolve(request).config
        assert record["latent_size"] == [exported.chunk.latent_height, exported.chunk.latent_width]
        assert record["kv_nbytes"]["pools"] == exported.nbytes_kv
        assert record["memory_nbytes"]["buffers"] == buffer_nbytes(exported)


@pytest.mark.parametrize("size", ["1920x1080", "1080x1920", "832x480", "999x555"])
def test_pixels_that_are_proposed_are_planned(run_fkv, size):
    told = run_fkv("plan", "--resolution", size).err
    proposed = re.findall(r"\d+x\d+px", told.partition("such as")[2])
    assert len(proposed) == 2
    for each in proposed:
        assert run_fkv("plan", "--resolution", each, "--policy", "dense").code == 0, each


def test_a_field_given_twice_is_refused(run_fkv):
    done = run_fkv("plan", "--policy", "num_sink_frames=1,num_sink_frames=2")
    assert done.code == 2
    assert "['num_sink_frames'] are given twice" in done.err
