"""One backend at full size: the first chunk and a steady one.

Usage: python full_size_worker.py SUBJECT FOLDER, where FOLDER holds the bundle and receives
SUBJECT.npz; prints times and the peak of memory as JSON.
"""

import json
import resource
import sys
from contextlib import closing
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch

from forcing_kv.export.verify.eager import EagerBackend
from forcing_kv.runtime_trt.session import Session
from forcing_kv.tools.bench.true_shapes.cases import run_case
from forcing_kv.tools.bench.workloads import workload

THREADS = 2


def open_session(subject, work, bundle):
    if subject == "eager":
        return Session(EagerBackend(work.load("cpu"), work.config))
    return Session.open(bundle, subject, num_threads=THREADS)


def main(subject, folder):
    torch.set_num_threads(THREADS)
    work = workload("wan-1.3b", "480p", "forcing-kv", "float32")
    with closing(open_session(subject, work, folder / "bundle")) as session:
        session.set_prompt(work.prompt())
        begin, cpu_begin = perf_counter(), process_time()
        first = session.generate_chunk(seed=0).latents
        first_s, first_cpu_s = perf_counter() - begin, process_time() - cpu_begin
        steady = run_case(session, "steady-chunk")
    np.savez(folder / f"{subject}.npz", first=first, steady=steady.found.latents)
    times = {
        "first_chunk_s": first_s, "first_chunk_cpu_s": first_cpu_s,
        "steady_chunk_s": steady.wall_ms / 1e3, "steady_chunk_cpu_s": steady.cpu_ms / 1e3,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }  # fmt: skip
    print(json.dumps({name: round(value, 1) for name, value in times.items()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
