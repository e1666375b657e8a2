"""The tiny bundle, and prompts for it."""

from collections.abc import Callable

import numpy as np
import pytest
from tiny_bundles import copied_bundle, decoder_bundle, tiny_bundle, tiny_config

from forcing_kv.runtime_trt.rollout.config import RolloutConfig

__all__ = ["copied_bundle", "decoder_bundle", "tiny_bundle", "tiny_config"]


@pytest.fixture(scope="session")
def prompts(tiny_config: RolloutConfig) -> Callable[[int], np.ndarray]:
    """Prompt embeddings by number."""
    shape = (tiny_config.model.text_len, tiny_config.model.text_dim)
    return lambda number: np.random.default_rng(number).standard_normal(shape).astype(np.float32)
