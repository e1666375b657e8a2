"""Damaged and foreign weight files: one clear error that names the file, or the right tensors."""

import argparse
import io
import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from forcing_kv.export.checkpoint.files import read_checkpoint, read_tensor_file
from forcing_kv.export.checkpoint.formats import pickled, torch_file
from forcing_kv.runtime_trt.errors import InputError

torch.manual_seed(0)
TENSORS = {
    f"blocks.{i}.{dtype}": torch.randn(4, 6).to(getattr(torch, dtype))
    for i in range(2)
    for dtype in ("float32", "bfloat16", "float16")
}
STATE = {"generator": TENSORS, "step": 5}


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def safetensors_bytes(header, data=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def assert_same(found):
    assert set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# What torch.save writes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}],
    ids=str,
)
def test_everything_that_pytorch_trusts_is_read(tmp_path, options):
    """Views, parameters, every dtype, and what trainers put beside the weights."""
    base = torch.arange(24.0).reshape(4, 6)
    tagged = torch.nn.Parameter(base.clone())
    tagged.tag = 3
    tensors = {
        "parameter": torch.nn.Parameter(base.half()),
        "tagged": tagged,
        "view": base[1:3, ::2],
        "transposed": base.T,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "float8": base.to(torch.float8_e4m3fn),
        "uint16": base.to(torch.uint16),
        "complex": base.to(torch.complex64),
        "bool": base > 3,
    }
    linear = torch.nn.Linear(2, 2)
    beside = {
        "rates": [0.1, {"betas": (0.9, 0.99)}],
        "epoch": 2**40,
        "name": "x",
        "none": None,
        "trusted": [{1, 2}, base.shape, torch.float16, torch.device("cpu")],
        "optimizer": {"state": {0: {"exp_avg": base}}},
    }
    path = tmp_path / "a.pt"
    torch.save({"tensors": tensors, "module": linear.state_dict(), **beside}, path, **options)
    found = read_tensor_file(path)
    assert found["epoch"] == 2**40
    assert found["rates"] == [0.1, {"betas": (0.9, 0.99)}]
    assert torch.equal(found["module"]["weight"], linear.weight)
    for name, value in tensors.items():
        assert found["tensors"][name].dtype == value.dtype
        assert found["tensors"][name].stride() == value.stride()
        assert found["tensors"][name].tolist() == value.tolist(), name


def test_a_file_without_checksums_is_read(tmp_path, monkeypatch):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_tensor_file(tmp_path / "a.pt")["generator"])


class Config:
    pass


FOREIGN = {
    "argparse.Namespace": lambda: argparse.Namespace(lr=1),
    "torch.nn.modules.linear.Linear": lambda: torch.nn.Linear(2, 2),
    "multiarray._reconstruct": lambda: np.ones(3),
    "PosixPath": lambda: Path("x"),
    "Config": Config,
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("named", FOREIGN)
def test_a_foreign_object_is_named_with_the_remedy(tmp_path, named, new):
    state = {**STATE, "config": [FOREIGN[named]()]}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(InputError) as refused:
        read_checkpoint(tmp_path / "a.pt")
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'a.pt'}: holds more than tensors: entry 'config.0' is ")
    assert named in message
    assert "torch.save({k: v.detach().cpu() for k, v in model.state_dict().items()}" in message
    assert "download" not in message


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t.to_sparse(), "entry 'x' is a sparse tensor; save it as a plain dense"),
        (lambda t: t.to("meta"), "entry 'x' is a meta tensor, which has no data"),
        (
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "entry 'x' is a tensor quantised by PyTorch; give the unquantised",
        ),
        (lambda t: t.to(torch.complex64).conj().imag, "stored conjugated or negated"),
    ],
)
def test_tensors_without_plain_data(tmp_path, make, message):
    torch.save({"x": make(torch.ones(3))}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_no_code_runs_and_no_module_is_imported(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    for new in (True, False):
        torch.save({"x": Evil()}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        with pytest.raises(InputError, match=r"entry 'x' is an object of class posix\.mkdir"):
            read_checkpoint(tmp_path / "a.pt")
    assert not ran.exists()


def test_a_dict_that_holds_itself(tmp_path):
    state: dict = {"x": torch.ones(2)}
    state["model"] = state
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match="entry model holds itself"):
        read_checkpoint(tmp_path / "a.pt")


# Records and archives --------------------------------------------------------------------------


def rewritten(content: bytes, change) -> bytes:
    """The archive with other records: `change` takes and gives a list of (name, bytes)."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in change(records):
            archive.writestr(name, data)
    return file.getvalue()


def replacing(ending, make):
    return lambda records: [(n, make(d) if n.endswith(ending) else d) for n, d in records]


def pickle_of(change):
    """data.pkl with some bytes replaced, the same length."""
    return replacing("data.pkl", lambda data: data.replace(*change, 1))


RECORDS = {
    "shorter": (replacing("data/0", lambda d: d[:-1]), r"record data/0 has 95 bytes, its.* 96"),
    "longer": (replacing("data/0", lambda d: d + b"x"), r"record data/0 has 97 bytes, its.* 96"),
    "absent": (lambda r: [e for e in r if not e[0].endswith("data/0")], "record data/0 is missing"),
    "big-endian": (replacing("byteorder", lambda d: b"big"), "byteorder is b'big'.*little-endian"),
    "no pickle": (lambda r: r[1:], "no data.pkl"),
    "program": (lambda r: [*r, ("archive/constants.pkl", b"")], "a TorchScript program"),
    "stride": (pickle_of((b"K\x06K\x01\x86", b"K\x07K\x01\x86")), r"strides \[7, 1\].*of 24"),
    "size": (pickle_of((b"K\x04K\x06\x86", b"K\x05K\x06\x86")), r"shape \[5, 6\].*reaches beyond"),
    "unknown dtype": (pickle_of((b"FloatStorage", b"FloutStorage")), "data of kind torch.Flout"),
    "cut pickle": (replacing("data.pkl", lambda d: d[:-20]), "cannot be read as a checkpoint"),
    "twice": (lambda r: [*r, r[-1]], "stands twice"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", RECORDS)
def test_records_that_do_not_fit_are_named(tmp_path, case):
    change, message = RECORDS[case]
    (tmp_path / "a.pt").write_bytes(rewritten(saved(STATE), change))
    with pytest.raises(InputError, match=message) as refused:
        read_checkpoint(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(refused.value)


def test_a_rewritten_archive_is_read(tmp_path):
    """What `rewritten` does by itself is harmless, without byteorder too, as before torch 2.1."""
    older = rewritten(saved(STATE), lambda r: [e for e in r if not e[0].endswith("byteorder")])
    (tmp_path / "a.pt").write_bytes(older)
    assert_same(read_checkpoint(tmp_path / "a.pt").tensors)


def test_a_wrong_checksum_compression_and_encryption(tmp_path):
    path, content = tmp_path / "a.pt", saved(STATE)
    value = TENSORS["blocks.0.float32"].numpy().tobytes()
    place = content.index(value)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(InputError, match=r"record 'archive/data/\d+' differs from its checksum"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)
    with pytest.raises(InputError, match="is compressed, which"):
        read_checkpoint(path)
    directory = content.index(b"PK\x01\x02")
    path.write_bytes(content[: directory + 8] + b"\x01" + content[directory + 9 :])
    with pytest.raises(InputError, match="is encrypted"):
        read_checkpoint(path)


def test_legacy_files_are_read_strictly(tmp_path):
    path, content = tmp_path / "a.pth", saved(STATE, _use_new_zipfile_serialization=False)
    path.write_bytes(content)
    assert_same(read_checkpoint(path).tensors)
    value = TENSORS["blocks.0.float32"].numpy().tobytes()
    size, little = content.index(value) - 8, content.index(b"\x88", content.index(b"endian"))
    cases = {
        "4 bytes follow its tensors": content + b"1234",
        "cut off or of another size": content[:-1],
        "or of another size": content[:size] + b"\x19" + content[size + 1 :],
        "is a big-endian file": content[:little] + b"\x89" + content[little + 1 :],
        "a pickle, but not of torch.save": pickle.dumps({"x": [1.0]}),
    }
    for message, changed in cases.items():
        path.write_bytes(changed)
        with pytest.raises(InputError, match=message):
            read_checkpoint(path)


def test_pickles_are_bounded(tmp_path, monkeypatch):
    """Deep nesting, tuples that double, counts without end, and opcodes that weights lack."""
    deep = b"(" * 5000 + b"t" * 5000
    doubled = b")" + b"\x942\x86" * 40
    cases = {
        "nested too deep": deep,
        "opcode EXT1": b"\x82\x01",
        "damaged": b"t",
        "no end|exhausted": b"]",
        "stands twice": b"}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u",
        "holds a tuple": doubled.replace(b"\x94", b""),
    }
    for message, body in cases.items():
        stop = b"" if body == b"]" else b"."
        make = replacing("data.pkl", lambda _, body=body, stop=stop: b"\x80\x02" + body + stop)
        (tmp_path / "a.pt").write_bytes(rewritten(saved(STATE), make))
        with pytest.raises(InputError, match=message):
            read_checkpoint(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(saved(STATE))
    monkeypatch.setattr(pickled, "MAX_OPCODES", 50)
    with pytest.raises(InputError, match="more than 50 opcodes"):
        read_checkpoint(tmp_path / "a.pt")
    monkeypatch.setattr(torch_file, "MAX_PICKLE_NBYTES", 50)
    with pytest.raises(InputError, match=r"data\.pkl has \d+ bytes, too many"):
        read_checkpoint(tmp_path / "a.pt")


# Safetensors -----------------------------------------------------------------------------------

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = struct.pack("<4f", 1, 2, 3, 4)
HEADERS = {
    "a name twice": (b'{"a": %b, "a": %b}' % ((json.dumps(A).encode(),) * 2), DATA[:8]),
    "an overlap": ({"a": A, "b": {**A, "data_offsets": [4, 12]}}, DATA[:12]),
    "a hole": ({"a": A, "b": {**A, "data_offsets": [12, 20]}}, DATA + DATA[:4]),
    "a wrong shape": ({"a": {**A, "shape": [3]}}, DATA[:8]),
    "a negative shape": ({"a": {**A, "shape": [-2]}}, DATA[:8]),
    "an unknown dtype": ({"a": {**A, "dtype": "F99"}}, DATA[:8]),
    "a dtype that is not read": ({"a": {**A, "dtype": "F8_E8M0", "shape": [8]}}, DATA[:8]),
    "a list": ([], b""),
    "a number": (b"4" * 5000, b""),
    "null": (None, b""),
    "no JSON": (b"{", b""),
    "depth": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "no fields": ({"a": {}}, b""),
    "trailing bytes": ({"a": A}, DATA),
    "truncation": ({"a": A}, DATA[:7]),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers_that_are_wrong(tmp_path, case):
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(*HEADERS[case]))
    with pytest.raises(InputError, match=r"a\.safetensors: "):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [2**63, 2**40, 33 << 20])
def test_a_header_that_is_too_long(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(InputError, match="its header would have"):
        read_checkpoint(tmp_path / "a.safetensors")


# Files of other kinds --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.gguf", "a.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a checkpoint"),
        (b"\x00" * 100, "cannot be read as a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>" * 4, "is a web page"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / name)


def test_a_file_under_the_name_of_another_type(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(saved(STATE))
    with pytest.raises(InputError, match=r"let its name end in \.pt"):
        read_checkpoint(tmp_path / "a.safetensors")
    (tmp_path / "b.pt").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))
    with pytest.raises(InputError, match=r"let its name end in \.gguf"):
        read_checkpoint(tmp_path / "b.pt")


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(InputError, match="is no regular file"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(InputError, match="no such checkpoint file"):
        read_checkpoint(tmp_path / "b.pt")
    with pytest.raises(InputError, match="is no regular file"):
        read_tensor_file(tmp_path)


# Mutants ---------------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "add"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, edits, length: int) -> bytes:
    """Some of the first `length` bytes changed, taken out, or more put between them."""
    changed = bytearray(content)
    for kind, part, new in edits:
        place = int(part * (length - 1))
        if kind == "flip":
            changed[place % len(changed)] ^= 1 << new[0] % 8
        elif kind == "set":
            changed[place : place + len(new)] = new
        elif kind == "cut":
            del changed[place : place + new[0]]
        else:
            changed[place:place] = new
        if not changed:
            break
    return bytes(changed)


def check_mutant(path: Path, content: bytes) -> dict | None:
    """The tensors of a mutant, or None where it is refused as it should be."""
    path.write_bytes(content)
    refused = None
    try:
        found = read_checkpoint(path).tensors
    except InputError as error:
        refused = str(error)
    assert refused is None or str(path) in refused
    return None if refused else {name: value.clone() for name, value in found.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mutants")


ZIPPED = saved(STATE)
LEGACY = saved(STATE, _use_new_zipfile_serialization=False)


@settings(max_examples=150, deadline=2000, derandomize=True)
@given(edits=EDITS)
def test_mutants_of_pt_files(folder, edits):
    """Everything in them has a checksum or is without effect."""
    found = check_mutant(folder / "a.pt", mutated(ZIPPED, edits, len(ZIPPED)))
    if found is not None:
        assert_same(found)


@settings(max_examples=100, deadline=2000, derandomize=True)
@given(edits=EDITS)
def test_mutants_of_legacy_files(folder, edits):
    """They have no checksums: what is read has the shapes and dtypes of the file all the same."""
    found = check_mutant(folder / "a.pth", mutated(LEGACY, edits, LEGACY.rindex(b"storage")))
    for name in set(found or ()) & set(TENSORS):
        assert found[name].dtype in (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=150, deadline=2000, derandomize=True)
@given(edits=EDITS)
def test_mutants_of_safetensors_headers(folder, edits):
    """A header has no checksum: a name or a dtype may be another one, but no tensor's place."""
    path = folder / "b.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    found = check_mutant(path, mutated(content, edits, length))
    for name in set(found or ()) & set(TENSORS):
        if found[name].dtype == TENSORS[name].dtype:
            assert torch.equal(found[name].flatten(), TENSORS[name].flatten())


@settings(max_examples=200, deadline=2000, derandomize=True)
@given(body=st.binary(max_size=60), seed=st.integers(0, 2**32))
def test_pickles_of_any_opcodes(folder, body, seed):
    """With a checksum that is right: damaged on purpose."""
    opcodes = (
        b"()}]|q\x00h\x00\x85\x86\x87tsuaeRQbK\x010.cX\x01\x00\x00\x00a\x81\x93\x94\x8f\x90\x91"
    )
    chosen = random.Random(seed).choices([opcodes[i : i + 1] for i in range(len(opcodes))], k=40)
    make = replacing("data.pkl", lambda _: b"\x80\x04" + body + b"".join(chosen) + b".")
    check_mutant(folder / "c.pt", rewritten(ZIPPED, make))
