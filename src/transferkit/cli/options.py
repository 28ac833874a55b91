"""What several commands share: their exit codes and the options for reading pictures."""

from __future__ import annotations

import argparse

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_PARTIAL = 3
"""All is done, but for pictures that could not be read (2 is argparse's for wrong usage)."""
EXIT_INTERRUPTED = 130


def parse_workers(text: str) -> int | str:
    """Return a number of workers, or "auto"."""
    return text if text == "auto" else int(text)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that reads pictures in bulk for a network."""
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="what to do about a picture that cannot be read (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        default="auto",
        type=parse_workers,
        metavar="N",
        help="threads or processes that read pictures (default: %(default)s)",
    )
