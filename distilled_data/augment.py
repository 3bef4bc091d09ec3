"""Augmentation of whole batches on their own device, differentiable in the images.

Differentiable Siamese Augmentation (Zhao and Bilen 2021, arXiv 2102.08259): every operation is a function of
the images and of a few uniform numbers. "Siamese" is to give the real and the synthetic images of a matching
step the same numbers. Images are normalised, so that zero, which fills what comes in from outside, is the
mean of the data set.

A strategy is text: operations joined by "_", applied in that order. An operation may be alternatives joined
by "|", of which one is drawn per call: "flip_color_crop|scale|rotate" flips, changes the colour, and then
does one of three things.

Mixing joins pairs of images and their targets, as CutMix and MixUp of `torchvision.transforms.v2` do, but
drawn from a generator and without torchvision, so that a batch does not depend on what is installed. Its
strategy is alternatives joined by "|", of which one is drawn per batch: "cutmix|none" mixes one batch in two.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnknownNameError
from .transfer import upload

__all__ = ["DSA", "MIXES", "OPERATIONS", "augment", "cutmix", "mix", "mixup"]

DSA = "flip_color_crop|scale|rotate"  # the augmentation of evaluation; the strategy "dsa" means this one
DSA_OF_DIGITS = "color_crop|scale|rotate"  # a mirrored digit is another sign, or none
OF_DIGITS = ("digits", "mnist", "svhn")  # datasets

BRIGHTNESS = 1.0  # width of the range of the shift, in standard deviations of the data set
SATURATION = 2.0  # largest gain; the smallest is 0
CONTRAST = 0.5  # smallest gain; the largest is 1 more
CROP = 0.125  # largest shift, as a share of the side
CUTOUT = 0.5  # side of the hole, as a share of the side
SCALE = 1.2  # largest factor; the smallest is its inverse
ROTATE = 15.0  # largest angle either way, in degrees

# Whatever torch's defaults are: of another dtype they would be other numbers.
_uniform = partial(torch.rand, dtype=torch.float32, device="cpu")


def augment(images: Tensor, strategy: str, generator: torch.Generator, *, shared: bool = False) -> Tensor:
    """Applies a strategy to normalised floating `images` [N, channels, height, width].

    The random numbers come from `generator`, which lives on the CPU, so that every device sees the same
    ones: per image, or, if `shared`, once for all, so that generators in the same state do the same to
    batches of any size. Raises UnknownNameError for an operation that does not exist.
    """
    operations, uniforms = draw(strategy, 1 if shared else len(images), generator)
    return apply(images, operations, uniforms)


def dsa_of(dataset: str) -> str:
    """The strategy of evaluation for the dataset of this name, whatever its case."""
    return DSA_OF_DIGITS if dataset.lower() in OF_DIGITS else DSA


def augment_each(images: Tensor, counts: Sequence[int], strategy: str, numbers: Tensor) -> Tensor:
    """Augments several batches that follow one another in `images` [N, channels, height, width], with
    `counts` images each.

    `numbers` [N, numbers] are those of `draw_each`, on the CPU. Which operations a batch gets, the numbers of
    its first image decide. Batches with the same operations go through them together: on a GPU that takes as
    long as one alone.
    """
    slots = parse(strategy)
    firsts = [0, *accumulate(counts)][:-1] if any(len(slot) > 1 for slot in slots) else [0]
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, choices in enumerate(numbers[firsts, : len(slots)].tolist()):
        groups.setdefault(tuple(choose(slots, choices)), []).append(number)
    uniforms = numbers[:, len(slots) :]
    if len(groups) == 1:
        [operations] = groups
        return apply(images, [*operations], uniforms[:, : uniforms_of(operations)])
    batches, rows = list(images.split(list(counts))), uniforms.split(list(counts))
    for operations, members in groups.items():
        chosen = torch.cat([batches[number] for number in members])
        drawn = torch.cat([rows[number] for number in members])[:, : uniforms_of(operations)]
        made = apply(chosen, [*operations], drawn).split([counts[number] for number in members])
        for number, batch in zip(members, made, strict=True):
            batches[number] = batch
    return torch.cat(batches)


def draw_each(strategy: str, count: int, generator: torch.Generator) -> Tensor:
    """The numbers that `augment_each` takes, float32 [count, numbers] on the CPU: of each image one for each
    place of the strategy, to choose an alternative by, then as many as its operations take at most.
    """
    slots = parse(strategy)
    most = sum(max(OPERATIONS[name].uniforms for name in slot) for slot in slots)
    return _uniform((count, len(slots) + most), generator=generator)


def draw(strategy: str, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """The operations to apply, and the uniform numbers they take, float32 [count, numbers] on the CPU."""
    slots = parse(strategy)
    operations = choose(slots, _uniform((len(slots),), generator=generator).tolist())
    return operations, _uniform((count, uniforms_of(operations)), generator=generator)


def choose(slots: list[list[str]], choices: Sequence[float]) -> list[str]:
    """One of the alternatives of each place, by a uniform number each."""
    return [slot[int(choice * len(slot))] for slot, choice in zip(slots, choices, strict=True)]


def uniforms_of(operations: Iterable[str]) -> int:
    """How many uniform numbers they take per image."""
    return sum(OPERATIONS[name].uniforms for name in operations)


def parse(strategy: str) -> list[list[str]]:
    """The alternatives of each place of a strategy. Raises UnknownNameError."""
    slots = [slot.split("|") for slot in (DSA if strategy == "dsa" else strategy).split("_")]
    for name in (name for slot in slots for name in slot):
        if name not in OPERATIONS:
            raise UnknownNameError.of("augmentation", name, [*OPERATIONS, "dsa"])
    return slots


def apply(images: Tensor, operations: list[str], uniforms: Tensor) -> Tensor:
    """Applies what `draw` returned to `images` [N, channels, height, width]; a single row of `uniforms`
    [N or 1, numbers] serves all of them.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)  # half precision is too coarse for positions
    result = images.to(dtype)
    uniforms = upload(uniforms.to(dtype), images.device)[..., None, None]
    steps = joined(operations)
    parts = uniforms.split([step.uniforms for step in steps], dim=1)
    for step, part in zip(steps, parts, strict=True):
        result = step.function(result, *part.unbind(1))
    return result.to(images.dtype)


def joined(names: Sequence[str]) -> list["Operation"]:
    """The operations of these names; two neighbours that only move pixels are one."""
    if not names:
        return []
    pair = JOINED.get(tuple(names[:2]))
    return [pair, *joined(names[2:])] if pair else [OPERATIONS[names[0]], *joined(names[1:])]


def mix(images: Tensor, targets: Tensor, strategy: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixes `images` [N, channels, height, width] and `targets` [N, classes], which are probabilities.

    `strategy` is one or several of "cutmix", "mixup" and "none", joined by "|". Raises UnknownNameError.
    """
    names = parse_mix(strategy)
    choice = _uniform((), generator=generator).item() if len(names) > 1 else 0
    return MIXES[names[int(choice * len(names))]](images, targets, generator)


def parse_mix(strategy: str) -> list[str]:
    """The alternatives of a strategy of mixing. Raises UnknownNameError."""
    names = strategy.split("|")
    for name in names:
        if name not in MIXES:
            raise UnknownNameError.of("mix", name, list(MIXES))
    return names


def cutmix(
    images: Tensor, targets: Tensor, generator: torch.Generator, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019, arXiv 1905.04899): pastes one box of each image's partner into the image.

    `images` [N, channels, height, width], `targets` [N, classes] probabilities. Box and partners are drawn
    once per batch from the CPU `generator`. The box has 1 - lambda of the area, lambda ~ Beta(alpha, alpha),
    before the parts outside the image are cut off; targets are mixed by the share of pixels it then has.
    """
    height, width = images.shape[-2:]
    drawn, rows, columns = draw_cutmix(len(images), height, width, generator, alpha)
    partners = upload(drawn, images.device)
    mixed = images.clone()
    mixed[..., rows, columns] = images[..., rows, columns][partners]
    share = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return mixed, torch.lerp(targets, targets[partners], share)


def draw_cutmix(
    count: int, height: int, width: int, generator: torch.Generator, alpha: float = 1.0
) -> tuple[Tensor, slice, slice]:
    """Partners, int64 [count], and the rows and columns of the box."""
    partners, numbers = pairs(count, generator)
    half = 0.5 * math.sqrt(1 - numbers.betavariate(alpha, alpha))
    rows, columns = (span(numbers.randrange(side), int(half * side), side) for side in (height, width))
    return partners, rows, columns


def mixup(
    images: Tensor, targets: Tensor, generator: torch.Generator, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """MixUp (Zhang et al. 2018, arXiv 1710.09412): lambda of each image, the rest of its partner.

    Targets likewise. Shapes are those of `cutmix`; lambda ~ Beta(alpha, alpha) and the partners are drawn
    once per batch.
    """
    partners, numbers = pairs(len(images), generator)
    share = 1 - numbers.betavariate(alpha, alpha)
    partners = upload(partners, images.device)
    return torch.lerp(images, images[partners], share), torch.lerp(targets, targets[partners], share)


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, random.Random]:
    """A partner for each image, int64 [count], and a source of further numbers for the batch."""
    partners = torch.randperm(count, generator=generator, device="cpu")
    # torch draws no Beta from a generator; the standard library does, from a seed
    return partners, random.Random(int(torch.randint(2**63 - 1, (), generator=generator, device="cpu")))


MIXES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cutmix": cutmix,
    "mixup": mixup,
    "none": lambda images, targets, generator: (images, targets),
}

# An operation takes images [N, channels, height, width] and uniform numbers in [0, 1), each [N or 1, 1, 1].


def color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Shifts, then scales the distance from the grey of each pixel, then from the mean of the image.

    All three are affine and scaling keeps the mean of the image, so together they are one multiply-add.
    """
    shift = (brightness[:, None] - 0.5) * BRIGHTNESS
    gain = saturation[:, None] * SATURATION
    spread = contrast[:, None] + CONTRAST
    grey = images.mean(1, keepdim=True)
    # one large image alone would be shared out to threads, and be rounded by how many there are
    summed = grey.expand(2, -1, -1, -1) if len(grey) == 1 else grey
    mean = summed.mean((2, 3), keepdim=True)[: len(grey)]
    return torch.addcmul(grey * (spread * (1 - gain)) + mean * (1 - spread) + shift, images, spread * gain)


def crop(
    images: Tensor, down: Tensor, right: Tensor, before: Tensor | int = 1, after: Tensor | int = 1
) -> Tensor:
    """Shifts by whole pixels; as the nearest pixel is read, nothing is interpolated. An image is mirrored
    `before` and `after` that where these are -1, with every pixel read and written once.
    """
    rows, columns = positions(images)
    down, right = shift_of(down, len(rows)), shift_of(right, len(columns))
    return sample(images, rows - down, (columns * after - right) * before, "nearest")


def crop_flip(images: Tensor, down: Tensor, right: Tensor, side: Tensor) -> Tensor:
    return crop(images, down, right, after=sign_of(side))


def flip_crop(images: Tensor, side: Tensor, down: Tensor, right: Tensor) -> Tensor:
    return crop(images, down, right, before=sign_of(side))


def cutout(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Sets a box to zero whose centre is anywhere in the image."""
    rows, columns = hole(row, images.shape[2]), hole(column, images.shape[3])
    return images * ~(rows.mT & columns)[:, None]


def flip(images: Tensor, side: Tensor) -> Tensor:
    """Mirrors left and right where the number is below one half."""
    return torch.where((side < 0.5)[:, None], images.flip(3), images)


def scale(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Scales each axis about the centre."""
    rows, columns = positions(images)
    vertical, horizontal = (1 / SCALE + (SCALE - 1 / SCALE) * number for number in (vertical, horizontal))
    return sample(images, rows / vertical, columns / horizontal, "bilinear")


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Turns about the centre, clockwise for numbers above one half."""
    height, width = images.shape[-2:]
    rows, columns = positions(images)
    radians = (2 * angle - 1) * math.radians(ROTATE)
    sine, cosine = radians.sin(), radians.cos()
    return sample(
        images,
        rows * cosine - columns * sine * (width / height),
        columns * cosine + rows * sine * (height / width),
        "bilinear",
    )


class Operation(NamedTuple):
    function: Callable[..., Tensor]
    uniforms: int  # how many numbers it takes per image


OPERATIONS = {
    "none": Operation(lambda images: images, uniforms=0),
    "color": Operation(color, 3),
    "crop": Operation(crop, 2),
    "cutout": Operation(cutout, 2),
    "flip": Operation(flip, 1),
    "rotate": Operation(rotate, 1),
    "scale": Operation(scale, 2),
}
JOINED: dict[tuple[str, ...], Operation] = {
    ("crop", "flip"): Operation(crop_flip, 3),
    ("flip", "crop"): Operation(flip_crop, 3),
}


def integer_of(uniform: Tensor, low: int, high: int) -> Tensor:
    """A whole number from `low` to `high`, both included."""
    return low + (uniform * (high - low + 1)).floor()


def shift_of(uniform: Tensor, side: int) -> Tensor:
    """A shift by whole pixels, in the unit of `positions`."""
    reach = int(side * CROP + 0.5)
    return integer_of(uniform, -reach, reach) * (2 / side)


def sign_of(side: Tensor) -> Tensor:
    """-1 where `flip` mirrors, else 1."""
    return 1 - 2 * (side < 0.5)


def hole(uniform: Tensor, side: int) -> Tensor:
    """True where the hole is, [N or 1, 1, side]."""
    length = int(side * CUTOUT + 0.5)
    # an even hole has its centre between two pixels, and one place more to be
    start = integer_of(uniform, 0, side - length % 2) - length // 2
    offset = torch.arange(side, device=uniform.device) - start
    return (offset >= 0) & (offset < length)


def span(centre: int, half: int, side: int) -> slice:
    return slice(max(centre - half, 0), min(centre + half, side))


def positions(images: Tensor) -> tuple[Tensor, Tensor]:
    """The centres of the rows [height, 1] and columns [width], where the edges of the image are -1 and 1."""
    rows, columns = (
        torch.arange(1, 2 * side, 2, device=images.device, dtype=images.dtype) / side - 1
        for side in images.shape[-2:]
    )
    return rows[:, None], columns


def sample(images: Tensor, rows: Tensor, columns: Tensor, mode: str) -> Tensor:
    """Reads the images at positions that broadcast to [N, height, width]; outside is zero."""
    grid = torch.stack(torch.broadcast_tensors(columns, rows), dim=-1).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)
