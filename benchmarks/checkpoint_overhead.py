"""The share of a fit's time that goes into its checkpoints.

    python benchmarks/checkpoint_overhead.py --backbone resnet18

Fine-tunes the whole network (with random weights, on which speed does not depend) on the
photographs of ants and bees, else on drawn pictures, with a checkpoint after every epoch. The
seconds within the saves (gathering the state, its digest, writing, flushing to the disk, renaming)
stand beside those of the fit as a whole, in the same run. Two fits, one with and one without them,
would differ by more than that on a machine that does other things, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import transferkit as tk
from transferkit.data.ants_bees import find_ants_bees
from transferkit.training.fitting import Fit


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    spent: list[float] = []
    save = Fit._save

    def timed(self: Fit, **arguments: Any) -> None:
        begun = time.perf_counter()
        save(self, **arguments)
        spent.append(time.perf_counter() - begun)

    Fit._save = timed  # type: ignore[method-assign]
    data = find_ants_bees().splits()
    model = tk.build_model(options.backbone, data.num_classes, weights=None, freeze="none")
    with tempfile.TemporaryDirectory() as folder:
        trainer = tk.Trainer(
            model, data, batch_size=options.batch_size, checkpoints=folder, verbose=False
        )
        history = trainer.fit(options.epochs)
        sizes = [path.stat().st_size / 2**20 for path in Path(folder).iterdir()]
    share = sum(spent) / history.seconds
    print(
        f"{options.backbone}: {len(spent)} checkpoints of up to {max(sizes):.0f} MiB in "
        f"{sum(spent):.2f} s of {history.seconds:.1f} s: {share:.2%} of the fit"
    )


if __name__ == "__main__":
    main()
