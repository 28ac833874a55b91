"""Fetching one file over the network, with a progress bar and limits on the waiting."""

from __future__ import annotations

from pathlib import Path

import pooch

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0


def fetch(url: str, folder: Path, name: str) -> Path:
    """Download `url` into a folder; the caller checks the file and moves it to its place.

    Args:
        url: Where the file is.
        folder: Where to put it, a temporary folder on the file system of its last place.
        name: What to call it there.

    Returns:
        The path of the file.

    Raises:
        OSError: The network, the server or the disk refused.
    """
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
    return Path(
        pooch.retrieve(url, known_hash=None, fname=name, path=folder, downloader=downloader)
    )
