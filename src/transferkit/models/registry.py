"""The registry of backbones, and the names that a provider resolves on demand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeAlias, overload

from transferkit._registry import Registry
from transferkit.models.efficientnet_lite0 import NAME as LITE0_NAME
from transferkit.models.efficientnet_lite0 import efficientnet_lite0_spec
from transferkit.models.spec import BackboneSpec
from transferkit.models.timm_backbones import TIMM_PREFIX, list_timm_backbones, timm_spec
from transferkit.models.torchvision_backbones import torchvision_names, torchvision_spec


class BackboneFactory(Protocol):
    """A callable without arguments that returns the spec of a backbone."""

    def __call__(self) -> BackboneSpec:
        """Return the spec."""
        ...


_Decorator: TypeAlias = "Callable[[BackboneFactory], BackboneFactory]"

_BACKBONES: Registry[BackboneFactory] = Registry("backbone", lister="list_backbones()")
_BACKBONES.add(LITE0_NAME, efficientnet_lite0_spec)
for _name in torchvision_names():
    _BACKBONES.add(_name, partial(torchvision_spec, _name))


@overload
def register_backbone(name: str, *, replace: bool = ...) -> _Decorator: ...
@overload
def register_backbone(
    name: str, factory: BackboneFactory, *, replace: bool = ...
) -> BackboneFactory: ...
def register_backbone(
    name: str, factory: BackboneFactory | None = None, *, replace: bool = False
) -> BackboneFactory | _Decorator:
    """Register a backbone of your own under a name.

    Use it as a decorator or call it with the factory. An artifact whose backbone is not
    built in loads wherever the same name is registered.

    Args:
        name: The name for `build_model` and the artifact.
        factory: Returns the spec. Left out, a decorator is returned.
        replace: Take the place of a backbone with the same name.

    Returns:
        The factory, or the decorator.

    Raises:
        ConfigError: The name is taken and `replace` is False.

    Example:
        >>> from torch import nn
        >>> from transferkit.images import Preprocess
        >>> @register_backbone("flat", replace=True)
        ... def flat() -> BackboneSpec:
        ...     return BackboneSpec(
        ...         name="flat", build=nn.Flatten, num_features=3 * 8 * 8,
        ...         preprocess=Preprocess(crop_size=8, resize_size=8),
        ...     )
        >>> get_backbone("flat").name
        'flat'
    """
    if factory is None:
        return _BACKBONES.decorator(name, replace=replace)
    return _BACKBONES.add(name, factory, replace=replace)


def get_backbone(name: str) -> BackboneSpec:
    """Return the spec of the backbone called `name`.

    Args:
        name: A registered name, or `timm:<name>` for any model of timm.

    Returns:
        The spec.

    Raises:
        UnknownNameError: There is no such backbone; the nearest name is suggested.
        MissingDependencyError: It needs a package that is not installed.

    Example:
        >>> get_backbone("resnet18").head_path
        'fc'
    """
    if name.startswith(TIMM_PREFIX):
        return timm_spec(name)
    return _BACKBONES.get(name)()


def list_backbones(*, timm: bool = False) -> list[str]:
    """Return the names of the backbones, sorted.

    Args:
        timm: Name the models of timm too, as `timm:<name>`; they are over a thousand.

    Returns:
        The names that `build_model` takes.

    Raises:
        MissingDependencyError: `timm=True` and timm is not installed.

    Example:
        >>> "resnet18" in list_backbones()
        True
    """
    return sorted(_BACKBONES.names() + (list_timm_backbones() if timm else []))
