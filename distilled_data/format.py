"""Artifact format, version 1: the only module that knows names, shapes, dtypes and rules of the files.

A folder holds `distilled.safetensors` (the only source of truth), `README.md`, `data/train.parquet`,
`preview.png` and `manifest.json`. The artifact has two tensors and one metadata key:

    images  uint8   [ipc, classes, channels, height, width]   packed: factor f holds f x f tiles each
    logits  float16 [ipc, classes, factor**2, classes]        optional, raw teacher logits per decoded view
    metadata["distilled_data"]                                sorted JSON, see `Metadata`

Axis 0 is the rank, so `images[:k]` is the IPC-k set; axis 1 is the class, so labels are implied.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import FormatError, NewerFormatError, UnknownNameError, UsageError
from .files import regular, write_file
from .indexing import as_int, ordered
from .terminal import shortened

FORMAT_VERSION = 1
METADATA_KEY = "distilled_data"
ARTIFACT_FILE = "distilled.safetensors"
CARD_FILE = "README.md"
PARQUET_FILE = "data/train.parquet"
PREVIEW_FILE = "preview.png"
MANIFEST_FILE = "manifest.json"  # see `manifest`
MAX_FACTOR = 64  # or a small file could stand for more views than the memory holds
MAX_HEADER = 25_000_000  # bytes; as much as the Hub's own reader of safetensors headers takes
FOLDER_FILES = (ARTIFACT_FILE, CARD_FILE, PARQUET_FILE, PREVIEW_FILE, MANIFEST_FILE)

_TENSORS = {"images": ("U8", torch.uint8), "logits": ("F16", torch.float16)}  # to safetensors, to torch
_DECODE = {"interpolation": "bilinear", "align_corners": False, "view_order": "row-major"}


@dataclass(frozen=True)
class Metadata:
    """What a user of the images has to know; stored as one sorted JSON text.

    `dataset` is the name of what was distilled; `classes` are in label order. A packed image and every
    decoded view have 1 or 3 `channels` and `height` x `width` pixels; `mean` and `std`, per channel, are of
    the real images in [0, 1]. There are `ipc` packed images per class, of `factor` x `factor` tiles each.

    `labels` (kind, temperature, teacher), `source` (id, fingerprint, images, license, citation ...) and
    `recipe` (complete resolved configuration, versions) are plain JSON objects and `results` a list of them
    (rows of `ncfm_engine.evaluate`), so that a new field there needs no new format version. Raises
    `FormatError` on construction when a value is unusable.
    """

    dataset: str
    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ipc: int
    factor: int = 1
    labels: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    results: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        def check(condition: bool, what: str, got: object):
            if not condition:
                raise FormatError(f"artifact metadata: {what}, got {got!r:.500}")

        for name in ("classes", "mean", "std", "results"):
            value = getattr(self, name)
            check(isinstance(value, (list, tuple)), f"{name} must be a list", value)
            object.__setattr__(self, name, tuple(value))
        for name in ("channels", "height", "width", "ipc", "factor"):
            value = getattr(self, name)
            check(type(value) is int and value > 0, f"{name} must be a positive integer", value)
        check(isinstance(self.dataset, str) and self.dataset != "", "dataset must be a name", self.dataset)
        check(all(isinstance(c, str) and c for c in self.classes), "classes must be names", self.classes)
        check(len(self.classes) > 1, "there must be two classes or more", self.classes)
        repeated = {name: count for name, count in Counter(self.classes).items() if count > 1}
        check(not repeated, "class names must differ", repeated)
        check(self.channels in (1, 3), "channels must be 1 or 3", self.channels)
        check(self.factor <= MAX_FACTOR, f"factor must be {MAX_FACTOR} or less", self.factor)
        for name in ("height", "width"):
            pixels = getattr(self, name)
            check(pixels % self.factor == 0, f"{name} must be a multiple of factor {self.factor}", pixels)
        for name in ("mean", "std"):
            value = getattr(self, name)
            finite = all(isinstance(x, (int, float)) and abs(x) < 1e30 for x in value)
            check(len(value) == self.channels and finite, f"{name} must be one number per channel", value)
        check(all(x >= 1e-30 for x in self.std), "std must be positive, 1e-30 or more", self.std)
        for name in ("labels", "source", "recipe"):
            check(isinstance(getattr(self, name), dict), f"{name} must be an object", getattr(self, name))
        temperature = self.labels.get("temperature", 1.0)
        positive = isinstance(temperature, (int, float)) and 1e-30 < temperature < 1e30
        check(positive, "labels.temperature must be a positive number, 1e-30 to 1e30", temperature)
        check(all(isinstance(r, dict) for r in self.results), "results must be objects", self.results)

    def to_json(self) -> str:
        """Sorted, compact JSON: equal metadata gives equal bytes in any process. Raises
        `FormatError` for what JSON cannot hold.
        """
        content = {"format_version": FORMAT_VERSION, "decode": _DECODE, "value_range": [0, 255]}
        try:
            content |= dataclasses.asdict(self)
            text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
            json.dumps(content, ensure_ascii=False).encode()  # half a character is a name of no file or card
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"artifact metadata cannot be written as JSON: {error}") from error
        return text

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of the tensor `images` or `logits`."""
        if tensor == "images":
            return (self.ipc, len(self.classes), self.channels, self.height, self.width)
        return (self.ipc, len(self.classes), self.factor**2, len(self.classes))

    @classmethod
    def from_json(cls, text: str) -> "Metadata":
        """What `to_json` wrote. Raises `FormatError`."""
        try:
            content = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"artifact metadata is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise FormatError("artifact metadata is not a JSON object")
        version = content.pop("format_version", None)
        refuse_newer(version, "the artifact")
        if type(version) is not int or version != FORMAT_VERSION:
            raise FormatError(f"artifact metadata: expected format_version {FORMAT_VERSION}, got {version!r}")
        decode, value_range = content.pop("decode", None), content.pop("value_range", None)
        if decode != _DECODE or value_range != [0, 255]:
            raise FormatError(f"artifact metadata: unknown decode rule {decode!r} or range {value_range!r}")
        expected = {f.name for f in dataclasses.fields(cls)}
        if set(content) != expected:
            raise FormatError(
                f"artifact metadata: fields missing {sorted(expected - set(content))}, "
                f"unknown {sorted(set(content) - expected)}"
            )
        return cls(**content)


def refuse_newer(version: Any, where: str | Path) -> None:
    """Raises `NewerFormatError` for the format of a later version of this package."""
    if type(version) is int and version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{where} has format version {version}, this package reads up to {FORMAT_VERSION}. "
            "Upgrade it: pip install -U distilled-data"
        )


@dataclass(frozen=True, eq=False)
class Artifact:
    """Tensors and metadata of one distilled set, checked against each other on construction: `FormatError`.

    `images` are uint8 [ipc, classes, channels, height, width], `logits`, raw ones of a teacher for every
    decoded view, float16 [ipc, classes, factor**2, classes], with the sizes that `metadata` says. Two are the
    same content where their `content_hash` is.
    """

    images: Tensor
    metadata: Metadata
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            dtype, shape = _TENSORS[name][1], self.metadata.shape(name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise FormatError(
                    f"artifact tensor {name!r}: expected {dtype} {list(shape)} by the metadata, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            if not tensor.is_contiguous() or tensor.requires_grad:  # or every access would copy all of it
                object.__setattr__(self, name, tensor.detach().contiguous())
        if self.logits is not None and not torch.isfinite(self.logits).all():
            raise FormatError("artifact tensor 'logits' holds values that are not finite")

    def __repr__(self) -> str:  # without the numbers, of which even torch's shortened form fills screens
        parts = [f"{name} {list(tensor.shape)}" for name, tensor in self.tensors.items()]
        return f"Artifact({self.metadata.dataset}: {', '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        """Tensors get memory of their own: pickle writes all that a view lies in, which is a whole file.

        They keep it, because multiprocessing passes on memory that has to live until it is received.
        """
        for name, tensor in self.tensors.items():
            if tensor.nbytes < tensor.untyped_storage().nbytes():
                object.__setattr__(self, name, tensor.clone())
        return self.__dict__

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        pairs = {"images": self.images, "logits": self.logits}
        return {name: tensor for name, tensor in pairs.items() if tensor is not None}

    @property
    def content_hash(self) -> str:
        """sha256 over name, dtype, shape and bytes of the tensors in name order; metadata is left out."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            head = f"{name}:{str(tensor.dtype).removeprefix('torch.')}:{list(tensor.shape)}:"
            digest.update(head.encode())
            digest.update(tensor.cpu().numpy().data)
        return digest.hexdigest()


def write_artifact(path: str | Path, artifact: Artifact) -> None:
    """Write `artifact` to `path`: all of it or, on any error or kill, none of it."""
    write_file(path, artifact_bytes(artifact))


def artifact_bytes(artifact: Artifact) -> bytes:
    """Of its file. Raises `FormatError` for metadata that make a larger header than `read_artifact` takes."""
    tensors = {name: tensor.cpu() for name, tensor in artifact.tensors.items()}
    content = save(tensors, {METADATA_KEY: artifact.metadata.to_json()})
    if (length := int.from_bytes(content[:8], "little")) > MAX_HEADER:
        raise FormatError(
            f"the metadata make a header of {length} bytes; the format allows {MAX_HEADER}. Shorten them."
        )
    return content


def read_artifact(
    path: str | Path,
    *,
    ipc: int | None = None,
    classes: Sequence[str | int] | None = None,
    content: Tensor | None = None,
) -> Artifact:
    """Read an artifact, or only its first `ipc` ranks and the given `classes` (names or indices).

    `content` is the bytes of the file, uint8 [size], if they were read already: the tensors lie in them. A
    class subset is renumbered in the order given, in the images and in both class axes of the logits.
    Raises `FormatError` for anything that is not a whole artifact of this format, `UsageError` for a
    subset that it does not have.
    """
    with _open(path) as file, torch.device("cpu"):  # of which parts would be, if it is torch's default
        views, text = ({}, (file.metadata() or {}).get(METADATA_KEY)) if content is None else _views(content)
        metadata = parse_metadata(path, text)
        # Parts of the file may lie about shapes; the full shapes are checked before anything is taken.
        names = set(file.keys())
        if names not in ({"images"}, {"images", "logits"}):
            raise FormatError(f"{path}: expected the tensors images and logits, got {sorted(names)}")
        for name in names:
            expected, found = [_TENSORS[name][0], *metadata.shape(name)], _stated(file.get_slice(name))
            if found != expected:
                raise FormatError(
                    f"{path}: tensor {name!r}: expected {expected} by the metadata, got {found}"
                )
        ranks = slice(0, resolve_ipc(ipc, metadata.ipc))
        tensors = {
            name: views[name][ranks] if name in views else file.get_slice(name)[ranks].clone()
            for name in names
        }
    metadata = dataclasses.replace(metadata, ipc=ranks.stop)
    whole = Artifact(tensors["images"], metadata, tensors.get("logits"))
    return whole if classes is None else select_classes(whole, classes)


def _stated(part: Any) -> list[Any]:
    """Dtype and shape of a slice; an error would keep that, and Windows replaces no file that is mapped."""
    return [part.get_dtype(), *part.get_shape()]


def _views(content: Tensor) -> tuple[dict[str, Tensor], str | None]:
    """Tensors, of the dtypes of the format, and metadata in the bytes uint8 [size] of a safetensors file."""
    start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
    header = json.loads(content[8:start].numpy().tobytes())
    text = (header.pop("__metadata__", None) or {}).get(METADATA_KEY)
    dtypes, tensors = dict(_TENSORS.values()), {}
    for name, entry in header.items():
        if (dtype := dtypes.get(entry["dtype"])) is not None:
            first, end = (start + offset for offset in entry["data_offsets"])
            part = content[first:end] if first % dtype.itemsize == 0 else content[first:end].clone()
            tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors, text


def resolve_ipc(ipc: int | None, stored: int) -> int:
    """The number of ranks to take: all `stored` for None; `UsageError` outside 1..stored."""
    if ipc is None:
        return stored
    number = as_int("ipc", ipc, None)
    if not 1 <= number <= stored:
        raise UsageError(
            f"ipc={ipc!r} was asked for; the artifact holds {stored} images per class (1..{stored})"
        )
    return number


def select_classes(artifact: Artifact, classes: Sequence[str | int]) -> Artifact:
    """The artifact restricted to two or more `classes` (names or indices), renumbered in that order. Raises
    `UnknownNameError` and `UsageError`.
    """
    names = artifact.metadata.classes
    numbers = {name: number for number, name in enumerate(names)}
    classes = ordered("names or indices", classes)
    for wanted in classes:
        if isinstance(wanted, str) and wanted not in numbers:
            raise UnknownNameError.of("class", wanted, names)
        if not isinstance(wanted, str) and (isinstance(wanted, bool) or wanted not in range(len(names))):
            raise UsageError(f"class index {wanted} is not a whole number in 0..{len(names) - 1}")
    index = [numbers[c] if isinstance(c, str) else int(c) for c in classes]
    if repeated := [repr(names[number]) for number, count in Counter(index).items() if count > 1]:
        raise UsageError(f"classes must be different ones, got {shortened(repeated)} more than once")
    if len(index) < 2:
        raise UsageError(f"classes must be two or more, got {classes}")
    logits = None if artifact.logits is None else artifact.logits[:, index][..., index]
    metadata = dataclasses.replace(artifact.metadata, classes=tuple(names[i] for i in index))
    return Artifact(artifact.images[:, index], metadata, logits)


def _open(path: str | Path) -> Any:
    path = Path(path)
    try:
        with regular(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if MAX_HEADER < length < path.stat().st_size:
            raise FormatError(f"{path} has a header of {length} bytes; the format allows {MAX_HEADER}")
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise FormatError(
            f"{path} is not a whole safetensors file ({error}). It may be cut off or another kind of file; "
            "get it again."
        ) from error
    except FileNotFoundError as error:
        raise FormatError(f"{path} does not exist; expected a {ARTIFACT_FILE}") from error
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_metadata(path: str | Path, text: str | None) -> Metadata:
    """`Metadata.from_json` of what the file `path` holds. Raises `FormatError`, which names it."""
    if text is None:
        raise FormatError(
            f"{path} is a safetensors file of another kind: its metadata has no key {METADATA_KEY!r}"
        )
    try:
        return Metadata.from_json(text)
    except FormatError as error:
        raise type(error)(f"{path}: {error}") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=)`: of a key that is there twice, either value might be meant."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("an object has the same key twice")
    return content
