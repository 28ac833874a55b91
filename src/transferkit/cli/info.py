"""`transferkit info`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transferkit.cli.options import EXIT_OK


def add_info(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "info",
        help="say what an artifact holds",
        description="Say what an artifact holds: classes, backbone, preprocessing, fit, sizes, "
        "digest, licence. Only the header of the file is read, and nothing in it is executed.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path)
    parser.add_argument(
        "--verify", action="store_true", help="read all of it, and compare it with its digest"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run_info)


def run_info(options: argparse.Namespace) -> int:
    """Run `transferkit info`."""
    import transferkit as tk

    info = tk.read_info(options.artifact, verify=options.verify)
    print(json.dumps(info.to_dict(), indent=2) if options.json else info.describe())
    return EXIT_OK
