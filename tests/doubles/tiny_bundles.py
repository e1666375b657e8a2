"""Fixtures: a bundle of a tiny random model, exported once, with decoders and without."""

import shutil
from pathlib import Path

import pytest

from forcing_kv.runtime_trt.rollout.config import RolloutConfig
from forcing_kv.runtime_trt.rollout.layout import ChunkShape, HeadPartition, ModelShape
from forcing_kv.runtime_trt.rollout.policy import CachePolicy
from forcing_kv.runtime_trt.rollout.schedule import Schedule


@pytest.fixture(scope="session")
def tiny_config() -> RolloutConfig:
    """Two layers of three heads, one of them static; 36 latent pixels of two channels."""
    model = ModelShape(
        2, dim=24, ffn_dim=16, num_heads=3, in_channels=2, text_len=3, text_dim=5, freq_dim=8
    )
    partition = HeadPartition(3, ((0,), (1,)))
    return RolloutConfig(
        model, ChunkShape(3, 4, 6), CachePolicy(), partition, Schedule((1000, 500))
    )


@pytest.fixture(scope="session")
def tiny_bundle(tiny_config: RolloutConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: copy it to change it (`copied_bundle`)."""
    import torch
    from shared_exports import export_once

    from forcing_kv.export.bundle.write import BundleLabels
    from forcing_kv.export.model.denoiser import CausalWanModel

    torch.manual_seed(0)
    model = CausalWanModel(tiny_config.model).requires_grad_(False)
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    export_once(model, tiny_config, folder, BundleLabels("tiny"))
    return folder


@pytest.fixture(scope="session")
def decoder_bundle(
    tiny_bundle: Path, tiny_config: RolloutConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle with both decoders; read only."""
    from shared_exports import shared_graphs
    from stand_ins import tiny_decoder_files

    from forcing_kv.export.decoder.add import add_decoder
    from forcing_kv.export.decoder.tae import tiny_decoder
    from forcing_kv.export.decoder.vae import wan_decoder

    folder = tmp_path_factory.mktemp("decoders")
    _, channels, *size = tiny_config.latent_shape
    vae, tae = tiny_decoder_files(folder, channels)
    bundle = Path(shutil.copytree(tiny_bundle, folder / "bundle"))
    with shared_graphs():
        add_decoder(bundle, wan_decoder(vae, (size[0], size[1])))
        add_decoder(bundle, tiny_decoder(tae, (size[0], size[1])))
    return bundle


@pytest.fixture
def copied_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle whose files may be changed."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
