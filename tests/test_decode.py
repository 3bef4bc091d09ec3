"""Decode: tiles row by row, enlarged bilinearly, differentiable."""

import pytest
import torch

from distilled_data.decode import decode, enlarge, take, tiles


def test_tiles_are_cut_row_by_row():
    image = torch.tensor(
        [
            [11, 12, 21, 22],
            [13, 14, 23, 24],
            [31, 32, 41, 42],
            [33, 34, 43, 44],
        ]
    )
    assert tiles(image[None, None], 2)[0, :, 0].tolist() == [
        [[11, 12], [13, 14]],
        [[21, 22], [23, 24]],
        [[31, 32], [33, 34]],
        [[41, 42], [43, 44]],
    ]


def test_tiles_of_an_oblong_image_keep_its_shape():
    image = torch.tensor([[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6], [7, 7, 8, 8, 9, 9]])
    parts = tiles(image[None, None], 3)[0, :, 0]
    assert parts.tolist() == [[[i, i]] for i in range(1, 10)]


def test_images_and_channels_stay_apart():
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    parts = tiles(images, 2)
    assert parts.shape == (2, 4, 3, 2, 2)
    for n, channel in ((0, 0), (0, 2), (1, 1)):
        alone = tiles(images[n : n + 1, channel : channel + 1], 2)
        assert torch.equal(parts[n, :, channel], alone[0, :, 0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tiles_keep_the_dtype_and_every_pixel(dtype):
    images = torch.arange(144).to(dtype).view(1, 1, 12, 12)
    parts = tiles(images, 3)
    assert parts.dtype == dtype
    assert sorted(parts.flatten().tolist()) == list(range(144))


def test_factor_one_is_the_identity():
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tiles(images, 1)[:, 0], images)
    assert torch.equal(decode(images, 1)[:, 0], images)


def test_two_pixels_become_four_by_quarters():
    row = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    assert enlarge(row, (1, 4)).flatten().tolist() == [0, 1, 3, 4]


def test_two_by_two_become_four_by_four_bilinearly():
    tile = torch.tensor([[0.0, 4.0], [8.0, 28.0]])[None, None]
    assert enlarge(tile, (4, 4))[0, 0].tolist() == [
        [0, 1, 3, 4],
        [2, 4, 8, 10],
        [6, 10, 18, 22],
        [8, 13, 23, 28],
    ]


def test_decode_enlarges_each_tile_on_its_own():
    image = torch.tensor([[0.0, 4.0, 9.0, 9.0], [8.0, 28.0, 9.0, 9.0], [5.0] * 4, [5.0] * 4])[None, None]
    views = decode(image, 2)
    assert views.shape == (1, 4, 1, 4, 4)
    assert torch.equal(views[0, 0, 0], enlarge(tiles(image, 2)[:, 0], (4, 4))[0, 0])
    assert views[0, 1].unique().tolist() == [9]
    assert views[0, 2:].unique().tolist() == [5]


def test_decode_has_the_gradient_of_finite_differences():
    images = torch.rand(2, 1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: decode(x, 2), images.requires_grad_())


def test_every_pixel_has_the_same_weight_in_the_mean_of_its_views():
    images = torch.zeros(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    decode(images, 3).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 9.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("contiguous", [True, False])
def test_tiles_are_taken_by_number_without_cutting_all(factor, dtype, contiguous):
    images = torch.randint(256, (5, 3, 12, 18), generator=torch.Generator().manual_seed(0)).to(dtype)
    images = images if contiguous else images.transpose(2, 3).contiguous().transpose(2, 3)
    rows = torch.randperm(5 * factor**2, generator=torch.Generator().manual_seed(1))[1:]
    assert torch.equal(take(images, rows, factor), tiles(images, factor).flatten(0, 1)[rows])
    with pytest.raises(IndexError):
        take(images, torch.tensor([5 * factor**2]), factor)


@pytest.mark.parametrize(("factor", "exact"), [(2, True), (3, False), (4, True)])
def test_bytes_are_enlarged_on_the_cpu_as_torch_interpolates_them(factor, exact):
    tile = torch.randint(256, (4, 3, 8, 6), generator=torch.Generator().manual_seed(0)).float()
    size = (8 * factor, 6 * factor)
    expected = torch.nn.functional.interpolate(tile, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarge(tile, size), expected, atol=0 if exact else 1e-4, rtol=0)
    assert enlarge(tile, size).is_contiguous()
    assert torch.equal(enlarge(tile.requires_grad_(), size), expected)
