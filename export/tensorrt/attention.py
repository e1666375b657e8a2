"""Which attention a TensorRT engine keeps: both are built, and a step of each is timed."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from forcing_kv.runtime_trt.bundle.engines import EngineRecord
from forcing_kv.runtime_trt.bundle.hashes import HashedFiles, RecordedFile
from forcing_kv.runtime_trt.bundle.manifest import Manifest
from forcing_kv.runtime_trt.cuda.chunk_graph import ChunkGraphBackend
from forcing_kv.runtime_trt.cuda.runtime import Cuda
from forcing_kv.runtime_trt.errors import require
from forcing_kv.runtime_trt.rollout.ports import steady_name
from forcing_kv.runtime_trt.tensorrt.engine import LoadedPlans, TensorRtEngine
from forcing_kv.runtime_trt.tensorrt.flavours import FLAVOURS


def keep_faster(manifest: Manifest, record: EngineRecord, folder: Path) -> EngineRecord:
    """Time the plugin's step against the native one, and drop the steady engine if it is slower.

    Args:
        record: engines of both forms, weights included.
        folder: where they lie until they are put in place.

    Returns:
        The record with both times, and without the engine that was dropped.
    """
    flavour = FLAVOURS["tensorrt"]
    cuda = Cuda(extra=flavour.extra)
    staged = {
        name: replace(graph, file=Path(graph.file).name) for name, graph in record.graphs.items()
    }
    with HashedFiles(folder) as files:
        files.recorded = {
            graph.file: RecordedFile(graph.sha256, "it was built", "build again")
            for graph in staged.values()
        }
        plans = LoadedPlans(flavour, require(flavour.module), files, replace(record, graphs=staged))
    engine = TensorRtEngine(plans)
    backend = ChunkGraphBackend(cuda, engine, manifest.config, record.graphs, use_graphs=False)
    with closing(backend):
        times_ms = {
            "plugin": round(backend.time_step(steady=False), 3),
            "native": round(backend.time_step(steady=True), 3),
        }
    record = replace(record, attention_ms=times_ms)
    return record if times_ms["native"] < times_ms["plugin"] else _without_steady(record, folder)


def _without_steady(record: EngineRecord, folder: Path) -> EngineRecord:
    name = steady_name("step")
    dropped = Path(record.graphs[name].file)
    own = {file for file in record.files if Path(file).name.split(".")[0] == dropped.stem}
    for file in own:
        (folder / Path(file).name).unlink()
    return replace(
        record,
        files={file: sha256 for file, sha256 in record.files.items() if file not in own},
        graphs={key: graph for key, graph in record.graphs.items() if key != name},
        details={key: detail for key, detail in record.details.items() if key != name},
    )
