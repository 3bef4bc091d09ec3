"""What a user's type checker knows: pyright reads this file, and what it takes for true is what happens."""

from typing import assert_type

from torch import Tensor

from distilled_data import DistilledDataset


def test_a_loader_gives_pairs_of_tensors(data: DistilledDataset):
    for batches in (
        data.loader(5),
        data.select(2).with_labels("hard").loader(5),
        data.split(0.5)[0].loader(5),
    ):
        for images, targets in batches:
            assert isinstance(assert_type(images, Tensor), Tensor)
            assert isinstance(assert_type(targets, Tensor), Tensor)


def test_a_loader_of_dicts_gives_tensors_by_names(data: DistilledDataset):
    for batch in data.with_format("dict").loader(5):
        assert isinstance(assert_type(batch, dict[str, Tensor])["pixel_values"], Tensor)
    for images, _ in data.with_format("dict").with_format("tuple").loader(5):
        assert isinstance(assert_type(images, Tensor), Tensor)


def test_a_set_that_was_loaded_gives_pairs(data: DistilledDataset, tmp_path):
    data.to_folder(tmp_path / "set")
    images, _ = next(iter(DistilledDataset.from_folder(tmp_path / "set").loader(5)))
    assert isinstance(assert_type(images, Tensor), Tensor)
