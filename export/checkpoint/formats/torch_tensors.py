"""What the pickle of `torch.save` says of tensors, made of a file's bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forcing_kv.export.checkpoint.formats.mapped import typed
from forcing_kv.export.checkpoint.formats.pickled import Named, Other, read_pickle
from forcing_kv.runtime_trt.errors import InputError

DAMAGED = "download it again and compare its size and checksum"
RESAVE = (
    "save the weights alone where it was made: torch.save({k: v.detach().cpu() for k, v in "
    'model.state_dict().items()}, "weights.pt")'
)
_MAX_DEPTH = 100
_MAX_DIMENSIONS = 32
_DENSE = "save it as a plain dense tensor"
_QUANTISED = "give the unquantised checkpoint"
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": Other("a sparse tensor", _DENSE),
    "_rebuild_nested_tensor": Other("a nested tensor", _DENSE),
    "_rebuild_qtensor": Other("a tensor quantised by PyTorch", _QUANTISED),
    "_rebuild_meta_tensor_no_storage": Other("a meta tensor, which has no data", RESAVE),
    "_rebuild_wrapper_subclass": Other("a tensor of a subclass", RESAVE),
    "_rebuild_device_tensor_from_numpy": Other("a tensor of another device", RESAVE),
    "_rebuild_device_tensor_from_cpu_tensor": Other("a tensor of another device", RESAVE),
}
_TRUSTED = {
    *("collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.frozenset"),
    *("builtins.bytearray", "builtins.complex", "torch.Size", "torch.device", "torch.Tensor"),
    *("torch.nn.parameter.Parameter", "torch.serialization._get_layout", "_codecs.encode"),
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"),
    *("torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter"),
    *("torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2"),
    *(f"torch._utils.{name}" for name in _OTHER_TENSORS),
}
"""Names that PyTorch trusts in weights too (`torch.load(…, weights_only=True)`)."""
_QUANTISERS = ("torchao.", "torch.ao.", "bitsandbytes.", "optimum.", "hqq.", "comfy", "gguf")


@dataclass(frozen=True)
class _Storage:
    name: str
    begin: int
    end: int
    dtype: torch.dtype


@dataclass
class TensorMaker:
    """Makes tensors of what a pickle says of them."""

    path: Path
    content: Tensor
    """The file's bytes."""
    storages: Mapping[str, tuple[int, int]] | None
    """Begin and end of each storage's bytes; None to note their sizes alone."""
    counts: dict[str, int] = field(default_factory=dict)
    """Elements of each storage that was referred to, and its bytes."""
    nbytes: dict[str, int] = field(default_factory=dict)

    def made(self, stream: io.BytesIO) -> Any:
        """Read a pickle and refuse what is neither a tensor nor plain data.

        Raises:
            InputError: names what is there, and where.
            ValueError: damaged.
        """
        made = read_pickle(stream, self)
        for place, value in _leaves(made):
            if isinstance(value, Named) and not _is_trusted(value.name):
                value = _foreign(value.name)
            if isinstance(value, Other) and value.remedy:
                entry = f"entry {place!r} is {value.what}" if place else value.what
                raise InputError(f"{self.path}: holds more than tensors: {entry}; {value.remedy}")
        return made

    def refer(self, key: Any) -> Any:
        if not isinstance(key, tuple) or len(key) < 3 or not isinstance(key[1], Named):
            raise ValueError("what a tensor's data refers to is damaged")
        if key[0] == "module":
            return _foreign(key[1].name)
        _, kind, name, _, count, *view = key
        dtype = _storage_dtype(kind.name)
        if dtype is None or any(part is not None for part in view):
            return Other(f"data of kind {kind.name}", RESAVE)
        if not (_are_counts([count]) and isinstance(name, str)):
            raise ValueError("a storage has no size")
        self.counts[name], self.nbytes[name] = count, count * dtype.itemsize
        if self.storages is None:
            return Other("a storage")
        begin, end = self.storages.get(name, (0, -1))
        if end - begin != self.nbytes[name]:
            found = "is missing" if end < begin else f"has {end - begin:,} bytes"
            raise InputError(
                f"{self.path}: record data/{name} {found}, its tensors need "
                f"{self.nbytes[name]:,}; {DAMAGED}"
            )
        return _Storage(name, begin, end, dtype)

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        function = name.rpartition(".")[2]
        if not _is_trusted(name):
            return _foreign(name)
        if function in _OTHER_TENSORS:
            return _OTHER_TENSORS[function]
        if function in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return self._tensor(arguments[:4], None, arguments[6:])
        if function == "_rebuild_tensor_v3":
            return self._tensor(arguments[:4], _dtype(arguments[6]), arguments[7:])
        if function.startswith("_rebuild_parameter"):
            return arguments[0]
        if function == "_rebuild_from_type_v2":
            return self._of_type(*arguments[:3])
        if function == "OrderedDict":
            return Other("a dict of Python 2", RESAVE) if arguments else {}
        return Other(f"a {function}")

    def _of_type(self, function: Any, kind: Any, arguments: Any) -> Any:
        """A tensor with attributes of its own, or of a subclass."""
        if not (isinstance(function, Named) and isinstance(kind, Named)):
            raise ValueError("a tensor's type is no name")
        if not _is_trusted(kind.name):
            return _foreign(kind.name)
        return self.call(function.name, arguments)

    def _tensor(self, arguments: Any, dtype: torch.dtype | None, metadata: Any) -> Any:
        storage, offset, size, stride = arguments
        if isinstance(storage, Other):
            return storage
        if any(metadata):
            return Other("a tensor that is stored conjugated or negated", _DENSE)
        if not isinstance(storage, _Storage) or max(len(size), len(stride)) > _MAX_DIMENSIONS:
            raise ValueError("a tensor's storage or shape is damaged")
        if not _are_counts([offset, *size, *stride]):
            raise ValueError("a tensor's shape is damaged")
        elements = typed(self.content, storage.begin, storage.end, dtype or storage.dtype)
        span = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if math.prod(size) and offset + span > len(elements):
            raise InputError(
                f"{self.path}: a tensor of shape {list(size)}, strides {list(stride)} and offset "
                f"{offset} reaches beyond record data/{storage.name} of {len(elements)} elements; "
                f"{DAMAGED}"
            )
        return elements.as_strided(size, stride, elements.storage_offset() + offset)


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _storage_dtype(name: str) -> torch.dtype | None:
    module, _, kind = name.rpartition(".")
    known = module in ("torch", "torch.cuda", "torch.storage")
    return _STORAGES.get(kind.removeprefix("_")) if known else None


def _dtype(named: Any) -> torch.dtype:
    found = vars(torch).get(named.name.removeprefix("torch.")) if isinstance(named, Named) else None
    if not isinstance(found, torch.dtype):
        raise ValueError("a tensor's dtype is unknown")
    return found


def _is_trusted(name: str) -> bool:
    known = vars(torch).get(name.removeprefix("torch.")) if name.startswith("torch.") else None
    kinds = (torch.dtype, torch.layout, torch.qscheme)
    return name in _TRUSTED or _storage_dtype(name) is not None or isinstance(known, kinds)


def _foreign(name: str) -> Other:
    remedy = _QUANTISED if name.startswith(_QUANTISERS) else RESAVE
    return Other(f"an object of class {name}", remedy)


def _leaves(value: Any) -> Iterable[tuple[str, Any]]:
    """Everything in nested dicts, lists and tuples by its dotted place, each holder once."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while waiting:
        place, value = waiting.pop()
        parts: Iterable[tuple[Any, Any]]
        if isinstance(value, dict):
            parts = value.items()
        elif isinstance(value, (list, tuple)):
            parts = enumerate(value)
        else:
            yield ".".join(place), value
            continue
        if len(place) > _MAX_DEPTH:
            raise ValueError("it is nested too deep")
        if id(value) not in seen:
            seen.add(id(value))
            waiting += [((*place, str(name)), each) for name, each in parts]
