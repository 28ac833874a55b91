"""`Trainer`: fit, keep the best epoch, save."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from transferkit._checks import check_integer, check_type
from transferkit._device import resolve_device
from transferkit._files import check_writable
from transferkit._seeding import check_seed, seeded_torch
from transferkit.artifacts import save_artifact
from transferkit.data import ImageDataset, ImageLoader, ImageSplits
from transferkit.data.loader import DEFAULT_MAX_SKIPPED, OnError, WorkerType
from transferkit.errors import ConfigError
from transferkit.evaluation import Evaluation, evaluate_model
from transferkit.evaluation.evaluate import RunningMean
from transferkit.images import Augmentation
from transferkit.models import Classifier
from transferkit.models.modes import modes_kept
from transferkit.training.best import BestWeights
from transferkit.training.callbacks import Callback, EpochLog, ProgressBar, check_callables
from transferkit.training.forward import Criterion, forward
from transferkit.training.history import EpochRecord, History
from transferkit.training.loading import (
    DEFAULT_CACHE_BYTES,
    Balance,
    BatchTransform,
    Loading,
    check_balance,
    find_split,
    list_skipped,
    make_batch_transform,
    make_criterion,
    mix,
)
from transferkit.training.optimizers import OptimizerFactory, group_options, make_optimizer
from transferkit.training.recipes import Recipe
from transferkit.training.schedulers import Schedule, SchedulerFactory, make_schedule
from transferkit.training.settings import name_of, resolve_recipe


class Trainer:
    """Train a classifier on the splits of a job and keep its best epoch.

    Each epoch has a training phase and a validation phase. The best epoch is the one with
    the highest validation accuracy (of equal ones the lowest validation loss), and its
    weights are in the model when `fit` returns.

    Args:
        model: The classifier. It is moved to `device` and trained in place.
        data: The splits; their number of classes must be the model's.
        recipe: A recipe or its name; None takes "probe" for a frozen backbone, else
            "finetune". The arguments that follow take the place of its settings.
        optimizer: "sgd", "adam", "adamw", a factory over parameters, or an optimizer over
            exactly the parameters that train.
        lr: Learning rate of the head, above 0; only where `optimizer` is a name.
        backbone_lr_factor: Learning rate of the backbone relative to `lr`, above 0; only
            where `optimizer` is a name.
        momentum: Momentum of "sgd", in [0, 1); only where `optimizer` is a name.
        weight_decay: Weight decay, at least 0; only where `optimizer` is a name.
        scheduler: A name (`list_schedulers()`), a factory, a `Schedule` or a PyTorch
            scheduler, which is stepped by the epoch.
        scheduler_options: Options for a scheduler given by name.
        batch_size: Pictures in a batch, at least 1; the last batch may be smaller.
        augmentation: A preset's name, or a callable from uint8 `(3, H, W)` to uint8
            `(3, crop_size, crop_size)`.
        batch_augmentation: "mixup", "cutmix", "mixup_or_cutmix", or a callable from images
            `(N, C, h, w)` and targets `(N,)` to images and soft targets `(N, classes)`, which
            the criterion must take. Training accuracy counts the true classes.
        balance: What to do about rare classes: "sampler" draws each class equally often,
            "weights" weighs them in the loss (`class_weights`); None takes them as they are.
        criterion: Maps logits `(N, C)` and targets `(N,)` to the batch's mean loss; None
            takes cross-entropy. An epoch's loss is the mean over its batches, each weighted
            by its number of images. A module is moved to `device`.
        callbacks: What else watches the fit.
        seed: Rules order, augmentation and dropout. The caller's random state is left alone.
        device: "auto" takes the accelerator that PyTorch finds, else the CPU.
        num_workers: Threads or processes that load pictures; "auto" looks at this machine
            and leaves the cores to a network that computes on the CPU.
        worker_type: "thread", "process" and so on, see `ImageLoader`; no choice changes a bit.
        cache_bytes: Decoded pictures are kept in memory up to so many bytes (512 MiB), for
            the epochs after the first. The pixels are the same. 0 keeps none.
        on_error: "raise" ends the fit at a picture that cannot be read; "skip" leaves it out
            and lists it in `history.skipped`.
        max_skipped: The share of a split's pictures beyond which skipping is an error.
        channels_last: Lay weights and images out with the channels last, which most networks
            run faster with and which changes results in the last bits only. Switch it off for
            a network of your own that calls `view` on its activations.
        verbose: Print a line for each epoch, and show a bar on a terminal.

    Raises:
        ConfigError: An argument cannot work, or data and model do not fit.
        UnknownNameError: There is no recipe, augmentation, optimizer or scheduler of that name.
        FreezeError: All parameters are frozen.

    Example:
        >>> import tempfile
        >>> from transferkit.data import load_folders
        >>> from transferkit.models import build_model
        >>> from transferkit.testing import make_image_folder
        >>> data = load_folders(make_image_folder(tempfile.mkdtemp()))
        >>> model = build_model("squeezenet1_1", 2, weights=None, freeze="backbone")
        >>> trainer = Trainer(model, data, verbose=False)
        >>> history = trainer.fit(epochs=1)
        >>> len(history), trainer.recipe.name
        (1, 'probe')
    """

    def __init__(
        self,
        model: Classifier,
        data: ImageSplits,
        *,
        recipe: str | Recipe | None = None,
        optimizer: str | OptimizerFactory | Optimizer | None = None,
        lr: float | None = None,
        backbone_lr_factor: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        scheduler: str | SchedulerFactory | Schedule | LRScheduler | None = None,
        scheduler_options: dict[str, Any] | None = None,
        batch_size: int | None = None,
        augmentation: str | Augmentation | None = None,
        batch_augmentation: str | BatchTransform | None = None,
        balance: Balance | None = None,
        criterion: Criterion | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int = 0,
        device: str | torch.device = "auto",
        num_workers: int | Literal["auto"] = "auto",
        worker_type: WorkerType = "auto",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        on_error: OnError = "raise",
        max_skipped: float = DEFAULT_MAX_SKIPPED,
        channels_last: bool = True,
        verbose: bool = True,
    ) -> None:
        check_type("model", model, Classifier, "a Classifier, as `build_model` makes one")
        check_type("data", data, ImageSplits, "ImageSplits, as `load_folders` gives them")
        check_callables(criterion, augmentation, callbacks)
        if data.num_classes != model.num_classes:
            raise ConfigError(
                f"The data has {data.num_classes} classes ({', '.join(data.class_names[:5])}"
                f"{', ...' if data.num_classes > 5 else ''}) and the model {model.num_classes}. "
                f"Build it with `num_classes=len(data.class_names)`."
            )
        self.model: Classifier = model
        self.data: ImageSplits = data
        self.seed: int = check_seed(seed)
        self.device: torch.device = resolve_device(device)
        self.recipe: Recipe = resolve_recipe(
            ("probe" if model.is_backbone_frozen else "finetune") if recipe is None else recipe,
            optimizer=optimizer,
            scheduler=scheduler,
            scheduler_options=scheduler_options,
            augmentation=augmentation,
            batch_size=batch_size,
            rates={
                "lr": lr,
                "backbone_lr_factor": backbone_lr_factor,
                "momentum": momentum,
                "weight_decay": weight_decay,
            },
        )
        self._balance = check_balance(balance, criterion)
        self.criterion: Criterion = make_criterion(criterion, balance, data.train)
        if isinstance(self.criterion, nn.Module):
            self.criterion.to(self.device)  # Class weights are buffers of it.
        self.history: History = History()
        self.should_stop: bool = False
        self._optimizer = optimizer if optimizer is not None else self.recipe.optimizer
        self._scheduler = scheduler if scheduler is not None else self.recipe.scheduler
        self._augmentation = augmentation if augmentation is not None else self.recipe.augmentation
        self._callbacks = [*((EpochLog(), ProgressBar()) if verbose else ()), *callbacks]
        self._batch_augmentation = batch_augmentation
        self._mix = make_batch_transform(batch_augmentation, data.num_classes)
        self._loading = Loading(
            model=model,
            batch_size=self.recipe.batch_size,
            seed=self.seed,
            device=self.device,
            num_workers=num_workers,
            worker_type=worker_type,
            cache_bytes=cache_bytes,
            on_error=on_error,
            max_skipped=max_skipped,
        )
        self._train_loader, self._val_loader = self._loading.phases(
            data, self._augmentation, balanced=balance == "sampler"
        )
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model.to(self.device).to(memory_format=self._memory_format)
        # Built now to have the errors at the door; `fit` builds its own.
        trial = self._make_optimizer()
        if trial is not optimizer:  # A scheduler would change the user's own optimizer.
            self._make_schedule(trial, num_epochs=self.recipe.epochs)

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer updates in an epoch."""
        return len(self._train_loader)

    def fit(self, epochs: int | None = None) -> History:
        """Train, and put the weights of the best epoch back into the model.

        The fit starts from the model's present weights, with a new optimizer and schedule
        unless they were given as objects. Ctrl-C ends it after the running step, with the
        best weights so far; an error in between leaves the best weights so far, too. Where no
        epoch was completed, the model is as it was before.

        Args:
            epochs: Passes over the training pictures, at least 1; None takes the recipe's.

        Returns:
            The history, which is also in `trainer.history`.

        Raises:
            ConfigError: `epochs` is out of range.
            ImageError: A picture cannot be read; the message names its path.
        """
        wanted = self.recipe.epochs if epochs is None else epochs
        num_epochs = check_integer("epochs", wanted, minimum=1)
        optimizer = self._make_optimizer()
        options = group_options(optimizer)
        schedule = self._make_schedule(optimizer, num_epochs=num_epochs)
        self.history = History(settings=self._settings(num_epochs, options[0]))
        self.should_stop = False
        with (
            modes_kept(self.model),
            self._session(num_epochs, optimizer, options) as best,
            seeded_torch(self.seed, self.device),
        ):
            for epoch in range(1, num_epochs + 1):
                record = self._run_epoch(epoch, optimizer, schedule)
                self.history.records.append(record)
                best.offer(record)
                self._call("on_epoch_end", record)
                if self.should_stop and epoch < num_epochs:
                    self.history.status = "stopped"
                    break
        return self.history

    def evaluate(self, split: str | ImageDataset = "val") -> Evaluation:
        """Evaluate the model on a split.

        Args:
            split: "train", "val" or "test", or a data set with the same class names. No
                augmentation is applied, to the training split neither.

        Returns:
            Loss, accuracy and confusion matrix. The model's mode stays as it is.

        Raises:
            ConfigError: There is no such split, or the class names differ.
            ImageError: A picture cannot be read.
        """
        dataset = find_split(self.data, split)
        loader = self._loading.loader(dataset, self.model.preprocess.eval())
        try:
            return replace(self._evaluate(loader), skipped=loader.skipped)
        finally:
            loader.close()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the model as an artifact that `Predictor.load` reads.

        Args:
            path: The file to write, usually `*.safetensors`.

        Returns:
            The path.

        Raises:
            OutputError: The file cannot be written; an older one is left as it was.
        """
        check_writable(path)
        return save_artifact(
            path,
            self.model,
            class_names=self.data.class_names,
            history=self.history.to_dict() if self.history.records else None,
        )

    def _run_epoch(self, epoch: int, optimizer: Optimizer, schedule: Schedule) -> EpochRecord:
        start = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        self._call("on_epoch_start", epoch)
        mean = self._train_phase(epoch, optimizer, schedule)
        evaluation = self._evaluate(self._val_loader)
        record = EpochRecord(
            epoch=epoch,
            train_loss=mean.loss,
            train_accuracy=mean.accuracy,
            val_loss=evaluation.loss,
            val_accuracy=evaluation.accuracy,
            lr=lr,
            seconds=time.perf_counter() - start,
        )
        schedule.step("epoch", record.get)
        return record

    def _train_phase(self, epoch: int, optimizer: Optimizer, schedule: Schedule) -> RunningMean:
        self.model.train()
        mean = RunningMean(self.device)
        for step, batch in enumerate(self._train_loader.batches(epoch=epoch), start=1):
            batch = batch.to(self.device, memory_format=self._memory_format)
            images, targets, _ = batch
            wanted = targets
            if self._mix is not None:
                images, wanted = mix(self._mix, batch, seed=self.seed, epoch=epoch)
            loss, logits = forward(self.model, self.criterion, images, wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step("step")
            mean.add(loss, logits, targets)
            self._call("on_step_end", step)
        return mean

    def _evaluate(self, loader: ImageLoader) -> Evaluation:
        return evaluate_model(
            self.model,
            loader.batches(),
            class_names=self.data.class_names,
            criterion=self.criterion,
            memory_format=self._memory_format,
        )

    @contextmanager
    def _session(
        self, num_epochs: int, optimizer: Optimizer, options: list[dict[str, Any]]
    ) -> Iterator[BestWeights]:
        """Run the epochs between start and end; whatever ends them, the best weights return."""
        best = BestWeights(self.model)
        start = time.perf_counter()
        try:
            self._call("on_fit_start", num_epochs)
            yield best
        except KeyboardInterrupt:
            self.history.status = "interrupted"
        except BaseException:
            self.history.status = "failed"
            raise
        finally:
            best.restore()
            if not isinstance(self._scheduler, (Schedule, LRScheduler)):
                # An optimizer given as an object is not left with the last rate, maybe 0.
                for group, first in zip(optimizer.param_groups, options, strict=False):
                    group.update(first)
            self.model.zero_grad(set_to_none=True)
            self._train_loader.close()
            self._val_loader.close()
            self.history.skipped = list_skipped(train=self._train_loader, val=self._val_loader)
            self.history.seconds = time.perf_counter() - start
            self._call("on_fit_end", self.history)

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(self, *arguments)

    def _make_optimizer(self) -> Optimizer:
        return make_optimizer(
            self._optimizer,
            self.model,
            lr=self.recipe.lr,
            backbone_lr_factor=self.recipe.backbone_lr_factor,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )

    def _make_schedule(self, optimizer: Optimizer, *, num_epochs: int) -> Schedule:
        return make_schedule(
            self._scheduler,
            optimizer,
            num_epochs=num_epochs,
            steps_per_epoch=self.steps_per_epoch,
            options=self.recipe.scheduler_options if isinstance(self._scheduler, str) else {},
        )

    def _settings(self, num_epochs: int, options: dict[str, Any]) -> dict[str, Any]:
        """Return what this fit was told, as plain data; rates are the optimizer's own."""
        rates = {name: options.get(name) for name in ("lr", "momentum", "weight_decay")}
        rates["lr"] = float(options["lr"])
        if not isinstance(self._optimizer, str):
            rates["backbone_lr_factor"] = None
        return (
            self.recipe.to_dict()
            | rates
            | {
                "epochs": num_epochs,
                "optimizer": name_of(self._optimizer),
                "scheduler": name_of(self._scheduler),
                "augmentation": name_of(self._augmentation),
                "batch_augmentation": name_of(self._batch_augmentation),
                "balance": self._balance,
                "criterion": name_of(self.criterion),
                "seed": self.seed,
                "device": str(self.device),
                "backbone": self.model.backbone_name,
                "freeze_plan": self.model.freeze_plan.to_dict(),
                "num_train": len(self.data.train),
                "num_val": len(self.data.val),
            }
        )
