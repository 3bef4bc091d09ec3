"""Where the synthetic images begin."""

import warnings

import torch
from torch import Tensor

from distilled_data import UsageError
from distilled_data.randomness import generator_at, seed_at
from distilled_data.tensors import per_channel

from .batches import images_per_pass
from .config import DistillConfig
from .features import FrozenNetwork
from .pool import FeaturePool
from .sampling import ClassSampler
from .selection import clusters, herding
from .sources import Source


def initial_images(
    config: DistillConfig, source: Source, pool: FeaturePool, *, ipc: int, seed: int
) -> Tensor:
    """Packed images [ipc, C, channels, H, W] in [0, 1] on the CPU: real ones shrunk into the tiles, or noise.

    Typical ones are chosen by the features of one trained network of `pool`, which `seed` picks, and fill the
    ranks in the order of the choice. They are computed where the pool lies.
    """
    check_packing(config, source, ipc)
    height, width, factor = source.height, source.width, config.factor
    generator = generator_at(seed, "initial images")
    shape = (ipc, source.num_classes, source.channels, height, width)
    if config.initialisation == "noise":
        return torch.rand(shape, generator=generator)
    # A class with fewer than ipc * factor**2 images gives some of them twice.
    if config.initialisation == "real":
        index = ClassSampler(source.train).draw(ipc * factor**2, generator)
    else:
        index = _typical(config, source, pool, ipc * factor**2, seed)
    tiles = source.train.images[index.T.flatten()].float() / 255
    tiles = torch.nn.functional.interpolate(
        tiles, size=(height // factor, width // factor), mode="bilinear", antialias=True
    )
    grid = tiles.view(ipc, factor, factor, *shape[1:3], height // factor, width // factor)
    return grid.permute(0, 3, 4, 1, 5, 2, 6).reshape(shape).clamp(0, 1)


def _typical(config: DistillConfig, source: Source, pool: FeaturePool, count: int, seed: int) -> Tensor:
    """Rows of the training images, int64 [C, count]."""
    device = str(pool.trajectory.device)
    network = FrozenNetwork(pool, device, precision=config.precision)
    network.load(seed_at(seed, "choosing network") % len(pool), 1.0)
    mean, std = per_channel(source.mean).to(device), per_channel(source.std).to(device)
    counts, rows, first = source.train.counts.tolist(), [], 0
    for label, size in enumerate(counts):
        with torch.no_grad():
            parts = torch.arange(first, first + size).split(images_per_pass(source, 256))
            batches = (source.train.images.index_select(0, part).to(device) for part in parts)
            features = torch.cat([network.features((b.float() / 255 - mean) / std).cpu() for b in batches])
        if config.initialisation == "herding":
            chosen = herding(features, count)
        else:
            chosen = clusters(features, count, seed_at(seed, "clusters", label))
        rows.append(chosen + first)
        first += size
    return torch.stack(rows)


def check_packing(config: DistillConfig, source: Source, ipc: int) -> None:
    """Raise `UsageError` for a factor or an IPC that the real images do not allow; warn of equal tiles."""
    height, width, factor = source.height, source.width, config.factor
    if height % factor or width % factor:
        raise UsageError(
            f"factor {factor} does not divide the image size {height}x{width}; each packed image holds "
            f"{factor}x{factor} tiles. Choose another factor (--set distill.factor=1) or size."
        )
    smallest, label = source.train.counts.min(0)
    if ipc > smallest:
        raise UsageError(
            f"ipc={ipc} is more than the {smallest} training images of the smallest class of "
            f"{source.name!r}, {source.classes[label]!r}. Choose --ipc {smallest} or less, add images to "
            "that class, or leave it out."
        )
    tiles = ipc * factor**2
    if tiles > smallest and config.initialisation != "noise":
        few = int((source.train.counts < tiles).sum())
        warnings.warn(
            f"{few} of the {source.num_classes} classes have fewer training images than the {tiles} tiles of "
            f"each, {source.classes[label]!r} has {smallest}: some of their tiles begin as the same "
            "image and may stay alike. A smaller --ipc or distill.factor makes a smaller set without them.",
            stacklevel=1,  # once for a run, whoever asks
        )
