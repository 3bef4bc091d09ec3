from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from distilled_data.errors import UnknownNameError, UsageError
from ncfm_engine.networks import (
    ACTIVATIONS,
    NETWORKS,
    NORMS,
    POOLINGS,
    Mean,
    build_network,
    is_faster_with_channels_last,
    resnet,
)
from ncfm_engine.train import Networks

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]

build_small = partial(build_network, channels=3, size=8, classes=10)


def images(count, channels=3, height=8, width=None):
    shape = (count, channels, height, width or height)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def parameters(network):
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_one_column_per_class(name, size, channels):
    network = build_network(name, channels=channels, size=size, classes=7)
    assert network(images(2, channels, size)).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_images_need_not_be_square(name):
    network = build_network(name, channels=3, size=(12, 20), classes=7)
    assert network(images(2, 3, 12, 20)).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_classifier_of_the_features(name):
    network = build_small(name)
    features = network.features(images(2))
    assert features.ndim == 4
    assert torch.equal(network.classifier(features), network(images(2)))


@pytest.mark.parametrize(
    ("size", "depth", "shape"),
    [(8, 3, (2, 128, 1, 1)), (28, 3, (2, 128, 3, 3)), (32, 3, (2, 128, 4, 4)), (64, 4, (2, 128, 4, 4))],
)
def test_every_block_of_a_convnet_halves_the_map(size, depth, shape):
    network = build_network("convnet", channels=3, size=size, classes=10, depth=depth)
    assert network.features(images(2, 3, size)).shape == shape


@pytest.mark.parametrize(
    ("name", "norm", "count", "shape"),
    [
        ("convnet", "instance", 320_010, (128, 4, 4)),
        ("resnet18", "batch", 11_173_962, (512, 4, 4)),
        ("vgg11", "batch", 9_231_114, (512, 1, 1)),
        ("alexnet", "none", 1_872_202, (192, 4, 4)),
    ],
)
def test_the_networks_of_the_literature_have_their_number_of_parameters(name, norm, count, shape):
    network = build_network(name, channels=3, size=32, classes=10, norm=norm)
    assert len(parameters(network)) == count
    assert network.features(images(1, 3, 32)).shape[1:] == shape


def test_a_quarter_of_the_channels_is_a_sixteenth_of_the_weights():
    whole, quarter = (
        build_network(name, channels=3, size=32, classes=10, norm="batch")
        for name in ("resnet18", "resnet18_x0_25")
    )

    def weights(network):
        inner = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 3]
        return sum(m.weight.numel() for m in inner)

    assert weights(whole) == 16 * weights(quarter)
    # without the stem's and the norms', which have a quarter, and the classifier's
    assert len(parameters(quarter)) == weights(quarter) + 16 * 3 * 9 + 9_600 // 4 + 10 * 128 + 10
    for name in ("vgg11", "alexnet"):
        whole, quarter = (
            build_network(name + scale, channels=3, size=32, classes=10) for scale in ("", "_x0_25")
        )
        assert weights(whole) == 16 * weights(quarter)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_norm_erases_the_image_at_eight_pixels(name):
    first, second = build_small(name)(images(2))
    assert (first - second).abs().max() > 1e-3


def test_a_resnet_halves_its_map_rounding_up_while_four_pixels_are_left():
    network = build_network("resnet18_x0_25", channels=1, size=9, classes=2)
    assert network.features(images(1, 1, 9)).shape[2:] == (3, 3)


def test_the_vit_sees_every_pixel_where_patches_do_not_divide_the_side():
    network = build_network("vit", channels=1, size=11, classes=2)
    x = images(1, 1, 11).requires_grad_()
    network(x)[0, 0].backward()
    assert x.grad is not None
    assert x.grad.count_nonzero() == 121


@pytest.mark.parametrize(("norm", "invariant"), [("instance", True), ("batch", False), ("none", False)])
def test_instance_norm_alone_makes_the_gain_of_an_image_irrelevant(norm, invariant):
    network = build_small("convnet", width=16, norm=norm)
    gain = torch.tensor([1.0, 3.0, 10.0, 30.0]).reshape(-1, 1, 1, 1)
    difference = network(100 * images(4) * gain) - network(100 * images(4))
    assert (difference.abs().max() < 1e-3) == invariant


@pytest.mark.parametrize(
    "setting",
    [{"norm": norm} for norm in NORMS]
    + [{"activation": activation} for activation in ACTIVATIONS]
    + [{"pooling": pooling} for pooling in POOLINGS],
    ids=str,
)
def test_a_convnet_of_every_kind_learns(setting):
    network = build_small("convnet", width=16, **setting)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        losses.append(F.cross_entropy(network(images(20)), torch.arange(20) % 10))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_of_a_network_gets_a_gradient(name):
    network = build_network(name, channels=3, size=16, classes=10)
    F.cross_entropy(network(images(2, 3, 16)), torch.arange(2)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_seed_gives_the_same_weights(name):
    one, same = (parameters(build_small(name, seed=5)) for _ in range(2))
    assert torch.equal(one, same)


def test_another_seed_gives_other_weights():
    one, other = (parameters(build_small("convnet", seed=seed)) for seed in (5, 6))
    assert not torch.equal(one, other)


def test_batch_norm_computes_in_float32_under_autocast():
    images = torch.randn(4, 8, 6, 6).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert NORMS["batch"](8)(images).dtype == torch.float32
    assert NORMS["batch"](8).double()(images.double()).dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)  # a CPU's autocast leaves these norms alone
@pytest.mark.parametrize("norm", ["layer", "instance", "group"])
def test_other_norms_keep_half_precision_under_autocast(norm, device):
    module = NORMS[norm](8).to(device)
    maps = 5 + images(2, 8).to(device)
    with torch.autocast(device, torch.bfloat16):
        result = module(maps.bfloat16())
    assert result.dtype is torch.bfloat16
    torch.testing.assert_close(result.float(), module(maps), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("norm", ["none", "layer", "instance", "group"])
@pytest.mark.parametrize("count", [1, 2])
def test_every_block_keeps_half_precision_stacked_too(norm, count):
    networks = Networks(
        [build_small("convnet", norm=norm, seed=seed) for seed in range(count)], "cpu", "bfloat16"
    )
    found = []
    for layer in networks.template.features:
        layer.register_forward_hook(lambda layer, inputs, output: found.append(output.dtype))
    assert networks(images(2)).dtype is torch.float32
    assert found == [torch.bfloat16] * 12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("height", [6, 7])
@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("stacked", [False, True])
def test_average_pooling_is_that_of_torch_and_so_is_its_gradient(device, height, width, stacked):
    maps = images(3, 2, height, width).unflatten(0, (3, 1)).to(device).requires_grad_()
    pool = vmap(Mean.apply) if stacked else lambda maps: Mean.apply(maps[0])[None]
    means, expected = pool(maps), torch.stack([F.avg_pool2d(one, 2) for one in maps])
    count = len(means)
    assert torch.allclose(means, expected[:count], rtol=0, atol=3e-7)  # the order of the sum
    incoming = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)[:count]
    gradients = [torch.autograd.grad(some, maps, incoming)[0] for some in (means, expected[:count])]
    assert torch.equal(*gradients)


def test_average_pooling_keeps_the_layout_in_both_directions():
    maps = images(2, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    means = POOLINGS["avg"]()(maps)
    (gradient,) = torch.autograd.grad(means, maps, torch.ones_like(means))
    assert all(made.is_contiguous(memory_format=torch.channels_last) for made in (means, gradient))


@pytest.mark.parametrize(
    ("setting", "faster"),
    [
        ({"norm": "batch"}, True),
        ({"norm": "layer", "pooling": "max"}, True),
        ({"norm": "group"}, True),
        ({"norm": "none", "name": "vgg11"}, True),
        ({"norm": "instance"}, False),
        ({"norm": "batch", "pooling": "none"}, False),
        ({"norm": "batch", "name": "resnet18"}, False),  # pools once
        ({"name": "vit"}, False),
    ],
    ids=str,
)
def test_channels_last_are_for_networks_that_pool_and_do_not_norm_single_channels(setting, faster):
    assert is_faster_with_channels_last(build_small(**({"name": "convnet"} | setting))) == faster
    assert not is_faster_with_channels_last(torch.nn.Sequential(torch.nn.MaxPool2d(2)))  # may need the other


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    build_small("convnet", seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [("network", "resnet19"), ("norm", "instanc"), ("activation", "rel"), ("pooling", "maximum")],
)
def test_an_unknown_name_is_refused(kind, wrong):
    setting = {"name": "convnet", "name" if kind == "network" else kind: wrong}
    with pytest.raises(UnknownNameError, match=f"unknown {kind} '{wrong}'"):
        build_small(**setting)


def test_a_convnet_too_deep_for_its_images_names_the_largest_depth():
    for shape in ({"depth": 0}, {"width": -1}):
        with pytest.raises(UsageError, match="width and depth must be 1 or more"):
            build_network("convnet", channels=1, size=28, classes=10, **shape)
    with pytest.raises(UsageError, match="width, stages and blocks must be 1 or more, got 4, 2 and 0"):
        resnet(1, (28, 28), 10, NORMS["batch"], width=4, stages=2, blocks=0)
    with pytest.raises(UsageError, match=r"28x40 pixels to nothing\. The largest depth for this size is 4"):
        build_network("convnet", channels=3, size=(28, 40), classes=10, depth=5)
    with pytest.raises(UsageError, match='norm "group" makes 4 groups of the channels, got 6 channels'):
        build_network("convnet", channels=1, size=28, classes=10, width=6, norm="group")


def test_the_smallest_networks_are_networks():
    smallest = (
        build_network("convnet", channels=1, size=8, classes=3, width=1, depth=1),
        resnet(1, (8, 8), 3, NORMS["batch"], width=1, stages=1, blocks=1),
    )
    assert all(network(images(2, 1)).shape == (2, 3) for network in smallest)


@pytest.mark.parametrize("setting", [{"depth": 4}, {"depth": 5, "pooling": "none"}], ids=str)
def test_a_convnet_may_be_as_deep_as_its_images_allow(setting):
    network = build_network("convnet", channels=3, size=28, classes=10, width=8, **setting)
    assert network(images(2, 3, 28)).shape == (2, 10)
