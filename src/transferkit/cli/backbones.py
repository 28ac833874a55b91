"""`transferkit backbones`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from transferkit.cli.options import EXIT_OK


def add_backbones(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "backbones", help="list the backbones", description="List the backbones by name."
    )
    parser.add_argument("--timm", action="store_true", help="list the models of timm too")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run_backbones)


def run_backbones(options: argparse.Namespace) -> int:
    """Run `transferkit backbones`."""
    import transferkit as tk

    names = tk.list_backbones(timm=options.timm)
    print(json.dumps(names, indent=2) if options.json else "\n".join(names))
    return EXIT_OK
