"""A bulk prediction in a process of its own, for the tests that kill it."""

from __future__ import annotations

import signal
import sys

import torch

from transferkit.inference import Predictor, predict_to_file
from transferkit.models import build_model


def main(folder: str, out: str) -> int:
    # A shell that starts a test run in the background has switched it off for all below it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    model = build_model("squeezenet1_1", 2, weights=None)
    predictor = Predictor(model, class_names=("blue", "red"), device="cpu", engine="pytorch")
    print("begun", flush=True)
    try:
        # Alone in its batch, a picture has the same bits in every run.
        predict_to_file(predictor, folder, out, resume=True, batch_size=1)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
