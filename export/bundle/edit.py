"""Changes a bundle that is there: one process at a time, and by one rename, that of its manifest.

What is added takes names that the manifest does not hold: each part has two, and goes to the one
that the part it replaces does not have. What no manifest names is removed after that, or by the
next change where the process ends before.
"""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from forcing_kv.runtime_trt.bundle.atomic.files import remove_litter
from forcing_kv.runtime_trt.bundle.atomic.locks import locked_folder
from forcing_kv.runtime_trt.bundle.manifest import GRAPH_FOLDER, Manifest, read_manifest

DECODER_GRAPHS = ("decode", "decode_first")
_SECOND = "-2"


@contextmanager
def changed_bundle(bundle: Path) -> Iterator[Manifest]:
    """The manifest of a bundle that no other process changes during the block; waits for that.

    Raises:
        BundleError: no readable bundle.
    """
    read_manifest(bundle)  # What is no bundle is not locked.
    with locked_folder(bundle):
        remove_litter(bundle)
        yield read_manifest(bundle)


def base_name(name: str) -> str:
    """What a part is called, whichever of its two names it has."""
    return name.removesuffix(_SECOND)


def free_name(name: str, taken: Container[str]) -> str:
    """The name that a part is to take: the other one where the part is there already."""
    return name + _SECOND if name in taken else name


def discard_engines(bundle: Path, manifest: Manifest, folder: str) -> None:
    """Remove engines that stand under either name of `folder` and are in no record."""
    taken = {record.folder for record in manifest.engines}
    for name in (folder, folder + _SECOND):
        if name not in taken and (bundle / name).is_dir():
            shutil.rmtree(bundle / name)


def decoder_stems(manifest: Manifest) -> set[str]:
    """What the files of the bundle's decoders begin with."""
    return {PurePath(info.weights_file).stem for info in manifest.decoders.values()}


def decoder_files(stem: str) -> list[str]:
    """Every file that a decoder may have."""
    graphs = [f"{GRAPH_FOLDER}/{stem}_{graph}.onnx" for graph in DECODER_GRAPHS]
    return [f"{GRAPH_FOLDER}/{stem}.bin", *graphs]


def discard_decoder(bundle: Path, manifest: Manifest, kind: str) -> None:
    """Remove files of a decoder that the manifest does not name."""
    taken = decoder_stems(manifest)
    for stem in (kind, kind + _SECOND):
        if stem not in taken:
            for file in decoder_files(stem):
                (bundle / file).unlink(missing_ok=True)
