"""Files of `torch.save`, in its zip format and the one before it, read without PyTorch's reader.

PyTorch's own reader maps tensors without comparing a record's length or checksum with anything.
"""

from __future__ import annotations

import io
import re
import zlib
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from torch import Tensor

from forcing_kv.export.checkpoint.formats.mapped import bytes_of, map_file
from forcing_kv.export.checkpoint.formats.pickled import read_pickle
from forcing_kv.export.checkpoint.formats.torch_tensors import DAMAGED, RESAVE, TensorMaker
from forcing_kv.runtime_trt.errors import InputError

MAX_PICKLE_NBYTES = 64 << 20
"""Longest pickle that is read; a model's has some 100 KB."""
_CRC_NBYTES = 64 << 20
_LOCAL_HEADER_NBYTES = 30
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LITTLE_ENDIAN = "save it again on a little-endian machine (x86, ARM)"


def read_torch_file(path: Path) -> Any:
    """What a file of `torch.save` holds; its code is never run.

    Returns:
        Plain data and tensors, mapped (see `map_file`).

    Raises:
        InputError: more than tensors and plain data, or damaged: names the entry or the record.
        Exception: whatever else a damaged file leads to.
    """
    content = map_file(path)
    if bytes_of(content, 0, 2) == b"PK":
        return _read_zip(path, content)
    return _read_legacy(path, content)


def _read_zip(path: Path, content: Tensor) -> Any:
    """The zip format: data.pkl, and one stored record for each storage."""
    records = _records(path, content)
    pickles = [name for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise InputError(f"{path}: a zip file, but not of torch.save: it has no data.pkl; {RESAVE}")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in records:
        raise InputError(f"{path}: a TorchScript program, not named tensors; {RESAVE}")
    order = bytes_of(content, *records.get(f"{root}byteorder", (0, 0)))
    if order not in (b"", b"little"):
        raise InputError(
            f"{path}: record byteorder is {order[:20]!r}, but only little-endian files are read; "
            + _LITTLE_ENDIAN
        )
    data = f"{root}data/"
    storages = {n.removeprefix(data): place for n, place in records.items() if n.startswith(data)}
    begin, end = records[pickles[0]]
    if end - begin > MAX_PICKLE_NBYTES:
        raise InputError(f"{path}: record data.pkl has {end - begin:,} bytes, too many; {RESAVE}")
    return TensorMaker(path, content, storages).made(io.BytesIO(bytes_of(content, begin, end)))


def _records(path: Path, content: Tensor) -> dict[str, tuple[int, int]]:
    """Begin and end of every record's bytes, each checked against the archive's directory."""
    with ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    # `torch.serialization.set_crc32_options(False)` leaves them all zero.
    has_checksums = any(entry.CRC for entry in entries)
    records: dict[str, tuple[int, int]] = {}
    last = 0
    for entry in entries:
        where = f"{path}: record {entry.orig_filename!r}"
        begin, end = _place(entry, content, where)
        if entry.orig_filename in records or entry.header_offset < last:
            raise InputError(f"{where} stands twice in it, or overlaps another; {DAMAGED}")
        if has_checksums and _crc(content[begin:end]) != entry.CRC:
            raise InputError(f"{where} differs from its checksum; {DAMAGED}")
        records[entry.orig_filename], last = (begin, end), end
    return records


def _place(entry: ZipInfo, content: Tensor, where: str) -> tuple[int, int]:
    """Begin and end of a record's bytes."""
    if entry.flag_bits & 1:
        raise InputError(f"{where} is encrypted; give the checkpoint without a password")
    if entry.compress_type != ZIP_STORED or entry.compress_size != entry.file_size:
        raise InputError(
            f"{where} is compressed, which torch.save never does; unpack it and zip it again "
            "with `zip -0 -r`"
        )
    begin = entry.header_offset
    header = bytes_of(content, begin, begin + _LOCAL_HEADER_NBYTES)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    begin += _LOCAL_HEADER_NBYTES
    local = bytes_of(content, begin, begin + name)
    begin += name + extra
    end = begin + entry.file_size
    if header[:4] != b"PK\x03\x04" or local != entry.orig_filename.encode() or end > len(content):
        raise InputError(f"{where} is not where the directory says, or cut off; {DAMAGED}")
    return begin, end


def _crc(content: Tensor) -> int:
    crc = 0
    for part in content.split(_CRC_NBYTES):
        crc = zlib.crc32(part.numpy(), crc)
    return crc


def _read_legacy(path: Path, content: Tensor) -> Any:
    """The format before 2020: pickles one after the other, then every storage and its size."""
    stream = io.BytesIO(bytes_of(content, 0, MAX_PICKLE_NBYTES))
    sizes = TensorMaker(path, content, None)
    if read_pickle(stream, sizes) != _LEGACY_MAGIC:
        raise InputError(f"{path}: a pickle, but not of torch.save; {RESAVE}")
    protocol, system = read_pickle(stream, sizes), read_pickle(stream, sizes)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise InputError(f"{path}: of torch.save's protocol {protocol!r}; {RESAVE}")
    if system.get("little_endian") is not True:
        raise InputError(f"{path}: is a big-endian file; {_LITTLE_ENDIAN}")
    begin = stream.tell()
    sizes.made(stream)
    keys = read_pickle(stream, sizes)
    storages: dict[str, tuple[int, int]] = {}
    place = stream.tell()
    for key in keys if isinstance(keys, list) else [keys]:
        if not isinstance(key, str) or key not in sizes.nbytes or key in storages:
            raise InputError(f"{path}: storage {key!r} is unknown or stands twice; {DAMAGED}")
        nbytes, count = sizes.nbytes[key], sizes.counts[key]
        stated = int.from_bytes(bytes_of(content, place, place + 8), "little")
        storages[key] = (place + 8, place + 8 + nbytes)
        place += 8 + nbytes
        if stated != count or place > len(content):
            raise InputError(f"{path}: storage {key!r} is cut off or of another size; {DAMAGED}")
    if place != len(content):
        raise InputError(f"{path}: {len(content) - place} bytes follow its tensors; {DAMAGED}")
    stream.seek(begin)
    return TensorMaker(path, content, storages).made(stream)
