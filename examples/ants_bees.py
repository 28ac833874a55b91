"""Learn ants from bees: the PyTorch lesson on transfer learning, on transferkit.

    python examples/ants_bees.py --out out/ants_bees

The lesson's own settings: --backbone resnet18 --recipe tutorial --epochs 25 --bn adapt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import transferkit as tk
from transferkit.data.ants_bees import find_ants_bees
from transferkit.errors import WeightsError


def find_backbone() -> str:
    """Take ResNet-18 where its weights are to be had, else EfficientNet-Lite0."""
    try:
        tk.build_model("resnet18", num_classes=2)
        chosen, reason = "resnet18", "its weights are to be had"
    except WeightsError:
        chosen, reason = "efficientnet_lite0", "the weights of resnet18 cannot be had here"
    print(f"Backbone: {chosen} ({reason})")
    return chosen


def show_training_batch(data: tk.ImageSplits, options: argparse.Namespace) -> None:
    """Draw what the network will see in training, with the class names."""
    preprocess = tk.get_backbone(options.backbone).preprocess
    loader = tk.ImageLoader(data.train, preprocess.train(), batch_size=8, shuffle=True)
    batch = next(loader.batches())
    cells = tk.show_batch(batch, class_names=data.class_names, preprocess=preprocess)
    cells[0].figure.savefig(options.out / "batch.png")


def run(scenario: str, data: tk.ImageSplits, options: argparse.Namespace) -> tk.Trainer:
    """Train one scenario; save the artifact, the curves and some predictions."""
    probe = scenario == "probe"
    print(f"\n== {scenario}: {'only the new head trains' if probe else 'everything trains'}")
    bn = options.bn if probe or options.bn == "fixed" else "frozen"  # Only frozen ones adapt.
    freezing: dict[str, Any] = {"freeze": "backbone" if probe else "none", "bn": bn}
    model = tk.build_model(options.backbone, data.num_classes, seed=options.seed, **freezing)
    settings = {"recipe": options.recipe or scenario, "batch_size": options.batch_size}
    trainer = tk.Trainer(model, data, seed=options.seed, **settings)
    history = trainer.fit(options.epochs)
    tk.plot_history(history)[0].figure.savefig(options.out / f"{scenario}_history.png")
    trainer.save(options.out / f"{scenario}.safetensors")
    cells = tk.show_predictions(model, data.val)
    cells[0].figure.savefig(options.out / f"{scenario}_predictions.png")
    return trainer


def predict_one(artifact: Path, data: tk.ImageSplits, options: argparse.Namespace) -> None:
    """Load the artifact as somebody else would, and predict one picture from its path."""
    by_name = {path.name: path for path in data.val.paths}
    picture = by_name.get("72100438_73de9f17af.jpg", data.val.paths[-1])  # As in the lesson.
    prediction = tk.Predictor.load(artifact).predict(picture, top_k=2)
    ax: Any = tk.show_prediction(picture, prediction)
    ax.figure.savefig(options.out / "prediction.png")
    print(f"\n{picture.name}:", *(f"{k.label} {k.probability:.1%}" for k in prediction.top_k))


def main(arguments: list[str] | None = None) -> None:
    """Run the lesson."""
    parser = argparse.ArgumentParser(description="Learn ants from bees.")
    parser.add_argument("--data", type=Path, help="the folder with train/ and val/")
    parser.add_argument("--backbone", default="auto", help="a name, or auto (the default)")
    parser.add_argument("--scenario", choices=("finetune", "probe", "both"), default="both")
    parser.add_argument("--recipe", choices=("tutorial",), help="default: the scenario's")
    parser.add_argument("--bn", choices=("fixed", "adapt"), default="fixed")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3; the lesson's is 25")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/ants_bees"), metavar="DIR")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    data = find_ants_bees(options.data).splits()
    print(data.describe())
    options.backbone = find_backbone() if options.backbone == "auto" else options.backbone
    show_training_batch(data, options)
    scenarios = ["finetune", "probe"] if options.scenario == "both" else [options.scenario]
    trainers = {scenario: run(scenario, data, options) for scenario in scenarios}
    predict_one(options.out / f"{scenarios[0]}.safetensors", data, options)
    for scenario, trainer in trainers.items():
        best, seconds = trainer.history.best, trainer.history.seconds
        print(f"{scenario}: best val accuracy {best.val_accuracy:.4f} after {seconds:.0f} s")
    print("Files:", *sorted(str(path) for path in options.out.iterdir()), sep="\n  ")


if __name__ == "__main__":
    try:
        main()
    except (tk.TransferkitError, OSError) as error:
        sys.exit(f"error: {error}")
