"""Artifacts and artifact folders made of real digits."""

import functools

import numpy as np
import torch

from distilled_data import Artifact, Metadata
from distilled_data.format import ARTIFACT_FILE, write_artifact
from hub import complete_folder
from ncfm_engine.sources.digits import read_digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@functools.cache
def digits():
    return read_digits().arrays["train"]


def make_artifact(ipc=2, channels=1, logits=True, classes=DIGITS, **metadata):
    """Real digits, `ipc` per class; 25 classes are the ten digits over and over."""
    scans, labels = digits()
    scans = torch.from_numpy(scans)
    chosen = [scans[np.flatnonzero(labels == label % 10)[: ipc * channels]] for label in range(len(classes))]
    images = torch.stack(chosen, 1).unflatten(0, (ipc, channels)).transpose(1, 2).contiguous()
    count = len(classes)
    teacher = torch.randn(ipc, count, 4, count, generator=torch.Generator().manual_seed(0)).half()
    fields = {"dataset": "digits", "mean": (0.3,) * channels, "std": (0.4,) * channels} | metadata
    return Artifact(
        images,
        Metadata(classes=tuple(classes), channels=channels, height=8, width=8, ipc=ipc, factor=2, **fields),
        teacher if logits else None,
    )


def make_folder(folder, artifact):
    write_artifact(folder / ARTIFACT_FILE, artifact)
    complete_folder(folder)
    return folder


def flip(path, offset=-1):
    """Another bit in the byte at `offset` of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
