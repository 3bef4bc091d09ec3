"""Distilled sets as other projects publish them: read into an artifact, and written from one.

The content of a path tells what it is:

    FILE.pt    [images, labels]                        NCFM, IDC: pixels in [0, 1], packed
    FILE.pt    {"images": images, "labels": labels}    anybody
    FILE.pt    {"data": [[images, labels], ...]}       DC, DSA, DM: normalised, one pair per experiment
    images_X.pt with labels_X.pt, or their folder      MTT, DATM: normalised or whitened; numbers or logits
    FILE.npz   arrays images and labels                anybody
    FOLDER     CLASS/*.png, *.jpg ...                  SRe2L, RDED, torchvision's ImageFolder

Nothing is unpickled but tensors and numbers.
"""

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import FormatError, MissingExtraError, OutputError, UsageError
from .export import own_metadata
from .files import advice, regular, replacing, write_file
from .format import ARTIFACT_FILE, METADATA_KEY, Artifact, Metadata, parse_metadata
from .manifest import Fingerprint
from .pictures import check_depth, check_opaque
from .tensors import artifact_of, check_numbers, own, per_channel

if TYPE_CHECKING:
    from .dataset import DistilledDataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHERS = (".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".jfif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow must not try others, whatever the suffix
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # those of 16 bits would be cut off
EXPECTED = (
    "expected [images, labels] (NCFM, IDC), a dict of them, a dict of experiments with the key 'data' (DC, "
    "DSA, DM), images_X.pt with labels_X.pt (MTT, DATM), .npz, or a folder of images per class"
)
REPEATS = 16  # times that a tensor may hold its own bytes, as one of grey images seen as three channels
IMAGE_KEYS, LABEL_KEYS = ("images", "x", "data", "x_train"), ("labels", "y", "targets", "y_train")
OTHER_KEYS = ("classes", "mean", "std", "factor", "logits", "temperature", METADATA_KEY)
# In the order of their numbers, which other projects take over with the files.
KNOWN_CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
        "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile "
        "cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp "
        "lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree "
        "orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum "
        "rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider "
        "squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
        "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ),
}


@dataclass(frozen=True)
class Found:
    """What a path holds, and what its own form says of it; None is not known."""

    form: str
    images: Tensor  # [N, channels, height, width]
    targets: Tensor  # [N] or [N, classes]
    classes: tuple[str, ...] | None = None
    logits: Tensor | None = None  # [N, views, classes]
    factor: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    values: str | None = None
    temperature: float = 1.0
    metadata: Metadata | None = None  # of a file that `write_set` wrote
    pair: tuple[Path, Path] | None = None  # the files, where there are two


def read_set(
    path: str | Path,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    factor: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    values: str | None = None,
    license: str | None = None,
    experiment: int = -1,
) -> Artifact:
    """The set at `path`, in any of the forms above, as an artifact named `name`.

    What is given beats what the file says. What neither says is guessed by the images, with a warning:
    `values` (see `distilled_data.tensors.VALUES`) and, of the NCFM form, the packing `factor`, which is 1
    elsewhere. Classes that are not told are numbered, but for cifar10 and cifar100, whose names are known. Of
    a DC file with several experiments the last is taken. A .npz of `write_set` comes back as it was, with
    `name` and `license` changed if they are given; with more than those, or with other arrays in it, it is
    read as anybody's.

    Raises `FormatError` for a file in no such form or that cannot be read, `UsageError` for what makes no
    artifact or needs a word.
    """
    path = Path(path)
    try:
        found = _read(path, experiment)
    except OSError as error:
        raise FormatError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    ours = found.metadata if all(word is None for word in (classes, factor, mean, std, values)) else None
    if factor is None:
        check_numbers("images", found.images)
        factor = found.factor or _guess_factor(found.images)
    chosen = found.classes if classes is None else classes
    artifact = artifact_of(
        found.images,
        chosen,
        targets=found.targets,
        logits=found.logits,
        factor=factor,
        mean=found.mean if mean is None else mean,
        std=found.std if std is None else std,
        temperature=found.temperature,
        values=values or found.values,
    )
    if chosen is None:
        known = tuple(KNOWN_CLASSES.get(name or "", "").split())
        fits = len(known) == len(artifact.metadata.classes)
        if fits:
            artifact = replace(artifact, metadata=replace(artifact.metadata, classes=known))
        taken = f"taken for those of {name}. If that is wrong, give" if fits else "numbered. Give"
        warnings.warn(
            f"{path} names no classes; they are {taken} them in order: classes=, --classes", stacklevel=2
        )
    told = ("classes", "channels", "height", "width", "mean", "std", "ipc", "factor")
    if ours is not None and all(getattr(ours, name) == getattr(artifact.metadata, name) for name in told):
        source = ours.source | ({} if license is None else {"license": license})
        return replace(artifact, metadata=replace(ours, dataset=name or ours.dataset, source=source))
    images, labels = found.pair or (path, None)
    source = {
        "id": name or path.stem,
        "license": license,
        "file": path.name,
        "form": found.form,
        "sha256": Fingerprint.of(images).sha256 if images.is_file() else None,
        "labels_sha256": None if labels is None else Fingerprint.of(labels).sha256,
    }
    metadata = replace(
        artifact.metadata,
        dataset=name or path.stem,
        source={key: value for key, value in source.items() if value is not None},
        recipe={"converted": {"factor": factor, "values": values or found.values or "guessed"}},
    )
    return replace(artifact, metadata=metadata)


def write_set(data: "DistilledDataset[Any]", path: str | Path) -> None:
    """Write a set to `path` in the form that its name stands for: .npz, images_X.pt, .pt, else a folder.

    NCFM's form and .npz hold the packed images, the others the decoded views; .npz alone holds everything.
    Raises `UsageError` for a folder that is not empty, `OutputError` and `MissingExtraError`.
    """
    path = Path(path)
    packed = data.artifact.images.transpose(0, 1).flatten(0, 1)  # one class after the other
    numbers = torch.arange(len(data.classes), device="cpu").repeat_interleave(data.ipc)
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {
            "images": packed.numpy(),
            "labels": numbers.numpy(),
            "classes": np.array(data.classes),
            "mean": np.array(data.mean),
            "std": np.array(data.std),
            "factor": np.array(data.info.factor),
            METADATA_KEY: np.array(own_metadata(data).to_json()),
        }
        if data.artifact.logits is not None:
            arrays["logits"] = data.artifact.logits.transpose(0, 1).flatten(0, 1).numpy()
            arrays["temperature"] = np.array(data.info.labels.get("temperature", 1.0))
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        write_file(path, file.getvalue())
    elif path.suffix == ".pt" and path.name.startswith("images"):
        order = data.targets.argsort(stable=True)
        mean, std = (per_channel(x) for x in (data.mean, data.std))
        labels = data.targets
        if data.artifact.logits is not None:
            labels = data.artifact.logits.flatten(0, 2).float() / data.info.labels.get("temperature", 1.0)
        images = (data.images[order] / 255 - mean) / std
        try:
            with replacing(path) as new_images, replacing(labels_beside(path)) as new_labels:
                _write_pt(new_images, images)
                _write_pt(new_labels, labels[order])
                path.unlink(missing_ok=True)  # new labels beside old images would be read as one set
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{path} cannot be replaced: {error.strerror}. {advice(error)}") from error
    elif path.suffix == ".pt":
        _write_pt(path, [packed / 255, numbers])
    elif path.suffix == "":
        data.to_imagefolder(path)
    else:
        raise UsageError(
            f"cannot tell what {path} is to be; expected a name ending in .npz or .pt, or a folder"
        )


def _read(path: Path, experiment: int) -> Found:
    if (path / "images_best.pt").exists():
        path /= "images_best.pt"
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; expected a file or folder with a distilled set")
    if path.suffix == ".npz":
        return _read_npz(path)
    content = _load_pt(path)
    if experiment != -1 and not (isinstance(content, dict) and "data" in content):
        raise UsageError(f"{path} has no experiments to choose from; experiment={experiment} has no meaning")
    match content:
        case Tensor() if "images" in path.name and (labels := labels_beside(path)).exists():
            pair = _pair(path, "images and labels (MTT, DATM)", [content, _load_pt(labels)])
            return replace(pair, pair=(path, labels))
        case Tensor():
            beside = labels_beside(path)
            lack = f"its labels are not in {beside.name} beside it" if beside != path else "no labels"
            raise UsageError(
                f"{path} holds one tensor, and {lack}; expected images_X.pt with its labels in labels_X.pt"
            )
        case {"data": [*pairs]} if -len(pairs) <= experiment < len(pairs):
            return _pair(path, "dict of experiments (DC, DSA, DM)", pairs[experiment])
        case {"data": [*pairs]}:
            raise UsageError(f"{path} has no experiment {experiment}; it has {len(pairs)}")
        case {"images": images, "labels": labels, **others}:
            if others:
                warnings.warn(
                    f"of {path} images and labels are read, and not {', '.join(map(str, others))}; a .npz "
                    "file may hold more",
                    stacklevel=3,
                )
            return _pair(path, "dict of images and labels", [images, labels], factor=None)
        case [_, _]:
            return _pair(path, "list of images and labels (NCFM, IDC)", content, factor=None)
    raise FormatError(f"{path} holds {_shape(content)}; {EXPECTED}")


def _pair(path: Path, form: str, content: Any, factor: int | None = 1) -> Found:
    match content:
        case [Tensor(layout=torch.strided) as images, Tensor(layout=torch.strided) as labels]:
            _check_stored(path, images, labels)
            return Found(form, images, labels, factor=factor)
        case [Tensor(layout=torch.strided) as images, [*numbers]] if all(
            isinstance(number, int | np.integer) for number in numbers
        ):
            _check_stored(path, images)
            return Found(form, images, own("labels", numbers), factor=factor)
    raise FormatError(f"{path} holds {_shape(content)}; {EXPECTED}")


def _check_stored(path: Path, *tensors: Tensor) -> None:
    """Raise `FormatError` for a small file with a huge tensor whose elements are the same few bytes."""
    for tensor in tensors:
        size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if size > REPEATS * stored:
            raise FormatError(
                f"{path} holds a tensor {list(tensor.shape)} of {size:,} bytes, of which it stores "
                f"{stored:,}; expected all of them. Save a copy of it: tensor.contiguous()"
            )


def _read_npz(path: Path) -> Found:
    if not _is_zip(path):  # or numpy advises to unpickle it
        raise FormatError(f"{path} is no .npz archive, or is damaged")
    try:
        # numpy leaves a file open that it opened and cannot read
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            arrays = {
                name: file[name] for name in file.files if name in (*IMAGE_KEYS, *LABEL_KEYS, *OTHER_KEYS)
            }
            names = list(file.files)
    except Exception as error:  # zlib, zip and numpy have one each for every kind of damage
        raise FormatError(f"{path} cannot be read as .npz without pickle: {error!r}") from error
    images = next((arrays[key] for key in IMAGE_KEYS if key in arrays), None)
    labels = next((arrays[key] for key in LABEL_KEYS if key in arrays), None)
    if images is None or labels is None:
        raise FormatError(
            f"{path} has the arrays {', '.join(names)}; expected images ({', '.join(IMAGE_KEYS)}) and "
            f"labels ({', '.join(LABEL_KEYS)})"
        )
    if images.ndim == 3:  # grey, as Keras has MNIST
        images = images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    try:
        optional: dict[str, Any] = {
            "classes": tuple(map(_text, arrays["classes"].flatten())) if "classes" in arrays else None,
            "logits": own("logits", arrays["logits"]) if "logits" in arrays else None,
            "factor": index(arrays["factor"].item()) if "factor" in arrays else 1,
            "temperature": float(arrays.get("temperature", 1.0)),
            "metadata": parse_metadata(path, str(arrays[METADATA_KEY])) if METADATA_KEY in arrays else None,
        } | {name: arrays[name].tolist() for name in ("mean", "std") if name in arrays}
        if labels.dtype.kind not in "buif":
            raise ValueError(
                f"labels are {labels.dtype}, expected class numbers or one column for each class"
            )
        return Found("npz", own("images", images), own("labels", labels), **optional)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path} holds arrays of no use here: {error}") from error


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of one that says that it is a part of several
        return True


def _text(name: object) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _read_folder(path: Path) -> Found:
    with MissingExtraError.unless("pillow", "engine", "reading images"):
        from PIL import Image
    folders = [folder for folder in _by_name(path) if folder.is_dir()]
    if sets := [folder.name for folder in folders if (folder / ARTIFACT_FILE).exists()]:
        raise UsageError(f"{path} holds artifact folders, not classes: {', '.join(sets)}. Convert each.")
    arrays, numbers = [], []
    for number, folder in enumerate(folders):
        for file in _by_name(folder):
            if file.suffix.lower() in OTHERS or (file.is_dir() and _holds_images(file)):
                raise FormatError(
                    f"{file} would be left out; expected images ({', '.join(SUFFIXES)}) right in the folder "
                    "of their class. Convert it, or move it away."
                )
            if file.suffix.lower() not in SUFFIXES:
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    with Image.open(regular(file), formats=FORMATS) as image:
                        if image.mode not in MODES:
                            raise ValueError(f"mode {image.mode}, expected one of {', '.join(MODES)}")
                        check_depth(image)
                        check_opaque(image)
                        mode = "L" if image.mode == "L" else "RGB"
                        array = np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
                raise FormatError(f"{file} cannot be read as an image: {error}") from error
            if arrays and array.shape != arrays[0].shape:
                raise FormatError(
                    f"{file} differs from the images before it: [height, width, channels] is "
                    f"{list(array.shape)}, expected {list(arrays[0].shape)}"
                )
            arrays.append(array)
            numbers.append(number)
    if not arrays:
        raise FormatError(f"{path} holds no images in class folders; {EXPECTED}")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    names = tuple(folder.name for folder in folders)
    if (numbered := by_numbers(names)) != names:
        first = next(pair for pair in zip(names, numbered, strict=True) if pair[0] != pair[1])
        warnings.warn(
            f"the classes of {path} have the order of their names, in which {first[0]} is before {first[1]}; "
            "--classes names them in that order. For the order of the numbers write all with as many digits",
            stacklevel=4,
        )
    return Found(
        "class folders",
        images,
        torch.tensor(numbers, device="cpu"),
        without_labels(names),
        factor=1,
        values="bytes",
    )


def _by_name(folder: Path) -> list[Path]:
    """What is in it and not hidden, as macOS hides "._1.png" beside "1.png". On Windows paths by themselves
    would be sorted as if all letters were small, and be other classes than elsewhere.
    """
    return sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: path.name)


def without_labels(names: Sequence[str]) -> tuple[str, ...]:
    """The classes of folders as `to_imagefolder` names them, label first; others are named as they are."""
    digits = len(str(len(names) - 1))
    classes = [name.removeprefix(f"{label:0{digits}d}_") for label, name in enumerate(names)]
    labelled = all(a != b for a, b in zip(classes, names, strict=True)) and len(set(classes)) == len(names)
    return tuple(classes if labelled else names)


def by_numbers(names: Sequence[str]) -> tuple[str, ...]:
    """In the order of the numbers in them, 2 before 10."""
    return tuple(sorted(names, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(99), name)))


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in (*SUFFIXES, *OTHERS) for path in folder.rglob("*"))


def _guess_factor(images: Tensor) -> int:
    """Tiles differ more where they meet than within: the packing factor, 1 or 2, with a warning."""
    if images.ndim != 4 or min(images.shape[-2:]) < 4 or any(side % 2 for side in images.shape[-2:]):
        return 1
    steps = [images.float().diff(dim=dim).abs().mean((0, 1, 5 - dim)) for dim in (2, 3)]
    middles = [step[len(step) // 2] / step.median() for step in steps]
    factor = 2 if min(middles) > 1.5 else 1
    warnings.warn(
        f"the packing factor is not stated; the images look like factor {factor}. Say it to be sure",
        stacklevel=3,
    )
    return factor


def _load_pt(path: Path) -> Any:
    try:
        # DC keeps accuracies beside the images
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_numbers()):
            warnings.simplefilter("ignore")  # torch on pickles of another kind, which it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of damaged pickles raises whatever they lead to
        if isinstance(error, OSError) and error.errno:
            raise FormatError(f"{path} cannot be read: {error.strerror}") from error
        if not _is_zip(path) and path.suffix not in (".pt", ".pth"):
            raise FormatError(f"{path} is in no known form; {EXPECTED}") from error
        said = (str(error) or type(error).__name__).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch says how to unpickle nevertheless
            asked_for = re.search(r"GLOBAL (\S+)", str(error))
            said = f"it asks for {asked_for[1]}" if asked_for else "it is damaged, or holds more than those"
        raise FormatError(
            f"{path} cannot be loaded as tensors and numbers alone, and nothing else is unpickled: {said}. "
            "Save the tensors alone, or get the file again."
        ) from error


def _numpy_numbers() -> list[Any]:
    scalar = np.float64().__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4")]
    return [np.dtype, *kinds, *((scalar, name) for name in names)]


def _write_pt(path: Path, content: Any) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    write_file(path, file.getvalue())


def labels_beside(path: Path) -> Path:
    return path.with_name(path.name.replace("images", "labels", 1))


def _shape(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dict of {', '.join(map(repr, list(content)[:5]))}"
    return (
        f"{type(content).__name__} of {len(content)}" if isinstance(content, (list, tuple)) else repr(content)
    )
