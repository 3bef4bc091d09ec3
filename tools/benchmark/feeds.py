"""Ways to feed a network the same images: shuffled, cropped, mirrored, normalised, in batches."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distilled_data import DistilledDataset
from distilled_data.format import ARTIFACT_FILE, write_artifact
from distilled_data.manifest import write_manifest

AUGMENT = "crop_flip"
PAD = 4  # pixels, an eighth of 32 as in the strategy


def feeds(data: DistilledDataset, batch: int, folder: Path, workers: int) -> dict[str, Iterable[Any]]:
    """The contenders that need no device, by name; the first is what the others are compared with."""
    several = {"num_workers": workers, "persistent_workers": True} if workers else {}
    name = f"{workers} workers"
    samples = Samples(data)
    return {
        "DataLoader, torchvision v2 per sample": DataLoader(samples, batch, shuffle=True),
        f"the same, {name}": DataLoader(samples, batch, shuffle=True, **several),
        "loader": data.loader(batch, augment=AUGMENT),
        "dataloader": data.dataloader(batch, augment=AUGMENT),
        f"dataloader, {name}": data.dataloader(batch, augment=AUGMENT, **several),
        "airbench-style": WholeEpoch(data, batch),
        "datasets, v2 per sample": hugging_face(data, batch),
        f"webdataset, v2 per sample, {name}": web_dataset(data, batch, folder, several),
    }


class Samples(Dataset):
    """What most people write: a transform of torchvision per sample."""

    def __init__(self, data: DistilledDataset):
        self.images, self.targets = data.images, data.targets.tolist()
        self.transform = per_sample(data)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def per_sample(data: DistilledDataset) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop((data.info.height, data.info.width), padding=PAD),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(data.mean), list(data.std)),
        ]
    )


class WholeEpoch:
    """The idea of cifar10-airbench, written anew: normalise and mirror once, crop all per epoch, then slice.

    Every other epoch the images are mirrored, all of them. The crops are made shift by shift, first the rows.
    """

    def __init__(self, data: DistilledDataset, batch: int, device: str = "cpu"):
        images = data.images.to(device).float().div(255)
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (data.mean, data.std))
        images = (images - mean) / std
        mirrored = (torch.rand(len(images), device=device) < 0.5).view(-1, 1, 1, 1)
        self.padded = F.pad(torch.where(mirrored, images.flip(3), images), (PAD,) * 4, "reflect")
        self.targets, self.batch, self.epoch = data.targets.to(device), batch, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self._cropped()
        images = images.flip(3) if self.epoch % 2 else images
        self.epoch += 1
        order = torch.randperm(len(images), device=images.device)
        for chosen in order.split(self.batch):
            yield images[chosen], self.targets[chosen]

    def _cropped(self) -> Tensor:
        count, channels, height, width = self.padded.shape
        height, width = height - 2 * PAD, width - 2 * PAD
        shifts = torch.randint(2 * PAD + 1, (count, 2), device=self.padded.device)
        rows = self.padded.new_empty(count, channels, height, width + 2 * PAD)
        cropped = self.padded.new_empty(count, channels, height, width)
        for shift in range(2 * PAD + 1):
            here = shifts[:, 0] == shift
            rows[here] = self.padded[here, :, shift : shift + height]
        for shift in range(2 * PAD + 1):
            here = shifts[:, 1] == shift
            cropped[here] = rows[here, :, :, shift : shift + width]
        return cropped


def hugging_face(data: DistilledDataset, batch: int) -> Iterable[Any]:
    """PNG in Arrow, decoded and transformed when asked for."""
    transform = per_sample(data)

    def prepare(rows: dict[str, list]) -> dict[str, list]:
        return {"image": [transform(image) for image in rows["image"]], "label": rows["label"]}

    images = data.to_hf().with_transform(prepare)
    return DataLoader(images, batch, shuffle=True)  # type: ignore[arg-type] - not by name, but it is one


def web_dataset(data: DistilledDataset, batch: int, folder: Path, several: dict[str, Any]) -> Iterable[Any]:
    """PNG in two tar files, one per worker, through a buffer that shuffles."""
    import webdataset.compat  # the module itself says nothing of what it exports

    half = len(data.classes) // 2
    for number, part in enumerate((range(half), range(half, len(data.classes)))):
        data.select(classes=list(part)).to_webdataset(folder / f"{number}.tar")
    shards: Any = webdataset.compat.WebDataset(
        [str(folder / f"{number}.tar") for number in range(2)], shardshuffle=2, empty_check=False
    )
    samples = shards.shuffle(1000).decode("pil").to_tuple("png", "cls").map_tuple(per_sample(data), int)
    return DataLoader(samples.batched(batch), batch_size=None, **several)


def random_set(images: int, size: int, classes: int = 10, factor: int = 1) -> DistilledDataset:
    """A set with random pixels."""
    generator, shape = torch.Generator().manual_seed(0), (images // classes, classes, 3, size, size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    names = [f"class {number}" for number in range(classes)]
    return DistilledDataset.from_tensors(pixels, names, factor=factor, labels="hard")


def write_random_set(folder: Path, *arguments: int) -> None:
    """`random_set` as an artifact and its manifest."""
    write_artifact(folder / ARTIFACT_FILE, random_set(*arguments).artifact)
    write_manifest(folder)
