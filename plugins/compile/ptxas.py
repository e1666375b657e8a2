"""NVIDIA's PTX assembler from Triton's wheel: does it accept a kernel, and what does it take?"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from forcing_kv.plugins.compile.launch import PtxError
from forcing_kv.plugins.compile.ptx import CompiledKernel
from forcing_kv.runtime_trt.bundle.atomic.files import scratch_folder
from forcing_kv.runtime_trt.errors import require

_FIRST_BLACKWELL = 100


@dataclass(frozen=True)
class PtxasReport:
    """What the assembler says about a kernel."""

    registers: int
    spilled_bytes: int
    """Bytes of a thread that are spilled to memory; 0 is good."""


def assemble(kernel: CompiledKernel, arch: str | None = None) -> PtxasReport:
    """Assemble a kernel and throw the result away.

    Args:
        arch: target such as `sm_90`; by default the one that the PTX names. A portable kernel may
            be assembled for any later one, as a driver does.

    Raises:
        PtxError: the assembler refuses it; with its message.
    """
    folder = Path(require("triton").__file__).parent / "backends" / "nvidia" / "bin"
    target = arch or kernel.arch
    assembler = folder / "ptxas"
    if int(re.sub(r"\D", "", target)) >= _FIRST_BLACKWELL:
        # Triton ships a second, newer assembler for these.
        assembler = folder / "ptxas-blackwell"
    with scratch_folder() as scratch:
        source = scratch / "kernel.ptx"
        source.write_text(kernel.ptx)
        cubin = str(source.with_suffix(".cubin"))
        command = [str(assembler), "-v", f"-arch={target}", str(source), "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise PtxError(f"{kernel.name}: ptxas refuses the PTX for {target}: {said.strip()}")
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    if registers is None or spilled is None:
        raise PtxError(f"{kernel.name}: ptxas reports no registers: {said.strip()}")
    return PtxasReport(int(registers.group(1)), int(spilled.group(1)))
