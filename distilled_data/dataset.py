"""`DistilledDataset`: a distilled set as a torch dataset."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, SupportsIndex, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import export, format
from .augment import dsa_of
from .decode import enlarge, take
from .errors import FormatError, IntegrityError, UsageError
from .format import ARTIFACT_FILE, Artifact, Metadata
from .indexing import as_int, rows_of, stacked
from .labels import as_float, as_temperature, as_they_are, one_hot, refuse_training, relabelled, soften
from .loader import Batch, Batches, Indices, Loader, Mix
from .manifest import Index, read_manifest, read_verified, replaced, verify_folder
from .randomness import generator_at
from .tensors import Array, artifact_of, per_channel
from .terminal import printable

if TYPE_CHECKING:
    import datasets

LABELS = ("soft", "logits", "hard")


class DistilledDataset(Dataset[Any], Generic[Batch]):
    """Distilled images and their labels, decoded on demand: `from_hub`, `from_folder`, `from_tensors`.

    A sample is one decoded view: float32 [channels, height, width], normalised by `mean` and `std`, and
    its target by `labels`: "soft" probabilities [classes] (one-hot where the artifact has no teacher
    labels), "logits" [classes], both float32, or "hard" int. Samples are ordered by (rank, class, view), so a
    smaller `ipc` is a prefix. With `transform` set, it is given a PIL image in the place of the tensor, and
    `target_transform` the target.

    `data[7]` is a sample; a slice, a list or a tensor of indices, or a mask gives a batch of them, stacked
    where they can be. Both are tuples, or dicts after `with_format("dict")`. `targets` are the class numbers
    of all samples, int64 [N].

    Methods raise `UsageError` for values that they cannot take, `UnknownNameError` (which is one) for a name
    that does not exist, and indexing `IndexError`.
    """

    def __init__(
        self,
        artifact: Artifact,
        labels: str = "soft",
        folder: Path | None = None,
        revision: str | None = None,
    ):
        """The set of `artifact`; `folder` and `revision`, a commit of the Hub, say where it was read from."""
        if not isinstance(artifact, Artifact):
            raise UsageError(
                f"artifact must be an Artifact, got {artifact!r:.80}; DistilledDataset.from_folder(path) "
                "and from_hub(name) load a set, from_tensors(images) makes one"
            )
        if labels not in LABELS:
            raise UsageError(f"labels must be one of {', '.join(LABELS)}, got {labels!r}")
        if labels == "logits" and artifact.logits is None:
            raise UsageError(
                "labels='logits' was asked for; this artifact has no teacher logits; expected soft or hard"
            )
        self.artifact, self.labels, self.folder, self.revision = artifact, labels, folder, revision
        self.transform: Callable[[Any], Any] | None = None
        self.target_transform: Callable[[Any], Any] | None = None
        self.keys: tuple[str, str] | None = None  # of image and label in a dict; None: samples are tuples
        m = artifact.metadata
        # with numpy: torch's first operations of a process would take a third of a millisecond
        classes = np.arange(len(m.classes), dtype=np.int64).repeat(m.factor**2)
        self.targets: Tensor = torch.from_numpy(np.tile(classes, m.ipc))  # int64 [N]

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        ipc: int | None = None,
        classes: Sequence[str | int] | None = None,
        labels: str = "soft",
        lock: str | Path | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Load a set from the Hugging Face Hub or its cache, pinned to one commit and verified.

        `repo_id` is "org/name" or "org/name@revision"; `revision` a branch, tag or commit. Of a repository
        with several sets it takes the one distilled for `ipc` images per class, else the first `ipc` images
        of the next larger one; without `ipc`, the default set. `classes` and `labels` are those of
        `from_folder`. `lock` names a lock file, which then says the commit and every hash. `token`,
        `endpoint`, `cache_dir`, `local_files_only` and `force_download` are those of
        `huggingface_hub.hf_hub_download`.

        What the Hub refuses by now comes from the cache, with a warning, if that holds it. Raises
        `AccessError` for what else is not there or not allowed, `HubError` when the Hub fails,
        `IntegrityError` for bytes that are not the published ones, `OutputError` for a cache that cannot be
        written, `LockError`, `FormatError`, `UsageError`.
        """
        from .lock import find_locked  # what only the Hub needs would double the time of the import
        from .remote import Repository

        found = Repository(
            repo_id,
            revision,
            token=token,
            endpoint=endpoint,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            lock=None if lock is None else find_locked(lock, repo_id.partition("@")[0]),
        ).fetch(ipc, classes)
        return cls(found.artifact, labels, found.folder, found.commit)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        ipc: int | None = None,
        classes: Sequence[str | int] | None = None,
        labels: str = "soft",
    ) -> Self:
        """Load the artifact folder `path`, whole or only the first `ipc` packed images of each of `classes`.

        Of a folder with several sets, such as a whole repository, `ipc` chooses as in `from_hub`. `classes`
        are two or more names or indices, renumbered in that order; `labels` is "soft", "logits" or "hard".
        The artifact is compared with the folder's manifest first. Raises `FormatError` for no such folder,
        `IntegrityError` for a file that cannot be trusted and `UsageError` for a subset that is not there.
        """
        folder = Path(path)
        root = read_manifest(folder)
        if isinstance(root, Index):
            folder /= (name := root.choose(ipc))
            root = read_manifest(folder, [root.configurations[name]])
        if isinstance(root, Index):
            raise FormatError(f"{folder} is an index inside an index; expected the folder of one set")
        expected = [root.files[ARTIFACT_FILE]]
        try:
            artifact = read_verified(folder / ARTIFACT_FILE, expected, ipc=ipc, classes=classes)
        except IntegrityError:
            if not replaced(folder, root):
                raise
            return cls.from_folder(path, ipc=ipc, classes=classes, labels=labels)
        return cls(artifact, labels, folder)

    @classmethod
    def from_tensors(
        cls,
        images: Array,
        classes: Sequence[str] | None = None,
        logits: Array | None = None,
        factor: int = 1,
        mean: Array | Sequence[float] | None = None,
        std: Array | Sequence[float] | None = None,
        temperature: float = 1.0,
        labels: str = "soft",
        targets: Array | Sequence[int] | None = None,
        values: str | None = None,
        dataset: str = "tensors",
        source: dict[str, Any] | None = None,
    ) -> Self:
        """A set in memory, of images [ipc, classes, channels, height, width], or [N, ...] with `targets`.

        `images` hold `factor` x `factor` tiles each. What their numbers are says `values`: "bytes" 0..255,
        "unit" 0..1 or "normalised" by `mean` and `std`; without it bytes are bytes, and floats a guess with a
        warning. `mean` and `std`, one per channel, are of pixels in [0, 1], and default to those of the
        images themselves. `targets`, in any order, is [N]: class numbers, or [N, classes]: probabilities, or
        logits if the rows do not add up to 1. `logits` are [ipc, classes, factor**2, classes] or, beside
        `targets`, [N, factor**2, classes]; of factor 1 the axis of the one view may be left out.
        `temperature` is that of soft `labels`. `classes` are two names or more, by default the numbers.
        `dataset` is the name of what was distilled, and `source` what else a card says of it, such as
        {"license": "mit"}.

        Raises `UsageError` for unequal classes, wrong shapes and values that are not finite, and
        `FormatError` for what no artifact may have, such as logits of other shapes, or a size that is no
        multiple of `factor`.
        """
        artifact = artifact_of(
            images,
            classes,
            targets=targets,
            logits=logits,
            factor=factor,
            mean=mean,
            std=std,
            temperature=temperature,
            values=values,
            dataset=dataset,
            source=source,
        )
        return cls(artifact, labels)

    @property
    def info(self) -> Metadata:
        """All that the artifact says of itself: labels, source, recipe and results too."""
        return self.artifact.metadata

    @property
    def ipc(self) -> int:
        """Packed images per class; each is `info.factor ** 2` samples."""
        return self.info.ipc

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the class numbers."""
        return self.info.classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        """The number of each class by its name."""
        return {name: index for index, name in enumerate(self.classes)}

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]; samples are normalised by it and `std`."""
        return self.info.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]."""
        return self.info.std

    @property
    def content_hash(self) -> str:
        """sha256 of the stored images and logits, computed anew each time, see `Artifact.content_hash`."""
        return self.artifact.content_hash

    @property
    def images(self) -> Tensor:
        """All samples decoded, uint8 [N, channels, height, width]."""
        return self.decoded(torch.arange(len(self), device="cpu")).round_().to(torch.uint8)

    def decoded(self, rows: Tensor) -> Tensor:
        """The samples number `rows` [B] decoded, float32 [B, channels, height, width] in 0..255."""
        chosen = take(self.artifact.images.flatten(0, 1), rows, self.info.factor)
        return enlarge(chosen.float(), (self.info.height, self.info.width))

    @property
    def data(self) -> np.ndarray:
        """All samples decoded as torchvision's CIFAR10 has them: uint8 [N, height, width, channels]."""
        return self.images.permute(0, 2, 3, 1).numpy()

    @property
    def soft_targets(self) -> Tensor:
        """Class probabilities, float32 [N, classes]: softmax of the teacher logits at their temperature."""
        stored, label = self._labels("soft")
        return label(stored)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: SupportsIndex | slice | Sequence[int] | Array) -> Any:
        if isinstance(index, slice):
            rows = list(range(len(self))[index])
        elif isinstance(index, Sequence) or getattr(index, "ndim", 0) > 0:
            rows = rows_of(index, len(self))
        else:
            return self._samples([index])[0]
        if rows and (self.transform or self.target_transform):
            batch = tuple(map(stacked, zip(*self._pairs(rows), strict=True)))
        else:
            batch = self._batch(rows)
        return batch if self.keys is None else dict(zip(self.keys, batch, strict=True))

    def __getitems__(self, indices: Sequence[Any] | Tensor) -> list[Any]:
        """Samples of a batch, decoded together; `DataLoader` calls this.

        Those of a subclass with a `__getitem__` of its own are what that makes of them, one by one.
        """
        if type(self).__getitem__ is not DistilledDataset.__getitem__:
            return [self[index] for index in indices]
        return self._samples(indices)

    def _samples(self, indices: Sequence[Any] | Tensor) -> list[Any]:
        pairs = self._pairs(rows_of(indices, len(self), masks=False))
        return pairs if self.keys is None else [dict(zip(self.keys, p, strict=True)) for p in pairs]

    def _batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Images of these samples, normalised unless `transform` takes them, and their targets."""
        rows = torch.tensor(indices, dtype=torch.int64, device="cpu")
        rows = torch.where(rows < 0, rows + len(self), rows)
        stored, label = self._labels(self.labels)
        images, targets = self.decoded(rows), label(stored.index_select(0, rows))
        if self.transform is None:
            images = (images / 255 - per_channel(self.mean)) / per_channel(self.std)
        return images, targets

    def _pairs(self, indices: list[int]) -> list[tuple[Any, Any]]:
        images, targets = self._batch(indices)
        samples = list(images)
        if self.transform is not None:
            samples = [self.transform(export.to_pil(image)) for image in images]
        labels = targets.tolist() if self.labels == "hard" else list(targets)
        if self.target_transform is not None:
            labels = [self.target_transform(label) for label in labels]
        return list(zip(samples, labels, strict=True))

    def __repr__(self) -> str:
        m = self.info
        return (
            f"{type(self).__name__}({printable(m.dataset)}: {len(self)} images of "
            f"{m.channels}x{m.height}x{m.width}, {len(m.classes)} classes, ipc={m.ipc}, "
            f"factor={m.factor}, labels={self.labels!r})"
        )

    def select(self, ipc: int | None = None, classes: Sequence[str | int] | None = None) -> Self:
        """The first `ipc` packed images of each class, or of two or more `classes` (names or indices, which
        are renumbered in that order).
        """
        ranks = format.resolve_ipc(ipc, self.ipc)
        tensors = {name: tensor[:ranks] for name, tensor in self.artifact.tensors.items()}
        if classes is None:  # a view would keep the whole set in memory; of classes copies are made below
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        artifact = Artifact(metadata=dataclasses.replace(self.info, ipc=ranks), **tensors)
        if classes is not None:
            artifact = format.select_classes(artifact, classes)
        return self._derived(artifact, self.labels)

    def with_labels(self, labels: str, temperature: float | None = None) -> Self:
        """The same images with `labels` "soft", "logits" or "hard", soft ones at another `temperature`.

        Without teacher logits "logits" and temperatures are a `UsageError`.
        """
        artifact = self.artifact
        if temperature is not None:
            if artifact.logits is None:
                raise UsageError(
                    f"temperature={temperature} was asked for; this artifact has no teacher logits"
                )
            labelled = self.info.labels | {"temperature": as_temperature(temperature)}
            results = self.info.results
            if labelled["temperature"] != self.info.labels.get("temperature", 1.0):  # soft ones were others
                results = tuple(row for row in results if row.get("labels") == "hard")
            info = dataclasses.replace(self.info, labels=labelled, results=results)
            artifact = dataclasses.replace(artifact, metadata=info)
        return self._derived(artifact, labels)

    @overload
    def with_format(self, format: Literal["tuple"]) -> "DistilledDataset": ...
    @overload
    def with_format(
        self, format: Literal["dict"], image_key: str = ..., label_key: str = ...
    ) -> "DistilledDataset[dict[str, Tensor]]": ...
    @overload
    def with_format(
        self, format: str, image_key: str = ..., label_key: str = ...
    ) -> "DistilledDataset[Any]": ...
    def with_format(
        self, format: str, image_key: str = "pixel_values", label_key: str = "labels"
    ) -> "DistilledDataset[Any]":
        """The same set with samples and batches of the `format` "tuple", or "dict" with the keys `image_key`
        and `label_key`, by default those of transformers.
        """
        if format not in ("tuple", "dict"):
            raise UsageError(f"format must be tuple or dict, got {format!r}")
        names = isinstance(image_key, str) and isinstance(label_key, str)
        if not names or image_key == label_key:
            raise UsageError(
                f"image_key and label_key must be two names that differ, got {image_key!r} and {label_key!r}"
            )
        derived = self._derived(self.artifact, self.labels)
        derived.keys = (image_key, label_key) if format == "dict" else None
        return derived

    def split(self, fraction: float, seed: int = 0) -> tuple[Self, Self]:
        """Two sets: about `fraction`, 0 to 1, of the packed images of every class, drawn with `seed`, and the
        rest.

        Tiles of one packed image stay together. Raises `UsageError` where either would be empty.
        """
        if not isinstance(fraction, numbers.Real):
            raise UsageError(f"fraction must be a number between 0 and 1, got {fraction!r}")
        seed = as_int("seed", seed, None)
        count = round(fraction * self.ipc) if 0 < fraction < 1 else 0
        if not 0 < count < self.ipc:
            raise UsageError(
                f"split({fraction}) of {self.ipc} packed images per class leaves one part empty; expected a "
                "fraction between 0 and 1 that gives both one or more"
            )
        generator = generator_at(seed, "split")
        order = torch.stack(
            [torch.randperm(self.ipc, generator=generator, device="cpu") for _ in self.classes], 1
        )
        return self._ranks(order[:count]), self._ranks(order[count:])

    def _ranks(self, order: Tensor) -> Self:
        """The images at `order` [ranks, classes] of each class."""
        columns = torch.arange(len(self.classes), device="cpu")
        logits = self.artifact.logits
        artifact = Artifact(
            self.artifact.images[order, columns],
            dataclasses.replace(self.info, ipc=len(order)),
            None if logits is None else logits[order, columns],
        )
        return self._derived(artifact, self.labels)

    def to_folder(self, path: str | Path) -> None:
        """Write the artifact folder `path`, which `from_folder` loads: the set and its manifest.

        The card and what else a published one has, `hub.complete_folder` adds. Results that were measured on
        other images than these or the first of these are left out. Raises `UsageError` unless the folder is
        empty or not there, and `OutputError`.
        """
        export.to_folder(self, path)

    def to_hf(self) -> "datasets.Dataset":
        """The decoded views as a `datasets.Dataset` with the columns `image`, `label` and, with teacher
        labels, `soft_label`. Raises `MissingExtraError`.
        """
        return export.to_hf(self)

    def to_webdataset(self, path: str | Path) -> None:
        """Write the decoded views to the shard `path`, a .tar: samples of `png`, `cls` and, with teacher
        labels, `soft.npy`.

        Raises `UsageError` for one that is there already, or compressed, `OutputError` and
        `MissingExtraError`.
        """
        export.to_webdataset(self, path)

    def to_imagefolder(self, path: str | Path) -> None:
        """Write the decoded views to `path`/CLASS/NUMBER.png, as torchvision's ImageFolder reads them, in
        label order.

        A class folder is the label in digits, then the name. `path` must not exist, or be an empty folder:
        else `UsageError`. Raises `OutputError` and `MissingExtraError` too.
        """
        export.to_imagefolder(self, path)

    def loader(
        self,
        batch_size: int = 256,
        *,
        device: torch.device | str = "cpu",
        augment: str | Callable[[Tensor], Tensor] | None = None,
        mix: Mix | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        infinite: bool = False,
    ) -> Loader[Batch]:
        """Batches (images float32 [B, channels, height, width], normalised, targets), made on `device`.

        Targets are float32 [B, classes] or, by labels="hard", int64 [B]. `batch_size` counts decoded views.
        After `with_format("dict")` batches are dicts.

        `augment="dsa"` is the strategy that the set was evaluated with, where the artifact names one, else
        that of the dataset it names: digits, for instance, must not be flipped. Others are operations joined,
        "crop_flip", of color, crop, cutout, flip, rotate and scale, with "|" between those of which each
        batch gets one; a callable gets images in [0, 1]. `mix`, such as "cutmix", "mixup" or "cutmix|none",
        makes class numbers probabilities; a callable gets the targets as they are, and may need
        `num_classes` for hard ones. Callables draw from the generators of torch, Python and numpy, which all
        threads share: let one thread at a time use them.

        `teacher`, a network on `device` in eval mode, gives logits [B, classes], in the order of `classes`,
        for every batch as it comes out, augmented and mixed: its targets, "soft" at the temperature of the
        set, or "logits". Source: FKD (Shen & Xing 2022, arXiv 2112.01528), where they are stored.

        `seed` decides the order, if there is to `shuffle`, and all draws. Process `rank` of `world_size` gets
        its share, as large as that of others: some views come twice or, by `drop_last`, are left out, as a
        smaller last batch is. An `infinite` loader goes on with the next epoch. More is said at `Loader`.
        """
        if self.transform is not None or self.target_transform is not None:
            raise UsageError(
                "transform and target_transform take single samples, a loader makes batches; give it "
                "callables on batches (augment=, mix=), or use torch.utils.data.DataLoader(data)"
            )
        if augment == "dsa":
            augment = self.info.recipe.get("augment", dsa_of(self.info.dataset))
        targets, label = self._labels(self.labels)
        relabel = None if teacher is None else self._relabel(teacher)
        if isinstance(mix, str) and self.labels == "logits" and teacher is None:
            raise UsageError(f"mix={mix!r} mixes probabilities; got labels='logits', expected soft or hard")
        if isinstance(mix, str) and self.labels == "hard":
            label = partial(one_hot, classes=len(self.classes))
        return Loader(
            self.artifact.images.flatten(0, 1),
            targets,
            factor=self.info.factor,
            label=label,
            mean=self.mean,
            std=self.std,
            batch_size=batch_size,
            device=device,
            augment=augment,
            mix=mix,
            relabel=relabel,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
            infinite=infinite,
            keys=self.keys,
        )

    def dataloader(
        self,
        batch_size: int = 256,
        *,
        augment: str | Callable[[Tensor], Tensor] | None = None,
        mix: Mix | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        loader_class: type[DataLoader[Any]] = DataLoader,
        **options: Any,
    ) -> DataLoader[Any]:
        """The batches of `loader` as a `torch.utils.data.DataLoader`, for frameworks that insist on one.

        Each batch is decoded and augmented at once, in a worker process if there are any; the same ones
        come out, on the CPU, where a `teacher` has to be too: every worker has a copy of it, and one thread,
        so that its labels may differ in rounding. `options` are those of `DataLoader`, such as `num_workers`
        and `pin_memory`, without sampler, batch_sampler and collate_fn; workers persist unless it is said
        otherwise, as it may take seconds to start them.
        Its sampler tells the epoch; `sampler.set_epoch` is that of `Loader`, to be called where a framework
        makes a new one for each epoch, as each begins at 0. `loader_class` may be torchdata's
        `StatefulDataLoader`.
        """
        for option in ("sampler", "batch_sampler", "collate_fn"):
            if option in options:
                raise UsageError(
                    f"dataloader() chooses and makes whole batches itself and takes no {option}; for one of "
                    f"your own: torch.utils.data.DataLoader(data, {option}=...)"
                )
        loader = self.loader(
            batch_size,
            augment=augment,
            mix=mix,
            teacher=teacher,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        if options.get("num_workers"):
            options.setdefault("persistent_workers", True)
        return loader_class(
            Batches(loader),
            batch_size=loader.batch_size,
            sampler=Indices(loader),
            drop_last=loader.drop_last,
            collate_fn=as_they_are,
            **options,
        )

    def verify(self) -> None:
        """Compare every file of the folder with its manifest, whatever part of it this set is.

        Of a set from the Hub only the artifact was fetched, and it alone is compared. Raises `IntegrityError`
        for a file that is missing or differs, `FormatError` for a manifest that is missing or damaged, and
        `UsageError` for a set that was made in memory.
        """
        if self.folder is None:
            raise UsageError("this set was made in memory; there is no folder to verify")
        verify_folder(self.folder, None if self.revision is None else [])

    def _derived(self, artifact: Artifact, labels: str) -> Self:
        derived = type(self)(artifact, labels, self.folder, self.revision)
        derived.transform, derived.target_transform = self.transform, self.target_transform
        derived.keys = self.keys
        return derived

    def _relabel(self, teacher: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What makes targets of a batch of normalised images."""
        if not callable(teacher) or isinstance(teacher, type):
            raise UsageError(f"teacher must be None, a network or another callable, got {teacher!r}")
        refuse_training(teacher)
        if self.labels == "hard":
            raise UsageError("labels='hard' take no teacher; expected soft or logits (with_labels)")
        label = self._of_logits(self.labels)
        return partial(relabelled, teacher=teacher, label=label, classes=len(self.classes))

    def _labels(self, labels: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What is stored for every sample, and what makes targets of this kind of it."""
        if labels == "hard":
            return self.targets, as_they_are
        if self.artifact.logits is None:
            return self.targets, partial(one_hot, classes=len(self.classes))
        return self.artifact.logits.flatten(0, 2), self._of_logits(labels)

    def _of_logits(self, labels: str) -> Callable[[Tensor], Tensor]:
        if labels == "logits":
            return as_float
        return partial(soften, temperature=self.info.labels.get("temperature", 1.0))
