"""Schedule, time sinusoid, rotary tables and noise against values known from elsewhere."""

import math

import numpy as np
import pytest
import torch

from forcing_kv.runtime_trt.errors import InputError
from forcing_kv.runtime_trt.rollout.noise import draw_noise
from forcing_kv.runtime_trt.rollout.schedule import Schedule, rope_table, time_sinusoid

KREA = Schedule((1000, 937, 833, 625, 0), warped=False)
SHAPE = (3, 2, 4, 6)


def test_warped_schedule():
    schedule = Schedule((1000, 750, 500, 250))
    assert schedule.timesteps.dtype == schedule.sigmas.dtype == np.float32
    np.testing.assert_allclose(schedule.timesteps, [1000, 937.5, 2500 / 3, 625], rtol=1e-7)
    np.testing.assert_allclose(schedule.sigmas, [1, 0.9375, 5 / 6, 0.625], rtol=1e-7)


def test_listed_timesteps_take_the_nearest_noise_level():
    assert KREA.timesteps.tolist() == [1000, 937, 833, 625, 0]
    wanted = [1.0, 0.936874, 0.832777, 0.625, 0.004980]
    np.testing.assert_allclose(KREA.sigmas, wanted, rtol=0, atol=6e-7)


def test_noise_levels_by_a_search_through_the_whole_schedule():
    levels = [5 * (k / 1000) / (1 + 4 * (k / 1000)) for k in range(1000, 0, -1)]
    for t, sigma in zip(KREA.timesteps, KREA.sigmas, strict=True):
        assert np.float32(min(levels, key=lambda level: abs(level - t / 1000))) == sigma


def test_exact_noise_levels():
    schedule = Schedule((1000, 938, 833, 625), warped=False, exact_sigma=True)
    np.testing.assert_allclose(schedule.sigmas, [1, 0.938, 0.833, 0.625], rtol=1e-7)


@pytest.mark.parametrize("warped", [True, False])
def test_a_list_may_end_at_0(warped):
    schedule = Schedule((1000, 500, 0), warped=warped)
    assert schedule.num_steps == 3
    assert schedule.timesteps[-1] == 0
    assert schedule.sigmas[-1] == pytest.approx(0.004980, abs=1e-6)


@pytest.mark.parametrize("steps", [(), (500, 750), (500, 500), (1001, 500), (500, -1), (math.nan,)])
def test_wrong_steps_are_refused(steps):
    with pytest.raises(InputError, match=r"Schedule\.steps"):
        Schedule(steps)


@pytest.mark.parametrize("shift", [0, -1, math.nan])
def test_wrong_shift_is_refused(shift):
    with pytest.raises(InputError, match=r"Schedule\.shift"):
        Schedule(shift=shift)


@pytest.mark.parametrize("t", [0.0, 0.1, 625.0, 2500 / 3, 937.5, 1000.0])
def test_time_sinusoid_is_computed_in_float64(t):
    t32 = float(np.float32(t))
    angles = [t32 / 10000 ** (i / 128) for i in range(128)]
    wanted = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    found = time_sinusoid(t, 256)
    assert found.shape == (1, 256)
    np.testing.assert_allclose(found[0], wanted, atol=6e-8)


@pytest.mark.parametrize("first", [0, 1020, 5000, 10**6])
def test_rotary_table_has_no_last_position(first):
    """The temporal axis of head dim 128 has 22 pairs; official tables end at 1024 positions."""
    cos, sin = rope_table(range(first, first + 6), 22)
    wanted = [[(first + frame) * 10000.0 ** (-2 * i / 44) for i in range(22)] for frame in range(6)]
    assert cos.shape == sin.shape == (6, 22)
    np.testing.assert_allclose(cos, np.cos(wanted), atol=6e-8)
    np.testing.assert_allclose(sin, np.sin(wanted), atol=6e-8)


def test_the_same_address_gives_the_same_noise_in_any_order():
    addresses = [(seed, chunk, draw) for seed in (0, 7) for chunk in (0, 1) for draw in (0, 1, 2)]
    forward = {address: draw_noise(*address, SHAPE) for address in addresses}
    backward = {address: draw_noise(*address, SHAPE) for address in reversed(addresses)}
    for address in addresses:
        assert np.array_equal(forward[address], backward[address])
    assert len({array.tobytes() for array in forward.values()}) == len(addresses)


def test_noise_is_fixed_for_ever():
    """A release that changed it would change everybody's videos."""
    wanted = [[-1.2722312, 1.6172233], [-1.1294377, 1.5996739]]
    np.testing.assert_allclose(draw_noise(42, 3, 1, (2, 2)), wanted, rtol=1e-6)


def test_noise_is_normal_and_uncorrelated_between_addresses():
    size = (200_000,)
    draws = torch.from_numpy(
        np.stack([draw_noise(seed, chunk, draw, size) for seed, chunk, draw in (
            (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**63, 2**40, 9), (2**64 - 1, 0, 0),
        )])
    )  # fmt: skip
    assert draws.dtype == torch.float32
    assert draws.mean(dim=1).abs().max() < 0.01
    assert (draws.std(dim=1) - 1).abs().max() < 0.01
    assert (torch.corrcoef(draws) - torch.eye(len(draws))).abs().max() < 0.01


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(InputError, match="seed"):
        draw_noise(seed, 0, 0, SHAPE)
