"""Who reads the pictures of a pass: this thread, several threads, or worker processes.

Whoever does, the batches are the same to the bit.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from transferkit.data.reading import BatchBuilder, Loaded, Reader
from transferkit.data.sampling import EpochSampler, Key
from transferkit.errors import ConfigError, ProcessError

NUM_BATCHES_AHEAD = 2
"""Batches that workers prepare while one is in use."""


class Workers(Protocol):
    """Reads the batches of one pass after another."""

    def run(self, epoch: int, start: int) -> Iterator[Loaded]:
        """Yield what became of each batch of an epoch, from batch number `start` on."""
        ...

    def close(self) -> None:
        """End threads or processes."""
        ...


class NoWorkers:
    """Read in the calling thread."""

    def __init__(self, reader: Reader, sampler: EpochSampler, *, pin_memory: bool) -> None:
        self._reader, self._sampler, self._pin_memory = reader, sampler, pin_memory

    def run(self, epoch: int, start: int) -> Iterator[Loaded]:
        """Yield what became of each batch."""
        for keys in self._sampler.batches(epoch, start=start):
            builder = BatchBuilder(self._reader, keys, pin_memory=self._pin_memory)
            for row in range(len(keys)):
                builder.read(row)
            yield builder.build()

    def close(self) -> None:
        """There is nothing to end."""


class ThreadWorkers:
    """Read in threads: decoding and torchvision's kernels let go of the interpreter lock.

    A transform that draws from the global generators cannot run in several threads at a
    time: threads decode for it, and the calling thread transforms.
    """

    def __init__(
        self, reader: Reader, sampler: EpochSampler, *, num_workers: int, pin_memory: bool
    ) -> None:
        self._reader, self._sampler, self._pin_memory = reader, sampler, pin_memory
        self._pool = start_threads(num_workers)
        self._num_ahead = max(NUM_BATCHES_AHEAD, -(-2 * num_workers // sampler.batch_size))
        # Few enough for all threads to end a batch together, enough not to wake up in vain.
        self._num_rows = max(1, sampler.batch_size // (4 * num_workers))

    def run(self, epoch: int, start: int) -> Iterator[Loaded]:
        """Yield what became of each batch, while the threads prepare the next ones."""
        pending: deque[_Pending] = deque()
        try:
            for keys in self._sampler.batches(epoch, start=start):
                pending.append(
                    _Pending(
                        self._submit,
                        self._reader,
                        keys,
                        num_rows=self._num_rows,
                        pin_memory=self._pin_memory,
                    )
                )
                if len(pending) > self._num_ahead:
                    yield pending.popleft().finish()
            while pending:
                yield pending.popleft().finish()
        finally:
            for each in pending:
                each.cancel()

    def _submit(self, *call: Any) -> Future[Any]:
        try:
            return self._pool.submit(*call)
        except RuntimeError as error:  # The pool was shut down behind this pass's back.
            raise ConfigError("The loader was closed during this pass. Start a new one.") from error

    def close(self) -> None:
        """End the threads after the pictures in their hands."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Pending:
    """A batch that threads are at work on, some rows each."""

    def __init__(
        self, submit: Any, reader: Reader, keys: list[Key], *, num_rows: int, pin_memory: bool
    ) -> None:
        self._builder = BatchBuilder(reader, keys, pin_memory=pin_memory)
        self._is_transformed = reader.is_seedable
        self._pixels: dict[int, Tensor | None] = {}
        task = self._read if self._is_transformed else self._decode
        rows = range(len(keys))
        self._futures: list[Future[None]] = [
            submit(task, rows[first : first + num_rows]) for first in rows[::num_rows]
        ]

    def _read(self, rows: range) -> None:
        for row in rows:
            self._builder.read(row)

    def _decode(self, rows: range) -> None:
        for row in rows:
            self._pixels[row] = self._builder.decode(row)

    def finish(self) -> Loaded:
        """Wait for the batch."""
        for future in self._futures:
            future.result()
        for row in sorted(self._pixels):
            pixels = self._pixels.pop(row)
            if pixels is not None:
                self._builder.transform(row, pixels)
        return self._builder.build()

    def cancel(self) -> None:
        """Take back what no thread has begun."""
        for future in self._futures:
            future.cancel()


_starting = Lock()


def start_threads(num_workers: int, *, cores_each: int = 1) -> ThreadPoolExecutor:
    """Start threads in which PyTorch computes with one core each, or a few.

    Otherwise each of them would use all cores, and get in the way of the others.
    PyTorch keeps the number by thread once a thread has computed something, and has one
    number for threads to come, which is put back. The caller's own stays as it is.

    Args:
        num_workers: The number of threads.
        cores_each: The number of cores for each.
    """
    with _starting:  # Another caller would take our number for what it has to put back.
        return _start_threads(num_workers, cores_each)


def _start_threads(num_workers: int, cores_each: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="transferkit-loader")
    barrier = Barrier(num_workers + 1)

    def take_cores() -> None:
        try:
            torch.set_num_threads(cores_each)
            torch.zeros(2**20).add_(1)
        except BaseException:
            barrier.abort()
            raise
        barrier.wait()

    # A new thread has the number for threads to come, where this one may have its own.
    with ThreadPoolExecutor(1, thread_name_prefix="transferkit-cores") as keeper:
        num_cores = keeper.submit(torch.get_num_threads).result()
        try:
            for _ in range(num_workers):
                pool.submit(take_cores)
            barrier.wait()
        except BaseException:
            barrier.abort()  # Those that did start would wait for ever.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            keeper.submit(torch.set_num_threads, num_cores).result()
    return pool


class ProcessWorkers:
    """Read in worker processes, which stay until `close`. They serve one pass at a time.

    Args:
        reader: Reads the pictures; pickled where processes are not forked.
        sampler: Says which pictures.
        num_workers: Number of processes.
        start_method: "fork", "spawn" or "forkserver"; None takes Python's default.
        pin_memory: Put the images into page-locked memory.
    """

    def __init__(
        self,
        reader: Reader,
        sampler: EpochSampler,
        *,
        num_workers: int,
        start_method: str | None,
        pin_memory: bool,
    ) -> None:
        self._passes = _Passes(sampler)
        if (start_method or multiprocessing.get_start_method()) != "fork":
            reader.dataset.share_memory()  # Forked processes share it as it is.
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_sampler=self._passes,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=pin_memory,
            persistent_workers=True,
            prefetch_factor=NUM_BATCHES_AHEAD,
            multiprocessing_context=multiprocessing.get_context(start_method),
            worker_init_fn=_ignore_interrupts,
            # Its own, or starting a pass would draw from the caller's.
            generator=torch.Generator().manual_seed(sampler.seed),
        )
        self._iterator: Any = None

    def run(self, epoch: int, start: int) -> Iterator[Loaded]:
        """Yield what became of each batch."""
        self._passes.epoch, self._passes.start = epoch, start
        try:
            self._iterator = iter(self._loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"The transform and the data set cannot be sent to worker processes: {error}. "
                f'Define them at the top level of a module, or use `worker_type="thread"`.'
            ) from error
        try:
            yield from self._iterator
        except (RuntimeError, OSError, EOFError) as error:
            # Which of them it is depends on where in its work the process was ended.
            code = self._exit_code()
            if code is None:
                raise
            raise ProcessError(_explain(code)) from error

    def _exit_code(self) -> int | None:
        """Return how a process ended that should be there; None where all are."""
        workers: list[multiprocessing.Process] = self._iterator._workers
        for _ in range(20):  # Its connections end a moment before the process does.
            for worker in workers:
                if worker.exitcode is not None:
                    return worker.exitcode
            # PyTorch raises here, too, when it hears of an ended process.
            with suppress(RuntimeError):
                time.sleep(0.05)
        return None

    def close(self) -> None:
        """End the processes."""
        if self._iterator is not None:
            # A pass that was cut off may still be held by its caller, and its workers with it.
            self._iterator._shutdown_workers()
        self._iterator = None


def _explain(code: int) -> str:
    start = "A worker process ended before its batch was read"
    if code >= 0:
        return (
            f"{start} (exit code {code}). What it printed says why. It has to import what the "
            f"transform and the data set are made of; "
            f'`worker_type="thread"` works in this process.'
        )
    return (
        f"{start} (signal {-code}). The system may have ended it for want of memory: use fewer "
        f'workers (`num_workers`), or `worker_type="thread"`, whose workers share the memory.'
    )


class _Passes:
    """The keys of the pass that is to come, batch by batch."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[Key]]:
        return self.sampler.batches(self.epoch, start=self.start)

    def __len__(self) -> int:
        return len(self.sampler) - self.start


def _ignore_interrupts(number: int) -> None:
    """Leave Ctrl-C, which goes to all processes of a terminal, to the one that they work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _identity(loaded: Iterable[Any]) -> Iterable[Any]:
    return loaded
