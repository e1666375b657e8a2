"""Sessions of the chunk-graph runtime on the CPU double, and what is compared of them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from host_engine import HostEngine

from forcing_kv.runtime_trt.bundle.manifest import read_manifest
from forcing_kv.runtime_trt.cuda.chunk_graph import ChunkGraphBackend
from forcing_kv.runtime_trt.open import open_backend
from forcing_kv.runtime_trt.session import Session


class Graphed:
    """Opens sessions on the double over one bundle."""

    def __init__(self, bundle):
        self.bundle, self.manifest = bundle, read_manifest(bundle)

    def backend(self, cuda, make=HostEngine, **options):
        engine = make(cuda, self.bundle, self.manifest)
        return ChunkGraphBackend(
            cuda, engine, self.manifest.config, self.manifest.graphs, **options
        )

    def session(self, cuda, **options):
        return Session(self.backend(cuda, **options))

    def reference(self):
        return Session(open_backend(self.bundle, "onnxruntime", num_threads=1))


def same(found, wanted):
    np.testing.assert_array_equal(found.latents, wanted.latents)
    for name in ("scores", "kept"):
        left, right = getattr(found, name), getattr(wanted, name)
        assert (left is None) == (right is None)
        if left is not None:
            np.testing.assert_array_equal(left, right)


def in_another_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


def late(graphed, cuda):
    """A session that captures when it first meets a variant, as a long dense ring may."""
    session = graphed.session(cuda, use_graphs=False)
    session.backend.use_graphs = True
    return session
