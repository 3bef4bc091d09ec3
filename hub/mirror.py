"""The parquet mirror: what `DistilledDataset` decodes, as rows that `datasets` and the Hub viewer read."""

import dataclasses
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distilled_data import Artifact, DistilledDataset, Metadata
from distilled_data.export import AT_ONCE, to_png


def parquet_bytes(artifact: Artifact) -> bytes:
    """A parquet file with one row per decoded view, in the order of `DistilledDataset`: rank, class, view.

    Columns: `image` (PNG), `label` (class index, with the names), and `soft_label` (probabilities) where
    the artifact has teacher logits. The first k * classes * views rows are the IPC-k set. A row group has
    the rows of one rank, `AT_ONCE` at most: the Hub's viewer reads none of more than 300 MB.
    """
    schema = _schema(artifact.metadata, soft=artifact.logits is not None)
    file = io.BytesIO()
    with pq.ParquetWriter(file, schema) as writer:
        for rank in range(artifact.metadata.ipc):
            views = _rank(artifact, rank)
            for rows in torch.arange(len(views), device="cpu").split(AT_ONCE):
                writer.write_table(_rows(views, rows, schema))
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
    tensors = {name: tensor[rank : rank + 1] for name, tensor in artifact.tensors.items()}
    return DistilledDataset(Artifact(metadata=dataclasses.replace(artifact.metadata, ipc=1), **tensors))


def _rows(views: DistilledDataset, rows: Tensor, schema: pa.Schema) -> pa.Table:
    columns: dict[str, object] = {
        "image": [{"bytes": to_png(image), "path": None} for image in views.decoded(rows)],
        "label": views.targets[rows].numpy(),
    }
    if "soft_label" in schema.names:
        columns["soft_label"] = list(views[rows][1].numpy())
    return pa.table(columns, schema=schema)
