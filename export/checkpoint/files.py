"""Weight files to named tensors: what trainers nest them in, and what converters made of them.

Tensors stay mapped to their file, so reading costs no memory until they are converted. They are not
to be written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from forcing_kv.export.checkpoint.formats.gguf_file import read_gguf
from forcing_kv.export.checkpoint.formats.safetensors import map_safetensors
from forcing_kv.export.checkpoint.formats.torch_file import read_torch_file
from forcing_kv.export.checkpoint.names import (
    EMA_ENTRIES,
    PLAIN_ENTRIES,
    Weights,
    is_averaged,
    is_diffusers,
    official_from_diffusers,
    strip_wrappers,
)
from forcing_kv.export.checkpoint.quantised import Dequantised, dequantised
from forcing_kv.export.checkpoint.shards import (
    GGUF_SUFFIX,
    SAFETENSORS_SUFFIXES,
    SUFFIXES,
    TORCH_SUFFIXES,
    find_weights,
    read_shards,
)
from forcing_kv.runtime_trt.bundle.hashes import sha256_of
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError


@dataclass(frozen=True)
class RawCheckpoint:
    """Tensors as a file names them, wrappers stripped."""

    path: Path
    layout: str
    """What the file was found to be, for people."""
    tensors: dict[str, Tensor]
    """Under the official names, mapped to the file, in the file's dtype; quantised ones without
    data, on the device `meta`."""
    packed: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """What computes a quantised tensor, in float32."""
    form: str | None = None
    """What the weights are stored as and computed back from, for people; None for plain tensors."""

    @property
    def description(self) -> str:
        """What is read of the file, for people."""
        return f"{self.path.name}: {self.layout}" + (f"; {self.form}" if self.form else "")


def read_checkpoint(path: Path, weights: Weights = "auto") -> RawCheckpoint:
    """Read a denoiser checkpoint of any supported layout; never unpickles code.

    Args:
        path: `.safetensors`, `.gguf` or `.pt` file (`.pth`, `.bin`, `.ckpt`), an index of shards or
            one of them, or a folder with one checkpoint.
        weights: which state dict, where a trainer saved both: the averaged (`ema`) or the `plain`
            one; `auto` takes the averaged one if there is one.

    Raises:
        InputError: missing, unreadable, truncated, of another type, or quantised in a format that
            is not computed back.
    """
    if weights not in get_args(Weights):
        raise InputError(f"weights is {weights!r}; choose one of {list(get_args(Weights))}")
    found = find_weights(path)
    suffix = found.files[0].suffix.lower()
    raw: Mapping[str, Any]
    packed: dict[str, Callable[[], Tensor]] = {}
    container, types = suffix, ""
    if suffix == GGUF_SUFFIX and len(found.files) == 1:
        raw, packed, types = _guarded(found.files[0], read_gguf)
    elif len(found.files) > 1 or found.index is not None:
        raw = read_shards(found, read_tensor_file)
        container = f"{len(found.files)} {suffix.removeprefix('.')} shards"
    else:
        raw = read_tensor_file(found.files[0])
    nesting, state = _state_dict(raw, weights, path)
    names, key_of = _official_names(state, path)
    content = dequantised({name: state[key] for name, key in key_of.items()}, str(path))
    if types:
        computed = {name: packed[key] for name, key in key_of.items() if key in packed}
        content = Dequantised(content.tensors, computed, f"GGUF of {types}")
    layout = ", ".join((container, *nesting, names))
    return RawCheckpoint(path, layout, content.tensors, content.packed, content.form)


def _state_dict(
    raw: Mapping[str, Any], weights: Weights, path: Path
) -> tuple[list[str], dict[str, Tensor]]:
    """The state dict that is asked for, and what it lies in, for people."""
    nesting: list[str] = []
    averaged = False
    seen = {id(raw)}
    while True:
        entries = [key for key in (*EMA_ENTRIES, *PLAIN_ENTRIES) if _holds_tensors(raw.get(key))]
        wanted = [key for key in entries if key not in EMA_ENTRIES or weights != "plain"]
        if not wanted:
            break
        averaged = averaged or wanted[0] in EMA_ENTRIES
        beside = [key for key in entries if key != wanted[0]]
        nesting.append(f"entry {wanted[0]}" + (f" (not {', '.join(beside)})" if beside else ""))
        raw = raw[wanted[0]]
        if id(raw) in seen:
            raise InputError(f"{path}: entry {wanted[0]} holds itself; save a plain state dict")
        seen.add(id(raw))
    tensors = {name: value for name, value in raw.items() if isinstance(value, Tensor)}
    wrong = [name for name, value in raw.items() if name not in tensors and "." in name]
    if wrong and tensors:
        kind = getattr(raw[wrong[0]], "what", f"a {type(raw[wrong[0]]).__name__}")
        raise InputError(f"{path}: {wrong[0]} is {kind}, not a tensor; save a plain state dict")
    names = [] if averaged else list(filter(is_averaged, tensors))
    if names and (weights != "plain" or len(names) == len(tensors)):
        averaged = True
        nesting.append("averaged weights" + (" (not plain ones)" if names != [*tensors] else ""))
        tensors = {name: tensors[name] for name in names}
    elif names:
        nesting.append("plain weights (not averaged ones)")
        tensors = {name: value for name, value in tensors.items() if name not in set(names)}
    if weights == "ema" and not averaged:
        raise InputError(
            f"{path}: holds no averaged weights (such as `generator_ema`); use --weights plain"
        )
    if weights == "plain" and (averaged or (entries and not tensors)):
        raise InputError(f"{path}: holds averaged weights alone; use --weights ema")
    if not tensors:
        raise InputError(
            f"{path}: holds no tensors (entries: {sorted(map(str, raw))[:8]}); give a denoiser "
            "checkpoint"
        )
    return nesting, tensors


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(each, (Tensor, Mapping)) for each in value.values()
    )


def _official_names(tensors: Mapping[str, Tensor], path: Path) -> tuple[str, dict[str, str]]:
    """What names a file has, for people, and its name of each official one."""
    stripped = {key: strip_wrappers(key) for key in tensors}
    names = "official names"
    if is_diffusers(stripped.values()):
        stripped = {key: official_from_diffusers(name) for key, name in stripped.items()}
        names = "diffusers names"
    key_of: dict[str, str] = {}
    for key, name in stripped.items():
        if name in key_of:
            raise InputError(
                f"{path}: {key_of[name]} and {key} are both {name}; give a checkpoint of one model"
            )
        key_of[name] = key
    return names, key_of


def weight_files(path: Path) -> list[Path]:
    """Every file that holds tensors of a checkpoint, shards in order.

    Raises:
        InputError: one is missing, or it is not clear which.
    """
    return find_weights(path).files


def checkpoint_sha256(path: Path) -> str:
    """Hash of a checkpoint, hexadecimal; of shards, the hash of their hashes."""
    hashes = [sha256_of(file) for file in weight_files(path)]
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()


def read_tensor_file(path: Path) -> Mapping[str, Any]:
    """Read one weight file as it is, mapped rather than loaded.

    Raises:
        InputError: missing, unreadable, truncated, or of another type.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is no regular file' if path.exists() else 'no such file'}")
    if path.suffix.lower() in SAFETENSORS_SUFFIXES:
        loaded: Any = _guarded(path, map_safetensors)
    elif path.suffix.lower() in TORCH_SUFFIXES:
        loaded = _guarded(path, read_torch_file)
    else:
        raise InputError(f"{path}: type {path.suffix!r}; give one of {', '.join(SUFFIXES)}")
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{path}: holds a {type(loaded).__name__}, not named tensors; save a state dict"
        )
    return loaded


def _guarded(path: Path, read: Callable[[Path], Any]) -> Any:
    """Call a reader, and say of a file that it cannot read what the file seems to be."""
    try:
        return read(path)
    except ForcingKvError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{path}: cannot be read as a checkpoint ({reason}); {_mistaken(path)}"
        ) from error


def _mistaken(path: Path) -> str:
    """What a file that cannot be read may be, and what to do."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, not the file itself: download that"
    for magic, suffixes in ((b"GGUF", (GGUF_SUFFIX,)), (b"PK\x03\x04", TORCH_SUFFIXES)):
        if head.startswith(magic) and path.suffix.lower() not in suffixes:
            return f"it seems to be of another type: let its name end in {suffixes[0]}"
    return (
        "it may be truncated or of another type: download it again and compare its size and "
        "checksum"
    )
