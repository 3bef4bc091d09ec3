"""The public surface of the design: names, signatures and shapes that users may rely on."""

import inspect
import pickle
import re
import tomllib

import pytest
import torch
from commands import ROOT
from torch.utils.data import DataLoader

import distilled_data
from distilled_data import (
    Artifact,
    DistilledDataset,
    Metadata,
    MissingExtraError,
    UnknownNameError,
    errors,
    soft_cross_entropy,
)
from distilled_data.loader import Loader
from distilled_data.tensors import artifact_of
from ncfm_engine.discrepancy import characteristic_function, ncfd
from ncfm_engine.frequencies import SamplingNetwork


def signature(function) -> str:
    """Names, kinds and defaults of the parameters, without types."""
    parameters = inspect.signature(function).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare))


def test_the_package_exports_these_names_in_this_order():
    assert distilled_data.__all__ == [
        "AccessError",
        "Artifact",
        "ArtifactError",
        "CheckpointError",
        "ConflictError",
        "DeviceMemoryError",
        "DistilledDataError",
        "DistilledDataset",
        "DivergenceError",
        "FormatError",
        "HubError",
        "IntegrityError",
        "LockError",
        "Metadata",
        "MissingExtraError",
        "NewerFormatError",
        "OutputError",
        "RankError",
        "SourceError",
        "UnknownNameError",
        "UsageError",
        "soft_cross_entropy",
    ]
    assert distilled_data.__all__ == sorted(distilled_data.__all__)


@pytest.mark.parametrize("name", distilled_data.__all__)
def test_an_exported_name_exists_and_is_documented(name):
    exported = getattr(distilled_data, name)
    if isinstance(exported, type) and issubclass(exported, Exception):
        assert name in errors.__doc__.split()  # drawn in the error tree
    assert exported.__doc__


def test_every_error_is_exported_and_is_one_of_ours():
    defined = {
        name: value
        for name, value in vars(errors).items()
        if getattr(value, "__module__", "") == errors.__name__
    }
    assert set(defined) <= set(distilled_data.__all__)
    assert all(issubclass(error, distilled_data.DistilledDataError) for error in defined.values())


ERRORS = [getattr(errors, name) for name in distilled_data.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_comes_out_of_another_process_as_what_it_is(kind):
    raised = {
        UnknownNameError: UnknownNameError.of("class", "dg", ["cat", "dog"]),
        MissingExtraError: MissingExtraError.of("optuna", "search", "the search"),
    }.get(kind, kind("what happened"))
    for again in (pickle.loads(pickle.dumps(raised)), kind(str(raised))):  # pickle; DataLoader
        assert (type(again), str(again)) == (kind, str(raised))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            DistilledDataset.from_hub,
            "(repo_id, *, revision=None, ipc=None, classes=None, labels='soft', lock=None, token=None, "
            "endpoint=None, cache_dir=None, local_files_only=False, force_download=False)",
        ),
        (DistilledDataset.from_folder, "(path, *, ipc=None, classes=None, labels='soft')"),
        (
            DistilledDataset.from_tensors,
            "(images, classes=None, logits=None, factor=1, mean=None, std=None, temperature=1.0, "
            "labels='soft', targets=None, values=None, dataset='tensors', source=None)",
        ),
        (DistilledDataset.select, "(self, ipc=None, classes=None)"),
        (DistilledDataset.with_labels, "(self, labels, temperature=None)"),
        (
            DistilledDataset.loader,
            "(self, batch_size=256, *, device='cpu', augment=None, mix=None, teacher=None, shuffle=True, "
            "drop_last=False, seed=0, rank=0, world_size=1, infinite=False)",
        ),
        (
            DistilledDataset.dataloader,
            "(self, batch_size=256, *, augment=None, mix=None, teacher=None, shuffle=True, "
            f"drop_last=False, seed=0, rank=0, world_size=1, loader_class={DataLoader!r}, **options)",
        ),
        (DistilledDataset.with_format, "(self, format, image_key='pixel_values', label_key='labels')"),
        (DistilledDataset.split, "(self, fraction, seed=0)"),
        (DistilledDataset.to_hf, "(self)"),
        (DistilledDataset.verify, "(self)"),
        (soft_cross_entropy, "(logits, targets, temperature=1.0)"),
        (ncfd, "(real, synthetic, frequencies, alpha=0.5)"),
        (characteristic_function, "(features, frequencies)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_public_function_has_the_signature_of_the_design_and_a_docstring(method, expected):
    assert signature(method) == expected
    assert method.__doc__


OF_A_SET = [
    value
    for name, value in inspect.getmembers(DistilledDataset, inspect.isroutine)
    if not name.startswith("_")
]


@pytest.mark.parametrize(
    "function",
    [*OF_A_SET, DistilledDataset, Artifact, Metadata, soft_cross_entropy],
    ids=lambda function: function.__name__,
)
def test_a_public_docstring_tells_of_every_parameter(function):
    told = function.__doc__
    if function == DistilledDataset.dataloader:
        told += DistilledDataset.loader.__doc__
    if function == DistilledDataset:
        told += DistilledDataset.__init__.__doc__
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    assert [name for name in names if not re.search(rf"\b{name}\b", told)] == []


@pytest.mark.parametrize("kind", [Artifact, DistilledDataset, Loader, Metadata, SamplingNetwork])
def test_public_methods_and_properties_are_documented(kind):
    members = {
        name: value
        for name, value in vars(kind).items()
        if callable(value) or isinstance(value, classmethod | property)
    }
    assert [name for name, value in members.items() if not name.startswith("_") and not value.__doc__] == []


@pytest.mark.parametrize("package", ["distilled_data", "hub", "ncfm_engine"])
def test_a_users_type_checker_is_told_that_there_are_types(package):
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in packaged[package]
    assert (ROOT / package / "py.typed").exists()


def test_a_users_type_checker_takes_for_a_set_what_an_artifact_is_made_of():
    public, inner = (inspect.get_annotations(made) for made in (DistilledDataset.from_tensors, artifact_of))
    assert {name: kind for name, kind in public.items() if name in inner and name != "return"} == {
        name: kind for name, kind in inner.items() if name != "return"
    }


def test_a_set_has_the_attributes_of_torchvisions_datasets_and_its_own(artifact):
    data = DistilledDataset(artifact)
    names = ("images", "targets", "soft_targets", "classes", "class_to_idx", "transform", "target_transform")
    for name in (*names, "ipc", "mean", "std", "info", "content_hash"):
        assert hasattr(data, name), name


def test_the_sampling_network_takes_a_dimension_and_a_count_and_is_called_with_a_generator():
    network = SamplingNetwork(7, 40)
    assert SamplingNetwork(dim=7, num_frequencies=40)(torch.Generator()).shape == (40, 7)
    assert network(torch.Generator()).shape == (40, 7)


def test_the_discrepancy_is_one_number_per_class():
    generator = torch.Generator().manual_seed(0)
    real, synthetic = (torch.randn(3, count, 5, generator=generator) for count in (20, 4))
    frequencies = torch.randn(11, 5, generator=generator)
    assert ncfd(real, synthetic, frequencies).shape == (3,)
    real_part, imaginary_part = characteristic_function(real, frequencies)
    assert real_part.shape == imaginary_part.shape == (3, 11)
