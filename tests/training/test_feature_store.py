from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from transferkit.errors import OutputError
from transferkit.training.feature_store import FeatureStore, StoredView, digest_of

KEY: dict[str, Any] = {"weights": "ab", "view": 1, "preprocess": {"mean": [0.5, 0.25]}}
VALUES = torch.arange(24.0).view(4, 2, 3) + 0.5


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fill(store: FeatureStore, values: torch.Tensor = VALUES) -> StoredView:
    view = store.allocate(len(values), tuple(values.shape[1:]))
    view.values.copy_(values)
    view.valid[:] = True
    return view


def kept(folder: Path) -> Path:
    """Keep the values under the key, and return the file."""
    store = FeatureStore(10**6, folder)
    store.keep(KEY, fill(store))
    (file,) = folder.iterdir()
    return file


# Memory and the files that it spills to


def test_room_starts_empty() -> None:
    view = FeatureStore(1000).allocate(3, (2, 2))
    assert (view.values.dtype, view.values.shape) == (torch.float32, (3, 2, 2))
    assert not view.values.any()
    assert view.valid.tolist() == [False] * 3


@pytest.mark.parametrize(
    ("budget", "expected"), [(0, (0, 192)), (95, (0, 192)), (96, (96, 96)), (192, (192, 0))]
)
def test_what_does_not_fit_the_budget_is_spilled(
    budget: int, expected: tuple[int, int], scratch: Path
) -> None:
    store = FeatureStore(budget)
    views = [fill(store), fill(store, VALUES + 100)]
    assert (store.num_bytes, store.num_spilled_bytes) == expected
    assert torch.equal(views[0].values, VALUES)
    assert torch.equal(views[1].values, VALUES + 100)


def test_a_smaller_view_may_fit_where_a_larger_one_did_not(scratch: Path) -> None:
    store = FeatureStore(50)
    store.allocate(10, (2,))
    store.allocate(5, (2,))
    assert (store.num_bytes, store.num_spilled_bytes) == (40, 80)


@pytest.mark.skipif(os.name != "posix", reason="files in use have names on Windows")
def test_spilled_files_have_no_name_that_could_be_left(scratch: Path) -> None:
    view = FeatureStore(0).allocate(1000, (100,))
    view.values.fill_(1.0)
    assert list(scratch.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_spilled_file_has_its_room_on_the_disk(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[int] = []
    fallocate = os.posix_fallocate

    def watch(handle: int, offset: int, size: int) -> None:
        fallocate(handle, offset, size)
        blocks.append(os.fstat(handle).st_blocks)

    monkeypatch.setattr(os, "posix_fallocate", watch)
    FeatureStore(0).allocate(1000, (100,))
    assert [each * 512 >= 400_000 for each in blocks] == [True]


def test_where_room_cannot_be_reserved_it_spills_all_the_same(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert torch.equal(fill(FeatureStore(0)).values, VALUES)


_FULL = (
    "The features do not fit the 90 bytes of memory that they may use, and 96 bytes cannot be "
    "spilled to `{}` either: no space left on device. Free room there, set TMPDIR, or take "
    "fewer views."
)


def test_a_disk_without_room(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(scratch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=95))
    message = _FULL.format(scratch)
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        FeatureStore(90).allocate(4, (2, 3))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_disk_that_fills_up_meanwhile(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = _FULL.format(scratch)
    store = FeatureStore(90)
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        store.allocate(4, (2, 3))
    assert store.num_spilled_bytes == 0


def test_no_folder_for_temporary_files(scratch: Path) -> None:
    scratch.rmdir()
    message = _FULL.format(scratch).replace("no space left on device", "no such file or directory")
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        FeatureStore(90).allocate(4, (2, 3))


@pytest.mark.parametrize("budget", [0, 10**6])
def test_closing_gives_everything_back(budget: int, scratch: Path, tmp_path: Path) -> None:
    store = FeatureStore(budget, tmp_path / "kept")
    store.keep(KEY, fill(store))
    views = [store.allocate(4, (2, 3)), store.load(KEY)]
    store.close()
    assert (store.num_bytes, store.num_spilled_bytes) == (0, 0)
    assert [len(view.values) for view in views if view is not None] == [0, 0]
    again = FeatureStore(budget, tmp_path / "kept").load(KEY)  # What was kept stays.
    assert again is not None
    assert torch.equal(again.values, VALUES)
    store.close()


# What is kept for later runs


@pytest.mark.parametrize("budget", [0, 10**6])
@pytest.mark.parametrize("later", [0, 10**6])
def test_a_kept_view_comes_back(budget: int, later: int, scratch: Path, tmp_path: Path) -> None:
    first = FeatureStore(budget, tmp_path / "new" / "kept")
    first.keep(KEY, fill(first))
    first.close()
    store = FeatureStore(later, tmp_path / "new" / "kept")
    view = store.load(dict(reversed(KEY.items())))  # Whatever the order of the key is.
    assert view is not None
    assert torch.equal(view.values, VALUES)
    assert view.valid.tolist() == [True] * 4
    assert (store.num_bytes, store.num_spilled_bytes) == ((0, 96) if later == 0 else (96, 0))


def test_a_kept_file_is_plain_safetensors(tmp_path: Path) -> None:
    file = kept(tmp_path)
    assert file.name == f"{digest_of(KEY)}.safetensors"
    assert torch.equal(safetensors.torch.load_file(file)["values"], VALUES)
    with safetensors.safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["key"]) == KEY


def test_changing_a_loaded_view_leaves_the_file(tmp_path: Path) -> None:
    content = kept(tmp_path).read_bytes()
    for budget in (0, 10**6):
        view = FeatureStore(budget, tmp_path).load(KEY)
        assert view is not None
        view.values.fill_(7.0)
        assert view.values.sum() == 7 * VALUES.numel()
    assert next(tmp_path.iterdir()).read_bytes() == content


def test_another_key_is_no_hit(tmp_path: Path) -> None:
    kept(tmp_path)
    store = FeatureStore(10**6, tmp_path)
    for other in ({**KEY, "view": 2}, {**KEY, "more": None}, {"view": 1}):
        assert store.load(other) is None


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    store = FeatureStore(10**6)
    store.keep(KEY, fill(store))
    assert store.load(KEY) is None
    assert list(tmp_path.iterdir()) == []


def test_a_view_that_lacks_pictures_is_not_kept(tmp_path: Path) -> None:
    store = FeatureStore(10**6, tmp_path)
    view = fill(store)
    view.valid[2] = False
    store.keep(KEY, view)
    assert list(tmp_path.iterdir()) == []


def test_keeping_again_takes_the_place_of_the_old_file(tmp_path: Path) -> None:
    file = kept(tmp_path)
    store = FeatureStore(10**6, tmp_path)
    store.keep(KEY, fill(store, VALUES + 1))
    assert list(tmp_path.iterdir()) == [file]
    view = store.load(KEY)
    assert view is not None
    assert torch.equal(view.values, VALUES + 1)


def test_the_values_are_kept_whatever_their_layout(tmp_path: Path) -> None:
    store = FeatureStore(10**6, tmp_path)
    values = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    store.keep(KEY, StoredView(values, torch.ones(4, dtype=torch.bool)))
    view = store.load(KEY)
    assert view is not None
    assert torch.equal(view.values, values)


# Files that are no good


def test_a_file_with_one_changed_bit_anywhere_is_passed_over(tmp_path: Path) -> None:
    file = kept(tmp_path)
    content = file.read_bytes()
    store = FeatureStore(10**6, tmp_path)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert store.load(KEY) is None, place
    file.write_bytes(content)
    assert store.load(KEY) is not None


def test_a_file_that_ends_anywhere_is_passed_over(tmp_path: Path) -> None:
    file = kept(tmp_path)
    content = file.read_bytes()
    store = FeatureStore(10**6, tmp_path)
    for size in range(len(content)):
        file.write_bytes(content[:size])
        assert store.load(KEY) is None, size
    file.write_bytes(content + b"\0")
    assert store.load(KEY) is None


def foreign(kind: str, file: Path) -> None:
    """Put something else in the place of a kept file."""
    metadata = {"key": json.dumps(KEY), "sha256": "0" * 64}
    if kind == "a folder":
        file.mkdir()
    elif kind == "an array":
        with file.open("wb") as opened:
            np.save(opened, VALUES.numpy())
    elif kind == "text":
        file.write_text("features")
    elif kind == "no metadata":
        safetensors.torch.save_file({"values": VALUES}, file)
    elif kind == "no digest":
        safetensors.torch.save_file({"values": VALUES}, file, {"key": json.dumps(KEY)})
    elif kind == "another digest":
        safetensors.torch.save_file({"values": VALUES}, file, metadata)
    elif kind == "another name":
        safetensors.torch.save_file({"others": VALUES}, file, metadata)
    elif kind == "another type":
        safetensors.torch.save_file({"values": VALUES.double()}, file, metadata)
    elif kind == "a key that is no JSON":
        safetensors.torch.save_file({"values": VALUES}, file, metadata | {"key": "{"})
    else:
        raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "a folder",
        "an array",
        "text",
        "no metadata",
        "no digest",
        "another digest",
        "another name",
        "another type",
        "a key that is no JSON",
    ],
)
def test_foreign_files_are_passed_over(kind: str, tmp_path: Path) -> None:
    foreign(kind, tmp_path / f"{digest_of(KEY)}.safetensors")
    assert FeatureStore(10**6, tmp_path).load(KEY) is None


def test_a_file_of_another_key_in_this_ones_place_is_passed_over(tmp_path: Path) -> None:
    file = kept(tmp_path)
    other = {**KEY, "view": 2}
    file.rename(tmp_path / f"{digest_of(other)}.safetensors")
    assert FeatureStore(10**6, tmp_path).load(other) is None


def test_a_view_is_made_anew_in_the_place_of_a_damaged_file(tmp_path: Path) -> None:
    file = kept(tmp_path)
    file.write_bytes(b"damaged")
    store = FeatureStore(10**6, tmp_path)
    store.keep(KEY, fill(store))
    assert store.load(KEY) is not None


def test_a_stop_while_writing_leaves_nothing_that_is_taken_for_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    store = FeatureStore(10**6, tmp_path)
    view = fill(store)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            store.keep(KEY, view)
    assert store.load(KEY) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_flushed_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watch_flush(handle: int) -> None:
        events.append("flush")
        fsync(handle)

    def watch_rename(source: Path, target: Path) -> Path:
        events.append("rename")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_flush)
    monkeypatch.setattr(Path, "replace", watch_rename)
    kept(tmp_path)
    assert events[:2] == ["flush", "rename"]


_OTHER_PROCESS = """
import json, sys, torch
from pathlib import Path
from transferkit.training.feature_store import FeatureStore
store = FeatureStore(10**6, Path(sys.argv[1]))
view = store.allocate(4, (2, 3))
view.values.copy_(torch.arange(24.0).view(4, 2, 3) + 0.5)
view.valid[:] = True
print("ready", flush=True)
for _ in range(40):
    store.keep(json.loads(sys.argv[2]), view)
"""


def test_processes_may_keep_one_key_at_once(tmp_path: Path) -> None:
    file = kept(tmp_path)
    command = [sys.executable, "-c", _OTHER_PROCESS, str(tmp_path), json.dumps(KEY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        while other.poll() is None:
            store = FeatureStore(0, tmp_path)
            view = store.load(KEY)
            assert view is not None
            assert torch.equal(view.values, VALUES)
            store.keep(KEY, view)
    assert other.returncode == 0
    assert list(tmp_path.iterdir()) == [file]


# Folders that are no good


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    message = (
        f"Cannot write into the folder `{file}`: file exists. "
        f"Choose a folder that exists or can be created and that you may write to."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        FeatureStore(10**6, file)


def test_a_disk_that_is_full_when_a_view_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = FeatureStore(10**6, tmp_path)
    view = fill(store)
    monkeypatch.setattr(os, "fsync", full)
    message = (
        f"Cannot write `{tmp_path / digest_of(KEY)}.safetensors`: no space left on device. "
        f"Choose a place that you may write to and that has room."
    )
    with pytest.raises(OutputError, match=f"^{re.escape(message)}$"):
        store.keep(KEY, view)
    assert list(tmp_path.iterdir()) == []


# The digest of a key


def test_the_digest_tells_keys_apart_but_not_their_order() -> None:
    digests = [digest_of(key) for key in (KEY, {**KEY, "view": "1"}, {**KEY, "view": 1.5}, {})]
    assert len(set(digests)) == 4
    assert re.fullmatch("[0-9a-f]{64}", digests[0])
    assert digest_of(dict(reversed(KEY.items()))) == digests[0]
