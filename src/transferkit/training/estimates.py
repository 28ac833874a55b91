"""Estimates of time and memory for a phase, from a few batches on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transferkit._allocator import buffers_kept
from transferkit._seeding import generator_for, seeded_torch
from transferkit.models.engines import DEFAULT_BATCH_SIZE, make_engine
from transferkit.models.modes import evaluating
from transferkit.models.splitting import Split
from transferkit.training.feed_choice import settings_of
from transferkit.training.phases import ResolvedPhase

if TYPE_CHECKING:
    from transferkit.training.job import Job

NUM_LOADED = 8
"""How many pictures are read to learn how long reading takes."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a phase will cost on this machine, about.

    Args:
        seconds: Its duration.
        memory_bytes: The peak of what it holds: weights, gradients, the optimizer's state,
            activations, cached features. Python, PyTorch and kept pictures come on top.
    """

    seconds: float
    memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        """Return both in words."""
        minutes, seconds = divmod(math.ceil(self.seconds), 60)
        duration = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"{duration}, {max(1, round(self.memory_bytes / 2**20)):,} MiB"


def measure_phase(
    job: Job,
    phase: ResolvedPhase,
    split: Split | str,
    optimizer: Optimizer | None,
    num_images: int | None,
) -> Estimate:
    """Estimate what a phase costs, by running a few batches of noise.

    Args:
        job: The job, with a model of its own: its weights, statistics and gradients change.
        phase: The phase; the model is frozen as it says.
        split: The parts of the backbone between which features are cached, or why they are not.
        optimizer: The optimizer of the phase, for its state; None where there is none.
        num_images: How many pictures the cached part will see; None where nothing is cached.

    Returns:
        The estimate.
    """
    loading = _seconds_to_load(job)
    with seeded_torch(job.seed, job.device), buffers_kept():
        if isinstance(split, str) or num_images is None:
            return _measure_live(job, phase, optimizer, loading)
        return _measure_cached(job, phase, split, optimizer, loading, num_images)


def _measure_live(
    job: Job, phase: ResolvedPhase, optimizer: Optimizer | None, loading: float
) -> Estimate:
    size = min(job.recipe.batch_size, len(job.data.train))
    images = noise(job, size)
    step, held = measure_step(job, job.model, images)
    evaluation = _seconds(job, lambda: _evaluate(job.model, images))
    per_epoch = len(job.data.train) * _both(job, step / size, loading)
    per_epoch += len(job.data.val) * _both(job, evaluation / size, loading)
    return Estimate(
        seconds=phase.phase.epochs * per_epoch,
        memory_bytes=weight_bytes(job, optimizer) + held,
    )


def _measure_cached(
    job: Job,
    phase: ResolvedPhase,
    split: Split,
    optimizer: Optimizer | None,
    loading: float,
    num_images: int,
) -> Estimate:
    cache = settings_of(job.cache)
    images = noise(job, DEFAULT_BATCH_SIZE)
    with evaluating(job.model):
        engine = make_engine(
            split.prefix, engine=cache.engine, precision=cache.precision, device=job.device
        )
    computing = _seconds(job, lambda: engine(images)) / len(images)
    activations = engine(images[:1]).float()
    size = min(job.recipe.batch_size, len(job.data.train))
    inputs = activations.expand(size, *activations.shape[1:]).clone().to(job.device)
    suffix = nn.Sequential(split.suffix, job.model.head)
    step, held = measure_step(job, suffix, inputs)
    num_views = 0 if cache.views == "epochs" else len(job.views(phase))
    num_stored = num_views * len(job.data.train) + len(job.data.val)
    stored = min(cache.memory_bytes, 4 * num_stored * activations.numel())
    num_steps = phase.phase.epochs * job.steps_per_epoch
    return Estimate(
        seconds=num_images * _both(job, computing, loading)
        + (0.0 if job.solves(phase) else num_steps * step),
        memory_bytes=weight_bytes(job, optimizer)
        + max(held, _forward_bytes(split, images))
        + stored,
    )


def _both(job: Job, computing: float, loading: float) -> float:
    """Return the seconds for a picture that is loaded while the one before it is computed."""
    if job.train_loader.num_workers == 0:
        return computing + loading
    if job.device.type == "cpu":  # They share the cores: little is gained.
        return computing + loading / 2
    return max(computing, loading / job.train_loader.num_workers)


def _seconds_to_load(job: Job) -> float:
    """Return the seconds in which one thread reads and augments a picture."""
    indices = list(range(0, len(job.data.train), max(1, len(job.data.train) // NUM_LOADED)))
    # A loader of its own: what it skips is no finding of the fit.
    loader = job.loading.loader(job.data.train, job.train_loader.transform)
    start = time.perf_counter()
    batch = loader.read(indices[:NUM_LOADED], epoch=1)
    return (time.perf_counter() - start) / len(batch.images)


def noise(job: Job, count: int) -> Tensor:
    """Return images of noise, float32 `(count, C, crop_size, crop_size)`."""
    size = job.model.preprocess.crop_size
    shape = (count, job.model.preprocess.num_channels, size, size)
    images = torch.rand(shape, generator=generator_for(job.seed))
    return images.to(job.device, memory_format=job.memory_format)


def measure_step(job: Job, module: nn.Module, inputs: Tensor) -> tuple[float, int]:
    """Return the seconds of a training step without the update, and the bytes that it holds."""
    targets = torch.arange(len(inputs), device=job.device) % job.model.num_classes
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run() -> None:
        loss = nn.functional.cross_entropy(module(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]

    own = {each.untyped_storage().data_ptr() for each in job.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return _seconds(job, run), sum(size for place, size in held.items() if place not in own)


@torch.no_grad()
def _evaluate(module: nn.Module, inputs: Tensor) -> None:
    with evaluating(module):
        module(inputs)


def _seconds(job: Job, run: Callable[[], object]) -> float:
    """Return the seconds of the second of two runs; the first warms up."""
    run()
    _wait(job)
    start = time.perf_counter()
    run()
    _wait(job)
    return time.perf_counter() - start


def _wait(job: Job) -> None:
    if job.device.type != "cpu":
        torch.accelerator.synchronize()


def weight_bytes(job: Job, optimizer: Optimizer | None) -> int:
    """Return the bytes of weights, gradients, and the optimizer's state."""
    trainable = [each for each in job.model.parameters() if each.requires_grad]
    state = [*job.model.parameters(), *job.model.buffers()]
    return _num_bytes(state) + (1 + _num_moments(optimizer)) * _num_bytes(trainable)


def _num_moments(optimizer: Optimizer | None) -> int:
    """Return how many values the optimizer keeps for each that trains."""
    if optimizer is None:
        return 0
    if "betas" in optimizer.defaults:
        return 2
    return int(bool(optimizer.defaults.get("momentum")))


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


@torch.no_grad()
def _forward_bytes(split: Split, images: Tensor) -> int:
    """Return the bytes of the two largest activations of the prefix: one is made of the other."""
    sizes: list[int] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size() * len(images))

    leaves = [each for each in split.prefix.modules() if not list(each.children())]
    handles = [each.register_forward_hook(note) for each in leaves]
    try:
        with evaluating(split.prefix):
            split.prefix(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return sum(sorted(sizes)[-2:]) + _num_bytes([images])
