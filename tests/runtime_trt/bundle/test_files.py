"""Files and folders appear whole or not at all, whatever interrupts their making."""

import os
import secrets
import threading
from pathlib import Path

import pytest

from forcing_kv.runtime_trt.bundle.atomic import locks, places
from forcing_kv.runtime_trt.bundle.atomic.files import (
    append_line,
    check_file,
    check_names,
    filled_folder,
    replaced_file,
    replaced_folder,
    write_file,
)
from forcing_kv.runtime_trt.bundle.atomic.locks import claimed, claimed_in, locked_folder
from forcing_kv.runtime_trt.errors import ForcingKvError, InputError


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


@pytest.mark.parametrize("can_rename", [True, False], ids=["renameat2", "without"])
@pytest.mark.parametrize("replaced", [replaced_file, replaced_folder])
def test_what_has_appeared_meanwhile_is_not_destroyed(tmp_path, monkeypatch, replaced, can_rename):
    if not can_rename:
        monkeypatch.setattr(places, "_rename", lambda *_: False)
    with pytest.raises(InputError, match="thing: has appeared meanwhile, and is left"):  # noqa: SIM117
        with replaced(tmp_path / "thing", force=False):
            (tmp_path / "thing").write_text("another's")
    assert (tmp_path / "thing").read_text() == "another's"
    with replaced(tmp_path / "free", force=False):
        pass
    assert names(tmp_path) == ["free", "thing"]


def test_a_folder_is_filled_with_what_it_may_hold(tmp_path):
    for content in ("old", "new"):
        with filled_folder(tmp_path / "a" / "thing", force=content == "new") as folder:
            (folder / "file").write_text(content)
            (folder / "folder").mkdir()
            (folder / "folder" / content).touch()
        (tmp_path / "a" / "thing" / "users").write_text("a user's")
    assert names(tmp_path / "a" / "thing") == ["file", "folder", "users"]
    assert (tmp_path / "a" / "thing" / "file").read_text() == "new"
    assert names(tmp_path / "a" / "thing" / "folder") == ["new"]
    with pytest.raises(InputError, match=r"thing/file'\] exist; choose another"):
        check_names(tmp_path / "a" / "thing", ["file", "other"], force=False)
    with (
        pytest.raises(InputError, match=r"thing/users'\] exist"),
        filled_folder(tmp_path / "a" / "thing", force=False) as folder,
    ):
        (folder / "users").write_text("ours")
    assert (tmp_path / "a" / "thing" / "users").read_text() == "a user's"
    assert names(tmp_path / "a" / "thing") == ["file", "folder", "users"]


def test_folders_made_for_what_failed_go_again(tmp_path):
    with pytest.raises(KeyError), replaced_folder(tmp_path / "a" / "b" / "thing"):
        raise KeyError
    assert names(tmp_path) == []


def test_a_long_name_is_written(tmp_path):
    write_file(tmp_path / ("n" * 255), b"new")
    with pytest.raises(ForcingKvError, match="File name too long; choose a shorter one"):
        write_file(tmp_path / ("n" * 256), b"new")
    assert names(tmp_path) == ["n" * 255]


def test_a_claim_is_refused_while_another_has_it(tmp_path):
    target = tmp_path / "a" / "thing"
    with claimed(target):
        assert names(tmp_path / "a") == [".thing.fkv-lock"]
        mine = rf"thing: process {os.getpid()} \(`.*`\) is writing it; wait for its end"
        with pytest.raises(InputError, match=mine), claimed(target):
            pass
        with claimed(target.with_name("other")), claimed_in(target.parent, "further"):
            pass
        assert names(tmp_path / "a") == [".thing.fkv-lock"]
    assert names(tmp_path) == []
    (tmp_path / ".thing.fkv-lock").write_text("forcing_kv 1 of a process that was killed")
    with claimed(tmp_path / "thing"):
        pass
    assert names(tmp_path) == []


def test_a_claim_may_be_waited_for(tmp_path, caplog):
    done = []

    def wait():
        with claimed(tmp_path / "thing", wait=True):
            done.append("other")

    other = threading.Thread(target=wait)
    with claimed(tmp_path / "thing"):
        other.start()
        other.join(0.2)
        done.append("first")
    other.join()
    assert done == ["first", "other"]
    assert "thing: waiting for process" in caplog.text
    assert names(tmp_path) == []


def test_what_is_no_claim_is_left(tmp_path):
    (tmp_path / "kept").write_text("a user's file")
    lock = tmp_path / ".thing.fkv-lock"
    for put in (lock.hardlink_to, lock.symlink_to):
        put(tmp_path / "kept")
        strange = "lock: is no lock of forcing_kv, and in the way; move it away"
        with pytest.raises(ForcingKvError, match=strange), claimed(tmp_path / "thing"):
            pass
        write_file(tmp_path / "other", b"")
        assert (tmp_path / "kept").read_text() == "a user's file"
        lock.unlink()


def test_a_locked_folder_is_one_threads(tmp_path, caplog):
    folder, seen = tmp_path / "thing", []
    folder.mkdir()

    def change():
        with locked_folder(folder):
            seen.append(names(folder))

    other = threading.Thread(target=change)
    with locked_folder(folder), locked_folder(folder):
        other.start()
        other.join(0.2)
        with replaced_folder(folder) as made:  # Whoever waits for the old one gets the new one.
            (made / "new").touch()
    other.join()
    assert seen == [["new"]]
    assert f"thing: waiting for process {os.getpid()} (`" in caplog.text


def test_where_there_are_no_locks_that_is_said_and_nothing_removed(tmp_path, monkeypatch, caplog):
    def lock(*_, **__):
        raise locks.NoLocksError

    dead = tmp_path / ".dead.fkv-0123456789abcdef"
    dead.touch()
    monkeypatch.setattr(locks, "lock", lock)
    monkeypatch.setattr("forcing_kv.runtime_trt.bundle.atomic.files.lock", lock)
    with claimed(tmp_path / "thing"), locked_folder(tmp_path):
        write_file(tmp_path / "thing", b"new")
    assert caplog.text.count("this file system has no locks") == 2
    assert names(tmp_path) == [dead.name, "thing"]


def test_lines_are_appended_whole(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    threads = [
        threading.Thread(target=append_line, args=(path, str(number) * 9999)) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().splitlines()
    assert sorted(lines) == [str(number) * 9999 for number in range(8)]
    before, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:3]))
    with pytest.raises(ForcingKvError, match="rows: No space left on device; free some"):
        append_line(path, "half a line")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder.mp4", "folder.mp4: is a folder; name a file"),
        ("v.avi", "v.avi: suffix '.avi'; give .mp4 or .gif"),
        ("none/v.mp4", "none is no folder; make it first"),
        ("file/v.mp4", "file is no folder; make it first"),
        ("there.mp4", "there.mp4: exists already; choose another path or give --force"),
        ("dangling.mp4", "dangling.mp4: exists already"),
        ("pipe.mp4", "pipe.mp4: exists already"),
        ("n" * 300 + ".mp4", "File name too long"),
    ],
)
def test_an_output_that_cannot_be_is_refused(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.mp4").mkdir()
    Path("file").touch()
    Path("there.mp4").touch()
    Path("dangling.mp4").symlink_to("nowhere")
    os.mkfifo("pipe.mp4")
    with pytest.raises((InputError, OSError), match=message):
        check_file(Path(path), [".mp4", ".gif"], "--out")
    check_file(Path("there.mp4"), [".mp4"], force=True)
    check_file(Path("none/v.mp4"), [".mp4"], make_folder=True)
    with pytest.raises(InputError, match=r"--out pipe\.mp4: is no plain file"):
        check_file(Path("pipe.mp4"), [".mp4"], "--out", force=True)


def test_links_in_a_circle_are_told(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for target in (tmp_path / "a", tmp_path / "a" / "below"):
        with (
            pytest.raises((ForcingKvError, OSError), match="Too many levels of symbolic links"),
            replaced_folder(target, force=True),
        ):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
