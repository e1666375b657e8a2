"""Missing optional packages are named together with the extra that installs them."""

import sys
import types

import pytest

from forcing_kv.runtime_trt.errors import (
    ForcingKvError,
    InputError,
    MissingDependencyError,
    StateGuard,
    require,
)


def test_require_returns_the_module():
    assert require("json") is sys.modules["json"]


def test_require_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'forcing-kv\[onnxruntime\]'"):
        require("onnxruntime")


def test_require_takes_another_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"`cuda.bindings`.*forcing-kv\[rtx\]"):
        require("cuda.bindings", extra="rtx")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("import no_such_module_of_ours", ModuleNotFoundError, "no_such_module_of_ours"),
        ("raise ImportError('libx.so')", MissingDependencyError, "does not load .libx.so."),
    ],
    ids=["a module it imports is missing", "it is broken"],
)
def test_require_tells_missing_from_broken(tmp_path, monkeypatch, source, error, message):
    (tmp_path / "broken_package.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=message):
        require("broken_package", extra="export")


def test_errors_can_be_caught_by_their_standard_class():
    assert issubclass(InputError, ValueError)
    assert issubclass(InputError, ForcingKvError)
    assert issubclass(MissingDependencyError, ImportError)
    assert isinstance(require("types"), types.ModuleType)


def test_a_guard_refuses_a_state_that_a_call_left_half_changed():
    guard = StateGuard("call reset")
    with pytest.raises(KeyboardInterrupt), guard.changing(InputError):
        raise KeyboardInterrupt
    with guard.changing():
        pass
    with pytest.raises(ForcingKvError, match="call reset"):
        guard.require_valid()
    guard.renew()
    with pytest.raises(InputError), guard.changing(InputError):
        raise InputError("refused before anything was changed")
    guard.require_valid()
