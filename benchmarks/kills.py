"""Kill a fit again and again, and compare what it ends in with a fit that was left alone.

    python benchmarks/kills.py --kills 200

A process trains a small network with a checkpoint after every step. It gets SIGKILL, which
nothing can catch, at a random moment, also within the writing of a checkpoint, and is started
again with resume="auto". A fit that ends before all kills are used up is followed by another
one. Each has to end in the weights and the history of the fit that nobody touched, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EPOCHS = 12


def train(root: Path, name: str) -> None:
    """Run the fit of this name to its end, from its newest checkpoint."""
    import torch

    import transferkit as tk

    torch.set_num_threads(1)
    model = tk.build_model("squeezenet1_1", 2, weights=None, freeze="none")
    trainer = tk.Trainer(
        model,
        tk.load_folders(root / "pictures"),
        checkpoints=tk.Checkpoints(folder=root / name, every_steps=1),
        average=tk.EMA(decay=0.9),
        optimizer="adamw",
        scheduler="warmup_cosine",
        lr=1e-4,
        batch_size=4,
        channels_last=True,  # Measured for each fit, it could be another one for the next.
        device="cpu",
        verbose=False,
    )
    print("begun", flush=True)
    history = trainer.fit(EPOCHS, resume="auto")
    trainer.save(root / f"{name}.safetensors")
    records = [{**vars(each), "seconds": 0} for each in history.records]
    (root / f"{name}.json").write_text(json.dumps(records))


def start(root: Path, name: str) -> subprocess.Popen[str]:
    """Start the fit in a process of its own, and wait until it begins to train."""
    command = [sys.executable, __file__, "--train", str(root), name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def outcome(root: Path, name: str) -> tuple[Any, Any]:
    """Return the weights and the records that a fit ended in."""
    import transferkit as tk

    weights = tk.load_artifact(root / f"{name}.safetensors").model.state_dict()
    return weights, json.loads((root / f"{name}.json").read_text())


def is_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> bool:
    """Tell whether two fits ended in the same, to the bit."""
    import torch

    weights = all(torch.equal(found[0][name], value) for name, value in expected[0].items())
    return weights and found[1] == expected[1]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(Path(options.train[0]), options.train[1])
        return 0
    from transferkit.testing import make_image_folder

    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_image_folder(root / "pictures")
        whole = start(root, "whole")
        begun = time.perf_counter()
        whole.wait()
        seconds = time.perf_counter() - begun
        expected = outcome(root, "whole")
        num_kills = num_fits = num_same = 0
        while num_kills < options.kills:
            num_fits += 1
            name = f"fit{num_fits}"
            while not (root / f"{name}.json").exists():
                process = start(root, name)
                if num_kills < options.kills:
                    time.sleep(rng.uniform(0, seconds / 4))
                    process.send_signal(signal.SIGKILL)
                num_kills += process.wait() == -signal.SIGKILL
            same = is_same(outcome(root, name), expected)
            num_same += same
            print(f"{num_kills} kills, {num_fits} fits, {num_same} of them the same", flush=True)
    print(f"{num_same} of {num_fits} fits, killed {num_kills} times, ended in the same bits")
    return int(num_same != num_fits)


if __name__ == "__main__":
    sys.exit(main())
