"""Labels for photographs, beside a plain loop and other libraries, as a table in Markdown.

    pip install -e ".[benchmarks,openvino,onnx]"
    python benchmarks/predict.py                     # the photographs, else drawn pictures
    python benchmarks/predict.py --backbone resnet18 --only loop openvino decoder --repeats 1

A head is fitted on the frozen backbone; then each side labels all pictures with this one network,
in float32, in processes of its own, written in `benchmarks/predict_peers.py` and
`benchmarks/predict_ours.py`. Peers have the batch size and the number of worker processes that
were fastest in a run on 64 pictures. The sides take turns, `--repeats` times, and medians are
given.

"cold" is the time from the start of a process to the last label: imports, the network, the choice
of an engine and all. "warm" is that of another pass in the same process. "/ peer" is the speed
over that of the fastest peer, cold or warm. "others" counts the pictures that got another label
than from the plain loop, or from the first side where that does not run. Below the rows of a
network stands how many got another label from one side of transferkit than from another.

"engine" runs the network on batches that lie in memory, "decoder" decodes, resizes and normalises
with the threads of `predict_many`; each has all cores. Where they share them, a picture takes the
time that each of the two takes for it: at e and d pictures a second apart, they reach
1 / (1/e + 1/d) together. "reach" is the share of that.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transferkit.data.ants_bees import find_ants_bees
from transferkit.models.engine_facts import has_bfloat16

PEERS = ("loop", "DataLoader", "fastai", "transformers", "skorch")
ENGINES: dict[str, dict[str, str]] = {
    "auto": {"engine": "auto", "precision": "fp32"},
    "pytorch": {"engine": "pytorch", "precision": "fp32"},
    "pytorch bf16": {"engine": "pytorch", "precision": "bf16"},
    "openvino": {"engine": "openvino", "precision": "fp32"},
    "openvino bf16": {"engine": "openvino", "precision": "bf16"},
    "onnxruntime": {"engine": "onnxruntime", "precision": "fp32"},
}
DOORS = {"predict_many": "", "predict_to_file": ", to a file", "engine": " engine alone"}
TRIALS = [{"batch_size": size, "workers": count} for count in (0, 2) for size in (1, 8, 32)]
INSTALL = 'pip install -e ".[benchmarks,openvino,onnx]"'
NO_BFLOAT16 = "skipped: this processor has no bfloat16"
HERE = Path(__file__).parent


@dataclass
class Side:
    """What is measured, and what came of it.

    Args:
        name: Its name in the table.
        group: The name with which it is chosen.
        told: The module, the function in it and its options.
        python: What runs it.
        reason: Why there is nothing; None where there is.
    """

    name: str
    group: str
    told: dict[str, Any]
    python: str = sys.executable
    reason: str | None = None
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    @property
    def is_peer(self) -> bool:
        """Whether it is another library's."""
        return self.name in PEERS

    @property
    def is_alone(self) -> bool:
        """Whether it is a part of ours, so that the first pass means nothing."""
        return self.told["side"] in ("engine", "decoder")

    def run(self, under: list[str], **more: Any) -> dict[str, Any] | None:
        """Run it in a process; return what it says, and note why where it says nothing."""
        text = json.dumps({**self.told, **more})
        command = [*under, self.python, str(HERE / "predict_sides.py"), text]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        if done.returncode:
            print(f"{self.name} failed:\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
            self.reason = "failed, see above"
            return None
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if "missing" in found:
            self.reason = f"not installed, {found['missing']}: `{INSTALL}`"
            return None
        return found

    def choose_options(self, under: list[str], task: dict[str, Any]) -> None:
        """Give a peer the options with which it is fastest."""
        found = self.run(under, task=task, trials=TRIALS)
        if found is None:
            return
        fastest = min(range(len(TRIALS)), key=lambda place: found["trials"][place])
        self.told["options"] = TRIALS[fastest]
        print(f"{self.name}: {found['trials']} s, takes {TRIALS[fastest]}", file=sys.stderr)

    def measure(self, under: list[str], task: dict[str, Any], passes: int) -> None:
        """Add the times of one process."""
        found = self.run(under, task=task, passes=passes)
        if found is None:
            return
        if self.labels and found["labels"] != self.labels:
            self.reason = "labels differ between runs"
            return
        self.labels = found["labels"]
        self.cold.append(found["cold"])
        self.warm += found["warm"]
        warm = ", ".join(f"{each:.2f}" for each in found["warm"])
        print(f"{self.name}: {found['cold']:.2f} s, then {warm} s", file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """Return the environment of all sides, which reach no network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def make_sides(chosen: list[str], peers_python: str) -> list[Side]:
    """Return the sides in the order of the table, those that cannot be had with the reason."""
    sides = []
    for name in PEERS:
        told = {"module": "predict_peers", "side": name, "options": {}}
        sides.append(Side(name, name, told, python=peers_python))
    for side, suffix in DOORS.items():
        for name, options in ENGINES.items():
            if name == "auto" and side != "predict_many":
                continue  # It is one of the others.
            told = {"module": "predict_ours", "side": side, "options": options}
            each = Side(f"{name}{suffix}", name, told)
            if options["precision"] == "bf16" and not has_bfloat16(torch.device("cpu")):
                each.reason = NO_BFLOAT16
            sides.append(each)
    told = {"module": "predict_ours", "side": "decoder", "options": {}}
    sides.append(Side("decoder alone", "decoder", told))
    return [each for each in sides if each.group in chosen]


def prepare(backbone: str, folder: str, root: Path, under: list[str]) -> dict[str, Any]:
    """Return what all sides are given; its files lie in the folder."""
    script = str(HERE / "predict_ours.py")
    command = [*under, sys.executable, script, backbone, folder, str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    task: dict[str, Any] = json.loads(Path(folder, "task.json").read_text())
    return task


def report(backbone: str, sides: list[Side]) -> None:
    """Print the rows of one backbone."""
    measured = [each for each in sides if each.reason is None]
    count = len(measured[0].labels) if measured else 0
    rates = {each.name: count / statistics.median(each.warm) for each in measured}
    peers = [each for each in measured if each.is_peer]
    expected = next((each.labels for each in measured if not each.is_alone), [])
    for each in sides:
        if each.reason is not None:
            print(f"| {backbone} | {each.name} | {each.reason} | | | | | | |", flush=True)
            continue
        cold, rate = statistics.median(each.cold), rates[each.name]
        cells = [backbone, each.name, "" if each.is_alone else f"{cold:.2f}"]
        cells += [f"{count / rate:.2f}", f"{rate:.1f}"]
        best_cold = min((statistics.median(peer.cold) for peer in peers), default=None)
        best_rate = max((rates[peer.name] for peer in peers), default=None)
        hide = each.is_alone
        cells.append("" if hide or best_cold is None else f"{best_cold / cold:.2f}")
        cells.append("" if hide or best_rate is None else f"{rate / best_rate:.2f}")
        parts = [rates.get(f"{each.group} engine alone"), rates.get("decoder alone")]
        reach = None if None in parts else 1 / sum(1 / part for part in parts if part)
        cells.append("" if hide or each.is_peer or reach is None else f"{rate / reach:.2f}")
        others = sum(one != two for one, two in zip(each.labels, expected, strict=False))
        cells.append(f"{others} of {count}" if each.labels else "")
        print(f"| {' | '.join(cells)} |", flush=True)
    ours = [each.labels for each in measured if not each.is_peer and each.labels]
    apart = sum(len(set(labels)) > 1 for labels in zip(*ours, strict=True))
    print(f"| {backbone} | transferkit's, apart | | | | | | | {apart} of {count} |", flush=True)


def main() -> None:
    """Read the arguments, measure, print the table."""
    groups = [*PEERS, *ENGINES, "decoder"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", nargs="+", default=["efficientnet_lite0", "resnet18"])
    parser.add_argument("--only", nargs="+", choices=groups, default=groups)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--passes", type=int, default=1, help="warm passes in each of them")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has the peers")
    parser.add_argument(
        "--under", default="", help="what runs each process, such as `taskset -c 0,1`"
    )
    options = parser.parse_args()
    under = shlex.split(options.under)
    root = find_ants_bees().root
    print(f"{options.repeats} repeats, {root.name}, PyTorch {torch.__version__}\n")
    print(
        "| network | side | cold s | warm s | pictures/s | cold / peer | warm / peer | reach "
        "| others |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for backbone in options.backbone:
        sides = make_sides(options.only, options.peers)
        with tempfile.TemporaryDirectory() as folder:
            task = prepare(backbone, folder, root, under)
            for each in sides:
                if each.is_peer and each.name != "loop":
                    each.choose_options(under, task)
            for _ in range(options.repeats):
                for each in sides:
                    if each.reason is None:
                        each.measure(under, task, options.passes)
        report(backbone, sides)


if __name__ == "__main__":
    main()
