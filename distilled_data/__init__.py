"""Distilled image datasets as a dependency: tiny, verified, ready for any PyTorch training loop."""

from .dataset import DistilledDataset
from .errors import (
    ArtifactError,
    CheckpointError,
    DistilledDataError,
    DivergenceError,
    FormatError,
    IntegrityError,
    MissingExtraError,
    NewerFormatError,
    OutputError,
    SourceError,
    UnknownNameError,
    UsageError,
)
from .format import Artifact, Metadata

__all__ = [
    "Artifact",
    "ArtifactError",
    "CheckpointError",
    "DistilledDataError",
    "DistilledDataset",
    "DivergenceError",
    "FormatError",
    "IntegrityError",
    "Metadata",
    "MissingExtraError",
    "NewerFormatError",
    "OutputError",
    "SourceError",
    "UnknownNameError",
    "UsageError",
]
