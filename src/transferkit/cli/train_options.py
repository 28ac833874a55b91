"""The options of `transferkit train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transferkit.cli.options import add_reading


def add_options(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Add the command with its options to the parser.

    Args:
        commands: The subcommands.
        run: Runs it.
    """
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
    _add_model(parser)
    parser.add_argument(
        "--recipe",
        help="tutorial, probe, finetune, probe_then_finetune or gradual; default: by what is "
        "frozen",
    )
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    _add_looks(parser)
    _add_rates(parser)
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
    parser.set_defaults(run=run)


def _add_model(parser: argparse.ArgumentParser) -> None:
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


def _add_looks(parser: argparse.ArgumentParser) -> None:
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


def _add_rates(parser: argparse.ArgumentParser) -> None:
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
        choices=("pytorch", "openvino", "onnxruntime"),
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
