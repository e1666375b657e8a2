"""The chunk-graph runtime over the tiny bundle."""

import gc

import pytest
from graphed import Graphed


@pytest.fixture(scope="module")
def graphed(tiny_bundle):
    gc.freeze()  # Every opening collects garbage; not among all that PyTorch and ONNX made.
    yield Graphed(tiny_bundle)
    gc.unfreeze()
