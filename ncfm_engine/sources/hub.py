"""Image data sets of the Hugging Face Hub, or of a folder that `datasets` can load."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distilled_data.errors import MissingExtraError, SourceError, UsageError

from .reader import PARTS, Damage, Origin, Record, Unit, stamp

STREAMED_FROM = 2**31  # bytes; what is smaller is downloaded once and kept by `datasets`
ROWS = 4096  # in a unit of what is not streamed
BATCH = 64  # rows that are read at once

_TEST_SPLITS = ("test", "validation", "valid", "val")
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_IN_ARCHIVE = re.compile(r"(?:(?:zip|tar|gzip|bz2|xz|lz4|zstd)://(?:(?!::).)*::)?(.*)", re.DOTALL)


class HubReader:
    """REPO, REPO:CONFIG or REPO:CONFIG:SPLIT; SPLIT may be two, to train and test with: "train,validation".

    Without SPLIT it is train, with test or else validation where there is one. The image column is found by
    its type, the label column likewise or by `label`. Raises `SourceError`, `UsageError`.
    """

    def __init__(self, spec: str, label: str | None = None):
        with MissingExtraError.unless("datasets", "data", f"the dataset 'hf:{spec}'"):
            import datasets
        self.where = f"hf:{spec}"
        repo, config, splits = divided(os.path.expanduser(spec))
        if not repo or splits.count(",") > 1:
            raise UsageError(f"hf:{spec} is not hf:REPO, hf:REPO:CONFIG or hf:REPO:CONFIG:SPLIT")
        try:
            builder = datasets.load_dataset_builder(repo, config or None)
            commit = re.fullmatch("[0-9a-f]{40}", str(builder.hash))  # of files on disk it is shorter
            license = _card_license(repo, commit and commit[0])
            known = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
            chosen = dict(zip(PARTS, splits.split(",") if splits else _default_splits(known), strict=False))
            size = builder.info.dataset_size
            sliced = any("[" in split for split in chosen.values())
            self.streamed = not sliced and (size is None or size >= STREAMED_FROM)
            options: dict[str, Any] = {"name": config or None, "streaming": self.streamed}
            if self.streamed and hasattr(builder.config, "decode_num_threads"):
                options["decode_num_threads"] = 0  # from 5.2 on it would decode, in threads of its own
            if commit:
                options["revision"] = commit[0]
            loaded: dict[str, Any] = {
                part: datasets.load_dataset(repo, split=split, **options) for part, split in chosen.items()
            }
        except Exception as error:  # of whatever it is that datasets, the Hub or a file format raises
            raise SourceError(f"hf:{spec} cannot be loaded: {type(error).__name__}: {error}") from error
        features = loaded["train"].features or {}  # of a file that is streamed they may not be known
        self.image, self.label = _columns(spec, features, label)
        kind = features[self.label]
        self.classes: Sequence[str] | None = kind.names if isinstance(kind, datasets.ClassLabel) else None
        undecoded = datasets.Image(decode=False)
        self.loaded: dict[str, Any] = {
            part: data.select_columns([self.image, self.label]).cast_column(self.image, undecoded)
            for part, data in loaded.items()
        }
        files = [str(file) for found in (builder.config.data_files or {}).values() for file in found]
        version = [builder.hash, *([*stamp(Path(file))] for file in files if not commit)]
        self.units = [
            Unit(part, [chosen[part], *version, self.image, self.label, *place])
            for part, data in self.loaded.items()
            for place in self._places(data)
        ]
        self.own = _own_places(repo, builder.base_path, files)
        local = Path(repo).exists()
        name = Path(repo).resolve().name if local else Path(repo).name
        self.origin = Origin(
            name,
            f"hf:{name if local else repo}" + (f":{config}" if config else ""),
            commit[0] if commit else "unknown",
            license or builder.info.license or "unknown",
            builder.info.citation or "",
        )

    def _places(self, data: Any) -> list[list[int]]:
        if self.streamed:
            return [[index, data.num_shards] for index in range(data.num_shards)]
        return [[first, min(first + ROWS, len(data))] for first in range(0, len(data), ROWS)]

    def read(self, unit: Unit) -> Iterator[Record | Damage]:
        *_, first, last = unit.what
        data = self.loaded[unit.part]
        rows = data.shard(num_shards=last, index=first) if self.streamed else data.select(range(first, last))
        start = f"{unit.part} {'file ' + str(first) + ', ' if self.streamed else ''}row"
        number = 0 if self.streamed else first
        try:
            # Not row by row: in a worker of a DataLoader, a stream that does so leaves out what it takes for
            # other workers' share.
            for batch in rows.iter(batch_size=BATCH):
                for image, label in zip(batch[self.image], batch[self.label], strict=True):
                    name = f"{start} {number}"
                    number += 1
                    yield self._found(name, label, image)
        except Exception as error:  # likewise
            raise SourceError(
                f"{self.origin.id}: reading stopped after {start} {number}: {type(error).__name__}: {error}"
            ) from error

    def _found(self, name: str, label: Any, image: Any) -> Record | Damage:
        if image is None or (image["bytes"] is None and image["path"] is None):
            return Damage(name, "no image")
        if type(label) not in (int, str):
            shown = f"the label {label!r:.80} is neither a number nor a name"
            return Damage(name, "no label" if label is None else shown)
        if image["bytes"] is not None:
            return Record(name, label, image["bytes"])
        path = image["path"]
        if not _lies_in(path, *self.own):  # or a data set could have any file read that its user may read
            return Damage(name, f"instead of an image the path {path!r:.200}, which is not in the data set")
        import fsspec

        try:
            with fsspec.open(path, "rb") as file:
                return Record(name, label, file.read())  # type: ignore[attr-defined]
        except (FileNotFoundError, IsADirectoryError):
            return Damage(name, f"no file {path}")


def divided(spec: str) -> list[str]:
    """Repository or folder, configuration and splits; "" for what is not said. A drive's colon ends none."""
    return [*re.split(r":(?![\\/])", spec, maxsplit=2), "", ""][:3]


def _card_license(repo: str, commit: str | None) -> str | None:
    """What the card of a repository or a folder says, in words of the Hub; `datasets` does not pass it on."""
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        place = Path(repo) / "README.md"
        if commit:
            place = hf_hub_download(repo, "README.md", repo_type="dataset", revision=commit)
        said = DatasetCard.load(place).data.license  # type: ignore[attr-defined]
    except (EntryNotFoundError, ValueError):  # there is no card
        return None
    licenses = [str(one) for one in (said if isinstance(said, list) else [said]) if one]
    return "other" if len(licenses) > 1 else next(iter(licenses), None)


def _own_places(repo: str, base: str | None, files: Sequence[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Folders that hold this data set's images, its own and where downloads are kept, and files elsewhere."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    kept = [config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH]
    kept += [Path(HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"]
    home = base if base and "://" in base else Path(repo).resolve()
    folders = tuple(f"{folder}/" for folder in (home, *map(os.path.abspath, kept)))
    return folders, frozenset(file for file in files if not file.startswith(folders))


def _lies_in(path: str, folders: tuple[str, ...], files: frozenset[str]) -> bool:
    """Whether a file, or the archive in zip://FILE::ARCHIVE, is one of `files` or below one of `folders`."""
    place = _IN_ARCHIVE.fullmatch(path)[1]  # type: ignore[index]
    if ".." in place.split("/") or "::" in place:
        return False
    return place.startswith(folders) or place in files


def _default_splits(known: Sequence[str]) -> list[str]:
    """One to train with, and where there is one, one to test with."""
    train = "train" if "train" in known or len(known) != 1 else known[0]
    return [train, *[name for name in _TEST_SPLITS if name in known and name != train][:1]]


def _columns(spec: str, features: Any, label: str | None) -> tuple[str, str]:
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if label is not None and label not in features:
        raise UsageError(f"hf:{spec} has no column {label!r}; it has {', '.join(features)}")
    if not labels:
        values = {name: kind.dtype for name, kind in features.items() if isinstance(kind, datasets.Value)}
        labels = [
            name
            for name in _LABEL_COLUMNS
            if values.get(name, "").startswith(("int", "uint", "string", "large_string"))
        ]
    image = _one(images, _IMAGE_COLUMNS)
    label = label or _one(labels, _LABEL_COLUMNS)
    if image is None or label is None:
        raise UsageError(
            f"hf:{spec} has the columns "
            f"{', '.join(f'{n} ({type(k).__name__})' for n, k in features.items())}; "
            + (
                "expected one of type Image"
                if image is None
                else "which one is the label? Say --label-column NAME"
            )
        )
    return image, label


def _one(found: Sequence[str], preferred: Sequence[str]) -> str | None:
    return found[0] if len(found) == 1 else next((name for name in preferred if name in found), None)
