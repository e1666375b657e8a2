"""What a video decoder does around the graphs that it runs."""

import numpy as np
import pytest
from fake_backend import LATENTS, CountingRunner, counting_decoder

from forcing_kv.runtime_trt.decoder import VideoDecoder
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError, NonFiniteError


@pytest.fixture
def runner():
    return CountingRunner()


@pytest.fixture
def decoder(runner):
    return counting_decoder(runner)


@pytest.mark.parametrize("fault", [ForcingKvError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["decode", "reset"])
def test_what_fails_half_way_asks_for_a_reset(runner, decoder, call, fault):
    decoder.decode(LATENTS)
    runner.fault = fault
    with pytest.raises(type(fault)):
        decoder.reset() if call == "reset" else decoder.decode(LATENTS)
    with pytest.raises(ForcingKvError, match="call reset to begin another video"):
        decoder.decode(LATENTS)
    decoder.reset()
    assert (decoder.decode(LATENTS) == 1).all()


def test_a_decoder_that_cannot_begin_releases_its_backend(runner, decoder):
    runner.fault = ForcingKvError("broken")
    with pytest.raises(ForcingKvError, match="broken"):
        VideoDecoder(runner, decoder._info)
    assert runner.closed


@pytest.mark.parametrize(
    ("latents", "told"),
    [
        (np.zeros((0, 2, 3, 3), np.float32), "shape"),
        (np.zeros((2, 3, 3), np.float32), "shape"),
        (np.zeros((1, 2, 3, 4), np.float32), "shape"),
        (np.float32(0), "shape"),
        (np.zeros((1, 2, 3, 3), np.int64), "dtype int64"),
        (None, "latents is None"),
        ("video.mp4", "latents is 'video.mp4'"),
    ],
)
def test_wrong_latents_are_refused_and_do_no_harm(runner, decoder, latents, told):
    decoder.decode(LATENTS)
    with pytest.raises(InputError, match=told):
        decoder.decode(latents)
    decoder.decode(LATENTS.tolist())
    assert runner.count == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_frames_that_are_not_finite_stop_the_video(runner, decoder, value):
    decoder.decode(LATENTS)
    runner.pixel = value
    with pytest.raises(NonFiniteError, match=r"latent frames 1 to 1: .* 1 of 27 pixel values"):
        decoder.decode(LATENTS)
    runner.pixel = None
    with pytest.raises(ForcingKvError, match="call reset"):
        decoder.decode(LATENTS)
    decoder.reset()
    assert decoder.decode(LATENTS).max() == 1
    runner.pixel = value
    given = VideoDecoder(runner, decoder._info, allow_non_finite=True).decode(LATENTS)
    assert np.isnan(given).any() == np.isnan(value)


def test_frames_are_clipped_where_they_are_finite(runner, decoder):
    for pixel, shown in ((-3.0, 0.0), (7.0, 1.0), (0.25, 0.25), (3e38, 1.0)):
        runner.pixel = pixel
        assert decoder.decode(LATENTS)[0, 0, 0, 0] == np.float32(shown)


@pytest.mark.parametrize("latents", [np.full_like(LATENTS, np.nan), LATENTS[:0]])
def test_latents_that_cannot_be_decoded_do_no_harm(decoder, latents):
    with pytest.raises(InputError, match="latents"):
        decoder.decode(latents)
    assert (decoder.decode(LATENTS) == 1).all()
