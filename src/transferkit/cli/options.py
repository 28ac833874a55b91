"""What several commands share: their exit codes and the options for reading pictures."""

from __future__ import annotations

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def parse_workers(text: str) -> int | str:
    """Return a number of workers, or "auto"."""
    return text if text == "auto" else int(text)
