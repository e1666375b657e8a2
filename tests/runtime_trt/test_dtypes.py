"""The table of element types against the libraries whose names it holds."""

import json

import numpy as np
import pytest
import torch
from onnx_ir import DataType
from safetensors.torch import save

from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.dtypes import BY_ONNX, DTYPES, dtype_name, widened
from forcing_kv.runtime_trt.errors import BundleError


@pytest.mark.parametrize("name", DTYPES)
def test_every_library_knows_the_type_by_its_name(name):
    known = DTYPES[name]
    dtype = getattr(torch, name)
    assert dtype_name(dtype) == name
    assert np.dtype(known.numpy).itemsize == dtype.itemsize == known.nbytes
    assert DataType[known.onnx].itemsize == known.nbytes
    assert BY_ONNX[known.onnx] is known
    stored = save({"x": torch.zeros(1, dtype=dtype)})
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    assert header["x"]["dtype"] == known.safetensors


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_knows_its_names(module):
    trt = pytest.importorskip(module)
    for known in DTYPES.values():
        if known.tensorrt:
            assert getattr(trt.DataType, known.tensorrt).itemsize == known.nbytes


def test_bits_of_bfloat16_become_numbers():
    values = torch.tensor([1.5, -0.0, 3e38, float("inf")]).bfloat16()
    bits = values.view(torch.int16).numpy().view(DTYPES["bfloat16"].numpy)
    np.testing.assert_array_equal(widened(bits, "bfloat16"), values.float().numpy())
    half = np.asarray([1.5], np.float16)
    assert widened(half, "float16") is half


def test_a_manifest_with_the_former_word_reads_the_same(tiny_bundle, copied_bundle):
    file = copied_bundle / "manifest.json"
    content = json.loads(file.read_text())
    ports = [port for graph in content["graphs"].values() for port in graph["inputs"]]
    assert {port["dtype"] for port in ports} == {"float32", "int32"}
    for port in ports:
        port["dtype"] = port["dtype"].replace("float32", "float")
    file.write_text(json.dumps(content))
    assert read_manifest(copied_bundle) == read_manifest(tiny_bundle)
    ports[0]["dtype"] = "floaty"
    file.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"dtype is 'floaty'; allowed are .*'float32'"):
        read_manifest(copied_bundle)
