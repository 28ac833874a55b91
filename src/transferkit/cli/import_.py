"""`transferkit import`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transferkit.cli.options import EXIT_OK


def add_import(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "import",
        help="make an artifact of the weights of a torchvision or timm network",
        description="Make an artifact of the weights of a network of torchvision or timm that "
        "was trained elsewhere, with its head. The file is read without running code.",
    )
    parser.add_argument(
        "weights", metavar="STATE_DICT", type=Path, help="a .pth or .safetensors file"
    )
    parser.add_argument("--backbone", required=True, help="a backbone's name")
    parser.add_argument(
        "--classes",
        required=True,
        type=_names,
        metavar="NAMES",
        help="the names of the classes in the order of the head's rows, with commas between",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("model.safetensors"),
        metavar="FILE",
        help="the artifact to write (default: %(default)s)",
    )
    parser.set_defaults(run=run_import)


def run_import(options: argparse.Namespace) -> int:
    """Run `transferkit import`."""
    import transferkit as tk

    model = tk.import_model(options.backbone, options.weights, class_names=options.classes)
    path = tk.save_artifact(options.out, model, class_names=options.classes)
    print(f"Saved the artifact in {path}")
    return EXIT_OK


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
