"""`Classifier`: a backbone, a head, and the one state of what is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from transferkit.errors import BackboneError, FreezeError
from transferkit.images import Preprocess
from transferkit.models.freezing import BatchNormMode, FreezePlan, find_pinned, pin


class Classifier(nn.Module):
    """Classify images with a backbone and a linear head.

    Parameter names are always `backbone.*` and `head.*`. `build_model` is the usual way
    to one.

    Args:
        backbone: Maps images `(N, C, H, W)` to features `(N, D)`.
        num_features: The D of the features.
        num_classes: The number of classes, at least 2.
        backbone_name: The name that the artifact will carry.
        preprocess: How pictures become images for this backbone.

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
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: nn.Linear = nn.Linear(num_features, num_classes)
        self.num_features = num_features
        self.num_classes = num_classes
        self.backbone_name = backbone_name
        self.preprocess = preprocess
        self.freeze_plan: FreezePlan = FreezePlan()
        self._pinned: tuple[str, ...] = ()

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
        features = self.backbone(images)
        expected = (len(images), self.num_features)
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

    def freeze(
        self, freeze: str | Sequence[str] | FreezePlan, *, bn: BatchNormMode = "frozen"
    ) -> Self:
        """Freeze what the plan names and unfreeze everything else, in place.

        Args:
            freeze: "none", "backbone", globs over parameter names, or a plan.
            bn: "frozen", "adapt" or "fixed", see `FreezePlan`.

        Returns:
            The model itself.

        Raises:
            FreezeError: A pattern matches nothing, or the plan cannot be understood. The
                model is left as it was.
        """
        plan = FreezePlan.parse(freeze, bn=bn)
        frozen = plan.frozen_names(self)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen)
            if name in frozen:
                parameter.grad = None
        self.freeze_plan = plan
        self._pinned = tuple(find_pinned(self, frozen))
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen modules, which stay in eval."""
        super().train(mode)
        if mode:
            self._pin()
        return self

    def _pin(self) -> None:
        # Also before each forward pass: `model.backbone.train()` goes round our `train`.
        bn = self.freeze_plan.bn if self.training else "frozen"
        for name in self._pinned:
            module = self.get_submodule(name)
            if any(
                layer.training != (bn == "adapt" and isinstance(layer, _BatchNorm))
                for layer in module.modules()
            ):
                pin(module, bn)
        if bn == "fixed":
            for layer in self.backbone.modules():
                if isinstance(layer, _BatchNorm) and layer.training:
                    layer.eval()

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
