"""Distilled image datasets as a dependency: tiny, verified, ready for any PyTorch training loop."""

from .dataset import DistilledDataset
from .errors import (
    AccessError,
    ArtifactError,
    CheckpointError,
    ConflictError,
    DeviceMemoryError,
    DistilledDataError,
    DivergenceError,
    FormatError,
    HubError,
    IntegrityError,
    LockError,
    MissingExtraError,
    NewerFormatError,
    OutputError,
    RankError,
    SourceError,
    UnknownNameError,
    UsageError,
)
from .format import Artifact, Metadata
from .labels import soft_cross_entropy

__all__ = [
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
