import math

import numpy as np
import pytest
import torch

from distilled_data.augment import (
    DSA,
    MIXES,
    OPERATIONS,
    apply,
    augment,
    augment_each,
    cutmix,
    draw,
    draw_each,
    mix,
    mixup,
)
from distilled_data.errors import UnknownNameError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=generator(99), dtype=dtype)


# The definitions, one image [channels, height, width] and its numbers at a time.


def color(image, brightness, saturation, contrast):
    image = image + (brightness - 0.5)
    grey = image.mean(0)
    image = (image - grey) * (2 * saturation) + grey
    return (image - image.mean()) * (contrast + 0.5) + image.mean()


def crop(image, down, right):
    _, height, width = image.shape
    result = np.zeros_like(image)
    down, right = (
        math.floor(number * (2 * reach + 1)) - reach
        for number, reach in ((down, math.floor(height / 8 + 0.5)), (right, math.floor(width / 8 + 0.5)))
    )
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[:, row, column] = image[:, row - down, column - right]
    return result


def cutout(image, row, column):
    _, height, width = image.shape
    result = image.copy()
    size = [math.floor(side / 2 + 0.5) for side in (height, width)]
    centre = [
        math.floor(number * (side + 1 - length % 2))
        for number, side, length in zip((row, column), (height, width), size, strict=True)
    ]
    for i in range(height):
        for j in range(width):
            if all(0 <= at - c + s // 2 < s for at, c, s in zip((i, j), centre, size, strict=True)):
                result[:, i, j] = 0
    return result


def flip(image, side):
    return image[:, :, ::-1] if side < 0.5 else image


def read(image, y, x):
    """Bilinear at row y and column x, counted from the centre of the image; zero outside."""
    _, height, width = image.shape
    y, x = y + (height - 1) / 2, x + (width - 1) / 2
    value = np.zeros(len(image))
    for row in range(height):
        for column in range(width):
            value += image[:, row, column] * max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
    return value


def warp(image, source):
    _, height, width = image.shape
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            result[:, row, column] = read(image, *source(row - (height - 1) / 2, column - (width - 1) / 2))
    return result


def scale(image, vertical, horizontal):
    vertical, horizontal = (number * (1.2 - 1 / 1.2) + 1 / 1.2 for number in (vertical, horizontal))
    return warp(image, lambda y, x: (y / vertical, x / horizontal))


def rotate(image, angle):
    angle = math.radians((2 * angle - 1) * 15)
    return warp(
        image,
        lambda y, x: (y * math.cos(angle) - x * math.sin(angle), x * math.cos(angle) + y * math.sin(angle)),
    )


DEFINITIONS = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "none": lambda image: image,
    "rotate": rotate,
    "scale": scale,
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_its_definition(name, channels):
    images = noise(5, channels, 9, 12)
    operations, uniforms = draw(name, len(images), generator())
    expected = [
        DEFINITIONS[name](image.numpy(), *row.tolist()) for image, row in zip(images, uniforms, strict=True)
    ]
    torch.testing.assert_close(apply(images, operations, uniforms), torch.tensor(np.stack(expected)))


def test_crop_shifts_by_whole_pixels_and_fills_with_zero():
    image = torch.arange(1.0, 17).reshape(1, 1, 4, 4)
    up_and_right = apply(image, ["crop"], torch.tensor([[0.0, 0.9]]))
    expected = [[0, 5, 6, 7], [0, 9, 10, 11], [0, 13, 14, 15], [0, 0, 0, 0]]
    assert up_and_right[0, 0].tolist() == expected


@pytest.mark.parametrize("side", [28, 32, 37, 224])
def test_crop_changes_no_value(side):
    images = noise(64, 1, side, side, dtype=torch.float32)
    operations, uniforms = draw("crop", len(images), generator())
    expected = [crop(image.numpy(), *row.tolist()) for image, row in zip(images[:4], uniforms, strict=False)]
    assert np.array_equal(apply(images, operations, uniforms)[:4].numpy(), np.stack(expected))


def test_crop_is_as_exact_in_half_precision():
    images = noise(8, 1, 224, 224).half()
    in_half, in_double = (augment(batch, "crop", generator()) for batch in (images, images.double()))
    assert torch.equal(in_half.double(), in_double)


def test_flip_mirrors_left_and_right():
    images = torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]]).repeat(2, 1, 1, 1)
    flipped = apply(images, ["flip"], torch.tensor([[0.4], [0.6]]))
    assert flipped[:, 0].tolist() == [[[3, 2, 1], [6, 5, 4]], [[1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize("strategy", ["crop_flip", "flip_crop", "flip_flip_crop_flip", "crop_crop_flip"])
@pytest.mark.parametrize("side", [28, 32, 37, 224])
def test_moves_at_once_are_the_moves_one_by_one(strategy, side):
    images = noise(64, 1, side, side, dtype=torch.float32)
    operations, uniforms = draw(strategy, len(images), generator())
    expected = images
    for name, part in zip(
        operations, uniforms.split([OPERATIONS[name].uniforms for name in operations], dim=1), strict=True
    ):
        expected = OPERATIONS[name].function(expected, *part[..., None, None].unbind(1))
    assert torch.equal(apply(images, operations, uniforms), expected)


def test_cutout_cuts_what_is_inside_the_image():
    corner_and_middle = apply(torch.ones(2, 1, 4, 4), ["cutout"], torch.tensor([[0.0, 0.0], [0.5, 0.5]]))
    assert corner_and_middle[:, 0].tolist() == [
        [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]],
    ]


def test_saturation_leaves_a_single_channel_as_it_is():
    uniforms = torch.tensor([[0.5, 0.1, 0.5]], dtype=torch.float64)
    images = noise(3, 1, 5, 5)
    torch.testing.assert_close(apply(images, ["color"], uniforms), images)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_agree_with_finite_differences(name):
    operations, uniforms = draw(name, 2, generator())
    images = noise(2, 3, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply(x, operations, uniforms), images)


def test_shared_numbers_do_the_same_to_every_image():
    images = noise(1, 3, 8, 8).repeat(5, 1, 1, 1)
    result = augment(images, "flip_color_crop_cutout_scale_rotate", generator(), shared=True)
    assert torch.equal(result, result[:1].expand_as(result))


def test_own_numbers_do_something_else_to_every_image():
    images = noise(1, 3, 8, 8).repeat(5, 1, 1, 1)
    result = augment(images, "flip_color_crop_cutout_scale_rotate", generator())
    assert len(result.flatten(1).unique(dim=0)) == 5


@pytest.mark.parametrize("seed", range(4))
def test_shared_numbers_are_the_same_for_batches_of_any_size(seed):
    real = noise(7, 3, 8, 8)
    few, many = (augment(batch, DSA, generator(seed), shared=True) for batch in (real[-2:], real))
    assert torch.equal(few, many[-2:])


def test_the_same_seed_gives_the_same_images():
    images = noise(4, 3, 8, 8)
    assert torch.equal(augment(images, DSA, generator(1)), augment(images, DSA, generator(1)))


def test_another_seed_gives_other_images():
    images = noise(4, 3, 8, 8)
    assert not torch.equal(augment(images, DSA, generator(1)), augment(images, DSA, generator(2)))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    cutmix(augment(noise(2, 3, 8, 8), DSA, generator()), torch.eye(2), generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_operations_are_applied_in_their_order():
    images = noise(4, 1, 8, 8)
    one, other = (augment(images, strategy, generator()) for strategy in ("cutout_color", "color_cutout"))
    holes = (torch.count_nonzero(result == 0) for result in (one, other))
    assert [bool(count) for count in holes] == [False, True]


def test_every_alternative_is_drawn_about_equally_often():
    numbers = generator()
    drawn = [tuple(draw(DSA, 1, numbers)[0]) for _ in range(600)]
    counts = [drawn.count(("flip", "color", last)) for last in ("crop", "scale", "rotate")]
    assert sum(counts) == 600
    assert min(counts) > 150


def test_batches_side_by_side_do_what_the_first_image_of_each_decides():
    images, counts = noise(7, 3, 8, 8), [2, 3, 2]
    numbers = draw_each("crop|flip_color", 7, generator())
    assert numbers.shape == (7, 2 + 2 + 3)  # two choices, then as many as crop and color take
    numbers[[0, 2, 5], 0] = torch.tensor([0.49, 0.5, 0.0])
    numbers[[1, 3, 4, 6], 0] = torch.tensor([0.9, 0.1, 0.1, 0.9])  # not heard
    crop, flip = (["crop", "color"], numbers[:, 2:]), (["flip", "color"], numbers[:, 2:6])
    parts = [apply(images, *one).split(counts)[k] for k, one in enumerate((crop, flip, crop))]
    assert torch.equal(augment_each(images, counts, "crop|flip_color", numbers), torch.cat(parts))


def test_dsa_names_the_recipe_of_evaluation():
    images = noise(4, 3, 8, 8)
    assert torch.equal(augment(images, "dsa", generator()), augment(images, DSA, generator()))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("strategy", ["color_rotat", "crop|rotat"])
def test_an_unknown_operation_is_refused_even_where_it_is_not_drawn(strategy, seed):
    with pytest.raises(UnknownNameError, match=r"unknown augmentation 'rotat'\. Did you mean 'rotate'\?"):
        augment(noise(1, 1, 4, 4), strategy, generator(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 4, 7)])
def test_shape_and_dtype_are_kept(shape, dtype):
    result = augment(noise(*shape).to(dtype), "flip_color_crop_cutout_scale_rotate", generator())
    assert (result.shape, result.dtype) == (shape, dtype)


def test_nothing_waits_for_the_device():
    # tensors on "meta" have no values: reading one on the host raises
    images, targets = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, 10, device="meta")
    augment(images, "flip_color_crop_cutout_scale_rotate", generator())
    for mixing in (cutmix, mixup):
        mixing(images, targets, generator())


def test_cutmix_mixes_targets_by_the_share_of_pixels():
    count = 4
    images = torch.arange(count).double()[:, None, None, None].expand(count, 3, 9, 7)
    for seed in range(30):
        mixed, targets = cutmix(images, torch.eye(count, dtype=torch.float64), generator(seed))
        share = torch.stack([(mixed[:, 0] == index).double().mean((1, 2)) for index in range(count)], dim=1)
        torch.testing.assert_close(targets, share)


def test_cutmix_draws_boxes_of_every_size():
    images, targets = noise(16, 1, 16, 16), torch.eye(16)
    kept = [cutmix(images, targets, generator(seed))[1].diagonal().min().item() for seed in range(200)]
    assert min(kept) < 0.4
    assert max(kept) > 0.98


def test_a_small_alpha_draws_all_or_nothing():
    images, targets = noise(8, 1, 32, 32), torch.eye(8)
    mixed = [cutmix(images, targets, generator(seed), alpha=1e-3)[0] for seed in range(20)]
    # the box is empty, or has the size of the image and a corner of it
    assert 2 < sum(torch.equal(result, images) for result in mixed) < 18


def test_cutmix_leaves_its_input_as_it_is():
    images, targets = noise(4, 1, 8, 8), torch.eye(4)
    before = images.clone()
    cutmix(images, targets, generator())
    assert torch.equal(images, before)


def test_cutmix_is_seeded():
    images, targets = noise(4, 1, 8, 8), torch.eye(4)
    one, same, other = (cutmix(images, targets, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_mixup_mixes_images_and_targets_by_the_same_share():
    count = 5
    images = torch.arange(count).double()[:, None, None, None].expand(count, 3, 4, 4)
    shares = set()
    for seed in range(20):
        mixed, targets = mixup(images, torch.eye(count, dtype=torch.float64), generator(seed))
        torch.testing.assert_close(targets.sum(1), torch.ones(count, dtype=torch.float64))
        expected = (targets @ torch.arange(count).double())[:, None, None, None].expand_as(mixed)
        torch.testing.assert_close(mixed, expected)
        assert targets.min() >= 0
        shares.add(round(targets.diagonal().min().item(), 6))
    assert len(shares) > 15


def test_small_alphas_leave_most_of_one_of_two():
    images, targets = noise(2, 1, 4, 4), torch.eye(2, dtype=torch.float64)
    larger = {
        alpha: torch.stack([mixup(images, targets, generator(seed), alpha)[1].max() for seed in range(200)])
        for alpha in (0.1, 1.0, 10.0)
    }
    mean = {alpha: float(values[values < 1].mean()) for alpha, values in larger.items()}  # 1: of itself
    assert mean[0.1] > 0.9 > mean[1.0] > 0.65 > mean[10.0]  # of uniform shares three quarters


def roll_instead_of_shuffling(monkeypatch):
    """torchvision's partner of an image is the one before it; ours is drawn."""
    monkeypatch.setattr(torch, "randperm", lambda count, generator, device: torch.arange(count).roll(1))


@pytest.mark.parametrize("soft", [False, True])
def test_mixup_is_that_of_torchvision(soft, monkeypatch):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images, numbers = noise(6, 3, 8, 8), torch.arange(6) % 4
    targets = torch.nn.functional.one_hot(numbers, 4).double()
    targets = (targets + 0.1).div(1.4) if soft else targets
    roll_instead_of_shuffling(monkeypatch)
    mixed, mixed_targets = mixup(images, targets, generator(3))
    share = 1 - ((mixed_targets - targets)[1, 0] / (targets[0] - targets[1])[0]).item()
    monkeypatch.setattr(v2.MixUp, "make_params", lambda self, inputs: {"lam": share})
    expected = v2.MixUp(num_classes=4)(images, targets if soft else numbers)
    torch.testing.assert_close(mixed, expected[0])
    torch.testing.assert_close(mixed_targets, expected[1].to(torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_is_that_of_torchvision(seed, monkeypatch):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images, targets = noise(6, 3, 12, 9), torch.eye(6, dtype=torch.float64)
    roll_instead_of_shuffling(monkeypatch)
    mixed, mixed_targets = cutmix(images, targets, generator(seed))
    changed = (mixed != images).any(1).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    box = (0, 0, 0, 0)
    if len(rows):
        box = tuple(map(int, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))
    area = (box[2] - box[0]) * (box[3] - box[1]) / (12 * 9)
    monkeypatch.setattr(v2.CutMix, "make_params", lambda self, inputs: {"box": box, "lam_adjusted": 1 - area})
    expected = v2.CutMix()(images, targets)
    assert torch.equal(mixed, expected[0])
    torch.testing.assert_close(mixed_targets, expected[1])


def test_a_strategy_of_mixing_draws_one_of_its_alternatives_per_batch():
    images, targets = noise(8, 1, 8, 8), torch.eye(8)
    whole = [
        torch.equal(mix(images, targets, "mixup|none", generator(seed))[0], images) for seed in range(60)
    ]
    assert 15 < sum(whole) < 45
    for name in ("cutmix", "mixup"):
        ours, direct = (
            f(images, targets, generator(4))[0]
            for f in (MIXES[name], lambda *a, n=name: mix(*a[:2], n, a[2]))
        )
        assert torch.equal(ours, direct)


def test_an_unknown_mix_is_refused():
    with pytest.raises(UnknownNameError, match=r"unknown mix 'cutmx'\. Did you mean 'cutmix'\?"):
        mix(noise(2, 1, 4, 4), torch.eye(2), "cutmx|none", generator())


@pytest.mark.parametrize("name", ["cutmix", "mixup"])
def test_mixing_is_differentiable_in_images_and_targets(name):
    images, targets = noise(4, 1, 8, 8).requires_grad_(), torch.eye(4).requires_grad_()
    mixed, mixed_targets = mix(images, targets, name, generator(1))
    (mixed.square().sum() + mixed_targets.square().sum()).backward()
    assert images.grad.abs().sum() > 0
    assert targets.grad.abs().sum() > 0


def test_one_large_image_is_changed_alike_by_any_number_of_threads():
    images = noise(1, 3, 225, 225, dtype=torch.float32)
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append([augment(images, "color", generator(seed)) for seed in range(20)])
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(one, other) for others in made[1:] for one, other in zip(made[0], others, strict=True)
    )
