"""`Classifier`: a backbone, a head, and the one state of what is frozen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from transferkit._checks import check_integer
from transferkit.data.loader import DEFAULT_MAX_SKIPPED, OnError
from transferkit.errors import BackboneError, ConfigError, FreezeError
from transferkit.images import Preprocess
from transferkit.models.freezing import BatchNormMode, Freeze, FreezePlan, is_batch_norm
from transferkit.models.heads import HeadSpec
from transferkit.models.pinning import count_inert_stages, find_pinned, is_inert, keep_pinned
from transferkit.models.pretrained_head import PretrainedHead
from transferkit.models.splitting import Split, split_backbone
from transferkit.models.stages import Stage

if TYPE_CHECKING:
    from transferkit.data import ImageDataset
    from transferkit.models.engines import EngineName, Precision
    from transferkit.models.features import Features
    from transferkit.models.summary import ModelSummary


class Classifier(nn.Module):
    """Classify images with a backbone and a head.

    Parameter names are always `backbone.*` and `head.*`. `build_model` is the usual way
    to one.

    Args:
        backbone: Maps images `(N, C, H, W)` to features `(N, D)`.
        num_features: The D of the features.
        num_classes: The number of classes, at least 2.
        backbone_name: The name that the artifact will carry.
        preprocess: How pictures become images for this backbone.
        head: "linear", "mlp", "cosine" or a `HeadSpec`, which `head_spec` keeps.
        stages: The stages of the backbone, for freezing up to one of them (`find_stages`).

    Example:
        >>> model = Classifier(nn.Flatten(), num_features=48, num_classes=2,
        ...                    backbone_name="flat", preprocess=Preprocess())
        >>> model(torch.zeros(5, 3, 4, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_features: int,
        num_classes: int,
        backbone_name: str,
        preprocess: Preprocess,
        head: str | HeadSpec = "linear",
        stages: Sequence[Stage] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head_spec: HeadSpec = HeadSpec.parse(head)
        self.head: nn.Module = self.head_spec.build(num_features, num_classes)
        self.num_features = num_features
        self.num_classes = num_classes
        self.backbone_name = backbone_name
        self.preprocess = preprocess
        self.stages: tuple[Stage, ...] = tuple(stages)
        self.freeze_plan: FreezePlan = FreezePlan()
        self._pinned: tuple[str, ...] = ()
        self.pretrained_head: PretrainedHead | None = None
        """The classifier that came with the backbone's weights, as a start for the head.

        It stays on the CPU and is no part of the state dict. None where the backbone has
        random weights, or they came without a last layer or the names of its classes.
        """
        self.weights_license: str | None = None
        """The licence of the weights that the backbone started from; None where none is known."""

    def features(self, images: Tensor) -> Tensor:
        """Compute the features of images.

        Args:
            images: float32 `(N, C, H, W)`, preprocessed.

        Returns:
            float32 `(N, D)`.

        Raises:
            BackboneError: The backbone gives something of another shape.
        """
        if not torch.compiler.is_compiling():
            self._pin()
        return self.check_features(self.backbone(images), len(images))

    def features_from(self, activations: Tensor, split: Split) -> Tensor:
        """Compute the features of images from what the first stages made of them.

        Args:
            activations: What `split.prefix` gives, `(N, ...)`.
            split: The parts of this model's backbone, see `split`.

        Returns:
            float32 `(N, D)`.

        Raises:
            BackboneError: The backbone gives something of another shape.
        """
        self._pin()
        return self.check_features(split.suffix(activations), len(activations))

    def check_features(self, features: Tensor, count: int) -> Tensor:
        """Return features where they have the shape that they should have.

        Args:
            features: What the backbone gave.
            count: The number of images that it was given.

        Returns:
            The same, `(count, D)`.

        Raises:
            BackboneError: They are something of another shape.
        """
        expected = (count, self.num_features)
        if not isinstance(features, Tensor) or features.shape != expected:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise BackboneError(
                f"Backbone `{self.backbone_name}` should give features of the shape {expected}, "
                f"found {found}. Check its `num_features` and that it ends in a flat vector."
            )
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits `(N, num_classes)` of images float32 `(N, C, H, W)`."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def freeze(self, freeze: Freeze, *, bn: BatchNormMode = "frozen") -> Self:
        """Freeze what the plan names and unfreeze everything else, in place.

        Args:
            freeze: "none", "backbone", "until:<stage>" (`stages` names them), globs over
                parameter names, a callable from a parameter's name and the parameter to
                True or False, or a plan.
            bn: "frozen", "train", "adapt" or "fixed", see `FreezePlan`.

        Returns:
            The model itself.

        Raises:
            FreezeError: A pattern matches nothing, or the plan cannot be understood. The
                model is left as it was.
            UnknownNameError: The backbone has no such stage.
        """
        plan = FreezePlan.parse(freeze, bn=bn, model=self, stages=self.stages)
        named = plan.frozen_names(self, self.stages)
        frozen = named
        if plan.bn == "train":
            frozen = {name for name in named if not is_batch_norm(name, self)}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen)
            if name in frozen:
                parameter.grad = None
        self.freeze_plan = plan
        self._pinned = tuple(find_pinned(self, named, self.stages))
        return self.train(self.training)

    def unfreeze(self, what: Freeze) -> Self:
        """Unfreeze what is named and leave the rest as it is, in place.

        Args:
            what: "all"; "backbone"; "from:<stage>" for everything but the stages before it;
                "until:<stage>" for it and those before it; a stage's name; "next" for the last
                stage of which anything is frozen; globs over parameter names, or a callable as
                for `freeze`.

        Returns:
            The model itself.

        Raises:
            FreezeError: A pattern matches nothing, or nothing of it was frozen. The model is
                left as it was.
            UnknownNameError: The backbone has no such stage.

        Example:
            >>> from transferkit.models import build_model
            >>> model = build_model("resnet18", 2, weights=None, freeze="backbone")
            >>> model.unfreeze("from:layer4").freeze_plan.until
            'layer3'
        """
        return self.freeze(self.freeze_plan.unfreeze(what, self, self.stages))

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen modules, which stay in eval."""
        super().train(mode)
        if mode:
            self._pin()
        return self

    def _pin(self) -> None:
        # Also before each forward pass: `model.backbone.train()` goes round our `train`.
        bn = self.freeze_plan.bn if self.training else "frozen"
        keep_pinned(self, self.backbone, self._pinned, bn)

    @property
    def num_inert_stages(self) -> int:
        """The number of leading stages that compute one function of an image while others train.

        All their parameters are frozen, their modules are pinned, and none of them looks at the
        batch, as BatchNorm does under `bn="adapt"`.
        """
        return count_inert_stages(self.backbone, self.stages, self._pinned, self.freeze_plan.bn)

    def split(self, num_stages: int | None = None) -> Split | None:
        """Cut the backbone into a prefix and a suffix that share its modules.

        Where it is cut within, two images of noise are run through the parts and the whole.

        Args:
            num_stages: The number of stages in the prefix, whether they are frozen or not, at
                least 1. None takes the longest prefix that is inert and can be cut off; a
                backbone without stages is all prefix or none.

        Returns:
            The two parts. None where nothing is inert, or the backbone cannot be cut there.

        Raises:
            ConfigError: There are not so many stages.
        """
        if num_stages is None and not self.stages:
            is_still = "backbone" in self._pinned and is_inert(self.backbone, self.freeze_plan.bn)
            return Split(self.backbone, nn.Identity(), 0) if is_still else None
        counts: Sequence[int] = range(self.num_inert_stages, 0, -1)
        if num_stages is not None:
            counts = [check_integer("num_stages", num_stages, minimum=1)]
            if counts[0] > len(self.stages):
                raise ConfigError(
                    f"`num_stages` should be at most {len(self.stages)}, the number of stages of "
                    f"the backbone, found {num_stages}."
                )
        return split_backbone(self.backbone, self.stages, counts, self._noise(2))

    def _noise(self, count: int) -> Tensor:
        size, own = self.preprocess.crop_size, next(self.parameters())
        shape = (count, self.preprocess.num_channels, size, size)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(own)

    def extract_features(
        self,
        data: ImageDataset | str | os.PathLike[str],
        *,
        engine: EngineName = "pytorch",
        precision: Precision = "float32",
        batch_size: int | Literal["auto"] = "auto",
        num_workers: int | Literal["auto"] = "auto",
        on_error: OnError = "raise",
        max_skipped: float = DEFAULT_MAX_SKIPPED,
        verbose: bool = True,
    ) -> Features:
        """Compute the features of pictures, preprocessed as for evaluation.

        Args:
            data: The pictures, or a folder of them; its subfolders are the classes, if any.
            engine: What computes them: "pytorch", or "openvino" or "onnxruntime" where the
                extra `openvino` or `onnx` is installed.
            precision: "float32", or "bfloat16" where the processor has it.
            batch_size: Pictures in a batch; "auto" takes what is fast on this machine.
            num_workers: Threads or processes that read pictures; "auto" chooses.
            on_error: "raise" ends at a picture that cannot be read, "skip" leaves it out.
            max_skipped: The share of pictures, in [0, 1], beyond which skipping is an error.
            verbose: Show a progress bar.

        Returns:
            The features, with the paths and labels of their pictures.

        Raises:
            TransferkitError: As `transferkit.models.features.extract_features` says.

        Example:
            >>> import tempfile
            >>> from transferkit.models import build_model
            >>> from transferkit.testing import make_image_folder
            >>> model = build_model("mnasnet0_5", 2, weights=None)
            >>> folder = make_image_folder(tempfile.mkdtemp(), num_train=1) / "train"
            >>> model.extract_features(folder, verbose=False).values.shape
            torch.Size([2, 1280])
        """
        from transferkit.models.features import extract_features

        return extract_features(
            self,
            data,
            engine=engine,
            precision=precision,
            batch_size=batch_size,
            num_workers=num_workers,
            on_error=on_error,
            max_skipped=max_skipped,
            verbose=verbose,
        )

    def summary(self, *, verbose: bool = True) -> ModelSummary:
        """Describe the stages: modules, shapes, parameters, what is frozen, BatchNorm.

        Args:
            verbose: Print the table, too.

        Returns:
            The rows; `str(summary)` is the table.
        """
        from transferkit.models.summary import summarize

        summary = summarize(self)
        if verbose:
            print(summary)
        return summary

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters that are not frozen.

        Raises:
            FreezeError: All are frozen.
        """
        parameters = [each for each in self.parameters() if each.requires_grad]
        if not parameters:
            raise FreezeError(
                "All parameters are frozen: nothing is left to train. "
                'Freeze less, such as freeze="backbone".'
            )
        return iter(parameters)

    @property
    def is_backbone_frozen(self) -> bool:
        """Whether no parameter of the backbone trains (linear probing)."""
        return not any(each.requires_grad for each in self.backbone.parameters())

    @property
    def num_parameters(self) -> int:
        """The number of all parameters."""
        return sum(each.numel() for each in self.parameters())

    @property
    def num_trainable_parameters(self) -> int:
        """The number of parameters that are not frozen."""
        return sum(each.numel() for each in self.parameters() if each.requires_grad)

    def extra_repr(self) -> str:
        """Name the backbone and the counts in the model's `repr`."""
        return (
            f"{self.backbone_name}, num_classes={self.num_classes}, "
            f"{self.num_trainable_parameters:,} of {self.num_parameters:,} parameters train"
        )
