"""`transferkit predict`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transferkit.cli.options import EXIT_OK


def add_predict(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "predict",
        help="predict the classes of pictures",
        description="Predict the classes of pictures and of all pictures in folders.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path)
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="a file or a folder")
    parser.add_argument(
        "--top-k",
        type=int,
        default=1,
        metavar="K",
        help="classes to print for each picture (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run_predict)


def run_predict(options: argparse.Namespace) -> int:
    """Run `transferkit predict`."""
    import transferkit as tk
    from transferkit.data.folders import find_images

    predictor = tk.Predictor.load(options.artifact, device=options.device)
    paths: list[Path] = []
    for path in options.paths:
        paths += find_images(path) if path.is_dir() else [path]
    predictions = predictor.predict_many(paths, top_k=options.top_k, batch_size=options.batch_size)
    if options.json:
        print(json.dumps([prediction.to_dict() for prediction in predictions], indent=2))
        return EXIT_OK
    for prediction in predictions:
        ranked = "  ".join(f"{each.label} {each.probability:.4f}" for each in prediction.top_k)
        print(f"{prediction.path}  {ranked}")
    return EXIT_OK
