"""Images and labels in memory, in any of the forms that people keep them in, as an artifact."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError
from .format import Artifact, Metadata
from .indexing import as_int, ordered
from .labels import as_temperature, soften

Array = Tensor | np.ndarray

VALUES = ("bytes", "unit", "normalised")  # 0..255, 0..1, (x - mean) / std of the latter
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # with which torch can do little more than convert them


def artifact_of(
    images: Array,
    classes: Sequence[str] | None = None,
    *,
    targets: Array | Sequence[int] | None = None,
    logits: Array | None = None,
    factor: int = 1,
    mean: Array | Sequence[float] | None = None,
    std: Array | Sequence[float] | None = None,
    temperature: float = 1.0,
    values: str | None = None,
    dataset: str = "tensors",
    source: dict[str, Any] | None = None,
) -> Artifact:
    """The artifact of `DistilledDataset.from_tensors`, which says what this takes and raises."""
    classes = None if classes is None else tuple(ordered("names", classes))
    images, temperature = own("images", images), as_temperature(temperature)
    factor = as_int("factor", factor, None)
    logits = None if logits is None else own("logits", logits)
    if logits is not None and _probable(logits):
        warnings.warn(
            "the rows of logits are positive and add up to 1, as those of probabilities do; if they are "
            "probabilities, give logits=probabilities.clamp(min=1e-7).log() * temperature",
            stacklevel=3,
        )
    if logits is not None and factor == 1 and logits.ndim == (3 if targets is None else 2):
        logits = logits.unsqueeze(-2)
    mean, std = _numbers("mean", mean), _numbers("std", std)
    if targets is None:
        if images.ndim != 5 or images.numel() == 0:
            raise UsageError(
                "images without targets must be [ipc, classes, channels, height, width], got "
                f"{list(images.shape)}"
            )
    else:
        targets = own("targets", targets)
        count = None if classes is None else len(classes)
        images, logits = arrange(images, targets, logits, count, factor, temperature)
    if any(value > 3 for value in [*(mean or ()), *(std or ())]):  # no scale for pixels in [0, 1]
        raise UsageError(
            f"mean and std are of pixels in [0, 1], got {mean} and {std}. Those of bytes have to be divided "
            "by 255."
        )
    images = to_bytes(images, mean, std, values)
    if mean is None or std is None:
        found = statistics(images)
        mean, std = found[0] if mean is None else mean, found[1] if std is None else std
    metadata = Metadata(
        dataset=dataset,
        classes=tuple(map(str, range(images.shape[1]))) if classes is None else classes,
        channels=images.shape[2],
        height=images.shape[3],
        width=images.shape[4],
        mean=tuple(mean),
        std=tuple(std),
        ipc=images.shape[0],
        factor=factor,
        labels={"temperature": temperature},
        source={} if source is None else copy.deepcopy(source),
    )
    artifact = Artifact(images, metadata, None if logits is None else logits.half())
    if logits is not None and artifact.logits is not None and logits.dtype != torch.float16:
        _warn_of_rounding(logits, artifact.logits, temperature)
    return artifact


def arrange(
    images: Tensor,
    targets: Tensor,
    logits: Tensor | None,
    count: int | None,
    factor: int,
    temperature: float,
) -> tuple[Tensor, Tensor | None]:
    """Images [N, ...] as [ipc, classes, ...], the rank being the order within a class, and logits likewise.

    Without logits the one soft target of a packed image becomes those of each of its `factor` ** 2 views.
    """
    targets = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets  # as Keras has them
    shapes = images.ndim == 4 and targets.ndim in (1, 2) and len(images) == len(targets)
    if not shapes or images.numel() == 0 or targets.numel() == 0:
        raise UsageError(
            "expected images [N, channels, height, width] with targets [N] or [N, classes], got "
            f"{list(images.shape)} and {list(targets.shape)}"
        )
    if logits is not None and logits.shape[:1] != images.shape[:1]:
        raise UsageError(f"expected logits for each of {len(images)} images, got {list(logits.shape)}")
    if not torch.isfinite(targets).all():
        raise UsageError("targets hold values that are not finite")
    if targets.ndim == 1 and targets.is_floating_point() and not torch.equal(targets, targets.round()):
        raise UsageError("targets [N] must be class numbers, got fractions")
    numbers = targets.float().argmax(1) if targets.ndim == 2 else targets.long()
    count = count or (targets.shape[1] if targets.ndim == 2 else int(numbers.max()) + 1)
    if targets.ndim == 2 and targets.shape[1] != count:
        raise UsageError(f"targets have {targets.shape[1]} classes, the names given are {count}")
    if numbers.min() < 0 or numbers.max() >= count:
        raise UsageError(
            f"class numbers must be 0 to {count - 1}, of {count} classes, got {int(numbers.min())} to "
            f"{int(numbers.max())}"
        )
    if count > len(images):
        raise UsageError(f"{len(images)} images cannot show {count} classes; give each class as many")
    sizes = numbers.bincount(minlength=count)
    order = _usual_order(targets, numbers) if targets.ndim == 2 and len(images) % count == 0 else None
    if order is None and sizes.min() != sizes.max():
        raise UsageError(
            f"every class must have equally many images, got {int(sizes.min())} to {int(sizes.max())}; "
            "leave some out, or convert the classes of each size on their own"
        )
    if order is None:
        order = numbers.argsort(stable=True)
    order = order.view(count, -1).T  # [ipc, classes]
    if logits is not None:
        return images[order], logits[order]
    if targets.ndim == 1:
        return images[order], None
    return images[order], as_logits(targets, temperature)[order, None].expand(-1, -1, factor**2, -1)


def _usual_order(targets: Tensor, favoured: Tensor) -> Tensor | None:
    """Rows [N] that sort the images by class, if the order of the file tells it; None: go by the labels.

    The largest entry of a learned label may be another class than the one the image was made for. So the
    order of the file decides, where it is one of the two usual ones and either most of the labels agree with
    it or they name some classes more often than others. One-hot labels, smoothed or not, were not learned:
    they are taken at their word.
    """
    count = targets.shape[1]
    rows = torch.arange(len(favoured), device="cpu").view(-1, count)
    classes = torch.arange(count, device="cpu").repeat_interleave(len(rows))
    orders = {"sorted by class": rows.flatten(), "one of each class in turn": rows.T.flatten()}
    fits = {name: int((favoured[order] == classes).sum()) for name, order in orders.items()}
    best = max(fits, key=lambda name: fits[name])
    unequal = len(favoured.bincount(minlength=count).unique()) > 1
    learned = targets.min() < 0 or len(targets.unique()) > 2
    if fits[best] == len(classes) or not learned or not (unequal or fits[best] > 0.8 * len(classes)):
        return None
    warnings.warn(
        f"the largest labels do not say which class every image is of; took the images for {best}, "
        f"{len(rows)} each",
        stacklevel=5,
    )
    return orders[best]


def as_logits(targets: Tensor, temperature: float) -> Tensor:
    """Logits [N, classes] that give these probabilities at `temperature`; others are taken for logits."""
    targets = targets.float()
    sums = targets.sum(1, keepdim=True)
    if _probable(targets):
        return (targets / sums).clamp(min=1e-7).log() * temperature
    if targets.min() >= 0:
        warnings.warn(
            f"targets are positive and their rows add up to {sums.min():.2f} to {sums.max():.2f}: taken for "
            "logits",
            stacklevel=5,
        )
    return targets


def _probable(rows: Tensor) -> bool:
    """Whether the rows [..., classes] may be probabilities; half precision adds up to about 1."""
    return bool(rows.numel() and rows.min() >= 0 and (rows.float().sum(-1) - 1).abs().max() < 0.05)


def _warn_of_rounding(logits: Tensor, stored: Tensor, temperature: float) -> None:
    """Logits are stored in half precision, in which large ones differ by whole numbers."""
    pairs = zip(logits, stored, strict=True)  # rank by rank, or it would take several times their memory
    moved = max(float((soften(a, temperature) - soften(b, temperature)).abs().max()) for a, b in pairs)
    if moved > 0.02:
        warnings.warn(
            f"soft labels change by up to {moved:.2f}: logits as large as {logits.abs().max():.0f} "
            "are stored in half precision; give logits - logits.amax(-1, keepdim=True), of equal soft labels",
            stacklevel=4,
        )


def own(name: str, values: Any) -> Tensor:
    """A copy on the CPU: what becomes of the values later does not change the set. Raises `UsageError`."""
    tensor = values
    if not isinstance(values, Tensor):
        try:
            array = np.asarray(values)
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{name} must be a tensor or an array of numbers, got {values!r:.80}") from error
    check_numbers(name, tensor)
    dtype = torch.int64 if tensor.dtype in UNSIGNED else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=tensor is values)


def check_numbers(name: str, tensor: Tensor) -> None:
    """Raises `UsageError` for anything but real numbers that are all there."""
    dense = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested
    if not dense or tensor.dtype not in (torch.bool, torch.uint8, *SIGNED, *FLOATS, *UNSIGNED):
        kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else f"{tensor.layout}"
        raise UsageError(
            f"{name} must be a dense tensor of whole numbers or of floats of 16 bits or more, got one of "
            f"{tensor.dtype}, {kind}"
        )


def per_channel(values: Sequence[float]) -> Tensor:
    """float32 [channels, 1, 1] on the CPU."""
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1)


def _numbers(name: str, values: Array | Sequence[float] | None) -> list[float] | None:
    try:
        return None if values is None else [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} must be numbers, one per channel, got {values!r}") from error


def statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of bytes [ipc, classes, channels, height, width], over 255."""
    values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    counts = torch.stack([part.flatten().bincount(minlength=256) for part in images.unbind(2)]).double()
    total = counts.sum(1)
    mean = counts @ values / total
    variance = (counts * (values - mean[:, None]).square()).sum(1) / (total - 1)
    return mean.tolist(), variance.sqrt().tolist()


def to_bytes(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, values: str | None
) -> Tensor:
    """Pixels uint8 of images [..., channels, height, width]; what lies outside of [0, 1] is cut off."""
    if values is not None and values not in VALUES:
        raise UsageError(f"values must be one of {', '.join(VALUES)}, got {values!r}")
    if images.dtype == torch.uint8 and values in (None, "bytes"):
        return images
    pixels = images.float()
    if not torch.isfinite(pixels).all():
        raise UsageError("images hold values that are not finite")
    if values is None:
        values = _guess(pixels)
    elif pixels.min() >= 0 and pixels.max() <= 1 and values != "unit":
        warnings.warn(
            f"the images are said to be {values!r}, and all their values lie from {pixels.min():.2f} to "
            f"{pixels.max():.2f}, as those of 'unit' do",
            stacklevel=4,
        )
    if values == "bytes":
        pixels = pixels / 255
    elif values == "normalised":
        if mean is None or std is None:
            raise UsageError(
                f"images with values from {pixels.min():.2f} to {pixels.max():.2f} are normalised; give the "
                "mean and std that they were normalised with, for instance 0.4914 0.4822 0.4465 and 0.2023 "
                "0.1994 0.2010, which many projects use for CIFAR-10"
            )
        if not len(mean) == len(std) == images.shape[-3]:
            raise UsageError(f"mean and std must have {images.shape[-3]} numbers, one per channel")
        pixels = pixels * per_channel(std) + per_channel(mean)
    outside = ((pixels < -0.5 / 255) | (pixels > 255.5 / 255)).float().mean()
    if outside > 0:
        warnings.warn(
            f"{100 * outside:.2g} % of the values lie outside of [0, 1], from {pixels.min():.2f} to "
            f"{pixels.max():.2f}, and are cut off; training on the set will differ from training on the "
            "original. If it is many, check mean and std, and whether the images were whitened (ZCA), which "
            "would have to be undone first",
            stacklevel=4,
        )
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _guess(pixels: Tensor) -> str:
    """What float values are, told by their range, with a warning."""
    low, high = float(pixels.min()), float(pixels.max())
    if low >= -0.5 and high <= 1.5:
        guess = "unit"
    elif low >= 0 and high > 16:
        guess = "bytes"
    else:
        guess = "normalised"
    warnings.warn(
        f"values from {low:.2f} to {high:.2f}: taken for {guess!r}; to be sure, say which of "
        f"{', '.join(VALUES)} they are",
        stacklevel=5,
    )
    return guess
