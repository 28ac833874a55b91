from __future__ import annotations

import gc
import hashlib
import shutil
import stat
import threading
import warnings
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pooch
import pytest

from transferkit.data import ants_bees
from transferkit.data.ants_bees import (
    CONTENT_DIGEST,
    DATA_VARIABLE,
    FOLDER_NAME,
    AntsBees,
    content_digest,
    extract_archive,
    find_ants_bees,
)
from transferkit.errors import DataError, OutputError
from transferkit.testing import make_image_folder

# After an error, the client drops its connection without closing it.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

DRAWN_NAME = "ants_bees_drawn_v1"
COUNTS = {"train/ants": 2, "train/bees": 2, "val/ants": 1, "val/bees": 1}
PUBLISHED = "124 in train/ants, 121 in train/bees, 70 in val/ants, 83 in val/bees"


def make_photographs(root: Path) -> Path:
    return make_image_folder(root, class_names=["ants", "bees"], num_train=2, num_val=1)


def not_published(root: Path) -> str:
    return (
        f"`{root}` is not the published set of ants and bees: it has 6 files (2 in train/ants, "
        f"2 in train/bees, 1 in val/ants, 1 in val/bees), expected 398 ({PUBLISHED}). "
        f"Results will differ from published ones."
    )


@pytest.fixture(autouse=True)
def _no_other_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test see the machine's photographs, its proxy or the real drawing."""

    def draw(root: Path) -> Path:
        return make_photographs(root)

    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(ants_bees, "write_drawn_pictures", draw)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder that does not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures in the layout of the photographs."""
    return make_photographs(tmp_path / "data" / FOLDER_NAME)


@pytest.fixture
def published(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The six pictures, taken for the published set."""
    monkeypatch.setattr(ants_bees, "NUM_FILES", 6)
    monkeypatch.setattr(ants_bees, "FILE_COUNTS", COUNTS)
    monkeypatch.setattr(ants_bees, "CONTENT_DIGEST", content_digest(photos))
    return photos


@pytest.fixture
def archive(tmp_path: Path, photos: Path) -> Path:
    """The six pictures as a zip file, with leftovers beside them."""
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{FOLDER_NAME}/", "")
        for picture in sorted(photos.rglob("*.png")):
            file.write(picture, Path(FOLDER_NAME, picture.relative_to(photos)))
        file.writestr(f"{FOLDER_NAME}/.DS_Store", "leftover")
        file.writestr(f"{FOLDER_NAME}/train/ants/.DS_Store", "leftover")
        file.writestr("__MACOSX/train/ants/._0.png", "leftover")
    return path


class Server(ThreadingHTTPServer):
    """Serve one content at every address, whole or cut off."""

    content = b""
    status = 200
    cut_off = False
    num_requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.num_requests += 1
        content = self.server.content
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.server.cut_off else content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def server(archive: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content = archive.read_bytes()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    gc.collect()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The sources, in their order


@pytest.mark.parametrize("inner", [True, False])
def test_path_comes_first(
    photos: Path,
    cache: Path,
    inner: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, "elsewhere")
    found = find_ants_bees(photos if inner else photos.parent, cache=cache)
    assert found == AntsBees(photos, "path", "the path given")
    assert capsys.readouterr().out == (f"Ants and bees: pictures in {photos} (the path given)\n")
    assert not cache.exists()


@pytest.mark.parametrize("inner", [True, False])
def test_environment_comes_before_the_cache(
    published: Path,
    cache: Path,
    inner: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_photographs(cache / FOLDER_NAME)
    monkeypatch.setenv(DATA_VARIABLE, str(published if inner else published.parent))
    found = find_ants_bees(cache=cache)
    assert found == AntsBees(published, "environment", "named by TRANSFERKIT_DATA")
    assert capsys.readouterr().out == (
        f"Ants and bees: photographs in {published} (named by TRANSFERKIT_DATA)\n"
    )


def test_cache_comes_before_the_download(
    published: Path, cache: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(published, cache / FOLDER_NAME)
    found = find_ants_bees(cache=cache, url=server.url)
    assert found == AntsBees(cache / FOLDER_NAME, "cache", "downloaded before")
    assert server.num_requests == 0
    assert capsys.readouterr().out == (
        f"Ants and bees: photographs in {cache / FOLDER_NAME} (downloaded before)\n"
    )


def test_download_comes_before_drawing_and_happens_once(
    published: Path, cache: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find_ants_bees(cache=cache, url=server.url)
    assert found == AntsBees(cache / FOLDER_NAME, "download", f"downloaded from {server.url}")
    assert capsys.readouterr().out == (
        f"Ants and bees: photographs in {cache / FOLDER_NAME} (downloaded from {server.url})\n"
    )
    assert names_in(cache) == [FOLDER_NAME]
    assert content_digest(found.root) == content_digest(published)
    assert find_ants_bees(cache=cache, url=server.url).source == "cache"
    assert server.num_requests == 1


def test_drawing_comes_last_and_happens_once(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_ants_bees(cache=cache, download=False)
    assert found == AntsBees(
        cache / DRAWN_NAME, "drawn", "no photographs; downloads are switched off"
    )
    assert capsys.readouterr().out == (
        f"Ants and bees: drawn pictures in {cache / DRAWN_NAME} "
        f"(no photographs; downloads are switched off)\n"
    )
    assert names_in(cache) == [DRAWN_NAME]
    assert found.splits().describe() == "train 4 (2 ants, 2 bees); val 2 (1 ants, 1 bees)"

    def fail(root: Path) -> NoReturn:
        pytest.fail("drawn twice")

    monkeypatch.setattr(ants_bees, "write_drawn_pictures", fail)
    assert find_ants_bees(cache=cache, download=False) == found


def test_photographs_are_not_looked_for_where_that_is_wished(
    published: Path,
    cache: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(published))
    found = find_ants_bees(cache=cache, url=server.url, photographs=False)
    assert found == AntsBees(cache / DRAWN_NAME, "drawn", "photographs are not asked for")
    assert server.num_requests == 0
    assert capsys.readouterr().out == (
        f"Ants and bees: drawn pictures in {cache / DRAWN_NAME} (photographs are not asked for)\n"
    )


def test_drawn_pictures_do_not_keep_photographs_from_being_fetched(
    published: Path, cache: Path, server: Server
) -> None:
    find_ants_bees(cache=cache, download=False, verbose=False)
    assert find_ants_bees(cache=cache, url=server.url, verbose=False).source == "download"


def test_nothing_is_printed_where_that_is_wished(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find_ants_bees(photos, verbose=False)
    assert capsys.readouterr().out == ""


def test_cache_of_the_user_is_the_default(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(pooch, "os_cache", lambda name: cache / name)
    found = find_ants_bees(download=False, verbose=False)
    assert found.root == cache / "transferkit" / DRAWN_NAME


# No source


@pytest.mark.parametrize(
    ("variable", "reason"), [(False, "the path given"), (True, "named by TRANSFERKIT_DATA")]
)
def test_path_and_variable_that_lead_nowhere_are_an_error(
    tmp_path: Path, cache: Path, variable: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    if variable:
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(DataError) as error:
        find_ants_bees(None if variable else tmp_path, cache=cache)
    assert str(error.value) == (
        f"No ants and bees in `{tmp_path}` ({reason}): neither it nor "
        f"`{tmp_path / FOLDER_NAME}` has the subfolders `train` and `val`."
    )
    assert not cache.exists()


def test_no_source_is_an_error_where_drawing_is_not_wished(cache: Path) -> None:
    with pytest.raises(DataError) as error:
        find_ants_bees(cache=cache, download=False, draw=False)
    assert str(error.value) == (
        f"No photographs of ants and bees: no path was given, TRANSFERKIT_DATA is not set, "
        f"`{cache / FOLDER_NAME}` does not exist and downloads are switched off. Give a path, or "
        f"allow drawn pictures with `draw=True`."
    )
    assert not cache.exists()


def expect_failed_download(cache: Path, url: str, reason: str) -> None:
    """Check the error without drawing, that nothing is left, and that drawing helps."""
    with pytest.raises(DataError) as error:
        find_ants_bees(cache=cache, url=url, draw=False)
    assert str(error.value) == (
        f"No photographs of ants and bees: no path was given, TRANSFERKIT_DATA is not set, "
        f"`{cache / FOLDER_NAME}` does not exist and the download failed: {reason}. Give a path, "
        f"or allow drawn pictures with `draw=True`."
    )
    assert names_in(cache) == []
    found = find_ants_bees(cache=cache, url=url, verbose=False)
    assert found.source == "drawn"
    assert found.reason == f"no photographs; the download failed: {reason}"
    assert names_in(cache) == [DRAWN_NAME]


def test_refused_connection_leads_to_drawing(cache: Path, server: Server) -> None:
    with Server(("127.0.0.1", 0), Handler) as closed:
        url = closed.url
    expect_failed_download(cache, url, "ConnectionError")


def test_error_of_the_server_leads_to_drawing(cache: Path, server: Server) -> None:
    server.status = 404
    expect_failed_download(cache, server.url, "HTTPError")


def test_interrupted_download_leads_to_drawing_and_leaves_nothing(
    cache: Path, server: Server
) -> None:
    server.cut_off = True
    expect_failed_download(cache, server.url, "ChunkedEncodingError")


def test_something_else_than_an_archive_leads_to_drawing(cache: Path, server: Server) -> None:
    server.content = b"<html>Please sign in.</html>"
    expect_failed_download(cache, server.url, "DataError")


def test_damaged_archive_leads_to_drawing(cache: Path, server: Server, archive: Path) -> None:
    server.content = damage(archive)
    expect_failed_download(cache, server.url, "DataError")


def test_archive_of_other_things_leads_to_drawing(cache: Path, server: Server) -> None:
    path = cache.parent / "other.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "text")
    server.content = path.read_bytes()
    with pytest.raises(DataError, match=r"and the download failed: \w+\. Give a path, "):
        find_ants_bees(cache=cache, url=server.url, draw=False)
    assert names_in(cache) == []


def test_key_press_during_the_download_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(url: str, path: Path, **options: Any) -> NoReturn:
        path.mkdir(parents=True)
        (path / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch, "retrieve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_ants_bees(cache=cache, url="http://127.0.0.1:1/data.zip")
    assert names_in(cache) == []


@pytest.mark.parametrize("download", [True, False])
def test_cache_that_cannot_be_written_is_an_error(tmp_path: Path, download: bool) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    with pytest.raises(OutputError) as error:
        find_ants_bees(cache=cache, download=download, url="http://127.0.0.1:1/data.zip")
    assert str(error.value) == (
        f"Cannot write into the cache folder `{cache}`: not a directory. Give another one as "
        f"`cache=`, or set XDG_CACHE_HOME."
    )


def test_folder_that_appears_while_drawing_is_taken(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(root: Path) -> Path:
        make_photographs(cache / DRAWN_NAME)  # Another process was faster.
        return make_photographs(root)

    monkeypatch.setattr(ants_bees, "write_drawn_pictures", draw)
    found = find_ants_bees(cache=cache, download=False, verbose=False)
    assert found.root == cache / DRAWN_NAME
    assert names_in(cache) == [DRAWN_NAME]


# What photographs should be


def test_digest_is_over_sorted_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").write_bytes(b"one")
    (tmp_path / "a.jpg").write_bytes(b"two")
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"one", b"two"))
    expected = hashlib.sha256(f"a.jpg\0{two}\nb/1.jpg\0{one}\n".encode()).hexdigest()
    assert content_digest(tmp_path) == expected
    (tmp_path / "a.jpg").rename(tmp_path / "c.jpg")
    assert content_digest(str(tmp_path)) != expected


def test_photographs_are_the_published_ones(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert content_digest(photographs) == CONTENT_DIGEST
    monkeypatch.setenv(DATA_VARIABLE, str(photographs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = find_ants_bees(verbose=False).splits()
    assert (len(splits.train), len(splits.val)) == (244, 153)


def test_other_counts_are_a_warning(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(photos))
    with pytest.warns(UserWarning, match="^") as caught:
        assert find_ants_bees(cache=cache, verbose=False).source == "environment"
    assert [str(each.message) for each in caught] == [not_published(photos)]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("again", [False, True])
def test_other_counts_are_a_warning_for_downloaded_photographs_too(
    cache: Path, server: Server, again: bool
) -> None:
    if again:
        make_photographs(cache / FOLDER_NAME)
    with pytest.warns(UserWarning, match="^") as caught:
        find_ants_bees(cache=cache, url=server.url, verbose=False)
    assert [str(each.message) for each in caught] == [not_published(cache / FOLDER_NAME)]
    assert caught[0].filename == __file__


def test_other_contents_are_a_warning(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (published / "train" / "ants" / "000.png").write_bytes(b"other")
    monkeypatch.setenv(DATA_VARIABLE, str(published))
    with pytest.warns(UserWarning, match="^") as caught:
        find_ants_bees(verbose=False)
    assert [str(each.message) for each in caught] == [
        f"`{published}` is not the published set of ants and bees: the counts agree, the "
        f"contents do not. Results will differ from published ones."
    ]


# The archive


def damage(archive: Path, offset: int = 0) -> bytes:
    """Return the archive with other bytes in the last picture, from `offset` on."""
    with zipfile.ZipFile(archive) as file:
        member = file.getinfo(f"{FOLDER_NAME}/val/bees/000.png")
    content = bytearray(archive.read_bytes())
    start = member.header_offset + 30 + len(member.filename) + offset
    content[start : start + 40] = b"\xff" * 40
    return bytes(content)


def write_archive(path: Path, member: zipfile.ZipInfo | str, content: str = "content") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{FOLDER_NAME}/train/ants/good.jpg", "good")
        file.writestr(member, content)
    return path


def test_only_the_pictures_are_unpacked(archive: Path, photos: Path, tmp_path: Path) -> None:
    extract_archive(archive, tmp_path / "target")
    assert names_in(tmp_path / "target") == [FOLDER_NAME]
    unpacked = tmp_path / "target" / FOLDER_NAME
    assert content_digest(unpacked) == content_digest(photos)


def expect_refusal(archive: Path, target: Path, message: str) -> None:
    with pytest.raises(DataError) as error:
        extract_archive(archive, target)
    assert str(error.value) == message
    assert not target.exists()
    assert names_in(target.parent) == [archive.name]


@pytest.mark.parametrize(
    "name",
    [
        "../evil.jpg",
        f"{FOLDER_NAME}/train/../../../evil.jpg",
        "/tmp/evil.jpg",
        "..\\evil.jpg",
        "C:\\evil.jpg",
        "C:evil.jpg",
    ],
)
def test_member_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    archive = write_archive(tmp_path / "archive.zip", name)
    expect_refusal(
        archive,
        tmp_path / "target",
        f"The archive is not unpacked: of its member `{name}`, its path leads outside.",
    )


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_member_that_is_no_regular_file_is_refused(tmp_path: Path, kind: int) -> None:
    name = f"{FOLDER_NAME}/train/ants/link.jpg"
    member = zipfile.ZipInfo(name)
    member.external_attr = (kind | 0o777) << 16
    archive = write_archive(tmp_path / "archive.zip", member, "/etc/hostname")
    expect_refusal(
        archive,
        tmp_path / "target",
        f"The archive is not unpacked: of its member `{name}`, it is no regular file.",
    )


def test_huge_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ants_bees, "MAX_MEMBER_BYTES", 1000)
    name = f"{FOLDER_NAME}/train/ants/huge.jpg"
    archive = write_archive(tmp_path / "archive.zip", name, "x" * 1001)
    expect_refusal(
        archive,
        tmp_path / "target",
        f"The archive is not unpacked: of its member `{name}`, it unpacks to 1,001 bytes.",
    )


def test_huge_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ants_bees, "MAX_ARCHIVE_BYTES", 1000)
    archive = write_archive(tmp_path / "archive.zip", "some.jpg", "x" * 1000)
    expect_refusal(
        archive,
        tmp_path / "target",
        "The archive unpacks to more than 1,000 bytes; the photographs are 47 million. "
        "It is not unpacked.",
    )


def test_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "archive.zip"
    archive.write_bytes(b"no archive")
    expect_refusal(
        archive,
        tmp_path / "target",
        f"The archive `{archive}` is no zip file, or damaged: File is not a zip file.",
    )


@pytest.mark.parametrize("offset", [0, 20])
def test_damaged_member_is_refused(tmp_path: Path, archive: Path, offset: int) -> None:
    archive.write_bytes(damage(archive, offset))
    with pytest.raises(DataError) as error:
        extract_archive(archive, tmp_path / "target")
    assert str(error.value) == (
        f"The archive `{archive}` is no zip file, or damaged: {error.value.__cause__}."
    )
    assert not (tmp_path / "target").exists()


def test_locked_member_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive.zip", "some.jpg")
    content = archive.read_bytes()
    # Bit 0 of the flags, in the local headers and in the directory at the end.
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature) + offset
        content = content[:place] + b"\x01" + content[place + 1 :]
    archive.write_bytes(content)
    with pytest.raises(DataError):
        extract_archive(archive, tmp_path / "target")
