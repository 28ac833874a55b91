"""A bulk prediction that is stopped, in whatever way, and gone on with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from transferkit.errors import ConfigError, OutputError, TransferkitError
from transferkit.inference import Predictor, predict_to_file
from transferkit.models import BackboneSpec, build_model

OPTIONS: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]
PROGRAM = Path(__file__).with_name("bulk_program.py")


def expect(kind: type[TransferkitError], message: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "found.csv"


@pytest.fixture
def journal(out: Path) -> Path:
    return out.with_name("found.csv.journal")


@pytest.fixture
def whole(watched: Any, pictures: list[Path], tmp_path: Path) -> bytes:
    """What a run that nobody stopped writes."""
    path = tmp_path / "whole.csv"
    predict_to_file(watched, pictures, path)
    watched.seen.clear()
    return path.read_bytes()


def stop(watched: Any, pictures: Any, out: Path, *, after: int, **options: Any) -> None:
    """Run until Ctrl-C."""
    watched.stop_after = after
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(watched, pictures, out, batch_size=4, **options)
    watched.stop_after = None
    watched.seen.clear()


@pytest.mark.parametrize("after", [1, 3, 4, 15])
def test_a_run_that_was_stopped_goes_on(
    after: int, whole: bytes, watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    stop(watched, pictures, out, after=after)
    assert len(journal.read_text().splitlines()) == 1 + after
    assert not out.exists()
    report = predict_to_file(watched, pictures, out, resume=True)
    assert (report.num_images, report.num_resumed) == (16, after)
    assert watched.seen == [str(path) for path in pictures[after:]]
    assert out.read_bytes() == whole
    assert not journal.exists()


def test_nothing_is_left_of_a_run_that_did_nothing(
    watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    stop(watched, pictures, out, after=0)
    assert not journal.exists()


def test_resume_begins_where_there_is_nothing(
    whole: bytes, watched: Any, pictures: list[Path], out: Path
) -> None:
    assert predict_to_file(watched, pictures, out, resume=True).num_resumed == 0
    assert out.read_bytes() == whole


def test_a_journal_is_not_passed_over(
    whole: bytes, watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    stop(watched, pictures, out, after=5)
    message = (
        f"`{journal}` is the journal of a run that did not end. Go on with it by `resume=True` "
        f"(`--resume`), or begin anew by `overwrite=True` (`--overwrite`)."
    )
    kept = journal.read_bytes()
    with expect(OutputError, message):
        predict_to_file(watched, pictures, out)
    assert journal.read_bytes() == kept
    assert predict_to_file(watched, pictures, out, overwrite=True).num_predicted == 16
    assert out.read_bytes() == whole


def test_a_line_that_is_torn_at_any_byte_is_cut_off(
    whole: bytes, watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    stop(watched, pictures, out, after=3)
    lines = journal.read_bytes().splitlines(keepends=True)
    last = len(lines[-1])
    for cut in (1, 2, last // 2, last - 1, last):
        journal.write_bytes(b"".join(lines)[:-cut])
        out.unlink(missing_ok=True)
        report = predict_to_file(watched, pictures, out, resume=True)
        assert report.num_resumed == 2
        assert out.read_bytes() == whole


@pytest.mark.parametrize("rest", [b"\0\0\0\n", b"{}\n", b'{"path": "a", "size"\n', b"[]\n", b"\n"])
def test_what_a_power_cut_leaves_is_cut_off(
    rest: bytes, whole: bytes, watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    stop(watched, pictures, out, after=3)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], rest, *lines[2:]]))
    assert predict_to_file(watched, pictures, out, resume=True).num_resumed == 1
    assert out.read_bytes() == whole


@pytest.mark.parametrize("length", [0, 1, 10, 40])
def test_a_first_line_that_is_torn_is_begun_anew(
    length: int, whole: bytes, watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    stop(watched, pictures, out, after=1)
    journal.write_bytes(journal.read_bytes()[:length])
    assert predict_to_file(watched, pictures, out, resume=True).num_resumed == 0
    assert out.read_bytes() == whole


def test_a_list_that_changed(watched: Any, pictures: list[Path], out: Path, tmp_path: Path) -> None:
    stop(watched, pictures[:10], out, after=8)
    changed = [*reversed(pictures[4:]), pictures[0]]
    report = predict_to_file(watched, changed, out, resume=True)
    assert report.num_resumed == 5
    assert watched.seen == [str(path) for path in reversed(pictures[8:])]
    predict_to_file(watched, changed, tmp_path / "whole.csv")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_file_that_changed_is_predicted_again(
    watched: Any, pictures: list[Path], out: Path, tmp_path: Path
) -> None:
    stop(watched, pictures, out, after=8)
    shutil.copyfile(pictures[15], pictures[2])
    os.utime(pictures[2], ns=(0, 123_456_789))
    os.utime(pictures[3], ns=(0, 123_456_789))  # Its bytes are the same.
    report = predict_to_file(watched, pictures, out, resume=True)
    assert (report.num_resumed, report.num_duplicates, report.num_predicted) == (6, 2, 8)
    predict_to_file(watched, pictures, tmp_path / "whole.csv")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert str(pictures[3]) not in watched.seen[:8]


def test_what_failed_is_tried_again(
    watched: Any, pictures: list[Path], out: Path, tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden.png"
    pictures[2].rename(hidden)
    stop(watched, pictures, out, after=6)
    hidden.rename(pictures[2])
    report = predict_to_file(watched, pictures, out, resume=True)
    assert (report.num_resumed, report.num_failed, report.num_predicted) == (5, 0, 11)


def test_a_copy_of_a_damaged_file_keeps_its_own_error(
    watched: Any,
    pictures: list[Path],
    out: Path,
    journal: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One step ahead: the copy is looked at when its original has failed, as it is in a large run.
    monkeypatch.setattr("transferkit.inference.bulk_inputs._NUM_AHEAD", 1)
    damaged, copy = tmp_path / "damaged.png", tmp_path / "copy.png"
    for path in (damaged, copy):
        path.write_bytes(pictures[0].read_bytes()[:40])
    inputs = [damaged, *pictures[:3], copy, *pictures[3:]]
    watched.stop_after = 6
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(watched, inputs, out, batch_size=1)
    watched.stop_after = None
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert [line["record"] is None for line in lines if line["path"] == str(copy)] == [True]
    report = predict_to_file(watched, inputs, out, resume=True, batch_size=1)
    assert (report.num_failed, report.num_resumed) == (2, 5)
    predict_to_file(watched, inputs, tmp_path / "whole.csv", batch_size=1)
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_duplicates_go_on_without_their_bytes_being_read(
    watched: Any, pictures: list[Path], out: Path, tmp_path: Path
) -> None:
    inputs = [pictures[0], pictures[1], pictures[0], pictures[0], *pictures[2:]]
    stop(watched, inputs, out, after=6)
    report = predict_to_file(watched, inputs, out, resume=True)
    assert report.num_resumed == 8
    assert watched.seen == [str(path) for path in pictures[6:]]


def test_a_duplicate_whose_original_was_not_reached(
    watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    stop(watched, [pictures[0], pictures[1], pictures[1], pictures[2]], out, after=1)
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert sorted(line["record"] is None for line in lines) == [False, True]
    report = predict_to_file(watched, pictures[:2], out, resume=True)
    assert (report.num_resumed, report.num_predicted) == (1, 1)


def test_a_journal_that_is_kept_saves_the_next_run(
    watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    predict_to_file(watched, pictures[:10], out, keep_journal=True)
    assert journal.exists()
    watched.seen.clear()
    report = predict_to_file(watched, pictures, out, resume=True)
    assert (report.num_resumed, report.num_predicted) == (10, 6)
    assert len(watched.seen) == 6
    assert not journal.exists()


def test_a_failing_writer_keeps_the_journal(
    watched: Any, pictures: list[Path], out: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules["transferkit.inference.results"].WRITERS, "csv", fail)
        message = (
            f"Cannot write `{out}`: no space left on device. Choose a place that you may write to "
            f"and that has room."
        )
        with expect(OutputError, message):
            predict_to_file(watched, pictures, out)
    assert journal.exists()
    assert not out.exists()
    assert predict_to_file(watched, pictures, out, resume=True).num_resumed == 16


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on files")
def test_a_full_disk(
    whole: bytes, watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    message = (
        f"Cannot write the journal `{journal}`: file too large. What it holds is kept: mend that, "
        f"and go on by `resume=True` (`--resume`)."
    )
    try:
        with expect(OutputError, message):
            predict_to_file(watched, pictures, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = journal.read_bytes().splitlines(keepends=True)
    assert kept[-1].endswith(b"\n")
    report = predict_to_file(watched, pictures, out, resume=True)
    assert report.num_resumed == len(kept) - 1 > 3
    assert out.read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_two_runs_at_one_journal(
    watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    message = (
        f"Another process writes `{journal}`. Wait for its end, or give the output another name."
    )
    caught = []

    def disturbed() -> Iterator[Path]:
        for number, path in enumerate(pictures):
            if number == 5:
                for option in OPTIONS:
                    with expect(OutputError, message):
                        predict_to_file(watched, pictures, out, **option)
                    caught.append(option)
            yield path

    assert predict_to_file(watched, disturbed(), out).num_predicted == 16
    assert len(caught) == 3


def test_another_file_in_the_place_of_the_journal(
    watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    journal.write_text("Dear diary,\n")
    message = (
        f"`{journal}` would be the journal, but is another file. Move it away, or give the output "
        f"another name."
    )
    for option in OPTIONS:
        with expect(OutputError, message):
            predict_to_file(watched, pictures, out, **option)
        assert journal.read_text() == "Dear diary,\n"


def test_a_journal_of_another_version(
    watched: Any, pictures: list[Path], out: Path, journal: Path
) -> None:
    journal.write_text('{"transferkit_journal": 2}\n')
    message = (
        f"The journal `{journal}` has version 2, this transferkit writes 1. End the run with the "
        f"transferkit that began it, or begin anew by `overwrite=True` (`--overwrite`)."
    )
    with expect(ConfigError, message):
        predict_to_file(watched, pictures, out, resume=True)


def test_a_journal_of_another_run(
    watched: Any,
    tiny_spec: BackboneSpec,
    pictures: list[Path],
    out: Path,
    journal: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop(watched, pictures, out, after=3)
    model = build_model(tiny_spec, 2, weights=None, seed=5)
    other = Predictor(model, class_names=("blue", "red"), device="cpu")

    def message(name: str, found: object, here: object) -> str:
        return (
            f"The journal `{journal}` belongs to another run: its {name} is {found!r}, here it is "
            f"{here!r}. Take the same, or begin anew by `overwrite=True` (`--overwrite`)."
        )

    with expect(ConfigError, message("model", watched.digest, other.digest)):
        predict_to_file(other, pictures, out, resume=True)
    with expect(ConfigError, message("top_k", 1, 2)):
        predict_to_file(watched, pictures, out, resume=True, top_k=2)
    module = "transferkit.inference.network.check_choice_of_engine"
    monkeypatch.setattr(module, lambda *_: None)  # This machine may have no bfloat16.
    others = {
        "engine_name": "openvino",
        "precision": "bf16",
        "threshold": 0.5,
        "temperature": 2.0,
        "tta": "flip",
    }
    for name, value in others.items():
        found = getattr(watched, name)
        with monkeypatch.context() as patch:
            owner = watched if name in vars(watched) else type(watched)
            patch.setattr(owner, name, value)
            with expect(ConfigError, message(name.removesuffix("_name"), found, value)):
                predict_to_file(watched, pictures, out, resume=True)
    assert predict_to_file(watched, pictures, out, resume=True).num_resumed == 3


@contextmanager
def running(folder: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Start `bulk_program.py` and wait until it begins to predict."""
    command = [sys.executable, str(PROGRAM), str(folder), str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process


def wait_for(journal: Path, process: subprocess.Popen[str], *, size: int) -> None:
    """Return as soon as the journal has a size, or the process ends."""
    while process.poll() is None and (not journal.exists() or journal.stat().st_size < size):
        time.sleep(0.0005)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_processes_lose_nothing(tiny_folder: Path, out: Path, journal: Path) -> None:
    alone = out.with_name("alone.csv")
    with running(tiny_folder, alone) as process:
        assert process.wait() == 0
    for size in (1, 1000, 2500):
        with running(tiny_folder, out) as process:
            wait_for(journal, process, size=size)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert journal.stat().st_size >= size
        assert not out.exists()
    with running(tiny_folder, out) as process:
        assert process.wait() == 0
    assert out.read_bytes() == alone.read_bytes()
    assert not journal.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_leaves_a_whole_journal(tiny_folder: Path, out: Path, journal: Path) -> None:
    with running(tiny_folder, out) as process:
        wait_for(journal, process, size=1000)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert journal.read_bytes().endswith(b"\n")
    with running(tiny_folder, out) as process:
        assert process.wait() == 0
    assert out.exists()
