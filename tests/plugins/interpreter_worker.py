"""Runs every kernel on every case in Triton's interpreter; started with TRITON_INTERPRET=1.

Usage: python interpreter_worker.py OUT [every], where OUT is the file that receives the outputs by
(operator, case, dtype, tactic). With `every`, each tactic is run; without, one of every kind.
"""

import os
import sys
from dataclasses import replace

import torch
from triton import language
from triton.runtime import interpreter

from forcing_kv.plugins.bind.triton_run import empty_outputs, run_kernel
from forcing_kv.plugins.check.cases import KERNEL_CASES, attention_case, norm_rope_case
from forcing_kv.plugins.compile.launch import default_tactic
from forcing_kv.plugins.registry import OPS

# Four heads of two tiles on three multiprocessors: full tiles and a tail of half the height, and
# several rounds of persistent programs.
WAVES = attention_case("waves", 200, 32, [(70, 70), (70, 66), (100, 3), (100, 100)])
# One tile of queries, whose keys the split schedule spreads over all three.
ONE_TILE = attention_case("one tile", 40, 32, [(300, 299)])
NUM_SMS = 3

# q and k as a fused product of q, k and v gives them.
APART = norm_rope_case("rows apart", 21, 3, 32)

# Small cases whose pools are moved behind 2^31 elements; in float16 alone, for their address space.
FAR = tuple(
    replace([case for case in KERNEL_CASES if case.spec is spec][-1], name="far rows")
    for spec in OPS[1:]
)


def patch_once_a_launch():
    """Have the interpreter replace the language's functions once a launch.

    It does so again at every call of one kernel function by another, where it finds them replaced:
    two fifths of its time.
    """
    patch, patched = interpreter._patch_lang, set()

    def patch_new(fn):
        modules = (language, language.core)
        names = frozenset(
            m.__name__ for m in modules if any(m is v for v in fn.__globals__.values())
        )
        if names in patched:
            return None
        outermost = not patched
        patched.add(names)
        scope = patch(fn)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_new


def move_pools(case, inputs):
    """Put the pools at the end of large ones, of which nothing else is touched, and say so."""
    attributes = dict(case.attributes)
    first = 2**31 // case.sizes["D"] + 5
    for index, tensor in enumerate(case.spec.inputs):
        if tensor.axes == ("R", "D"):
            pool = torch.empty(first + case.sizes["R"], case.sizes["D"], dtype=inputs[index].dtype)
            pool[first:] = inputs[index]
            inputs[index] = pool
        elif tensor.name == "head_offset":
            inputs[index] = inputs[index] + first
    if "row_offset" in attributes:
        attributes["row_offset"] += first
    return attributes


def tactics(case, dtype, run_every):
    """The portable one and the default one, in float32 one of every kind too; or every one."""
    every = case.spec.module("kernel").TACTICS
    if run_every:
        return every
    chosen = [every[0], default_tactic(every, 90)]
    if dtype == torch.float32:
        chosen += {(tactic.schedule, tactic.tma): tactic for tactic in every}.values()
    return {tactic.name: tactic for tactic in chosen}.values()


def run(case, dtype, tactic):
    inputs = case.build(dtype)
    if case is APART:
        joined = torch.cat((*inputs[:2], torch.full_like(inputs[0], torch.nan)), dim=1)
        inputs[:2] = joined.chunk(3, dim=1)[:2]
    attributes = move_pools(case, inputs) if case in FAR else case.attributes
    outputs = empty_outputs(case.spec, inputs, attributes)
    for output in outputs:
        output.fill_(torch.nan if output.is_floating_point() else -1)
    run_kernel(case.spec, inputs, attributes, outputs, tactic, NUM_SMS)
    return outputs


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    if hasattr(interpreter, "_LangPatchScope"):  # Other releases do it otherwise.
        patch_once_a_launch()
    results = {
        (case.spec.name, case.name, str(dtype), tactic.name): run(case, dtype, tactic)
        for case in (*KERNEL_CASES, WAVES, ONE_TILE, APART, *FAR)
        for dtype in ((torch.float16,) if case in FAR else (torch.float32, torch.float16))
        for tactic in tactics(case, dtype, sys.argv[2:] == ["every"])
    }
    torch.save(results, sys.argv[1])
