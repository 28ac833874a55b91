"""`transferkit predict`."""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transferkit.cli.options import EXIT_INTERRUPTED, EXIT_OK, EXIT_PARTIAL, parse_workers
from transferkit.cli.predict_table import Table
from transferkit.errors import ConfigError


def add_predict(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "predict",
        help="predict the classes of pictures",
        description="Predict the classes of pictures and of all pictures in folders. The exit code "
        "is 3 where some could not be read.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path)
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", type=Path, help="a file, a folder or a glob pattern"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=1,
        metavar="K",
        help="classes for each picture (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="abstain where the likeliest class has a lower probability",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="what logits are divided by before softmax (default: 1)",
    )
    parser.add_argument(
        "--on-error",
        choices=("record", "skip", "raise"),
        default="record",
        help="what to do about a picture that cannot be read (default: %(default)s)",
    )
    _add_output(parser)
    _add_speed(parser)
    parser.set_defaults(run=run_predict)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a file, not a table")
    parser.add_argument(
        "--format",
        choices=("csv", "jsonl", "parquet"),
        help="of the file; default: by its ending",
    )
    both = parser.add_mutually_exclusive_group()
    both.add_argument(
        "--resume", action="store_true", help="go on with a run that was stopped, if there is one"
    )
    both.add_argument(
        "--overwrite", action="store_true", help="begin anew, whatever of the file is there"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone")
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar and no summary, only errors"
    )


def _add_speed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=("auto", "pytorch", "openvino", "onnxruntime"),
        default="auto",
        help="what runs the network (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="what it computes in (default: %(default)s)",
    )
    parser.add_argument(
        "--tta",
        choices=("flip", "five_crop"),
        help="average with the mirrored picture, or over five crops; default: no",
    )
    parser.add_argument(
        "--batch-size", type=_batch_size, default="auto", metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--workers",
        default="auto",
        type=parse_workers,
        metavar="N",
        help="threads that read pictures (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="default: %(default)s")


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run_predict(options: argparse.Namespace) -> int:
    """Run `transferkit predict`."""
    _check(options)
    predictor = _load(options)
    paths = _find(options.paths)
    if options.out is not None:
        return _write(predictor, paths, options)
    found = predictor.predict_many(
        paths,
        top_k=options.top_k,
        batch_size=options.batch_size,
        num_workers=options.workers,
        on_error="raise" if options.on_error == "raise" else "record",
        # A table on a terminal shows by itself how far it is.
        progress=not options.quiet and not sys.stdout.isatty(),
    )
    return _print(predictor, paths, found, options)


def _check(options: argparse.Namespace) -> None:
    """Refuse options that would be ignored."""
    if options.out is None:
        for name in ("format", "resume", "overwrite"):
            if getattr(options, name):
                raise ConfigError(f"--{name} needs the file that it is about: --out FILE.")


def _load(options: argparse.Namespace) -> Any:
    import transferkit as tk

    names = ("tta", "threshold", "temperature")
    given = {name: getattr(options, name) for name in names}
    return tk.Predictor.load(
        options.artifact,
        device=_device(options.device),
        engine=options.engine,
        precision=options.precision,
        **{name: value for name, value in given.items() if value is not None},
    )


def _device(name: str) -> str:
    """Return the device: under torchrun an accelerator for each process, where there are any."""
    import torch

    place = os.environ.get("LOCAL_RANK")
    if name != "auto" or place is None:
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return name
    return f"{accelerator.type}:{int(place) % torch.accelerator.device_count()}"


def _find(given: Iterable[Path]) -> list[Path]:
    """Return the pictures that folders, patterns and files stand for.

    A file that is not there is one that cannot be read, and said to be so in its row.
    """
    from transferkit.inference.bulk_inputs import find_paths

    paths: list[Path] = []
    for each in given:
        is_picture = not each.is_dir() and (each.exists() or not glob.has_magic(str(each)))
        paths += [each] if is_picture else find_paths(each)
    return paths


def _write(predictor: Any, paths: list[Path], options: argparse.Namespace) -> int:
    import transferkit as tk

    try:
        report = tk.predict_to_file(
            predictor,
            paths,
            options.out,
            format=options.format,
            top_k=options.top_k,
            resume=options.resume,
            overwrite=options.overwrite,
            on_error=options.on_error,
            shard="auto",
            batch_size=options.batch_size,
            num_workers=options.workers,
            progress=not options.quiet,
        )
    except KeyboardInterrupt:
        print(
            "transferkit: interrupted; what was done is kept, and the same command with --resume "
            "goes on",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    if options.json:
        summary = {**report.to_dict(), "precision": predictor.precision}
        print(json.dumps(summary, indent=2))
    elif not options.quiet:
        print(_describe(report, predictor))
    return _finish(report.num_failed, report.num_images, options)


def _describe(report: Any, predictor: Any) -> str:
    counts = {
        "predicted": report.num_predicted,
        "duplicates": report.num_duplicates,
        "done before": report.num_resumed,
        "not readable": report.num_failed,
    }
    parts = ", ".join(f"{value:,} {name}" for name, value in counts.items() if value)
    engine = f"{report.engine} in {predictor.precision}"
    return (
        f"Saved {report.num_images:,} pictures in {report.path} ({parts or 'none'}), by {engine} "
        f"in {report.seconds:.1f} s"
    )


def _print(
    predictor: Any, paths: list[Path], found: Iterator[Any], options: argparse.Namespace
) -> int:
    """Print a table row by row, or a JSON list."""
    from transferkit.inference.results import to_record

    table = Table(paths, predictor.class_names, options.top_k)
    records, num_failed = [], 0
    if not options.json:
        print(table.header())
    for each in found:
        record = to_record(each)
        failed = "error" in record
        num_failed += failed
        if failed and options.on_error == "skip":
            continue
        if options.json:
            records.append(record)
        else:
            print(table.row(record), flush=True)
    if options.json:
        print(json.dumps(records, indent=2))
    return _finish(num_failed, len(paths), options)


def _finish(num_failed: int, num_images: int, options: argparse.Namespace) -> int:
    """Say how many failed, and return the exit code."""
    if not num_failed:
        return EXIT_OK
    if not options.quiet:
        print(
            f"transferkit: {num_failed:,} of {num_images:,} pictures could not be read",
            file=sys.stderr,
        )
    return EXIT_OK if options.on_error == "skip" else EXIT_PARTIAL
