"""The commands of docs/models run as they stand there, on tiny stand-ins for the real files.

Blocks carry the comments of README.md (see tests/test_readme.py). The stand-ins have the names that
the downloads have and the presets' architecture made small; `bfloat16` becomes `float32`, because
ONNX Runtime on a CPU does not run it. Every `fkv` command of every block, tested or not, must have
options that exist.
"""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stand_ins import (
    diffusers_name,
    fsdp_names,
    peft_file,
    prefixed,
    vae_original_name,
    write_sharded,
    write_wan_text_encoder,
)

from forcing_kv.export.decoder.tae import TinyDecoder
from forcing_kv.export.model.denoiser import CausalWanModel
from forcing_kv.export.request import presets
from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.rollout.layout import ModelShape
from forcing_kv.tools import cli

PAGES = Path(__file__).resolve().parents[1] / "docs" / "models"
BLOCK = re.compile(r"^<!-- (test|not tested): ([^\n]*) -->\n```bash\n(.*?)^```$", re.DOTALL | re.M)
SHAPE = ModelShape(2, 24, 16, 2, text_dim=16, freq_dim=8)
RUN_ALIKE = ("self-forcing", "longlive", "causal-forcing", "krea-realtime-14b", "raven", "wan2.1")


def blocks(page: Path) -> list[tuple[bool, str, list[list[str]]]]:
    """Whether each block is tested, its name, and its commands as words."""
    text = page.read_text()
    assert len(BLOCK.findall(text)) == text.count("```bash"), f"{page}: a block without a comment"
    return [
        (kind == "test", name, [words for line in code.splitlines()
                                if (words := shlex.split(line, comments=True))])
        for kind, name, code in BLOCK.findall(text)
    ]  # fmt: skip


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_every_command_has_options_that_exist(page):
    app = cli.build_app(cli.COMMANDS)
    commands = [words for _, _, lines in blocks(page) for words in lines if words[0] == "fkv"]
    assert commands
    for words in commands:
        app.parse_args(words[1:])


def test_every_preset_has_a_page():
    named = " ".join(page.read_text() for page in PAGES.glob("*.md") if page.stem != "README")
    assert [name for name in presets.PRESETS if name not in named] == []


def test_every_preset_names_the_download_of_its_page():
    """What `fkv export --model NAME` says without a checkpoint."""
    pages = " ".join(page.read_text() for page in PAGES.glob("*.md"))
    assert [p.name for p in presets.PRESETS.values() if p.download not in pages] == []


def write_checkpoint(page: str) -> None:
    """The page's checkpoint, in the current folder, as its project distributes it."""
    torch.manual_seed(0)
    weights = CausalWanModel(SHAPE).state_dict()
    factors = {"blocks.0.ffn.0": (torch.randn(4, 24), torch.randn(16, 4))}
    Path("checkpoints/chunkwise").mkdir(parents=True)
    Path("longlive_models/models").mkdir(parents=True)
    plain = {"generator": prefixed(weights, "model.")}
    if page == "self-forcing":
        nested = plain | {"generator_ema": fsdp_names(weights)}
        torch.save(nested, "checkpoints/self_forcing_dmd.pt")
    elif page == "longlive":
        torch.save(plain, "longlive_models/models/longlive_base.pt")
        torch.save({"generator_lora": peft_file(factors)}, "longlive_models/models/lora.pt")
    elif page == "causal-forcing":
        torch.save(plain, "checkpoints/chunkwise/causal_forcing.pt")
    elif page == "krea-realtime-14b":
        save_file(prefixed(weights, "model."), "checkpoints/krea-realtime-video-14b.safetensors")
    elif page == "raven":
        torch.save(weights, "raven_model.pt")
    else:
        renamed = {diffusers_name(name): value for name, value in weights.items()}
        folder = Path("Wan2.1-Diffusers/transformer")
        write_sharded(folder, renamed, "diffusion_pytorch_model")


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A folder with stand-ins for everything that a page downloads."""
    monkeypatch.chdir(tmp_path)
    from diffusers import AutoencoderKLWan

    small = {
        name: replace(preset, model=SHAPE, latent_size=(8, 12))
        for name, preset in presets.PRESETS.items()
    }
    monkeypatch.setattr(presets, "PRESETS", small)
    wan = Path("Wan2.1-T2V-1.3B")
    wan.mkdir()
    write_wan_text_encoder(wan)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16).state_dict()
    state = {vae_original_name(name): value for name, value in vae.items()}
    torch.save(state, wan / "Wan2.1_VAE.pth")
    torch.save(TinyDecoder(16, (8, 6, 4, 4)).state_dict(), "taew2_1.pth")
    Path("prompts.txt").write_text("a cat runs\na cat on grass\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_ALIKE)
def test_commands_run_on_stand_ins(page, downloads, capfd):
    write_checkpoint(page)
    for tested, name, lines in blocks(PAGES / f"{page}.md"):
        for words in lines if tested else ():
            assert words[0] == "fkv", name
            with pytest.raises(SystemExit) as stop:
                cli.main([word.replace("bfloat16", "float32") for word in words[1:]])
            assert not stop.value.code, f"{shlex.join(words)}\n{capfd.readouterr().err}"
    for made in ("corgi.safetensors", "heads/heads.json", "bundle/manifest.json", "video.mp4"):
        assert Path(made).is_file(), made


@pytest.mark.slow
def test_commands_of_the_overview_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for tested, name, commands in blocks(PAGES / "README.md"):
        assert tested, name
        for words in commands:
            with pytest.raises(SystemExit) as stop:
                cli.main(words[1:])
            assert not stop.value.code, capfd.readouterr().err
    assert Path("policy/policy.png").is_file()
    assert read_manifest(Path("bundle-fp8")).fp8
