"""The table of element types against the libraries whose names it holds."""

import json

import numpy as np
import pytest
import torch
from onnx_ir import DataType
from safetensors.torch import save

from forcing_kv.runtime_trt.dtypes import BY_ONNX, BY_ONNX_CODE, DTYPES, dtype_name, widened


@pytest.mark.parametrize("name", DTYPES)
def test_every_library_knows_the_type_by_its_name(name):
    known = DTYPES[name]
    dtype = getattr(torch, name)
    assert dtype_name(dtype) == name
    assert np.dtype(known.numpy).itemsize == dtype.itemsize == known.nbytes
    assert DataType[known.onnx].itemsize == known.nbytes
    assert BY_ONNX[known.onnx] is known
    assert BY_ONNX_CODE[DataType[known.onnx].value] is known
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
