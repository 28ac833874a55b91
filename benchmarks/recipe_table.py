"""Accuracy and seconds of each ready recipe, as a table in Markdown.

    python benchmarks/recipe_table.py                     # the photographs, else drawn pictures
    python benchmarks/recipe_table.py --only probe --seeds 1

Each recipe trains EfficientNet-Lite0 with its own settings from several seeds, with BatchNorm
statistics fixed where the backbone trains. "val accuracy" is the mean over the seeds of the best
epoch's, with Wilson's 95 % interval for that share of the validation pictures: two recipes whose
intervals overlap widely cannot be told apart by them. The best epoch was picked on these same
pictures, which flatters all recipes alike. Seconds are the median of a whole fit,
pictures read, features computed and all.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from typing import Any

import transferkit as tk
from transferkit.data.ants_bees import find_ants_bees

BACKBONE = "efficientnet_lite0"

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "probe": ({"freeze": "backbone"}, {}),
    "probe, views=0": ({"freeze": "backbone"}, {"cache": tk.FeatureCache(views=0)}),
    'probe, views="epochs"': ({"freeze": "backbone"}, {"cache": tk.FeatureCache(views="epochs")}),
    'probe, solver="lbfgs"': ({"freeze": "backbone"}, {"solver": "lbfgs"}),
    'probe, head_start="pretrained"': ({"freeze": "backbone"}, {"head_start": "pretrained"}),
    "finetune": ({"bn": "fixed"}, {}),
    "probe_then_finetune": ({"bn": "fixed"}, {"recipe": "probe_then_finetune"}),
    'probe_then_finetune, solver="lbfgs"': (
        {"bn": "fixed"},
        {"recipe": "probe_then_finetune", "solver": "lbfgs"},
    ),
    "gradual": ({"bn": "fixed"}, {"recipe": "gradual"}),
}
"""For each row the options of the model and of the trainer."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval for a share of so many (Wilson, 1927)."""
    z = 1.959964
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    half = z * spread / (1 + z**2 / count)
    return centre - half, centre + half


def run(name: str, data: tk.ImageSplits, seed: int) -> tk.History:
    """Train once."""
    of_model, of_trainer = ROWS[name]
    model = tk.build_model(BACKBONE, data.num_classes, seed=seed, **of_model)
    return tk.Trainer(model, data, seed=seed, verbose=False, **of_trainer).fit()


def main() -> None:
    """Read the arguments, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=tuple(ROWS))
    options = parser.parse_args()
    found = find_ants_bees()
    data = found.splits()
    print(f"{BACKBONE} on {found.root.name}, {options.seeds} seeds\n")
    print("| recipe | epochs | val accuracy | 95 % interval | by seed | seconds |")
    print("|---|---|---|---|---|---|")
    for name in options.only or ROWS:
        runs = []
        for seed in range(options.seeds):
            runs.append(run(name, data, seed))
            print(f"{name}, seed {seed}: {runs[-1].seconds:.0f} s", file=sys.stderr)
        accuracies = [each.best.val_accuracy for each in runs]
        mean = statistics.mean(accuracies)
        low, high = wilson(mean, len(data.val))
        by_seed = ", ".join(f"{each:.4f}" for each in accuracies)
        seconds = statistics.median(each.seconds for each in runs)
        epochs = runs[0].settings["epochs"]
        print(
            f"| {name} | {epochs} | {mean:.4f} | {low:.3f} to {high:.3f} | {by_seed} "
            f"| {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
