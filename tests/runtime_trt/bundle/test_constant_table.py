"""Constants come back as they were described."""

import numpy as np
import pytest

from forcing_kv.runtime_trt.bundle.constants import (
    ConstantEntry,
    Piece,
    map_constants,
    parse_table,
    read_constants,
    write_table,
)
from forcing_kv.runtime_trt.errors import BundleError


def test_pieces_follow_one_another(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(10)))
    (tmp_path / "b.bin").write_bytes(bytes(range(100, 110)))
    entry = ConstantEntry((2, 3), "int8", (Piece("a.bin", 2, 4), Piece("b.bin", 0, 2)))
    write_table(tmp_path / "table.json", {"w": entry})
    table = parse_table((tmp_path / "table.json").read_bytes(), tmp_path / "table.json")
    assert table == {"w": entry}
    ((name, found, content),) = read_constants(tmp_path, table)
    assert (name, found) == ("w", entry)
    np.testing.assert_array_equal(content, [2, 3, 4, 5, 100, 101])


def test_one_piece_is_mapped_without_a_copy(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(10)))
    entry = ConstantEntry((3,), "int8", (Piece("a.bin", 2, 3),))
    ((name, found, content),) = map_constants(tmp_path, {"w": entry})
    assert (name, found) == ("w", entry)
    np.testing.assert_array_equal(content, [2, 3, 4])
    assert not content.flags.owndata


def test_a_short_file_is_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(10))
    table = {"w": ConstantEntry((8,), "int8", (Piece("a.bin", 4, 8),))}
    with pytest.raises(BundleError, match=r"a\.bin: too short, for constant w ends at 12"):
        list(read_constants(tmp_path, table))
    with pytest.raises(BundleError, match=r"a\.bin: too short, for constant w ends at 12"):
        list(map_constants(tmp_path, table))


@pytest.mark.parametrize("content", ["", "[1]", '{"w": {}}'])
def test_a_malformed_table(tmp_path, content):
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(BundleError, match="build the engine again"):
        parse_table((tmp_path / "table.json").read_bytes(), tmp_path / "table.json")
