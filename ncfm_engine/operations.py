"""The arithmetic of a run, counted before it is made: two operations for each multiply-add."""

import math
from dataclasses import dataclass

import torch

from .config import NetworkConfig, Recipe
from .evaluate import CHECKS, epochs_of_as_many_steps
from .pool import build
from .sampling import real_per_class
from .sources import Source


@dataclass(frozen=True)
class Passes:
    """Images that go through the networks of a stage, and other operations."""

    forward: float = 0.0  # only
    returned: float = 0.0  # forward, and back to the pixels
    trained: float = 0.0  # forward, and back to the weights
    products: float = 0.0  # floating-point operations besides the networks'


def passes(recipe: Recipe, source: Source, random: bool = True) -> dict[str, Passes]:
    """What each stage does, labelling aside; evaluating with `random` images beside the distilled ones."""
    return {
        "pretraining": Passes(trained=recipe.pretrain.networks * recipe.pretrain.epochs * len(source.train)),
        "distilling": _distilling(recipe, source),
        "evaluating": _evaluating(recipe, source, random),
    }


def _distilling(recipe: Recipe, source: Source) -> Passes:
    config, classes = recipe.distill, source.num_classes
    real = real_per_class(config.real_batch, source.train.counts) * classes
    looks = config.iterations
    if config.real_features == "bank" and looks:
        looks = -(-looks // config.bank_refresh) + config.bank_size - 1
    views = recipe.ipc * config.factor**2 * classes
    networks = 2 if config.calibration else 1
    seen = looks * real + (config.turns - 1) * config.iterations * views
    products = 0.0
    if config.has_frequencies:
        # Of one image: forward for both kinds; backward into the synthetic features and, for psi, into the
        # frequencies.
        angles = 2 * _dim(recipe.network, source) * config.frequencies * config.iterations
        synthetic = views
        if config.nested and recipe.ipc > 1:  # and the prefixes, of (ipc - 1) / log(ipc) images on average
            synthetic += views * (recipe.ipc - 1) / math.log(recipe.ipc) / recipe.ipc
        products = angles * (real + 2 * synthetic)
        if config.discrepancy == "ncfd":
            products += angles * (real + synthetic) * (2 * config.turns - 1)
    return Passes(seen, config.iterations * networks * views, products=products)


def _evaluating(recipe: Recipe, source: Source, random: bool) -> Passes:
    config, packed = recipe.evaluate, recipe.ipc * source.num_classes
    views = packed * recipe.distill.factor**2
    seen = config.epochs * views
    if random:
        batches = [math.ceil(images / config.batch_size) for images in (views, packed)]
        seen += epochs_of_as_many_steps(config.epochs, *batches) * packed
    kinds = config.repeats * len(config.labels)
    trained = kinds * seen
    trained += config.full_repeats * config.full_epochs * len(source.train)
    tests = kinds * (CHECKS + random) + config.full_repeats
    labelled = "teacher" in config.labels and config.repeats * seen
    return Passes(tests * len(source.test) + labelled * recipe.pretrain.networks, trained=trained)


def operations(recipe: Recipe, source: Source) -> dict[str, float]:
    """Floating-point operations of convolutions and matrix products in each stage."""
    forward, returned, trained = _of_one_image(recipe.network, source)
    return {
        name: stage.forward * forward + stage.returned * returned + stage.trained * trained + stage.products
        for name, stage in passes(recipe, source).items()
    }


def _of_one_image(network: NetworkConfig, source: Source) -> list[float]:
    """Of a forward pass, one that goes back to the pixels, and one that goes back to the weights."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton, for a third of a second

    counted = []
    for pixels, weights in ((False, False), (True, False), (False, True)):
        model = build(network, source, 0).requires_grad_(weights)
        image = torch.zeros(1, source.channels, source.height, source.width, requires_grad=pixels)
        with FlopCounterMode(display=False) as counter:
            logits = model(image)
            if pixels or weights:
                logits.sum().backward()
        counted.append(counter.get_total_flops())
    return counted


def _dim(network: NetworkConfig, source: Source) -> int:
    image = torch.zeros(1, source.channels, source.height, source.width)
    return build(network, source, 0).features(image).numel()
