"""`transferkit features`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transferkit.cli.options import EXIT_OK, add_reading
from transferkit.errors import ConfigError


def add_features(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "features",
        help="compute the features of pictures and write them to a file",
        description="Compute the features of all pictures in DIR, class folders or not, and "
        "write them with paths and labels.",
    )
    parser.add_argument("data", metavar="DIR", type=Path, help="a folder of pictures")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("features.npz"),
        metavar="FILE",
        help="the .npz or .safetensors file to write (default: %(default)s)",
    )
    parser.add_argument("--backbone", help="a backbone's name, with its default weights")
    parser.add_argument(
        "--artifact", type=Path, metavar="FILE", help="take the backbone of an artifact instead"
    )
    parser.add_argument(
        "--weights", default="default", metavar="PATH", help="as for train (default: %(default)s)"
    )
    parser.add_argument(
        "--engine",
        choices=("pytorch", "openvino", "onnxruntime"),
        default="pytorch",
        help="what computes them (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 where the processor has it (default: %(default)s)",
    )
    add_reading(parser)
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone")
    parser.set_defaults(run=run_features)


def run_features(options: argparse.Namespace) -> int:
    """Run `transferkit features`."""
    from transferkit._device import resolve_device
    from transferkit._files import check_writable
    from transferkit.models.feature_files import check_features_path

    check_features_path(options.out)
    check_writable(options.out)
    device = resolve_device(options.device)
    features = (
        _load_model(options)
        .to(device)
        .extract_features(
            options.data,
            engine=options.engine,
            precision=options.precision,
            num_workers=options.workers,
            on_error=options.on_error,
            verbose=not options.json,
        )
    )
    features.save(options.out)
    count, dim = features.values.shape
    if options.json:
        summary = {
            "file": str(options.out),
            "num_images": count,
            "num_features": dim,
            "class_names": list(features.class_names),
            "skipped": [str(each.path) for each in features.skipped],
        }
        print(json.dumps(summary, indent=2))
    else:
        print(f"Saved {dim:,} features of each of {count:,} pictures in {options.out}")
    return EXIT_OK


def _load_model(options: argparse.Namespace) -> Any:
    import transferkit as tk

    if (options.backbone is None) == (options.artifact is None):
        raise ConfigError("Name either --backbone or --artifact, which say what computes features.")
    if options.artifact is not None:
        if options.weights != "default":
            raise ConfigError("--weights belong to --backbone; an artifact has its own.")
        return tk.load_artifact(options.artifact).model
    weights = None if options.weights == "none" else options.weights
    return tk.build_model(options.backbone, num_classes=2, weights=weights)
