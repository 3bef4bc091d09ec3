"""The parquet mirror: what `DistilledDataset` decodes, as rows that `datasets` and the Hub viewer read."""

import dataclasses
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from distilled_data import Artifact, DistilledDataset, Metadata


def parquet_bytes(artifact: Artifact) -> bytes:
    """A parquet file with one row per decoded view, in the order of `DistilledDataset`: rank, class, view.

    Columns: `image` (PNG), `label` (class index, with the names), and `soft_label` (probabilities) where
    the artifact has teacher logits. The first k * classes * views rows are the IPC-k set.
    """
    schema = _schema(artifact.metadata, soft=artifact.logits is not None)
    file = io.BytesIO()
    with pq.ParquetWriter(file, schema) as writer:
        # One rank at a time: all views decoded at once can be gigabytes.
        for rank in range(artifact.metadata.ipc):
            writer.write_table(_rows(_rank(artifact, rank), schema))
    return file.getvalue()


def _schema(metadata: Metadata, soft: bool) -> pa.Schema:
    columns = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}
    features: dict[str, object] = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": list(metadata.classes)},
    }
    if soft:
        columns["soft_label"] = pa.list_(pa.float32())
        # "Sequence" and not "List", which only datasets 4 and later can read.
        features["soft_label"] = {"_type": "Sequence", "feature": {"_type": "Value", "dtype": "float32"}}
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _rank(artifact: Artifact, rank: int) -> DistilledDataset:
    part = slice(rank, rank + 1)
    logits = None if artifact.logits is None else artifact.logits[part]
    return DistilledDataset(
        Artifact(artifact.images[part], dataclasses.replace(artifact.metadata, ipc=1), logits)
    )


def _rows(views: DistilledDataset, schema: pa.Schema) -> pa.Table:
    columns: dict[str, object] = {
        "image": [{"bytes": _png(image), "path": None} for image in views.images],
        "label": views.targets.numpy(),
    }
    if "soft_label" in schema.names:
        columns["soft_label"] = list(views.soft_targets.numpy())
    return pa.table(columns, schema=schema)


def _png(image: Tensor) -> bytes:
    """uint8 [channels, height, width], 1 or 3 channels."""
    array = image.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, "PNG")
    return file.getvalue()
