"""Real images: drawn from whole classes, by address, wherever they lie."""

import dataclasses

import numpy as np
import torch

from distilled_data.randomness import generator_at
from ncfm_engine.real import RealImages
from ncfm_engine.sampling import ClassSampler


def test_draws_hold_their_class_and_no_image_twice(digits):
    real = RealImages(digits, "cpu")
    smallest = int(digits.train.counts.min())
    rows = real.draw(smallest, generator_at(0))
    assert (digits.train.targets[rows] == torch.arange(10)[:, None]).all()
    assert all(len(set(row.tolist())) == smallest for row in rows)


def test_draws_differ_between_steps_and_cover_the_whole_class(digits):
    sampler = ClassSampler(digits.train)
    draws = [sampler.draw(30, generator_at(0, "real", step)) for step in range(60)]
    assert not torch.equal(draws[0].sort().values, draws[1].sort().values)
    assert len(torch.cat([d.flatten() for d in draws]).unique()) == len(digits.train)


def test_a_draw_larger_than_a_class_gives_every_image_before_any_twice(digits):
    counts = digits.train.counts
    rows = ClassSampler(digits.train).draw(int(counts.max()) + 20, generator_at(0))
    for row, count in zip(rows, counts.tolist(), strict=True):
        assert len(row[:count].unique()) == count


def test_a_part_of_the_classes_holds_its_images_only_and_draws_the_same_ones(digits):
    whole, part = RealImages(digits, "cpu"), RealImages(digits, "cpu", part=slice(3, 5))
    assert len(part.images) == int(digits.train.counts[3:5].sum())
    of_whole = whole.images[whole.draw(20, generator_at(1))]
    assert torch.equal(part.images[part.draw(20, generator_at(1))], of_whole[3:5])


def test_batches_are_the_rows_in_order_whatever_their_size(digits):
    real = RealImages(digits, "cpu")
    rows = real.draw(7, generator_at(1)).flatten()
    for size in (1, 16, 1000):
        batches = list(real.batches(rows, size))
        assert max(len(batch) for batch in batches) <= size
        assert torch.equal(torch.cat(batches), digits.train.images[rows])


def test_images_in_a_memory_mapped_file_serve_as_well(digits, tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, digits.train.images.numpy())
    mapped = torch.from_numpy(np.load(path, mmap_mode="c"))
    train = dataclasses.replace(digits.train, images=mapped)
    real = RealImages(dataclasses.replace(digits, train=train), "cpu")
    rows = real.draw(5, generator_at(2)).flatten()
    assert torch.equal(torch.cat(list(real.batches(rows, 8))), digits.train.images[rows])
    assert real.images.data_ptr() == mapped.data_ptr()  # never copied as a whole
