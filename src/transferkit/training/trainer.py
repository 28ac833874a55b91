"""`Trainer`: fit, keep the best epoch, save."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from transferkit._allocator import buffers_kept
from transferkit._checks import check_flag, check_integer, check_type
from transferkit._device import resolve_device
from transferkit._files import check_writable
from transferkit._seeding import check_seed
from transferkit.artifacts import save_artifact
from transferkit.data import ImageDataset, ImageSplits
from transferkit.data.loader import DEFAULT_MAX_SKIPPED, OnError, WorkerType
from transferkit.errors import ConfigError
from transferkit.evaluation import Evaluation, Metric, evaluate_model
from transferkit.images import Augmentation
from transferkit.models import Classifier
from transferkit.training.admission import admit, check_frozen_by_plan
from transferkit.training.averaging import EMA, SWA, make_average
from transferkit.training.callbacks import Callback, check_callables, notify
from transferkit.training.checkpoints import (
    Checkpoints,
    Resume,
    find_checkpoint,
    make_checkpoints,
)
from transferkit.training.distributed import find_world, own_device
from transferkit.training.execution import (
    ChannelsLast,
    agree_on_execution,
    check_channels_last,
    first_format,
    lay_out,
)
from transferkit.training.feed_choice import CacheChoice, check_cache
from transferkit.training.fitting import Fit
from transferkit.training.forward import Criterion
from transferkit.training.head_start import HeadStart, check_head_start, start_head
from transferkit.training.history import History
from transferkit.training.job import Job, describe_job, make_phases, resize_batches
from transferkit.training.loading import (
    DEFAULT_CACHE_BYTES,
    Balance,
    BatchTransform,
    Loading,
    check_balance,
    check_metrics,
    find_split,
    make_batch_transform,
    make_criterion,
)
from transferkit.training.logs import EpochLog, ProgressBar
from transferkit.training.losses import NanPolicy, check_nan_policy
from transferkit.training.lr_find import LRFind
from transferkit.training.lr_sweep import spread_lrs, sweep_lrs
from transferkit.training.memory import find_batch_size
from transferkit.training.optimizers import OptimizerFactory
from transferkit.training.phases import Phase
from transferkit.training.plan import FitPlan, copy_job, plan_fit
from transferkit.training.precision import Precision
from transferkit.training.recipes import Recipe
from transferkit.training.regularizers import check_strength
from transferkit.training.schedulers import Schedule, SchedulerFactory
from transferkit.training.settings import RATES, resolve_recipe
from transferkit.training.solving import Solver, check_solver
from transferkit.training.steps import check_clip_norm
from transferkit.training.updates import lay_out_state


class Trainer:
    """Train a classifier on the splits of a job and keep its best epoch.

    Each epoch is a pass over the training pictures and one over the validation pictures. The
    best epoch is the one with
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
        backbone_lr_factor: Learning rate of the backbone's last stage relative to `lr`, above
            0; only where `optimizer` is a name.
        stage_lr_factor: Learning rate of each stage of the backbone relative to the stage
            after it, above 0 (discriminative learning rates); only where `optimizer` is a name.
        momentum: Momentum of "sgd", in [0, 1); only where `optimizer` is a name.
        weight_decay: Weight decay, at least 0; only where `optimizer` is a name.
        scheduler: A name (`list_schedulers()`), a factory, a `Schedule` or a PyTorch
            scheduler, which is stepped by the epoch.
        scheduler_options: Options for a scheduler given by name.
        batch_size: Pictures in a batch, at least 1; the last batch may be smaller. Several
            processes (`torchrun`) share each batch. "auto" takes the recipe's, or the largest
            half, quarter and so on of it that fits the memory.
        augmentation: A preset's name, or a callable from uint8 `(3, H, W)` to uint8
            `(3, crop_size, crop_size)`.
        batch_augmentation: "mixup", "cutmix", "mixup_or_cutmix", or a callable from images
            `(N, C, h, w)` and targets `(N,)` to images and soft targets `(N, classes)`, which
            the criterion must take. Training accuracy counts the true classes.
        balance: What to do about rare classes: "sampler" draws each class equally often,
            "weights" weighs them in the loss (`class_weights`); None takes them as they are.
        head_start: Where the head starts in the first fit: None leaves it as it is (random);
            "class_means", "ridge" or "logistic" fits it to the features of the training
            pictures; "pretrained" takes the rows of the classifier that the backbone was
            trained with whose class names fit; a mapping from our class names to its names or
            indices says which these are.
        label_smoothing: The share of each target that goes to all classes alike, in [0, 1].
        l2_sp: Strength of the pull of the backbone's weights back to where they started, at
            least 0; 0 is none.
        average: `EMA(...)` or `SWA(...)`: evaluate, and keep, averages of the weights.
        wise_ft: After the fit, interpolate between the weights before fine-tuning and the best
            ones, by the factor that validates best.
        cache: Whether the features of a frozen part are computed once: "auto" does so where it
            can and the features fit, True demands it, False never does; a `FeatureCache` says
            how many augmented views of each picture, by which engine, and where they are kept.
        solver: What trains the head where nothing else trains: "sgd" the optimizer, "lbfgs"
            logistic regression on cached features, its penalty picked by cross-validation.
        criterion: Maps logits `(N, C)` and targets `(N,)` to the batch's mean loss; None
            takes cross-entropy. An epoch's loss is the mean over its batches, each weighted
            by its number of images. A module is moved to `device`.
        metrics: Further metrics of the validation pictures, by name, such as those of
            torchmetrics (`MulticlassF1Score(num_classes=...)`): objects with `reset()`,
            `update(logits, targets)` and `compute()`. `record.metrics` has their values.
        callbacks: What else watches the fit.
        seed: Rules order, augmentation and dropout. The caller's random state is left alone.
        device: "auto" takes the accelerator that PyTorch finds, else the CPU.
        num_workers: Threads or processes that load pictures; "auto" looks at this machine
            and leaves the cores to a network that computes on the CPU.
        worker_type: "thread", "process" and so on, see `ImageLoader`; no choice changes a bit.
        cache_bytes: Pictures are kept in memory up to so many bytes (512 MiB), for the epochs
            after the first: decoded ones of training, resized and cropped ones of validation,
            which on an accelerator stay there. The pixels are the same. 0 keeps none.
        on_error: "raise" ends the fit at a picture that cannot be read; "skip" leaves it out
            and lists it in `history.skipped`.
        max_skipped: The share of a split's pictures beyond which skipping is an error.
        channels_last: Lay weights and images out with the channels last (True) or first (False),
            which changes results in the last bits only. "auto" takes what is faster in a few
            batches of noise at the start of a fit, and the channels last where the fit is too
            short to measure; `history.settings["execution"]` says which, and why. A fit that
            goes on from a checkpoint keeps what it had. A network of your own that calls `view`
            on its activations needs False in short fits.
        precision: What the network computes in: "fp32"; "bf16" or "fp16" where the device has
            it; "auto" takes bfloat16 where there are instructions for it, else float32. The
            weights stay float32.
        accumulate: Batches whose gradients are summed up for one optimizer update, at least 1:
            as large a batch, in less memory.
        clip_norm: The largest norm of all gradients together, above 0; larger ones are scaled
            down to it. None leaves them.
        activation_checkpointing: Keep only what goes into each stage of the backbone, and
            compute the rest anew in the backward pass: less memory for about a third more
            time, with the same results.
        nan_policy: "raise" ends the fit at a loss that is not finite; a number lets so many
            batches be left out, which `history.settings["nonfinite"]` lists.
        checkpoints: The folder, or a `Checkpoints`, in which the fit keeps its state, so that
            `fit(resume="auto")` can go on with it; None keeps none.
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
        stage_lr_factor: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        scheduler: str | SchedulerFactory | Schedule | LRScheduler | None = None,
        scheduler_options: dict[str, Any] | None = None,
        batch_size: int | Literal["auto"] | None = None,
        augmentation: str | Augmentation | None = None,
        batch_augmentation: str | BatchTransform | None = None,
        balance: Balance | None = None,
        head_start: HeadStart = None,
        label_smoothing: float = 0.0,
        l2_sp: float = 0.0,
        average: EMA | SWA | None = None,
        wise_ft: bool = False,
        cache: CacheChoice = "auto",
        solver: Solver = "sgd",
        criterion: Criterion | None = None,
        metrics: Mapping[str, Metric] | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int = 0,
        device: str | torch.device = "auto",
        num_workers: int | Literal["auto"] = "auto",
        worker_type: WorkerType = "auto",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        on_error: OnError = "raise",
        max_skipped: float = DEFAULT_MAX_SKIPPED,
        channels_last: ChannelsLast = "auto",
        precision: str = "fp32",
        accumulate: int = 1,
        clip_norm: float | None = None,
        activation_checkpointing: bool = False,
        nan_policy: NanPolicy = "raise",
        checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
        verbose: bool = True,
    ) -> None:
        given: dict[str, Any] = {
            "optimizer": optimizer,
            "lr": lr,
            "backbone_lr_factor": backbone_lr_factor,
            "stage_lr_factor": stage_lr_factor,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "scheduler": scheduler,
            "scheduler_options": scheduler_options,
            "criterion": criterion,
            "augmentation": augmentation,
        }
        check_type("model", model, Classifier, "a Classifier, as `build_model` makes one")
        check_type("data", data, ImageSplits, "ImageSplits, as `load_folders` gives them")
        check_callables(criterion, augmentation, callbacks)
        if data.num_classes != model.num_classes:
            raise ConfigError(
                f"The data has {data.num_classes} classes ({', '.join(data.class_names[:5])}"
                f"{', ...' if data.num_classes > 5 else ''}) and the model {model.num_classes}. "
                f"Build it with `num_classes=len(data.class_names)`."
            )
        check_frozen_by_plan(model)
        self.model: Classifier = model
        self.data: ImageSplits = data
        self.seed: int = check_seed(seed)
        world = find_world(device)
        self.device: torch.device = resolve_device(own_device(device, world))
        self.recipe: Recipe = resolve_recipe(
            ("probe" if model.is_backbone_frozen else "finetune") if recipe is None else recipe,
            optimizer=optimizer,
            scheduler=scheduler,
            scheduler_options=scheduler_options,
            augmentation=augmentation,
            batch_size=None if batch_size == "auto" else batch_size,
            rates={name: given[name] for name in RATES},
        )
        self.criterion: Criterion = make_criterion(
            criterion, balance, data.train, label_smoothing=label_smoothing
        )
        if isinstance(self.criterion, nn.Module):
            self.criterion.to(self.device)  # Class weights are buffers of it.
        self.metrics: dict[str, Metric] = check_metrics(metrics, self.device)
        self.history: History = History()
        self.should_stop: bool = False
        self.should_stop_phase: bool = False
        self.lrs: dict[str, float] = {}
        """The learning rate of each parameter group at the start of the running epoch."""
        self._has_started = False
        self._first_plan = model.freeze_plan
        self._callbacks = [*((EpochLog(), ProgressBar()) if verbose else ()), *callbacks]
        loading = Loading(
            model=model,
            batch_size=self.recipe.batch_size,
            seed=self.seed,
            device=self.device,
            num_workers=num_workers,
            worker_type=worker_type,
            cache_bytes=cache_bytes,
            on_error=on_error,
            max_skipped=max_skipped,
            verbose=verbose and world.is_first,
            world=world,
        )
        world.check_batch_size(self.recipe.batch_size)
        augment = augmentation if augmentation is not None else self.recipe.augmentation
        train_loader, val_loader = loading.passes(data, augment, balanced=balance == "sampler")
        self._job = Job(
            model=model,
            data=data,
            recipe=self.recipe,
            optimizer=optimizer if optimizer is not None else self.recipe.optimizer,
            scheduler=scheduler if scheduler is not None else self.recipe.scheduler,
            augmentation=augment,
            criterion=self.criterion,
            batch_augmentation=batch_augmentation,
            mixing=make_batch_transform(batch_augmentation, data.num_classes),
            balance=check_balance(balance, criterion),
            loading=loading,
            train_loader=train_loader,
            val_loader=val_loader,
            cache=check_cache(cache),
            solver=check_solver(solver),
            head_start=check_head_start(head_start, model, data),
            label_smoothing=label_smoothing,
            l2_sp=check_strength(l2_sp),
            average=make_average(average),
            wise_ft=check_flag("wise_ft", wise_ft),
            channels_last=check_channels_last(channels_last),
            memory_format=first_format(channels_last),
            precision=Precision(precision, self.device),
            accumulate=check_integer("accumulate", accumulate, minimum=1),
            clip_norm=check_clip_norm(clip_norm),
            recomputes=check_flag("activation_checkpointing", activation_checkpointing),
            nan_policy=check_nan_policy(nan_policy),
            metrics=self.metrics,
            checkpoints=make_checkpoints(checkpoints),
            world=world,
            seed=self.seed,
            device=self.device,
            given=frozenset(name for name, value in given.items() if value is not None),
        )
        model.to(self.device).to(memory_format=self._job.memory_format)
        if isinstance(optimizer, Optimizer):
            lay_out_state(optimizer)
        # What can be told now: a fit may have other phases.
        phases = make_phases(self._job, None, None)
        admit(self._job, phases, at_door=True)
        if batch_size == "auto":
            world.join()
            size = min(world.gather(find_batch_size(copy_job(self._job), phases)))
            world.check_batch_size(size)
            self._job = resize_batches(self._job, size)
            self.recipe = self._job.recipe

    @property
    def is_first_process(self) -> bool:
        """Whether this process is the one of those that train together that writes and prints."""
        return self._job.world.is_first

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer updates in an epoch."""
        return self._job.steps_per_epoch

    def fit(
        self,
        epochs: int | None = None,
        *,
        phases: Sequence[Phase] | None = None,
        resume: Resume = False,
    ) -> History:
        """Train, and put the weights of the best epoch back into the model.

        The fit starts from the model's present weights, with a new optimizer and schedule
        unless they were given as objects. Ctrl-C ends it after the running step, with the
        best weights so far; an error in between leaves the best weights so far, too. Where no
        epoch was completed, the model is as it was before. What is frozen afterwards is what
        was frozen in the last phase.

        With `checkpoints`, the state is kept, also at Ctrl-C (SIGINT) and at SIGTERM, which ends
        the program with the code 143 after that. A second signal ends the fit at once. A fit
        that goes on gives what it would have given, bit for bit on the CPU, wherever it stopped
        and however pictures are loaded. Signals are seen in the main thread only.

        Args:
            epochs: Passes over the training pictures, at least 1; None takes the recipe's.
                Where the recipe has phases, they are shared out in their proportion.
            phases: The phases of the fit, in the place of the recipe's; each has its own
                epochs.
            resume: "auto" goes on from the newest checkpoint, or starts where there is none;
                True demands one; a path goes on from that checkpoint; False starts anew, in a
                folder without checkpoints of another fit.

        Returns:
            The history, which is also in `trainer.history`.

        Raises:
            ConfigError: `epochs` is out of range, or the phases do not fit model and optimizer.
            CheckpointError: There is no checkpoint to go on from, or it is of another fit.
            LossError: The loss is not finite.
            OutputError: A checkpoint cannot be written.
            FreezeError: What a phase freezes or unfreezes is not there.
            FeatureError: Cached features are not those that the network gives.
            ImageError: A picture cannot be read; the message names its path.
        """
        self._job.world.join()
        store, checkpoint = find_checkpoint(self._job.checkpoints, resume, self._job.world)
        if checkpoint is None:
            self._first_plan = self.model.freeze_plan
        else:  # Phases begin where they did, whatever has run since.
            self.model.freeze(self._first_plan)
        resolved = make_phases(self._job, epochs, phases)
        options = admit(self._job, resolved, by_recipe=phases is None)
        execution = agree_on_execution(self._job, resolved, checkpoint)
        self._job = lay_out(self._job, execution)
        self.history = History(settings=describe_job(self._job, resolved, options))
        self.history.settings["execution"] = execution.to_dict()
        self.should_stop = self.should_stop_phase = False
        fit = Fit(
            self._job,
            resolved,
            self.history,
            callbacks=self._callbacks,
            notify=self._call,
            flags=self,
            store=store,
        )
        fit.run(start=not self._has_started, checkpoint=checkpoint)
        self._has_started = True
        return self.history

    def plan(
        self,
        epochs: int | None = None,
        *,
        phases: Sequence[Phase] | None = None,
        measure: bool = True,
        verbose: bool = True,
    ) -> FitPlan:
        """Work out what `fit` with the same arguments would do, before anything runs.

        Args:
            epochs: As for `fit`.
            phases: As for `fit`.
            measure: Run a few batches on a copy of the model, to estimate time and memory.
            verbose: Print the plan, too.

        Returns:
            Phases, what trains in each, learning rates, steps, where features are cached, and
            the estimates. Model, optimizer and random state are as before.

        Raises:
            ConfigError: `fit` would raise it, too.
        """
        resolved = make_phases(self._job, epochs, phases)
        admit(self._job, resolved, by_recipe=phases is None)
        plan = plan_fit(self._job, resolved, measure=measure)
        if verbose:
            print(plan)
        return plan

    def lr_find(
        self,
        *,
        min_lr: float = 1e-6,
        max_lr: float = 10.0,
        num_steps: int = 100,
        phases: Sequence[Phase] | None = None,
        verbose: bool = True,
    ) -> LRFind:
        """Train a copy of the model at a learning rate that rises, and suggest one for `fit`.

        The first phase of a fit is swept, with all that belongs to it but the schedule: what is
        frozen, the batches in their order, augmentation, criterion, optimizer. The rates of all
        parameter groups keep their proportions. The trainer, its model and its optimizer are as
        before, whatever ends the sweep, and so is the random state.

        Args:
            min_lr: The learning rate of the head in the first step, above 0.
            max_lr: That of the last step, above `min_lr`. The sweep ends before it where the
                smoothed loss is 4 times its lowest, or not finite.
            num_steps: The number of steps, at least 10; a step is a batch.
            phases: As for `fit`; the first of them is swept.
            verbose: Print the result, too.

        Returns:
            The losses, and the suggestion: what to pass as `lr`, or None.

        Raises:
            ConfigError: A value cannot work, `fit` would raise it, or a solver trains the phase.
            DataError: There are fewer than 8 training pictures.
            ImageError: A picture cannot be read; the message names its path.

        Example:
            >>> import tempfile
            >>> from transferkit.data import load_folders
            >>> from transferkit.models import build_model
            >>> from transferkit.testing import make_image_folder
            >>> data = load_folders(make_image_folder(tempfile.mkdtemp()))
            >>> model = build_model("squeezenet1_1", 2, weights=None, freeze="backbone")
            >>> found = Trainer(model, data, verbose=False).lr_find(num_steps=20, verbose=False)
            >>> found.phase, found.lrs[0]
            ('probe', 1e-06)
        """
        lrs = spread_lrs(min_lr, max_lr, num_steps)
        resolved = make_phases(self._job, None, phases)
        admit(self._job, resolved, by_recipe=phases is None)
        found = sweep_lrs(self._job, resolved, lrs, start=not self._has_started)
        if verbose:
            print(found)
        return found

    def start_head(self) -> dict[str, Any] | None:
        """Write `head_start` into the head now, as the first fit does before it trains.

        For a look at what the start is worth by itself: `evaluate` says so. A fit that
        follows goes on from it.

        Returns:
            What was done, as plain JSON data; None where there is no `head_start`.

        Raises:
            ImageError: A picture cannot be read.
        """
        job = self._job
        report = start_head(job.head_start, job.model, job.data, job.loading)
        self._has_started = True
        return report

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
        loading = self._job.loading
        loader = loading.loader(dataset, loading.eval_transform())
        try:
            with buffers_kept(), self._job.precision.autocast():
                evaluation = evaluate_model(
                    self.model,
                    (batch for _, batch in loading.images(loader.numbered_batches())),
                    class_names=self.data.class_names,
                    criterion=self.criterion,
                    memory_format=self._job.memory_format,
                    metrics=self.metrics,
                )
            return replace(evaluation, skipped=loader.skipped)
        finally:
            loader.close()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the model as an artifact that `Predictor.load` reads.

        Of several processes that train together the first one writes.

        Args:
            path: The file to write, usually `*.safetensors`.

        Returns:
            The path.

        Raises:
            OutputError: The file cannot be written; an older one is left as it was.
        """
        if not self._job.world.is_first:
            return Path(path)
        check_writable(path)
        return save_artifact(
            path,
            self.model,
            class_names=self.data.class_names,
            history=self.history.to_dict() if self.history.records else None,
        )

    def _call(self, event: str, *arguments: Any) -> None:
        notify(self._callbacks, event, self, *arguments)
