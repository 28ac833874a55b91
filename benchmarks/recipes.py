"""Measure settings for linear probing and fine-tuning: what the default recipes were picked by.

    python benchmarks/recipes.py --scenario probe --data photographs
    python benchmarks/recipes.py --scenario finetune --data drawn --only sgd-0.01-b16

Each candidate is trained from several seeds; a row is printed as soon as its runs end: the
best epoch's validation accuracy of each seed, their mean, the mean validation loss of these
epochs and the seconds of a run. The photographs are found as in
`transferkit.data.ants_bees.find_ants_bees`.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

import transferkit as tk
from transferkit.data.ants_bees import find_ants_bees

BACKBONE = "efficientnet_lite0"
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    "probe": {
        "sgd-0.03-b16": {"optimizer": "sgd", "lr": 0.03, "scheduler": "cosine"},
        "sgd-0.01-b16": {"optimizer": "sgd", "lr": 0.01, "scheduler": "cosine"},
        "adamw-0.003-b16": {"optimizer": "adamw", "lr": 0.003, "scheduler": "cosine"},
    },
    "finetune": {
        "sgd-0.01-b16-backbone-0.03-bn-fixed": {
            "optimizer": "sgd",
            "lr": 0.01,
            "backbone_lr_factor": 0.03,
            "scheduler": "warmup_cosine",
            "bn": "fixed",
        },
        "sgd-0.003-b16": {"optimizer": "sgd", "lr": 0.003, "scheduler": "warmup_cosine"},
        "sgd-0.01-b16": {"optimizer": "sgd", "lr": 0.01, "scheduler": "warmup_cosine"},
        "sgd-0.03-b16": {"optimizer": "sgd", "lr": 0.03, "scheduler": "warmup_cosine"},
        "sgd-0.01-b8": {
            "optimizer": "sgd",
            "lr": 0.01,
            "scheduler": "warmup_cosine",
            "batch_size": 8,
        },
        "adamw-0.0003-b16": {"optimizer": "adamw", "lr": 0.0003, "scheduler": "warmup_cosine"},
        "adamw-0.001-b16": {"optimizer": "adamw", "lr": 0.001, "scheduler": "warmup_cosine"},
    },
}


def measure(
    scenario: str, settings: dict[str, Any], data: tk.ImageSplits, seed: int, epochs: int
) -> tk.History:
    """Train once and return the history."""
    freeze = "backbone" if scenario == "probe" else "none"
    options = {"batch_size": 16, "backbone_lr_factor": 1.0, "verbose": False} | settings
    bn = options.pop("bn", "frozen")
    model = tk.build_model(BACKBONE, data.num_classes, freeze=freeze, bn=bn, seed=seed)
    trainer = tk.Trainer(model, data, seed=seed, **options)
    return trainer.fit(epochs)


def main() -> None:
    """Measure the candidates that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", choices=tuple(CANDIDATES), required=True)
    parser.add_argument("--data", choices=("photographs", "drawn"), default="drawn")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", metavar="CANDIDATE")
    options = parser.parse_args()
    wanted = options.data == "photographs"
    data = find_ants_bees(photographs=wanted, draw=not wanted).splits()
    print(f"{options.scenario} on {options.data}, {options.epochs} epochs, {options.seeds} seeds")
    print("| candidate | val accuracy by seed | mean | val loss | seconds |\n|---|---|---|---|---|")
    for name, settings in CANDIDATES[options.scenario].items():
        if options.only and name not in options.only:
            continue
        runs = [
            measure(options.scenario, settings, data, seed, options.epochs)
            for seed in range(options.seeds)
        ]
        accuracies = [run.best.val_accuracy for run in runs]
        print(
            f"| {name} | {', '.join(f'{each:.4f}' for each in accuracies)} "
            f"| {mean(accuracies):.4f} | {mean(run.best.val_loss for run in runs):.4f} "
            f"| {mean(run.seconds for run in runs):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
