"""Opening the feed of each phase of a fit: cached features where that can be, else pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from transferkit.training.cached_feed import CachedFeed
from transferkit.training.feature_cache import FeatureCache
from transferkit.training.feed_choice import find_split, settings_of
from transferkit.training.feeds import Feed, LiveFeed
from transferkit.training.history import History
from transferkit.training.job import Job
from transferkit.training.loading import list_skipped
from transferkit.training.phases import ResolvedPhase


class Feeds:
    """Give each phase its batches; cached features go on to the next one where they fit.

    Args:
        job: What is trained, and how.
        history: Is told where each phase's batches come from.
        check: Called between the batches of a long pass: raises where the fit should end.
    """

    def __init__(self, job: Job, history: History, *, check: Callable[[], None]) -> None:
        self._job = job
        self._history = history
        self._check = check
        self._cached: CachedFeed | None = None
        self._val = job.loading.keep(job.val_loader, job.data)
        self._skipped: list[dict[str, str]] = []

    @contextmanager
    def open(self, phase: ResolvedPhase, batch_sizes: dict[str, int]) -> Iterator[Feed]:
        """Run a block with the feed of a phase.

        Args:
            phase: The phase; the model is frozen as it says.
            batch_sizes: By phase, in how many pictures at a time features are computed: what a
                fit that goes on began with, which results depend on in the last bits. Takes that
                of this phase.
        """
        feed = self._choose(phase, batch_sizes)
        described = self._history.settings.setdefault("features", {})
        described[phase.phase.name] = feed.describe()
        try:
            yield feed
        finally:
            described[phase.phase.name] = feed.describe()

    def live(self, reason: str) -> LiveFeed:
        """Return the feed of pictures through the whole network.

        Args:
            reason: Why features are not cached, in words.
        """
        job = self._job
        return LiveFeed(job.model, job.train_loader, self._val, device=job.device, reason=reason)

    def close(self) -> None:
        """Give back what cached features and kept pictures take up."""
        self._close_cached()
        self._val.close()

    def _close_cached(self) -> None:
        """Give back what cached features take up, and note what could not be read."""
        if self._cached is not None:
            self._cached.close()
            self._skipped += list_skipped(**self._cached.loaders)
        self._cached = None

    def list_skipped(self) -> list[dict[str, str]]:
        """Return the pictures that were left out so far since they could not be read."""
        live = list_skipped(train=self._job.train_loader, val=self._job.val_loader)
        cached = {} if self._cached is None else self._cached.loaders
        return [*live, *self._skipped, *list_skipped(**cached)]

    def _choose(self, phase: ResolvedPhase, batch_sizes: dict[str, int]) -> Feed:
        """Return cached features where that is possible: those of the phase before, if they fit."""
        job = self._job
        split = find_split(job, epochs=phase.phase.epochs)
        if isinstance(split, str):
            self._close_cached()
            return self.live(split)
        if self._cached is not None and self._cached.num_stages != split.num_stages:
            self._close_cached()
        if self._cached is None:
            # Their workers and the pictures that they keep would only take up memory.
            job.train_loader.close()
            self._val.close()
            self._cached = CachedFeed(
                job.model,
                split,
                self._settings(batch_sizes.get(phase.phase.name)),
                job.loading,
                data=job.data,
                order=job.train_loader,
                augmentation=job.augmentation,
                check=self._check,
            )
            self._cached.prepare()
        batch_sizes[phase.phase.name] = self._cached.batch_size
        return self._cached

    def _settings(self, batch_size: int | None) -> FeatureCache:
        settings = settings_of(self._job.cache)
        return settings if batch_size is None else replace(settings, batch_size=batch_size)
