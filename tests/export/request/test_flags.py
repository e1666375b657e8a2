"""Dataclasses as flags: lists and sizes in one word, changes of a policy, what was given."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import pytest
from cyclopts import App, CycloptsError

from forcing_kv.export.request.flags import (
    MANNERS,
    Computed,
    Integers,
    LatentSize,
    Numbers,
    YesNo,
    between,
    changes_of,
    flags,
    given,
)
from forcing_kv.export.request.options import ExportRequest
from forcing_kv.runtime_trt.rollout.policy import CachePolicy


@flags()
@dataclass(frozen=True, kw_only=True)
class Options:
    """For these tests."""

    layers: Integers | None = None
    """Layers."""
    steps: Numbers = (1.0, 2.5)
    """Steps."""
    size: LatentSize | None = None
    """Size."""
    share: Annotated[float, between(0, 1)] = 0.5
    """Share."""
    tuned: YesNo = True
    """Tuned."""
    fast: bool = False
    """Fast."""
    found: Annotated[str, Computed] = "by us"


def parse(cls, *words):
    app = App(default_parameter=MANNERS, exit_on_error=False, print_error=False)

    @app.default
    def command(*, options: cls = cls()) -> cls:
        return options

    return app(words, result_action="return_value")


def test_fields_are_flags():
    assert parse(Options) == Options()
    words = ("--layers", "3,0,-5", "--steps=1000", "--size", "480p", "--share", "1", "--no-tuned")
    expected = Options(layers=(3, 0, -5), steps=(1000.0,), size=(60, 104), share=1.0, tuned=False)
    assert parse(Options, *words) == expected
    assert parse(Options, "--fast").fast
    assert parse(Options, "--size", "4x6", "--size", "8x2").size == (8, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layers", "1,x"), "--layers is '1,x'; give integers such as 0,3,5"),
        (("--layers", "1.5"), "--layers is '1.5'; give integers such as 0,3,5"),
        (("--steps", ""), "--steps is ''; give numbers such as 0,3,5"),
        (("--size", "9"), "--size is '9'; give latent rows x columns such as 60x104"),
        (("--share", "1.5"), 'Invalid value "1.5" for --share. Must be <= 1.'),
        (("--share=-1",), 'Invalid value "-1.0" for --share. Must be >= 0.'),
        (("--no-fast",), "Unknown option: --no-fast."),
        (("--found", "x"), "Unknown option: --found."),
    ],
)
def test_what_is_no_such_value_is_refused(words, message):
    with pytest.raises(CycloptsError) as caught:
        parse(Options, *words)
    assert str(caught.value).startswith(message)


def test_what_was_given_is_named_as_it_is_typed():
    assert given(Options()) == []
    assert given(parse(Options, "--no-tuned", "--layers", "1", "--steps", "1,2.5")) == [
        "--layers",
        "--no-tuned",
    ]


def test_a_subclass_in_another_module_keeps_what_it_inherits():
    @flags()
    @dataclass(frozen=True, kw_only=True)
    class More(ExportRequest):
        """Annotations of the base are not known in this module."""

        wanted: Literal["a", "b"] = "a"

    found = parse(More, "--wanted", "b", "--latent-size", "8x8", "--segments", "2")
    assert (found.wanted, found.latent_size, found.policy_changes) == (
        "b",
        (8, 8),
        {"num_segments": 2},
    )


def test_changes_hold_what_was_given_alone():
    changes = changes_of(CachePolicy, lambda name: name)
    assert changes.__total__ is False
    assert list(changes.__annotations__) == [field.name for field in fields(CachePolicy)]


def test_every_field_of_the_policy_is_a_flag_of_an_export():
    words = (
        *("--sink-frames", "3", "--static-frames", "2", "--temporal-frames", "4"),
        *("--dynamic-frames", "0", "--segments", "5", "--warmup-chunk", "7"),
        *("--compress-first-layer", "--no-global-sink"),
        *("--selection", "per_layer", "--warmup", "steady"),
    )
    changes = parse(ExportRequest, *words).policy_changes
    assert CachePolicy(**changes) == CachePolicy(
        3, 2, 4, 0, 5, 7, True, False, "per_layer", "steady"
    )
    assert set(changes) == {field.name for field in fields(CachePolicy)}
    assert parse(ExportRequest).policy_changes == {}
