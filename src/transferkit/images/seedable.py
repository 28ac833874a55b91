"""What makes a random transform fit to run in threads: a generator of its own."""

from __future__ import annotations


def is_seedable(transform: object) -> bool:
    """Tell whether a transform draws from the generator that it is given, or not at all.

    Such a transform is called as `transform(image, generator=generator)` and may run in
    several threads at a time. It says so by an attribute `seedable = True`. All others may
    draw from the global generators of Python, NumPy and PyTorch, which threads share, so
    that they run one at a time.

    Args:
        transform: Any callable from an image to an image.

    Example:
        >>> class Noise:
        ...     seedable = True
        ...     def __call__(self, image, generator=None):
        ...         return image + torch.randn(image.shape, generator=generator)
        >>> import torch
        >>> is_seedable(Noise()), is_seedable(torch.nn.Identity())
        (True, False)
    """
    return getattr(transform, "seedable", False) is True
