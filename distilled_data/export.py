"""A distilled set as a folder of ours, and as other libraries keep images: a Hugging Face dataset, WebDataset
shards, folders of PNG.

What others get are the decoded views, in their order, with class and, where there are teacher labels, the
class probabilities.
"""

import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import MissingExtraError, OutputError, UsageError
from .files import advice, new_folder, replacing
from .format import ARTIFACT_FILE, Metadata, write_artifact
from .manifest import write_manifest

if TYPE_CHECKING:
    import datasets

    from .dataset import DistilledDataset

AT_ONCE = 1000  # views that are decoded; all of them can be gigabytes


def to_hf(data: "DistilledDataset[Any]") -> "datasets.Dataset":
    """See `DistilledDataset.to_hf`."""
    with MissingExtraError.unless("datasets", "data", "a Hugging Face dataset"):
        import datasets
        import pyarrow
    features: dict[str, Any] = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(data.classes)),
    }
    columns: dict[str, Any] = {
        "image": [{"bytes": content, "path": None} for content in _pngs(data)],
        "label": data.targets.tolist(),
    }
    if data.artifact.logits is not None:
        features["soft_label"] = datasets.Sequence(datasets.Value("float32"))
        rows = list(data.soft_targets.numpy())  # which datasets would make numbers of Python of
        columns["soft_label"] = pyarrow.array(rows, pyarrow.list_(pyarrow.float32()))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def to_folder(data: "DistilledDataset[Any]", path: str | Path) -> None:
    """See `DistilledDataset.to_folder`."""
    artifact = dataclasses.replace(data.artifact, metadata=own_metadata(data))
    with new_folder(path) as folder:
        write_artifact(folder / ARTIFACT_FILE, artifact)
        write_manifest(folder)


def own_metadata(data: "DistilledDataset[Any]") -> Metadata:
    """What is written of a set: without results of other images than these or the first of these."""
    results = data.info.results
    measured = [ipc for ipc in range(1, data.ipc + 1) if any(row.get("ipc") == ipc for row in results)]
    hashes = [data.select(ipc).content_hash for ipc in measured]
    own = tuple(row for row in results if row.get("content_hash") in hashes)
    return dataclasses.replace(data.info, results=own)


def to_webdataset(data: "DistilledDataset[Any]", path: str | Path) -> None:
    """See `DistilledDataset.to_webdataset`."""
    with MissingExtraError.unless("webdataset", "data", "a WebDataset shard"):
        from webdataset.writer import TarWriter
    path = Path(path)
    if path.name.endswith("gz"):
        raise UsageError(f"a shard is not compressed, PNG is already; name it .tar, got {path.name}")
    soft = None if data.artifact.logits is None else data.soft_targets.numpy()
    try:
        if path.exists():
            raise UsageError(f"{path} is there already; choose another name, or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        # as a file, since a name may look like a URL; equal sets give equal bytes
        with replacing(path) as new, new.open("wb") as file, TarWriter(file, mtime=0.0) as shard:
            for number, (content, label) in enumerate(zip(_pngs(data), data.targets.tolist(), strict=True)):
                sample = {"__key__": f"{number:08d}", "png": content, "cls": label}
                shard.write(sample if soft is None else sample | {"soft.npy": soft[number]})
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror or error}. {advice(error)}") from error


def to_imagefolder(data: "DistilledDataset[Any]", path: str | Path) -> None:
    """See `DistilledDataset.to_imagefolder`."""
    digits = len(str(len(data.classes) - 1))
    names = [f"{label:0{digits}d}_{_file_name(name)}" for label, name in enumerate(data.classes)]
    with new_folder(path) as folder:
        for name in names:
            (folder / name).mkdir()
        for number, (content, label) in enumerate(zip(_pngs(data), data.targets.tolist(), strict=True)):
            (folder / names[label] / f"{number:08d}.png").write_bytes(content)


def _pngs(data: "DistilledDataset[Any]") -> Iterator[bytes]:
    for rows in torch.arange(len(data), device="cpu").split(AT_ONCE):
        for image in data.decoded(rows):
            yield to_png(image)


def to_png(image: Tensor) -> bytes:
    """A file of values 0..255 [channels, height, width], 1 or 3 channels."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return file.getvalue()


def to_pil(image: Tensor) -> Any:
    """A PIL image of values 0..255 [channels, height, width], 1 or 3 channels. Raises `MissingExtraError`."""
    with MissingExtraError.unless("pillow", "engine", "a PIL image"):
        from PIL import Image
    array = image.round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name).encode()[:80].decode(errors="ignore")
