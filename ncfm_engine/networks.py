"""Image classifiers for small images, split where distillation needs it.

`network.features(images)` is the last feature map [N, channels, height, width], and `network(images)`, the
logits [N, classes], is `network.classifier` of it.

The convolutional ones are those of the dataset condensation literature (Zhao, Mopuri and Bilen 2021,
arXiv 2006.05929): ConvNet is its standard network, the others are the known ones adapted to small images.
With "_x0_25" at the end of their names they have a quarter of the channels, for CPUs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_data.errors import UnknownNameError, UsageError
from distilled_data.randomness import seeded_with

__all__ = ["NETWORKS", "build_network"]

QUARTER = "_x0_25"
KNOWN = ("resnet18", "vgg11", "alexnet")
NETWORKS = ("convnet", *KNOWN, *(name + QUARTER for name in KNOWN), "vit")


class BatchNorm(nn.BatchNorm2d):
    """In the precision of its weights, under autocast too: stacked, the kernels take no mixture."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class Conv2d(nn.Conv2d):
    """In the precision of autocast when it is stacked too, where the float32 bias would raise the result."""

    def forward(self, input: Tensor) -> Tensor:
        device, bias = input.device.type, self.bias
        if bias is None or not torch.is_autocast_enabled(device):
            return super().forward(input)
        half = torch.get_autocast_dtype(device)
        return self._conv_forward(input.to(half), self.weight.to(half), bias.to(half))


class GroupNorm(nn.GroupNorm):
    """In the precision of what comes in, where autocast would have float32; it adds up in float32."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class AvgPool(nn.AvgPool2d):
    """Of 2 x 2 pixels."""

    def __init__(self):
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda or input.is_contiguous():
            return Mean.apply(input)
        return super().forward(input)


class Mean(torch.autograd.Function):
    """Means of 2 x 2 pixels. Torch's took a fifth of a step: on CPUs both ways, on GPUs their gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(maps: Tensor) -> Tensor:
        if maps.is_cuda:
            return F.avg_pool2d(maps, 2)
        height, width = maps.shape[-2] // 2 * 2, maps.shape[-1] // 2 * 2
        rows = maps[..., 0:height:2, :width] + maps[..., 1:height:2, :width]
        return (rows[..., 0::2] + rows[..., 1::2]) / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        *outer, height, width = gradient.shape
        quarter = gradient / 4
        if gradient.is_cuda:
            spread = quarter[..., None, :, None].expand(*outer, height, 2, width, 2)
        else:  # in half of the time
            rows = quarter.repeat_interleave(2, -1)
            spread = torch.stack((rows, rows), -2)
        spread = spread.reshape(*outer, 2 * height, 2 * width)
        odd = ctx.shape[-1] - 2 * width, ctx.shape[-2] - 2 * height
        return F.pad(spread, (0, odd[0], 0, odd[1])) if any(odd) else spread


def is_faster_with_channels_last(network: nn.Module) -> bool:
    """Whether a CPU trains it faster on images in that layout: its own pooling then takes a quarter of the
    time or less, but a norm of single channels three times as long.
    """
    kinds = list(network.modules())
    pools = any(isinstance(kind, (AvgPool, nn.MaxPool2d)) for kind in kinds)
    single = any(isinstance(kind, nn.GroupNorm) and kind.num_groups == kind.num_channels for kind in kinds)
    return isinstance(network, Network) and pools and not single


GROUPS = 4  # of channels, of the norm "group"


def grouped(width: int) -> GroupNorm:
    if width % GROUPS:
        raise UsageError(f'norm "group" makes {GROUPS} groups of the channels, got {width} channels')
    return GroupNorm(GROUPS, width)


NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "none": nn.Identity,
    "batch": BatchNorm,
    "layer": lambda width: GroupNorm(1, width),
    "instance": lambda width: GroupNorm(width, width),
    "group": grouped,
}
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU}
POOLINGS: Mapping[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "max": lambda: nn.MaxPool2d(2),
    "avg": AvgPool,
}

Block = tuple[int, int, bool]  # width, side of the kernel, whether pooling follows
PLANS: Mapping[str, list[Block]] = {
    "vgg11": [
        (64, 3, True),
        (128, 3, True),
        (256, 3, False),
        (256, 3, True),
        *[(512, 3, False), (512, 3, True)] * 2,
    ],
    "alexnet": [(128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)],
}


class Network(nn.Module):
    """`features` [N, channels, H, W] -> map [N, D, h, w], and its `classifier` -> logits [N, classes]."""

    def __init__(self, features: nn.Module, classifier: nn.Module):
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def build_network(
    name: str,
    *,
    channels: int,
    size: int | tuple[int, int],
    classes: int,
    width: int = 128,
    depth: int = 3,
    norm: str = "instance",
    activation: str = "relu",
    pooling: str = "avg",
    seed: int = 0,
) -> Network:
    """Returns a network on the CPU, with the initial weights that `seed` gives.

    `size` is the side of the images in pixels, or (height, width). `width`, `depth`, `activation` and
    `pooling` shape the "convnet" only, `norm` all but "vit". Raises UnknownNameError for a name that does not
    exist and UsageError for a ConvNet that is too deep for the size, or whose width makes no groups.
    """
    for kind, choice, choices in (
        ("network", name, NETWORKS),
        ("norm", norm, NORMS),
        ("activation", activation, ACTIVATIONS),
        ("pooling", pooling, POOLINGS),
    ):
        if choice not in choices:
            raise UnknownNameError.of(kind, choice, choices)
    if min(width, depth) < 1:
        raise UsageError(f"width and depth must be 1 or more, got {width} and {depth}")
    size = (size, size) if isinstance(size, int) else size
    with seeded_with(seed):
        if name == "vit":
            return vit(channels, size, classes)
        known = name.removesuffix(QUARTER)
        share = 1 if name == known else 4
        if known == "resnet18":
            return resnet(channels, size, classes, NORMS[norm], width=64 // share, stages=4, blocks=2)
        if known in PLANS:
            blocks = [(filters // share, kernel, pooled) for filters, kernel, pooled in PLANS[known]]
            return convnet(blocks, channels, size, classes, NORMS[norm], nn.ReLU, POOLINGS["max"])
        largest = min(size).bit_length() - 1
        if pooling != "none" and depth > largest:
            raise UsageError(
                f"a ConvNet of depth {depth} halves images of {size[0]}x{size[1]} pixels to nothing. "
                f"The largest depth for this size is {largest}."
            )
        blocks = [(width, 3, pooling != "none")] * depth
        return convnet(
            blocks, channels, size, classes, NORMS[norm], ACTIVATIONS[activation], POOLINGS[pooling]
        )


def convnet(
    plan: list[Block],
    channels: int,
    size: tuple[int, int],
    classes: int,
    norm: Callable[[int], nn.Module],
    activation: Callable[[], nn.Module],
    pooling: Callable[[], nn.Module],
) -> Network:
    """Blocks of convolution, norm, activation and pooling, then a linear classifier of the whole map."""
    height, width = size
    layers = []
    for index, (filters, kernel, pooled) in enumerate(plan, start=1):
        layers += [Conv2d(channels, filters, kernel, padding=kernel // 2), norm(filters), activation()]
        if pooled and (index == len(plan) or can_halve(height, width)):
            layers.append(pooling())
            height, width = height // 2, width // 2
        channels = filters
    return Network(
        nn.Sequential(*layers), nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))
    )


def resnet(
    channels: int,
    size: tuple[int, int],
    classes: int,
    norm: Callable[[int], nn.Module],
    *,
    width: int,
    stages: int,
    blocks: int,
) -> Network:
    """ResNet of basic blocks (He et al. 2016, arXiv 1512.03385), its stem for small images: 3x3, no pooling.

    Every stage has `blocks` of them and twice the width of the one before. ResNet-18 is 64, 4, 2. Raises
    `UsageError` for numbers below 1.
    """
    if min(width, stages, blocks) < 1:
        raise UsageError(f"width, stages and blocks must be 1 or more, got {width}, {stages} and {blocks}")
    from torchvision.models.resnet import BasicBlock  # importing torchvision takes as long as importing torch

    rows, columns = size
    layers = [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
    inputs = width
    for filters in (width * 2**stage for stage in range(stages)):
        stride, shortcut = 1, None
        if filters != inputs:
            if can_halve(rows, columns):
                stride, rows, columns = 2, -(-rows // 2), -(-columns // 2)
            shortcut = nn.Sequential(nn.Conv2d(inputs, filters, 1, stride, bias=False), norm(filters))
        layers.append(BasicBlock(inputs, filters, stride, shortcut, norm_layer=norm))
        layers += [BasicBlock(filters, filters, norm_layer=norm) for _ in range(blocks - 1)]
        inputs = filters
    return Network(nn.Sequential(*layers), pooled_classifier(inputs, classes))


def vit(channels: int, size: tuple[int, int], classes: int) -> Network:
    """Small ViT whose map is pooled, in place of a class token (Beyer et al. 2022, arXiv 2205.01580)."""
    return Network(PatchEncoder(channels, size, dim=192, layers=6, heads=3), pooled_classifier(192, classes))


class PatchEncoder(nn.Module):
    """Cuts images into about 8x8 patches and encodes them to a map [N, dim, rows, columns]."""

    def __init__(self, channels: int, size: tuple[int, int], *, dim: int, layers: int, heads: int):
        from torchvision.models.vision_transformer import Encoder

        super().__init__()
        height, width = size
        patch = -(-min(size) // 8)
        rows, columns = -(-height // patch), -(-width // patch)
        padding = (rows * patch - height + 1) // 2, (columns * patch - width + 1) // 2
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch, padding=padding)
        self.encoder = Encoder(rows * columns, layers, heads, dim, 4 * dim, dropout=0, attention_dropout=0)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images)
        return self.encoder(patches.flatten(2).mT).mT.reshape(patches.shape)


def pooled_classifier(width: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def can_halve(height: int, width: int) -> bool:
    """Whether more than one pixel is left; norms over space would turn a single one into a constant."""
    return min(height, width) >= 4
