"""`transferkit train`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from transferkit.cli.options import EXIT_INTERRUPTED, EXIT_OK
from transferkit.cli.train_options import add_options
from transferkit.errors import ConfigError

_PLOT_FORMATS = (".png", ".svg", ".pdf")


def add_train(commands: Any) -> None:
    """Add the command to the parser."""
    add_options(commands, run_train)


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
    if not trainer.is_first_process:
        return EXIT_INTERRUPTED if interrupted else EXIT_OK
    if not history.records:
        kept = "nothing is saved"
        if options.checkpoints is not None:
            kept = f"go on by --checkpoints {options.checkpoints} --resume"
        print(f"transferkit: interrupted before the first epoch ended; {kept}", file=sys.stderr)
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
