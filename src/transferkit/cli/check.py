"""`transferkit check`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from transferkit.cli.options import EXIT_ERROR, EXIT_OK, parse_workers


def add_check(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "check",
        help="look for broken, odd and duplicate pictures before training",
        description="Decode every picture of DIR/train/CLASS/* and DIR/val/CLASS/*, or of "
        "DIR/CLASS/*, and report what is wrong. The exit code is 1 where errors were found.",
    )
    parser.add_argument("data", metavar="DIR", type=Path)
    for name in ("train", "val", "test"):
        parser.add_argument(
            f"--{name}", default=name, metavar="NAME", help=f"the folder of the {name} split"
        )
    parser.add_argument(
        "--near-distance",
        type=int,
        default=8,
        metavar="N",
        help="bits of 64 in which near duplicates may differ (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        default="auto",
        type=parse_workers,
        metavar="N",
        help="threads that read pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="let warnings count as errors for the exit code"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the worst finds as PNG")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run_check)


def run_check(options: argparse.Namespace) -> int:
    """Run `transferkit check`."""
    from tqdm import tqdm

    import transferkit as tk
    from transferkit._files import check_writable

    if options.picture is not None:
        check_writable(options.picture)
    report = tk.check_folder(
        options.data,
        train=options.train,
        val=options.val,
        test=options.test,
        near_distance=options.near_distance,
        num_workers=options.workers,
        # Only on a terminal, and on standard error.
        watch=lambda facts, total: tqdm(facts, total=total, unit="file", leave=False, disable=None),
    )
    print(report.to_json() if options.json else report.describe())
    if options.picture is not None:
        _draw_findings(report, options.picture)
    failed = report.has_errors or (options.strict and report.count("warning") > 0)
    return EXIT_ERROR if failed else EXIT_OK


def _draw_findings(report: Any, path: Path) -> None:
    """Write the picture; say so where there is nothing to draw."""
    if not any(each.is_file() for finding in report.findings for each in finding.paths):
        print("transferkit: no finding is about a file; no picture is drawn", file=sys.stderr)
        return
    os.environ.setdefault("MPLBACKEND", "Agg")  # A file is written; no window is needed.
    import transferkit as tk
    from transferkit._files import atomic_path

    with atomic_path(path) as temporary:
        tk.show_findings(report)[0].figure.savefig(temporary, format="png", dpi=120)
