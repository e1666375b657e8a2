"""Every PyTorch subject computes what the official code computed."""

from pathlib import Path

import numpy as np
import pytest

from forcing_kv.export.model.fusion import FusionOptions
from forcing_kv.export.verify.golden import GoldenCase, verify_golden
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.pytorch.backend import TorchBackend
from forcing_kv.tools.bench.pytorch.options import TorchOptions

SUBJECTS = {
    "grouped": ("fkv_selfforcing", TorchOptions("grouped")),
    "reference": ("fkv_selfforcing", TorchOptions("reference")),
    "operators": ("fkv_selfforcing", TorchOptions("operators")),
    "operators, fused": (
        "fkv_selfforcing",
        TorchOptions("operators", fusion=FusionOptions(qkv=True)),
    ),
    "three temporal frames": ("fkv_temporal3_nodynamic", TorchOptions("grouped")),
    "dense": ("dense_selfforcing", TorchOptions("dense")),
}


def golden(repository: Path, case: str) -> GoldenCase:
    return GoldenCase.load(repository / "tests/golden" / case)


def open_session(case: GoldenCase, options: TorchOptions, **more) -> Session:
    return Session(TorchBackend(case.load_model(), case.config, "cpu", options, **more))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_golden_case(repository, subject):
    name, options = SUBJECTS[subject]
    case = golden(repository, name)
    with open_session(case, options) as session:
        checks = list(verify_golden(case, session))
    assert all(check.latent_error < 1e-4 for check in checks)
    assert all(check.kept_equal is not False for check in checks)


def test_forced_segments_replace_the_selection(repository):
    case = golden(repository, "fkv_selfforcing")
    prompt = case.inputs["prompt_embeds"][0]
    options = TorchOptions("grouped")
    with open_session(case, options) as session:
        session.set_prompt(prompt)
        free = list(session.stream(5, seed=3))
    own = {chunk.index: chunk.kept for chunk in free if chunk.kept is not None}
    other = own | {2: np.arange(6, dtype=np.int32)}
    assert not np.array_equal(own[2], other[2])
    for forced in (own, other):
        with open_session(case, options, forced=forced) as session:
            session.set_prompt(prompt)
            made = list(session.stream(5, seed=3))
        same = [np.array_equal(a.latents, b.latents) for a, b in zip(free, made, strict=True)]
        assert same == ([True] * 5 if forced is own else [True] * 3 + [False] * 2)
        np.testing.assert_array_equal(made[2].kept, forced[2])
        np.testing.assert_allclose(made[2].scores, free[2].scores)
