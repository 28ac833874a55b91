"""The `transferkit` command: a thin skin over the public API.

Nothing heavy is imported before the arguments are understood, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transferkit import __version__
from transferkit.errors import ConfigError, TransferkitError

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The words after the command's name; None takes them from `sys.argv`.

    Returns:
        The exit code: 0 if all went well, 1 after an error, 130 after Ctrl-C. Wrong usage
        exits with 2.
    """
    options = make_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names need not be text in any encoding; showing one must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result: int = options.run(options)
        sys.stdout.flush()
    except TransferkitError as error:
        print(f"transferkit: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("transferkit: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough.
        sys.stderr.close()
        return EXIT_OK
    except OSError as error:
        print(f"transferkit: error: cannot write the output: {error}", file=sys.stderr)
        return EXIT_ERROR
    return result


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="transferkit", description="Transfer learning for image classification."
    )
    parser.add_argument("--version", action="version", version=f"transferkit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_predict(commands)
    _add_check(commands)
    _add_backbones(commands)
    return parser


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train on a folder of class folders and save the best epoch",
        description="Train on DIR/train/CLASS/* and DIR/val/CLASS/*, on DIR/CLASS/* with "
        "--val-share, or on a table, and save the best epoch.",
    )
    parser.add_argument(
        "data",
        metavar="DIR",
        type=Path,
        help="the folder with train/ and val/ or with the classes, or a .csv or .tsv file",
    )
    parser.add_argument(
        "--val-share",
        type=float,
        metavar="F",
        help="split off that share of each class for validation",
    )
    parser.add_argument("--backbone", default="resnet18", help="default: %(default)s")
    parser.add_argument(
        "--weights",
        default="default",
        metavar="PATH",
        help='"default", "none" or the path of a .pth or .safetensors file (default: %(default)s)',
    )
    parser.add_argument(
        "--freeze",
        action="append",
        metavar="WHAT",
        help='"backbone" (the default), "none", or a glob over parameter names; may be repeated',
    )
    parser.add_argument(
        "--bn",
        choices=("frozen", "adapt", "fixed"),
        default="frozen",
        help="BatchNorm statistics: still where frozen, adapting there, or fixed everywhere "
        "(default: %(default)s)",
    )
    parser.add_argument("--recipe", help="tutorial, probe or finetune; default: by what is frozen")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--lr", type=float, help="learning rate of the head; default: the recipe's")
    parser.add_argument(
        "--backbone-lr-factor",
        type=float,
        metavar="F",
        help="learning rate of the backbone relative to it; default: the recipe's",
    )
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--optimizer", help="sgd, adam or adamw; default: the recipe's")
    parser.add_argument("--scheduler", help="default: the recipe's")
    _add_loading(parser)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("model.safetensors"),
        metavar="FILE",
        help="the artifact to write (default: %(default)s)",
    )
    parser.add_argument("--history", type=Path, metavar="FILE", help="write the history as JSON")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone")
    parser.set_defaults(run=run_train)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--augmentation", help="a preset's name; default: the recipe's")
    parser.add_argument(
        "--batch-augmentation",
        metavar="NAME",
        help="mixup, cutmix or mixup_or_cutmix; default: none",
    )
    parser.add_argument(
        "--balance", choices=("sampler", "weights"), help="make rare classes count; default: no"
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="what to do about a picture that cannot be read (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        default="auto",
        type=_workers,
        metavar="N",
        help="threads or processes that load pictures (default: %(default)s)",
    )


def _add_predict(commands: Any) -> None:
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


def _add_check(commands: Any) -> None:
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
        type=_workers,
        metavar="N",
        help="threads that read pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="let warnings count as errors for the exit code"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the worst finds as PNG")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run_check)


def _add_backbones(commands: Any) -> None:
    parser = commands.add_parser(
        "backbones", help="list the backbones", description="List the backbones by name."
    )
    parser.add_argument("--timm", action="store_true", help="list the models of timm too")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run_backbones)


def _workers(text: str) -> int | str:
    return text if text == "auto" else int(text)


def run_train(options: argparse.Namespace) -> int:
    """Run `transferkit train`."""
    import transferkit as tk
    from transferkit._files import check_writable

    if options.history is not None and options.history.resolve() == options.out.resolve():
        raise ConfigError(f"--out and --history name the same file, `{options.out}`.")
    for path in (options.out, options.history):
        if path is not None:
            check_writable(path)
    data = _load(options)
    if not options.json:
        print(data.describe())
    model = tk.build_model(
        options.backbone,
        num_classes=data.num_classes,
        freeze=_freeze(options.freeze),
        bn=options.bn,
        weights=None if options.weights == "none" else options.weights,
        seed=options.seed,
    )
    trainer = tk.Trainer(
        model,
        data,
        recipe=options.recipe,
        optimizer=options.optimizer,
        lr=options.lr,
        backbone_lr_factor=options.backbone_lr_factor,
        scheduler=options.scheduler,
        batch_size=options.batch_size,
        augmentation=options.augmentation,
        batch_augmentation=options.batch_augmentation,
        balance=options.balance,
        on_error=options.on_error,
        seed=options.seed,
        device=options.device,
        num_workers=options.workers,
        verbose=not options.json,
    )
    history = trainer.fit(options.epochs)
    return _finish_training(trainer, history, options)


def _load(options: argparse.Namespace) -> Any:
    """Load the pictures of a folder or a table."""
    import transferkit as tk

    if options.data.suffix.lower() in (".csv", ".tsv") and not options.data.is_dir():
        return tk.load_table(options.data, val=options.val_share, seed=options.seed)
    if options.val_share is None:
        return tk.load_folders(options.data)
    return tk.load_folders(options.data, val=options.val_share, seed=options.seed)


def _freeze(values: list[str] | None) -> str | list[str]:
    if values is None:
        return "backbone"
    if len(values) == 1:
        return values[0]
    shortcuts = [value for value in values if value in ("none", "backbone")]
    if shortcuts:
        raise ConfigError(f"--freeze {shortcuts[0]} stands alone, found {' '.join(values)}.")
    return values


def _finish_training(trainer: Any, history: Any, options: argparse.Namespace) -> int:
    interrupted = history.status == "interrupted"
    if not history.records:
        print(
            "transferkit: interrupted before the first epoch ended; nothing is saved",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    trainer.save(options.out)
    if options.history is not None:
        history.save(options.history)
    if options.json:
        summary = {
            "artifact": str(options.out),
            "best_epoch": history.best.epoch,
            "class_names": list(trainer.data.class_names),
            **json.loads(history.to_json()),
        }
        print(json.dumps(summary, indent=2))
    else:
        print(f"Saved {options.out}")
    return EXIT_INTERRUPTED if interrupted else EXIT_OK


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


def run_backbones(options: argparse.Namespace) -> int:
    """Run `transferkit backbones`."""
    import transferkit as tk

    names = tk.list_backbones(timm=options.timm)
    print(json.dumps(names, indent=2) if options.json else "\n".join(names))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
