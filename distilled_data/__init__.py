"""Distilled image datasets as a dependency: tiny, verified, ready for any PyTorch training loop."""

from .dataset import DistilledDataset
from .errors import (
    ArtifactError,
    CheckpointError,
    DeviceMemoryError,
    DistilledDataError,
    DivergenceError,
    FormatError,
    IntegrityError,
    MissingExtraError,
    NewerFormatError,
    OutputError,
    RankError,
    SourceError,
    UnknownNameError,
    UsageError,
)
from .format import Artifact, Metadata

__all__ = [
    "Artifact",
    "ArtifactError",
    "CheckpointError",
    "DeviceMemoryError",
    "DistilledDataError",
    "DistilledDataset",
    "DivergenceError",
    "FormatError",
    "IntegrityError",
    "Metadata",
    "MissingExtraError",
    "NewerFormatError",
    "OutputError",
    "RankError",
    "SourceError",
    "UnknownNameError",
    "UsageError",
]
