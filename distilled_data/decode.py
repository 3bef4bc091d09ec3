"""Multi-formation decode: one packed image of factor f becomes f x f full-size views."""

import torch.nn.functional as F
from torch import Tensor


def tiles(images: Tensor, factor: int) -> Tensor:
    """Cut packed images [N, channels, H, W] into tiles [N, factor**2, channels, H/factor, W/factor].

    Row-major: the first view is the top left tile, the second the one to its right. H and W must be
    multiples of `factor`, which `Metadata` checks.
    """
    count, channels, height, width = images.shape
    grid = images.reshape(count, channels, factor, height // factor, factor, width // factor)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(
        count, factor**2, channels, height // factor, width // factor
    )


def enlarge(tile: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling, align_corners False, of float tiles [N, channels, h, w] to `size` (H, W)."""
    if tuple(tile.shape[-2:]) == tuple(size):
        return tile
    return F.interpolate(tile, size=size, mode="bilinear", align_corners=False)


def decode(images: Tensor, factor: int) -> Tensor:
    """Views [N, factor**2, channels, H, W] of packed float images [N, channels, H, W]. Differentiable.

    Source: multi-formation of IDC (Kim et al. 2022, arXiv 2205.14959), as used by NCFM.
    """
    size = (images.shape[-2], images.shape[-1])
    parts = tiles(images, factor)
    return enlarge(parts.flatten(0, 1), size).unflatten(0, parts.shape[:2])
