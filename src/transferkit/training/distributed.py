"""Several processes that train together, as `torchrun` starts them.

Each process takes its part of each batch. The gradients are summed over pictures and processes
and divided by the number of pictures, so that a step is that of one process with the whole
batch, also where a part is smaller than the others or empty. (PyTorch's DistributedDataParallel
takes the mean over processes, waits for ever where one has no picture, and has to be built
anew when something is unfrozen.)

References:
    Goyal et al., Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, 2017,
    https://arxiv.org/abs/1706.02677 (section 3, on the mean over all workers).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from transferkit.errors import ConfigError, ProcessError

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this one is.

    Args:
        rank: This process's number, from 0.
        size: How many there are.
        local_rank: This process's number on its machine, from 0.
        device_type: Where their tensors lie.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device_type: str = "cpu"

    @property
    def is_alone(self) -> bool:
        """Whether there is this process only."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and calls the callbacks."""
        return self.rank == 0

    @property
    def entropy(self) -> tuple[int, ...]:
        """What keeps the random draws of the processes apart; nothing where one is alone."""
        return () if self.is_alone else (self.rank,)

    def check_batch_size(self, batch_size: int) -> None:
        """Check that each process gets a part of a batch.

        Raises:
            ConfigError: There are more processes than pictures in a batch.
        """
        if batch_size < self.size:
            raise ConfigError(
                f"`batch_size` is {batch_size}, and {self.size} processes share each batch. Pass "
                f"at least batch_size={self.size}, or start fewer processes."
            )

    def join(self) -> None:
        """Connect the processes, if nobody has: by gloo on the CPU, by NCCL on NVIDIA's GPUs.

        The connection stays until the program ends, since it can be made once only.
        """
        if self.is_alone or dist.is_initialized():
            return
        # Builds of PyTorch without distributed training have neither.
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        backend = "cpu:gloo,cuda:nccl" if self.device_type == "cuda" else "gloo"
        store, rank, size = next(rendezvous("env://"))
        # torchrun keeps its store when it starts killed processes again, and with it the addresses
        # of those that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"transferkit/{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        atexit.register(_leave)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if not self.is_alone:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, values: Iterable[int]) -> list[int]:
        """Return the sums of some counts over all processes, the same in each."""
        counts = torch.tensor(list(values), dtype=torch.int64)
        return [int(each) for each in self.sum(counts)]

    def share(self, value: _T) -> _T:
        """Return the first process's value, which is plain data, in all of them."""
        if self.is_alone:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        shared: _T = box[0]
        return shared

    @torch.no_grad()
    def share_weights(self, model: nn.Module) -> None:
        """Give all processes the first one's parameters and buffers, in place."""
        if not self.is_alone:
            for value in (*model.parameters(), *model.buffers()):
                dist.broadcast(value.detach(), src=0)

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Make BatchNorm's statistics, which each process gathered from its part, their mean.

        Args:
            model: The model, in training mode. Layers that stand still are left alone.
        """
        if self.is_alone:
            return
        for layer in model.modules():
            if isinstance(layer, _BatchNorm) and layer.training:
                for value in layer.buffers():
                    if value.is_floating_point():
                        self.sum(value).div_(self.size)

    @torch.no_grad()
    def mean_statistics(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what `average_statistics` would make of buffers, by name, and change nothing."""
        found: dict[str, Tensor] = {}
        if self.is_alone:
            return found
        for path, layer in model.named_modules():
            if isinstance(layer, _BatchNorm) and layer.training:
                for name, value in layer.named_buffers():
                    if value.is_floating_point():
                        found[f"{path}.{name}"] = self.sum(value.clone()).div_(self.size)
        return found

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of parameters over all processes, in place.

        Those that one process lacks, having had no picture, count as zeros there.
        """
        if self.is_alone:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for each in parameters:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            groups.setdefault(each.grad.dtype, []).append(each.grad)
        for grads in groups.values():
            flat = self.sum(torch.cat([grad.reshape(-1) for grad in grads]))
            sizes = [grad.numel() for grad in grads]
            for grad, values in zip(grads, torch.split(flat, sizes), strict=True):
                grad.copy_(values.view_as(grad))

    def together(self, run: Callable[[], _T]) -> _T:
        """Run something in each process; where it fails in one, it fails in all.

        Args:
            run: What to run. It does not talk to other processes.

        Raises:
            ProcessError: It failed in another process.
        """
        if self.is_alone:
            return run()
        error: Exception | None = None
        try:
            result = run()
        except Exception as failed:
            error = failed
        self.check(error)
        return result

    def gather(self, value: _T) -> list[_T]:
        """Return the values, which are plain data, of all processes, by rank."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def meeting(self) -> Iterator[Callable[[], None]]:
        """Run a block in which processes work apart and meet once, before they talk.

        Yields:
            What the block calls where they meet: it raises where another one did not come.

        Raises:
            ProcessError: Another process failed before it came there.
        """
        has_met = self.is_alone

        def meet() -> None:
            nonlocal has_met
            if not self.is_alone:
                has_met = True
                self.check(None)

        try:
            yield meet
        except Exception as error:
            if not has_met:
                self.check(error)
            raise

    def check(self, error: Exception | None) -> None:
        """Tell the others of an error here, and raise it or theirs.

        Args:
            error: What failed in this process.

        Raises:
            ProcessError: Something failed in another one.
        """
        (num_failed,) = self.agree([int(error is not None)])
        if num_failed:
            self.fail(error)

    def fail(self, error: Exception | None) -> None:
        """Raise the error of this process, or one that names that of another.

        All processes call it, once they know that one of them has an error.

        Args:
            error: This process's own.
        """
        texts: list[Any] = [None] * self.size
        own = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(texts, own)
        if error is not None:
            raise error
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise ProcessError(
            f"Process {rank} of {self.size} failed, so that none can go on. Its error: {text}"
        )


def find_world(device: str | torch.device = "auto") -> World:
    """Return the processes that `torchrun` started, by its variables in the environment.

    Args:
        device: The device that was asked for.

    Raises:
        ConfigError: The variables are no numbers that fit together, or this PyTorch cannot
            connect processes.

    Example:
        >>> find_world().is_alone
        True
    """
    size = _read("WORLD_SIZE", 1)
    if size == 1:
        return World()
    if not dist.is_available():
        raise ConfigError(
            f"WORLD_SIZE is {size} in the environment, and this PyTorch is built without "
            f"torch.distributed. Start the program without torchrun."
        )
    rank, local_rank = _read("RANK", -1), _read("LOCAL_RANK", -1)
    if not 0 <= rank < size or local_rank < 0:
        raise ConfigError(
            f"WORLD_SIZE is {size} in the environment, RANK {rank} and LOCAL_RANK {local_rank}. "
            f"Start the program by torchrun, which sets all three, or unset WORLD_SIZE."
        )
    uses_cuda = torch.cuda.is_available() and str(device).partition(":")[0] in ("auto", "cuda")
    return World(rank, size, local_rank, "cuda" if uses_cuda else "cpu")


def own_device(device: str | torch.device, world: World) -> str | torch.device:
    """Return the device of one process: of several GPUs the one of its number."""
    is_open = str(device) in ("auto", "cuda")
    return f"cuda:{world.local_rank}" if world.device_type == "cuda" and is_open else device


def _read(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{name} is {text!r} in the environment, expected a number. Start the program by "
            f"torchrun, or unset it."
        ) from None


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
