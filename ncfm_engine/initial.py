"""Where the synthetic images begin."""

import torch
from torch import Tensor

from distilled_data import UsageError
from distilled_data.randomness import generator_at

from .config import DistillConfig
from .sampling import ClassSampler
from .sources import Source


def initial_images(config: DistillConfig, source: Source, *, ipc: int, seed: int) -> Tensor:
    """Packed images [ipc, C, channels, H, W] in [0, 1]: real images shrunk into the tiles, or noise."""
    check_packing(config, source, ipc)
    height, width, factor = source.height, source.width, config.factor
    generator = generator_at(seed, "initial images")
    shape = (ipc, source.num_classes, source.channels, height, width)
    if config.initialisation == "noise":
        return torch.rand(shape, generator=generator)
    # A class with fewer than ipc * factor**2 images gives some of them twice.
    index = ClassSampler(source.train).draw(ipc * factor**2, generator)
    tiles = source.train.images[index.T.flatten()].float() / 255
    tiles = torch.nn.functional.interpolate(
        tiles, size=(height // factor, width // factor), mode="bilinear", antialias=True
    )
    grid = tiles.view(ipc, factor, factor, *shape[1:3], height // factor, width // factor)
    return grid.permute(0, 3, 4, 1, 5, 2, 6).reshape(shape).clamp(0, 1)


def check_packing(config: DistillConfig, source: Source, ipc: int) -> None:
    """Raise `UsageError` for a factor or an IPC that the real images do not allow."""
    height, width, factor = source.height, source.width, config.factor
    if height % factor or width % factor:
        raise UsageError(
            f"factor {factor} does not divide the image size {height}x{width}; each packed image holds "
            f"{factor}x{factor} tiles. Choose another factor (--set distill.factor=1) or size."
        )
    smallest = int(source.train.counts.min())
    if ipc > smallest:
        raise UsageError(
            f"ipc={ipc} is more than the {smallest} training images of the smallest class of {source.name!r}"
        )
