"""`transferkit card`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transferkit.cli.options import EXIT_OK


def add_card(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "card",
        help="write the model card of an artifact",
        description="Write a model card in Markdown with all that the artifact says, and with "
        "the places marked that its author has to fill in.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the file to write; without it the card is printed"
    )
    parser.set_defaults(run=run_card)


def run_card(options: argparse.Namespace) -> int:
    """Run `transferkit card`."""
    from transferkit._files import check_writable, write_text
    from transferkit.artifacts import make_card
    from transferkit.errors import ConfigError

    if options.out is None:
        print(make_card(options.artifact), end="")
        return EXIT_OK
    if options.out.resolve() == options.artifact.resolve():
        raise ConfigError(f"--out names the artifact itself, `{options.out}`.")
    check_writable(options.out)
    write_text(options.out, make_card(options.artifact))
    print(f"Saved {options.out}")
    return EXIT_OK
