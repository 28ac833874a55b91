from __future__ import annotations

import stat
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from transferkit._files import atomic_path, check_writable, make_folder, write_text
from transferkit.errors import OutputError


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise PermissionError(13, "Permission denied")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: type[BaseException]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error


def test_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names_in(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stop_in_the_block_leaves_the_old_file_alone(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(error):
        write_half(target, error)
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["file.txt"]


def test_a_full_disk_is_an_output_error_and_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(OutputError) as error, atomic_path(target):
        raise OSError(28, "No space left on device")
    assert str(error.value) == (
        f"Cannot write `{target}`: no space left on device. "
        f"Choose a place that you may write to and that has room."
    )
    assert isinstance(error.value.__cause__, OSError)
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["file.txt"]


def test_our_own_error_in_the_block_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as error, atomic_path(tmp_path / "file.txt"):
        raise OutputError("Cannot write `Other`: it is a folder.")
    assert str(error.value) == "Cannot write `Other`: it is a folder."


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "file.txt"
    with pytest.raises(OutputError) as error, atomic_path(target):
        pytest.fail("the block must not run")
    assert str(error.value) == (
        f"Cannot write `{target}`: the folder `{target.parent}` does not exist. Create it first."
    )


def test_folder_in_the_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as error, atomic_path(tmp_path):
        pytest.fail("the block must not run")
    assert str(error.value) == f"Cannot write `{tmp_path}`: it is a folder. Give a file name."


def test_folder_without_the_right_to_write_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    target = tmp_path / "file.txt"
    with pytest.raises(OutputError) as error, atomic_path(target):
        pytest.fail("the block must not run")
    assert str(error.value) == (
        f"Cannot write `{target}`: permission denied. "
        f"Choose a place that you may write to and that has room."
    )


def test_file_gets_the_usual_rights(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.touch()
    written = write_text(tmp_path / "written.txt", "")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("name", ["a" * 255, "\N{HONEYBEE}" * 63], ids=["ascii", "unicode"])
def test_any_name_that_the_system_takes_can_be_written(tmp_path: Path, name: str) -> None:
    assert write_text(tmp_path / name, "x").read_text() == "x"


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = write_text(tmp_path / "file.txt", "bée")
    assert path == tmp_path / "file.txt"
    assert path.read_bytes() == "bée".encode()


def test_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert folder.is_dir()
    assert make_folder(folder) == folder
    assert names_in(folder) == []


@pytest.mark.parametrize(
    ("name", "reason"), [("file", "file exists"), ("file/folder", "not a directory")]
)
def test_file_in_the_way_of_a_folder_is_an_error(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("kept")
    folder = tmp_path / name
    with pytest.raises(OutputError) as error:
        make_folder(folder)
    assert str(error.value) == (
        f"Cannot write into the folder `{folder}`: {reason}. "
        f"Choose a folder that exists or can be created and that you may write to."
    )
    assert (tmp_path / "file").read_text() == "kept"


def test_folder_that_takes_no_files_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError) as error:
        make_folder(tmp_path)
    assert str(error.value) == (
        f"Cannot write into the folder `{tmp_path}`: permission denied. "
        f"Choose a folder that exists or can be created and that you may write to."
    )


def test_error_without_a_system_text_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError("Strange")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(OutputError) as error:
        make_folder(tmp_path)
    assert str(error.value).startswith(f"Cannot write into the folder `{tmp_path}`: strange. ")


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    assert check_writable(target) == target
    assert names_in(tmp_path) == []
    target.write_text("old")
    check_writable(target)
    assert target.read_text() == "old"


def test_check_refuses_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as error:
        check_writable(tmp_path)
    assert str(error.value) == f"Cannot write `{tmp_path}`: it is a folder. Give a file name."
    with pytest.raises(OutputError):
        check_writable(tmp_path / "missing" / "file.txt")
