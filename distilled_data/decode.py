"""Multi-formation decode: one packed image of factor f becomes f x f full-size views."""

import functools

import torch
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


def take(images: Tensor, rows: Tensor, factor: int) -> Tensor:
    """Tiles [B, channels, H/factor, W/factor] number `rows` [B] of packed images [N, channels, H, W].

    They are numbered as `tiles` has them, image by image. Nothing but these tiles is copied.
    """
    if factor == 1:
        return images.index_select(0, rows)  # on the CPU several times as fast as images[rows]
    channels, height, width = images.shape[1], images.shape[2] // factor, images.shape[3] // factor
    # the memory of an image in stripes as wide as a tile: [channels, factor, height, factor]
    image, view = rows // factor**2, rows % factor**2
    first = image * (channels * factor * height * factor) + view // factor * (height * factor) + view % factor
    channel, line = (torch.arange(count, device=rows.device) for count in (channels, height))
    stripes = (channel[:, None] * factor * height + line) * factor
    chosen = images.reshape(-1, width).index_select(0, (first[:, None, None] + stripes).flatten())
    return chosen.view(len(rows), channels, height, width)


def enlarge(tile: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling, align_corners False, of float tiles [N, channels, h, w] to `size` (H, W)."""
    if tuple(tile.shape[-2:]) == tuple(size):
        return tile
    if tile.device.type == "cpu" and not (torch.is_grad_enabled() and tile.requires_grad):
        # four times as fast as interpolate; with bytes at factors 2 and 4 sums are exact, so equal bit by bit
        rows, columns = (_weights(*sides).to(tile.dtype) for sides in zip(tile.shape[-2:], size, strict=True))
        with torch.autocast("cpu", enabled=False):
            return F.linear(rows @ tile, columns)
    return F.interpolate(tile, size=size, mode="bilinear", align_corners=False)


@functools.cache
def _weights(side: int, longer: int) -> Tensor:
    """What each of `longer` pixels takes of each of `side`, float32 [longer, side]."""
    unit = torch.eye(side, dtype=torch.float32, device="cpu")  # kept, so whatever the defaults are just now
    return F.interpolate(unit[None], longer, mode="linear", align_corners=False)[0].T.contiguous()


def decode(images: Tensor, factor: int) -> Tensor:
    """Views [N, factor**2, channels, H, W] of packed float images [N, channels, H, W]. Differentiable.

    Source: multi-formation of IDC (Kim et al. 2022, arXiv 2205.14959), as used by NCFM.
    """
    size = (images.shape[-2], images.shape[-1])
    parts = tiles(images, factor)
    return enlarge(parts.flatten(0, 1), size).unflatten(0, parts.shape[:2])
