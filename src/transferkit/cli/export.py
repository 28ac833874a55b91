"""`transferkit export`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transferkit.cli.options import EXIT_OK

_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}


def add_export(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write an artifact's model in the format of another program",
        description="Write an artifact's model in the format of another program, and check that "
        "it computes the same there.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path)
    parser.add_argument(
        "--format",
        choices=tuple(_SUFFIXES),
        default="onnx",
        help="onnx; openvino, which has two files; torch, a program of torch.export "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the .onnx, .xml or .pt2 file to write (default: beside the artifact)",
    )
    parser.add_argument(
        "--outputs",
        choices=("logits", "probabilities"),
        default="logits",
        help="what the exported model gives (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone")
    parser.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Run `transferkit export`."""
    from transferkit.exporting import export_onnx, export_openvino, export_program

    writers = {"onnx": export_onnx, "openvino": export_openvino, "torch": export_program}
    out = options.out or options.artifact.with_suffix(_SUFFIXES[options.format])
    path = writers[options.format](options.artifact, out, outputs=options.outputs)
    files = [path, path.with_suffix(".bin")] if options.format == "openvino" else [path]
    if options.json:
        print(json.dumps({"format": options.format, "files": [str(each) for each in files]}))
    else:
        print(f"Saved the model in {' and '.join(map(str, files))}")
    return EXIT_OK
