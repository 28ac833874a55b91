"""`transferkit train`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transferkit.cli.options import EXIT_INTERRUPTED, EXIT_OK, add_reading
from transferkit.errors import ConfigError

_PLOT_FORMATS = (".png", ".svg", ".pdf")


def add_train(commands: Any) -> None:
    """Add the command to the parser."""
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
        help='"backbone" (the default, but for --recipe finetune), "none", "until:STAGE", or a '
        "glob over parameter names, which may be repeated",
    )
    parser.add_argument(
        "--bn",
        choices=("frozen", "train", "adapt", "fixed"),
        default="frozen",
        help="BatchNorm of frozen parts: still, training, or adapting its statistics; or all "
        "statistics fixed (default: %(default)s)",
    )
    parser.add_argument(
        "--recipe",
        help="tutorial, probe, finetune, probe_then_finetune or gradual; default: by what is "
        "frozen",
    )
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    looks = parser.add_mutually_exclusive_group()
    looks.add_argument(
        "--plan", action="store_true", help="print what would be done, and stop before it"
    )
    looks.add_argument(
        "--lr-find",
        action="store_true",
        help="try rising learning rates, print the one that they suggest, and stop",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw what --lr-find found, as .png, .svg or .pdf"
    )
    parser.add_argument("--lr", type=float, help="learning rate of the head; default: the recipe's")
    parser.add_argument(
        "--backbone-lr-factor",
        type=float,
        metavar="F",
        help="learning rate of the backbone relative to it; default: the recipe's",
    )
    parser.add_argument(
        "--stage-lr-factor",
        type=float,
        metavar="F",
        help="learning rate of each stage relative to the stage after it; default: the recipe's",
    )
    parser.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help='"auto" takes the largest that fits the memory, up to the recipe\'s; default: the '
        "recipe's",
    )
    parser.add_argument("--optimizer", help="sgd, adam or adamw; default: the recipe's")
    parser.add_argument("--scheduler", help="default: the recipe's")
    _add_head(parser)
    _add_regularizers(parser)
    _add_cache(parser)
    _add_updates(parser)
    _add_checkpoints(parser)
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


def _add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--head",
        choices=("linear", "mlp", "cosine"),
        default="linear",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        default=0.0,
        metavar="F",
        help="the share that the head drops in training (default: %(default)s)",
    )
    parser.add_argument(
        "--head-start",
        choices=("class_means", "ridge", "logistic", "pretrained"),
        help="what the head starts from; default: random weights",
    )
    parser.add_argument(
        "--solver",
        choices=("sgd", "lbfgs"),
        default="sgd",
        help="what trains the head where it trains alone (default: %(default)s)",
    )


def _add_regularizers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--label-smoothing", type=float, default=0.0, metavar="F", help="default: %(default)s"
    )
    parser.add_argument(
        "--l2-sp",
        type=float,
        default=0.0,
        metavar="F",
        help="pull of the backbone to its first weights (default: %(default)s)",
    )
    averages = parser.add_mutually_exclusive_group()
    averages.add_argument(
        "--ema", type=float, metavar="DECAY", help="average the weights over the steps"
    )
    averages.add_argument(
        "--swa", type=float, metavar="START", help="average them over the epochs from a share on"
    )
    parser.add_argument(
        "--wise-ft",
        action="store_true",
        help="interpolate with the weights before fine-tuning, as validation says",
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        choices=("auto", "on", "off"),
        default="auto",
        help="compute the features of a frozen part once (default: %(default)s, where it can)",
    )
    parser.add_argument(
        "--views",
        type=_views,
        metavar="K",
        help='cached augmented views of each picture, 0 for none, or "epochs" for a new one in '
        "every epoch (default: 4)",
    )
    parser.add_argument(
        "--engine",
        choices=("pytorch", "openvino"),
        help="what computes cached features (default: pytorch)",
    )
    parser.add_argument(
        "--feature-precision",
        choices=("float32", "bfloat16"),
        help="of cached features (default: float32)",
    )
    parser.add_argument(
        "--feature-folder", type=Path, metavar="DIR", help="keep features there for later runs"
    )


def _views(text: str) -> int | str:
    return text if text == "epochs" else int(text)


def _add_updates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16", "auto"),
        default="fp32",
        help="what training computes in (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="batches for one optimizer update (default: %(default)s)",
    )
    parser.add_argument(
        "--clip-norm", type=float, metavar="F", help="the largest norm of all gradients"
    )
    parser.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="less memory for more time, with the same results",
    )
    parser.add_argument(
        "--nan-policy",
        type=_nan_policy,
        default="raise",
        metavar="N",
        help='how many batches whose loss is not finite may be left out, or "raise" '
        "(default: %(default)s)",
    )


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _nan_policy(text: str) -> int | str:
    return text if text == "raise" else int(text)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="keep the state of the fit there"
    )
    parser.add_argument(
        "--checkpoint-steps",
        type=int,
        metavar="N",
        help="also after every N optimizer updates, not only after each epoch",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --checkpoints, where there is one",
    )


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
    add_reading(parser)


def run_train(options: argparse.Namespace) -> int:
    """Run `transferkit train`."""
    from transferkit._files import check_writable

    if options.history is not None and options.history.resolve() == options.out.resolve():
        raise ConfigError(f"--out and --history name the same file, `{options.out}`.")
    _check_plot(options)
    only_looks = options.plan or options.lr_find
    for path in (options.plot,) if only_looks else (options.out, options.history):
        if path is not None:
            check_writable(path)
    cache = _cache(options)
    data = _load(options)
    if not options.json:
        print(data.describe())
    trainer = _make_trainer(data, options, cache)
    if options.plan:
        plan = trainer.plan(options.epochs, verbose=False)
        print(json.dumps(plan.to_dict(), indent=2) if options.json else plan)
        return EXIT_OK
    if options.lr_find:
        return _find_lr(trainer, options)
    history = trainer.fit(options.epochs, resume="auto" if options.resume else False)
    return _finish_training(trainer, history, options)


def _check_plot(options: argparse.Namespace) -> None:
    """Check that a picture was asked for of something, and in a format that there is."""
    if options.plot is None:
        return
    if not options.lr_find:
        raise ConfigError("--plot draws what --lr-find found, and would be ignored without it.")
    if options.plot.suffix.lower() not in _PLOT_FORMATS:
        raise ConfigError(
            f"--plot writes {' or '.join(_PLOT_FORMATS)}, found `{options.plot}`. Give the file "
            f"such an ending."
        )


def _find_lr(trainer: Any, options: argparse.Namespace) -> int:
    found = trainer.lr_find(verbose=False)
    if options.plot is not None:
        from transferkit.plots import plot_lr_find
        from transferkit.plots.saving import save_and_close

        save_and_close(plot_lr_find(found), options.plot)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return EXIT_OK


def _make_trainer(data: Any, options: argparse.Namespace, cache: Any) -> Any:
    import transferkit as tk

    model = tk.build_model(
        options.backbone,
        num_classes=data.num_classes,
        freeze=_freeze(options.freeze, options.recipe),
        bn=options.bn,
        head=tk.HeadSpec(kind=options.head, dropout=options.dropout),
        weights=None if options.weights == "none" else options.weights,
        seed=options.seed,
    )
    same = (
        "recipe", "optimizer", "lr", "backbone_lr_factor", "stage_lr_factor", "scheduler",
        "batch_size", "augmentation", "batch_augmentation", "balance", "head_start", "solver",
        "label_smoothing", "l2_sp", "wise_ft", "on_error", "seed", "device", "precision",
        "accumulate", "clip_norm", "activation_checkpointing", "nan_policy",
    )  # fmt: skip
    return tk.Trainer(
        model,
        data,
        **{name: getattr(options, name) for name in same},
        average=_average(options),
        cache=cache,
        checkpoints=_checkpoints(options),
        num_workers=options.workers,
        verbose=not options.json,
    )


def _checkpoints(options: argparse.Namespace) -> Any:
    """Return where checkpoints are kept; options that would be ignored are an error."""
    import transferkit as tk

    if options.checkpoints is not None:
        return tk.Checkpoints(folder=options.checkpoints, every_steps=options.checkpoint_steps)
    if options.checkpoint_steps is not None:
        raise ConfigError("--checkpoint-steps needs a folder for them: --checkpoints DIR.")
    if options.resume:
        raise ConfigError("--resume needs the folder of the checkpoints: --checkpoints DIR.")
    return None


def _average(options: argparse.Namespace) -> Any:
    import transferkit as tk

    if options.ema is not None:
        return tk.EMA(decay=options.ema)
    return None if options.swa is None else tk.SWA(start=options.swa)


def _cache(options: argparse.Namespace) -> Any:
    """Return how features are cached; options that would be ignored are an error."""
    import transferkit as tk

    names = {"views": "views", "engine": "engine", "feature_precision": "precision"}
    names |= {"feature_folder": "folder"}
    given = {
        name: getattr(options, option)
        for option, name in names.items()
        if getattr(options, option) is not None
    }
    if options.cache == "off" and given:
        option = next(option for option, name in names.items() if name in given)
        raise ConfigError(f"--cache off would ignore --{option.replace('_', '-')}. Leave one out.")
    if given:
        return tk.FeatureCache(**given)
    return {"auto": "auto", "on": True, "off": False}[options.cache]


def _load(options: argparse.Namespace) -> Any:
    """Load the pictures of a folder or a table."""
    import transferkit as tk

    if options.data.suffix.lower() in (".csv", ".tsv") and not options.data.is_dir():
        return tk.load_table(options.data, val=options.val_share, seed=options.seed)
    if options.val_share is None:
        return tk.load_folders(options.data)
    return tk.load_folders(options.data, val=options.val_share, seed=options.seed)


def _freeze(values: list[str] | None, recipe: str | None) -> str | list[str]:
    from transferkit.training import RECIPES

    wanted = RECIPES[recipe].freeze if recipe is not None and recipe in RECIPES else None
    if values is None:
        return "none" if wanted == "none" else "backbone"
    if values == ["none"] and wanted == "backbone":
        raise ConfigError(f"--recipe {recipe} freezes the backbone, --freeze none does not.")
    if len(values) == 1:
        return values[0]
    shortcuts = [
        value for value in values if value in ("none", "backbone") or value.startswith("until:")
    ]
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
