"""Files and folders appear whole or not at all, whatever interrupts their making."""

import os
import secrets
from pathlib import Path

import pytest

from forcing_kv.runtime_trt.bundle.files import replaced_file, replaced_folder, write_file
from forcing_kv.runtime_trt.errors import ForcingKvError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def foreseen(monkeypatch):
    """The hidden name of the next `thing`, as if somebody had guessed it."""
    monkeypatch.setattr(secrets, "token_hex", lambda _: "guessed")
    return ".thing.fkv-guessed"


def test_a_file_appears_whole_and_with_the_users_rights(tmp_path):
    target = tmp_path / "thing"
    target.write_text("old")
    mask = os.umask(0o027)
    try:
        with replaced_file(target) as file:
            file.write(b"new")
            file.flush()
            assert target.read_text() == "old"
            (hidden,) = set(names(tmp_path)) - {"thing"}
            assert Path(file.name) == tmp_path / hidden
    finally:
        os.umask(mask)
    assert names(tmp_path) == ["thing"]
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_two_writers_do_not_share_a_name(tmp_path):
    with replaced_file(tmp_path / "thing") as one, replaced_file(tmp_path / "thing") as other:
        one.write(b"longer than the other")
        other.write(b"short")
    assert (tmp_path / "thing").read_bytes() == b"longer than the other"


def fail_half_way(making, error):
    if isinstance(making, Path):
        (making / "half").touch()
    else:
        making.write(b"half")
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("replaced", [replaced_file, replaced_folder])
@pytest.mark.parametrize("there", [False, True])
def test_what_is_interrupted_leaves_nothing_and_the_old(tmp_path, replaced, error, there):
    target = tmp_path / "thing"
    if there and replaced is replaced_folder:
        target.mkdir()
        (target / "old").touch()
    elif there:
        target.write_text("old")
    with pytest.raises(error), replaced(target) as making:
        fail_half_way(making, error)
    assert names(tmp_path) == ["thing"] * there
    if there:
        assert (names(target) if target.is_dir() else [target.read_text()]) == ["old"]


def test_a_link_at_the_hidden_name_is_not_followed(tmp_path, foreseen):
    (tmp_path / "precious").write_text("untouched")
    (tmp_path / foreseen).symlink_to(tmp_path / "precious")
    with pytest.raises(ForcingKvError, match="/thing: File exists"):
        write_file(tmp_path / "thing", b"new")
    assert (tmp_path / "precious").read_text() == "untouched"
    assert (tmp_path / foreseen).is_symlink()
    with (
        pytest.raises(ForcingKvError, match="/thing: File exists"),
        replaced_folder(tmp_path / "thing"),
    ):
        pass
    assert names(tmp_path) == [foreseen, "precious"]


def test_a_link_at_a_files_path_is_replaced_and_at_a_folders_followed(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "to file").symlink_to(tmp_path / "file")
    write_file(tmp_path / "to file", b"new")
    assert (tmp_path / "file").read_text() == "old"
    assert not (tmp_path / "to file").is_symlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "to folder").symlink_to(tmp_path / "folder")
    with replaced_folder(tmp_path / "to folder") as making:
        (making / "new").touch()
    assert (tmp_path / "to folder").is_symlink()
    assert names(tmp_path / "folder") == ["new"]


def test_a_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "thing"
    for content in ("old", "new"):
        with replaced_folder(target) as making:
            (making / content).touch()
    assert names(target) == ["new"]
    assert names(target.parent) == ["thing"]


def test_errors_name_the_path_that_was_asked_for(tmp_path):
    with pytest.raises(ForcingKvError, match=r"none/thing: No such file or directory$"):
        write_file(tmp_path / "none" / "thing", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ForcingKvError, match=r"folder: Is a directory; name a file$"):
        write_file(tmp_path / "folder", b"")
    with pytest.raises(ForcingKvError, match="thing: No space left on device; free some"):  # noqa: SIM117
        with replaced_file(tmp_path / "thing"):
            raise OSError(28, "No space left on device")
    assert names(tmp_path) == ["folder"]


def test_errors_about_other_files_keep_their_own_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), replaced_file(tmp_path / "thing"):
        (tmp_path / "elsewhere").read_bytes()
