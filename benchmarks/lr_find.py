"""What fits make of the learning rate that `lr_find` suggests, beside a tenth and ten times it.

    python benchmarks/lr_find.py                       # the head, some optimizers and batch sizes
    python benchmarks/lr_find.py --finetune --seeds 1  # the whole network, which takes long

The network is EfficientNet-Lite0 with its published weights, on the photographs of ants and
bees. The features of the frozen backbone are computed once and kept in a temporary folder, of
the evaluation view, so that seeds differ in the first weights of the head and in the order of
the pictures. Losses and accuracies are those of the validation pictures after the last epoch,
as means over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

import transferkit as tk
from transferkit.data.ants_bees import find_ants_bees

FACTORS = (0.1, 1.0, 10.0)


def make_trainer(data: tk.ImageSplits, seed: int, finetune: bool, **options: Any) -> tk.Trainer:
    """Return a trainer with the weights that belong to a seed."""
    freeze = "none" if finetune else "backbone"
    model = tk.build_model("efficientnet_lite0", data.num_classes, freeze=freeze, seed=seed)
    return tk.Trainer(model, data, seed=seed, verbose=False, device="cpu", **options)


def run_case(
    data: tk.ImageSplits, seeds: int, epochs: int, finetune: bool, options: dict[str, Any]
) -> str:
    """Return a line of the table: the suggestions, then loss and accuracy at each factor."""
    suggestions: list[float] = []
    results: dict[float, list[tuple[float, float]]] = {factor: [] for factor in FACTORS}
    for seed in range(seeds):
        found = make_trainer(data, seed, finetune, **options).lr_find(verbose=False)
        if found.suggestion is None:
            continue
        suggestions.append(found.suggestion)
        for factor in FACTORS:
            trainer = make_trainer(data, seed, finetune, lr=found.suggestion * factor, **options)
            last = trainer.fit(epochs).records[-1]
            results[factor].append((last.val_loss, last.val_accuracy))
    cells = [", ".join(f"{each:.2g}" for each in suggestions)]
    for pairs in results.values():
        loss, accuracy = (statistics.mean(values) for values in zip(*pairs, strict=True))
        cells.append(f"{loss:.3f}, {accuracy:.1%}")
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--finetune", action="store_true")
    options = parser.parse_args()
    data = find_ants_bees().splits()
    cases = [(name, size) for name in ("sgd", "adamw") for size in (4, 16, 64)]
    if options.finetune:
        cases = [("sgd", 16)]
    print("| optimizer, batch | suggestions | at a tenth | at the suggestion | at ten times |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cache = tk.FeatureCache(views=0, folder=folder)
        for name, size in cases:
            given = {"optimizer": name, "batch_size": size}
            if not options.finetune:
                given["cache"] = cache
            line = run_case(data, options.seeds, options.epochs, options.finetune, given)
            print(f"| {name}, {size} | {line} |", flush=True)


if __name__ == "__main__":
    main()
