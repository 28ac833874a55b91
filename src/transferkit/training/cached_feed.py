"""Feeding the training loop with features that were computed once, and checking them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from transferkit.data import Batch, ImageLoader, ImageSplits
from transferkit.data.prefetch import normalized, prefetch, upload
from transferkit.data.sampling import part_of
from transferkit.errors import DataError, FeatureError
from transferkit.images import Augmentation
from transferkit.models import Classifier
from transferkit.models.engines import Engine, choose_batch_size, make_engine
from transferkit.models.modes import evaluating
from transferkit.models.splitting import Split
from transferkit.training.feature_cache import FeatureCache
from transferkit.training.feature_keys import view_key
from transferkit.training.feature_store import FeatureStore, StoredView
from transferkit.training.loading import Loading
from transferkit.training.resident import ResidentTensors

NUM_COMPARED = 8
"""Of how many pictures a new view's features are computed once more, and compared."""

# Relative to the largest value. Accelerators may multiply in TF32, with 10 bits of mantissa.
_CPU_TOLERANCES = {"float32": 1e-4, "bfloat16": 6e-2}
_ACCELERATOR_TOLERANCES = {"float32": 1e-2, "bfloat16": 6e-2}


def _go_on() -> None:
    """Let a pass go on."""


class CachedFeed:
    """Feed the activations of the frozen prefix, each computed once.

    Args:
        model: The model; its prefix is frozen and inert.
        split: Its parts.
        settings: How features are computed and kept.
        loading: How pictures are loaded.
        data: The splits.
        order: The loader of a fit without a cache, whose order of pictures is followed.
        augmentation: How training pictures are augmented.
        check: Called between the batches of a long pass: raises where the fit should end.
    """

    def __init__(
        self,
        model: Classifier,
        split: Split,
        settings: FeatureCache,
        loading: Loading,
        *,
        data: ImageSplits,
        order: ImageLoader,
        augmentation: str | Augmentation,
        check: Callable[[], None] = _go_on,
    ) -> None:
        self._check = check
        self._model = model
        self._split = split
        self._settings = settings
        self._loading = loading
        self._world = loading.world
        self._order = order
        self._data = {"train": data.train, "val": data.val}
        self._augmentation = augmentation
        folder = None if settings.folder is None else Path(settings.folder)
        self._store = FeatureStore(settings.memory_bytes, folder)
        self._resident = ResidentTensors(loading.device)
        self._engine: Engine | None = None
        self._batch_size = 0
        self._views: dict[tuple[str, int], StoredView] = {}
        self._loaders: dict[str, ImageLoader] = {}
        self._num_compared = 0
        self.num_batches: int = len(order)
        # Where the whole backbone is cached, each step leaves it alone.
        self.module: nn.Module = model.head if split.is_whole else model

    def prepare(self) -> None:
        """Compute the validation features, and compare a sample of them.

        Raises:
            FeatureError: Features differ from those computed anew.
            ImageError: A picture cannot be read.
        """
        self.view("val", 0)

    def train(self, epoch: int, *, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """Iterate over the batches of an epoch: activations float32 `(N, ...)`.

        The first epoch that needs a view computes it. In each epoch a picture's activations
        are computed anew and compared. They come to lie where the network computes.
        """
        streams = self._settings.views == "epochs"
        batches = self._stream(epoch, start) if streams else self._stored(epoch, start)
        return prefetch(batches, self._loading.device)

    def _stored(self, epoch: int, start: int) -> Iterator[tuple[int, Batch]]:
        """Look the activations of an epoch up in its views."""
        order, repeats = (torch.from_numpy(each) for each in self._order.order(epoch))
        # All views first, in which several processes work together.
        for repeat in range(int(repeats.max()) + 1):
            self.view("train", self._number(epoch, repeat))
        self._compare("train", self._number(epoch), count=1)
        size = self._loading.batch_size
        for number in range(start, self.num_batches):
            part = self._part(number * size, min(len(order), (number + 1) * size))
            values, indices = self._rows(order[part], repeats[part], epoch)
            if len(indices):
                yield number, self._batch("train", values, indices)

    def _part(self, first: int, end: int) -> slice:
        """Return this process's part of a batch's places."""
        return part_of(range(first, end), (self._world.rank, self._world.size))

    def _number(self, epoch: int, repeat: int = 0) -> int:
        """Return the number of the view that an epoch shows; 0 is the evaluation view."""
        (number,) = self._settings.views_of(range(epoch + repeat, epoch + repeat + 1))
        return number

    def _rows(self, indices: Tensor, repeats: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the activations of those pictures that could be read, and their places.

        A picture that comes again in an epoch comes in its next view.
        """
        if not bool(repeats.any()):
            number = self._number(epoch)
            indices = indices[self.view("train", number).valid[indices]]
            return self._look_up("train", number, indices), indices
        pairs = [
            (self._number(epoch, repeat), index)
            for index, repeat in zip(indices.tolist(), repeats.tolist(), strict=True)
        ]
        is_valid = torch.stack([self.view("train", number).valid[index] for number, index in pairs])
        rows = torch.stack([self._values("train", number)[index] for number, index in pairs])
        chosen = is_valid.nonzero().flatten()
        return rows[upload(chosen, rows.device)], indices[chosen]

    def _values(self, split: str, number: int) -> Tensor:
        """Return a view's activations, from the accelerator's memory where they fit it."""
        return self._resident.get((split, number), self.view(split, number).values)

    def _look_up(self, split: str, number: int, indices: Tensor) -> Tensor:
        """Return the activations of some pictures."""
        values = self._values(split, number)
        return values[upload(indices, values.device)]

    def _batch(self, split: str, values: Tensor, indices: Tensor) -> Batch:
        targets = self._data[split].targets[indices.numpy()]
        return Batch(values, torch.from_numpy(targets), indices)

    def _stream(self, epoch: int, start: int) -> Iterator[tuple[int, Batch]]:
        """Compute an epoch's own views in large batches and give them out in small ones."""
        if not self._world.is_alone:
            yield from self._stream_part(epoch, start)
            return
        size = self._loading.batch_size
        rows, indices, number = list[Tensor](), list[int](), start
        for place, index, value in self._activations(epoch, start * size):
            if place // size != number and rows:
                yield number, self._batch("train", torch.stack(rows), torch.tensor(indices))
                rows, indices = [], []
            number = place // size
            rows.append(value)
            indices.append(index)
        if rows:
            yield number, self._batch("train", torch.stack(rows), torch.tensor(indices))

    def _stream_part(self, epoch: int, start: int) -> Iterator[tuple[int, Batch]]:
        """Compute this process's part of each batch of an epoch."""
        engine, loader = self._started(), self._loader("train")
        loaded = loader.numbered_batches(epoch=epoch, start=start)
        for number, batch in self._loading.images(loaded):
            values = engine(batch.images)
            if number == start:
                self._compare_rows(values[:1], batch.images[:1], f"item {int(batch.indices[0])}")
            yield number, self._batch("train", values, batch.indices)

    def _activations(self, epoch: int, first: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield places in the epoch's order from `first` on, pictures and their activations."""
        engine, loader = self._started(), self._loader("train")
        order = self._order.order(epoch)[0].tolist()
        # The same large batches as from the start: results depend on them in the last bits.
        skipped = first // self._batch_size
        place = skipped * self._batch_size
        loaded = loader.numbered_batches(epoch=epoch, start=skipped)
        for number, batch in self._loading.images(loaded):
            self._check()
            values = engine(batch.images)
            if number == skipped:
                self._compare_rows(values[:1], batch.images[:1], f"item {int(batch.indices[0])}")
            for value, index in zip(values, batch.indices.tolist(), strict=True):
                while order[place] != index:  # Pictures in between could not be read.
                    place += 1
                if place >= first:
                    yield place, index, value
                place += 1

    def val(self) -> Iterator[Batch]:
        """Iterate over the activations of the validation pictures, likewise."""
        for _, batch in prefetch(enumerate(self._stored_val()), self._loading.device):
            yield batch

    def _stored_val(self) -> Iterator[Batch]:
        view = self.view("val", 0)
        places = torch.arange(len(view.valid))[view.valid]
        # In the batches of live validation, on which some criteria depend.
        size = self._loading.batch_size
        for first in range(0, len(places), size):
            indices = places[self._part(first, min(len(places), first + size))]
            if len(indices):
                yield self._batch("val", self._look_up("val", 0, indices), indices)

    def logits(self, inputs: Tensor) -> Tensor:
        """Run the rest of the network."""
        if self.module is self._model:
            inputs = self._model.features_from(inputs, self._split)
        logits: Tensor = self._model.head(inputs)
        return logits

    def describe(self) -> dict[str, object]:
        """Return what is cached and how."""
        engine = self._engine.describe() if self._engine is not None else {}
        return {
            "cached": True,
            "in_words": self._settings.describe(),
            "num_stages": self._split.num_stages,
            "views": self._settings.views,
            "engine": self._settings.engine,
            "precision": self._settings.precision,
            "batch_size": self._batch_size or None,
            "memory_bytes": self._store.num_bytes,
            "spilled_bytes": self._store.num_spilled_bytes,
            **engine,
        }

    @property
    def view_numbers(self) -> range:
        """The numbers of all views of training pictures, where they are not one an epoch."""
        views = int(self._settings.views)
        return range(1, views + 1) if views else range(1)

    def targets(self, split: str) -> Tensor:
        """Return the targets of all pictures of "train" or "val", int64 `(N,)`."""
        return torch.from_numpy(self._data[split].targets)

    def close(self) -> None:
        """End the workers, and give memory and temporary files back."""
        for loader in self._loaders.values():
            loader.close()
        self._views.clear()
        self._resident.clear()
        self._store.close()

    @property
    def batch_size(self) -> int:
        """How many pictures the engine computes at a time; 0 where it has not begun."""
        return self._batch_size

    @property
    def num_stages(self) -> int:
        """The number of stages whose outputs are cached."""
        return self._split.num_stages

    @property
    def loaders(self) -> dict[str, ImageLoader]:
        """The loaders that read pictures so far, by their split."""
        return dict(self._loaders)

    def view(self, split: str, number: int) -> StoredView:
        """Return a view of all pictures: the one at hand, one that was kept, or a new one."""
        place = (split, number)
        if place not in self._views:
            key = self._key(split, number) if self._store.folder is not None else None
            view = self._store.load(key) if key is not None else None
            (num_found,) = self._world.agree([int(view is not None)])
            if num_found < self._world.size:
                view = None  # All compute it together.
            if view is None:
                view = self._compute(split, number)
                self._views[place] = view
                self._compare(split, number, count=NUM_COMPARED)
                if key is not None:
                    self._keep(key, view)
            else:
                self._views[place] = view
                self._compare(split, number, count=NUM_COMPARED)
            self._rest(split)
        return self._views[place]

    def _keep(self, key: dict[str, Any], view: StoredView) -> None:
        """Keep a view for later runs, once for all processes."""
        world = self._world
        world.together(lambda: self._store.keep(key, view) if world.is_first else None)

    def _rest(self, split: str) -> None:
        """End the workers of a split of which all views are there."""
        views = self._settings.views
        wanted = 1 if split == "val" or views == "epochs" else max(1, views)
        if split in self._loaders and sum(name == split for name, _ in self._views) == wanted:
            self._loaders[split].close()

    def _compute(self, split: str, number: int) -> StoredView:
        """Compute a view, each process its part of the pictures."""
        world = self._world
        view = world.together(lambda: self._compute_part(split, number))
        world.sum(view.values)
        view.valid.copy_(world.sum(view.valid.int()) > 0)
        if not bool(view.valid.any()):
            raise DataError(f"No picture of the {split} split can be read.")
        return view

    def _compute_part(self, split: str, number: int) -> StoredView:
        engine, loader = self._started(), self._loader(split)
        view = None if self._world.is_alone else self._allocate(split)
        bar = tqdm(
            total=len(loader.dataset),
            desc=f"features {split}" + (f" view {number}" if number else ""),
            unit="image",
            leave=False,
            disable=None if self._loading.verbose else True,
        )
        with bar:
            for _, batch in self._loading.images(loader.numbered_batches(epoch=number)):
                self._check()
                values = engine(batch.images).cpu()
                if view is None:
                    view = self._store.allocate(len(loader.dataset), tuple(values.shape[1:]))
                view.values[batch.indices] = values
                view.valid[batch.indices] = True
                bar.update(len(values))
        return self._allocate(split) if view is None else view

    def _allocate(self, split: str) -> StoredView:
        """Return room for a view, also in a process that has no picture to learn its shape from."""
        size = self._model.preprocess.crop_size
        image = torch.zeros(1, self._model.preprocess.num_channels, size, size)
        shape = tuple(self._started()(image).shape[1:])
        return self._store.allocate(len(self._data[split]), shape)

    def _compare(self, split: str, number: int, *, count: int) -> None:
        """Compute a sample of a view anew, by the network as it is now, and compare."""
        view = self.view(split, number)
        valid = torch.arange(len(view.valid))[view.valid].tolist()
        first = self._num_compared
        self._num_compared += count
        chosen = sorted({valid[(first + place) * 7919 % len(valid)] for place in range(count)})
        batch = self._world.together(lambda: self._loader(split).read(chosen, epoch=number))
        batch = normalized(batch, self._model.preprocess)
        name = self._data[split].name_of(chosen[0])
        self._compare_rows(view.values[batch.indices], batch.images, name)

    def _compare_rows(self, values: Tensor, images: Tensor, name: str) -> None:
        device = next(self._model.parameters()).device
        with evaluating(self._model), torch.no_grad():
            wanted = self._split.prefix(images.to(device)).float()
        settings = self._settings
        usual = _CPU_TOLERANCES if device.type == "cpu" else _ACCELERATOR_TOLERANCES
        allowed = settings.tolerance or usual[settings.precision]
        largest = max(float(wanted.abs().max()), 1e-12)
        difference = float((values.to(device) - wanted).abs().max()) / largest
        if not difference <= allowed:
            raise FeatureError(
                f"Cached features do not match those that the network gives now: relative to the "
                f"largest they differ by {difference:.3g}, allowed are {allowed:g} (seen near "
                f"`{name}`). The frozen part changed during the fit, what was kept in a folder is "
                f"stale, or {settings.precision} is too coarse for this network. Pass "
                f"`cache=False` to compute all features anew in every epoch."
            )

    def _loader(self, split: str) -> ImageLoader:
        """Return the loader of a split, in batches that are good for the engine."""
        if split not in self._loaders:
            self._started()
            loading, views = self._loading, self._settings.views
            streams = split == "train" and views == "epochs"
            is_augmented = split == "train" and views != 0
            self._loaders[split] = loading.loader(
                self._data[split],
                loading.train_transform(self._augmentation)
                if is_augmented
                else loading.eval_transform(),
                shuffle=streams,
                balanced=streams and self._order.balanced,
                cache_share=1.0 if is_augmented and views != 1 else 0.0,
                batch_size=self._batch_size if not streams or self._world.is_alone else None,
                is_shared=True,
            )
        return self._loaders[split]

    def _started(self) -> Engine:
        """Return the engine, built when it is first needed."""
        if self._engine is None:
            device = next(self._model.parameters()).device
            settings = self._settings
            with evaluating(self._model):
                self._engine = make_engine(
                    self._split.prefix,
                    engine=settings.engine,
                    precision=settings.precision,
                    device=device,
                )
            size = self._model.preprocess.crop_size
            shape = (self._model.preprocess.num_channels, size, size)
            if settings.batch_size != "auto":
                self._batch_size = int(settings.batch_size)
            else:
                self._batch_size = choose_batch_size(
                    self._engine, shape, num_images=len(self._data["train"]), device=device
                )
        return self._engine

    def _key(self, split: str, number: int) -> dict[str, Any]:
        is_augmented = split == "train" and number > 0
        return view_key(
            self._model,
            self._split,
            self._data[split],
            engine={**self._started().describe(), "batch_size": self._batch_size},
            augmentation=self._augmentation if is_augmented else None,
            seed=self._loading.seed if is_augmented else None,
            view=number,
        )
