"""Energy of a GPU: what NVML says, or why it says nothing."""

import sys
from types import SimpleNamespace

import pytest

from forcing_kv.tools.bench.measure.device_counters import EnergyMeter


class NVMLError(Exception):
    pass


def nvml(millijoules, refused=False):
    """NVIDIA's Python package, whose counter gives these values one after the other."""

    def read(handle):
        if refused:
            raise NVMLError("Not Supported")
        return next(values)

    values = iter(millijoules)
    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )


def test_energy_since_the_meter_was_made(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pynvml", nvml([5, 1000, 4500]))
    assert EnergyMeter("cuda").joules() == 3.5
    assert EnergyMeter("cpu").joules() is None
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "pip install 'forcing-kv[bench]'"),
        (nvml([], refused=True), "the driver does not tell it (Not Supported)"),
    ],
    ids=["not installed", "not told"],
)
def test_what_keeps_energy_from_being_measured_is_told(monkeypatch, capsys, module, message):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert EnergyMeter("cuda").joules() is None
    said = " ".join(capsys.readouterr().err.split())
    assert "energy is not measured" in said
    assert message in said
