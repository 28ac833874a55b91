"""Learn ants from bees: the PyTorch lesson on transfer learning, on transferkit.

    python examples/ants_bees.py --out out/ants_bees

The lesson's own settings: --backbone resnet18 --recipe tutorial --epochs 25 --bn adapt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import transferkit as tk
from transferkit.data.ants_bees import find_ants_bees
from transferkit.errors import WeightsError

EPOCHS = 3  # Enough here; the lesson takes 25.


def build(backbone: str, freeze: str, bn: str, seed: int) -> tk.Classifier:
    """Build the network; `auto` is ResNet-18 where its weights are to be had."""
    if backbone != "auto":
        return tk.build_model(backbone, 2, freeze=freeze, bn=bn, seed=seed)
    try:
        return tk.build_model("resnet18", 2, freeze=freeze, bn=bn, seed=seed)
    except WeightsError:
        print("Backbone: efficientnet_lite0 (the weights of resnet18 cannot be had here)")
        return tk.build_model("efficientnet_lite0", 2, freeze=freeze, bn=bn, seed=seed)


def save_plot(axes: object, path: Path) -> None:
    """Save the figure that some Axes belong to."""
    first = axes[0] if hasattr(axes, "__len__") else axes
    first.figure.savefig(path, dpi=100)


def run(scenario: str, data: tk.ImageSplits, options: argparse.Namespace) -> tk.Trainer:
    """Train one scenario, then save its artifact and its pictures."""
    freeze = "backbone" if scenario == "probe" else "none"
    print(f"\n== {scenario}: {'only the new head' if scenario == 'probe' else 'all'} trains")
    model = build(options.backbone, freeze, options.bn if scenario == "probe" else "frozen",
                  options.seed)
    trainer = tk.Trainer(model, data, recipe=options.recipe or scenario,
                         batch_size=options.batch_size, seed=options.seed)
    history = trainer.fit(epochs=options.epochs)
    trainer.save(options.out / f"{scenario}.safetensors")
    save_plot(tk.plot_history(history), options.out / f"{scenario}_history.png")
    save_plot(tk.show_predictions(model, data.val), options.out / f"{scenario}_predictions.png")
    return trainer


def main(arguments: list[str] | None = None) -> None:
    """Run the lesson."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--backbone", default="auto", help="auto, or a name")
    parser.add_argument("--scenario", choices=("finetune", "probe", "both"), default="both")
    parser.add_argument("--recipe", help="tutorial, probe or finetune; default: the scenario's")
    parser.add_argument("--bn", choices=("frozen", "adapt"), default="frozen")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/ants_bees"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    data = find_ants_bees(options.data).splits()
    print(data.describe())
    scenarios = ("finetune", "probe") if options.scenario == "both" else (options.scenario,)
    trainers = {scenario: run(scenario, data, options) for scenario in scenarios}

    first = trainers[scenarios[0]]
    loader = tk.ImageLoader(data.train, first.model.preprocess.train(), batch_size=8, shuffle=True)
    batch = next(loader.batches())
    grid = tk.show_batch(batch, class_names=data.class_names, preprocess=first.model.preprocess)
    save_plot(grid, options.out / "batch.png")

    picture = data.val.paths[-1]
    if (data.val.paths[-1].parent / "72100438_73de9f17af.jpg").exists():
        picture = picture.parent / "72100438_73de9f17af.jpg"  # The lesson's own choice.
    predictor = tk.Predictor.load(options.out / f"{scenarios[0]}.safetensors")
    prediction = predictor.predict(picture, top_k=2)
    save_plot(tk.show_prediction(picture, prediction), options.out / "prediction.png")
    print(f"\n{picture.name}: " + ", ".join(f"{p.label} {p.probability:.1%}"
                                            for p in prediction.top_k))
    for scenario, trainer in trainers.items():
        best, seconds = trainer.history.best, trainer.history.seconds
        print(f"{scenario}: best val accuracy {best.val_accuracy:.4f} in {seconds:.0f} s")
    print("Written: " + ", ".join(str(path) for path in sorted(options.out.iterdir())))


if __name__ == "__main__":
    main()
