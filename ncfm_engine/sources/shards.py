"""WebDataset shards: tar files in which the files of one sample share a name."""

import glob
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from distilled_data.errors import MissingExtraError, SourceError, UsageError

from ..cache import sha256_of
from .reader import CLASSES_FILE, Damage, Origin, Record, Unit, class_names, stamp

MAX_BYTES = 2**28  # of one file in a shard; what is larger is no image
MAX_EXTENSION = 2**20  # bytes of a header's extension: a long name, other attributes
BLOCK = 2**20  # bytes that are read at once after the end of an archive

_IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "ppm")
_USED = (*_IMAGES, "cls", "json")
_LABELS = ("label", "cls", "class")  # in a .json
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_PART = re.compile(
    r"(?<![a-z])(train|training|test|testing|val|valid|validation|eval|dev)(s|set|data|batch|[a-d])?(?![a-z])"
)


class ShardReader:
    """The shards of a URL, a path or a glob, where {000..099} stands for many; one unit each.

    A sample has an image, and a label: `.cls`, a number or a name, or `.json` with one under "label". Shards
    with the word "test" in their file names hold the test images; without any, those with "val", "valid",
    "validation", "eval" or "dev" do. Of shards in several folders the folder's name counts if the file's has
    no such word. Without `classes` their names are read from classes.txt beside the first shard, if there is
    one. URLs are opened as webdataset opens them; nobody notices when there is something else at one, so new
    data needs a new URL.
    """

    def __init__(self, pattern: str, classes: Sequence[str] | None = None):
        with MissingExtraError.unless("webdataset", "data", f"the dataset 'wds:{pattern}'"):
            from webdataset.gopen import gopen
            from webdataset.shardlists import expand_urls
        self._open: Callable[[str], Any] = gopen
        self.where = f"wds:{pattern}"
        local = os.path.expanduser(pattern)
        shards = [local] if os.path.isfile(local) else []
        for url in [] if shards else expand_urls(local):
            shards += sorted(glob.glob(url)) if glob.has_magic(url) and not is_remote(url) else [url]
        missing = [shard for shard in shards if not is_remote(shard) and not Path(shard).is_file()]
        if missing or not shards:
            raise SourceError(
                f"wds:{pattern} names {', '.join(missing[:5])}, which is not there; expected tar files"
                if missing
                else f"wds:{pattern} names no file; expected tar files"
            )
        kinds = _kinds(shards)
        test = next((kind for kind in ("test", "val") if kind in kinds.values()), None)
        beside = Path(shards[0]).parent / CLASSES_FILE
        if classes is None and beside.is_file():
            classes = class_names(beside)
        self.classes = classes
        named = [] if classes is None else [sha256_of(classes)]
        self.units = [
            Unit("test" if kind else "train", [shard, *stamp(Path(shard)), *named])
            for shard, kind in kinds.items()
            if kind in (None, test)
        ]
        if not any(unit.part == "train" for unit in self.units):
            raise UsageError(
                f"wds:{pattern}: all shards are named as test shards; at least one must be for training"
            )
        name = _folder_name(shards[0])
        self.origin = Origin(name, f"wds:{name}")

    def read(self, unit: Unit) -> Iterator[Record | Damage]:
        shard, *_ = unit.what
        place, seen, key, files = Path(shard).name, set(), "", {}
        try:
            with (
                self._open(shard) if is_remote(shard) else open(shard, "rb") as stream,
                tarfile.open(fileobj=_Unzipped(stream), mode="r|*", tarinfo=_Entry) as archive,  # type: ignore[arg-type]
            ):
                for entry in archive:
                    archive.members = []  # or it would remember them all
                    # Not webdataset's own notes, and not what macOS puts beside a file, named ._ and like it.
                    if entry.isdir() or re.match(r"__[^/]*__($|/)|(.*/)?\.[^/]*$", entry.name):
                        continue
                    if reason := _unfit(entry):
                        yield Damage(f"{place}/{entry.name}", reason)
                        continue
                    name = re.fullmatch(r"((?:.*/)?[^.]+)\.([^/]*)", entry.name)
                    if name is None:
                        continue
                    if name[1] != key:
                        yield from _sample(place, key, files, seen)
                        key, files = name[1], {}
                    kind, content = name[2].lower(), b""
                    if kind in _USED:  # of others a sample may have any number, with zeros in them
                        content = archive.extractfile(entry).read()
                    files[kind] = None if kind in files else content
                yield from _sample(place, key, files, seen)
                rest = iter(lambda: archive.fileobj.read(BLOCK), b"")
                if any(block.strip(b"\0") for block in rest):
                    yield Damage(place, "more follows the end of the archive; make that a shard of its own")
        except OSError as error:  # a connection, a right: not the data, so not remembered as damage
            raise SourceError(f"the shard {shard} cannot be read: {error}. Run the command again.") from error
        except (EOFError, ValueError, RecursionError, tarfile.TarError, zlib.error) as error:
            # The sample at the cut may lack a part of itself.
            yield Damage(place, f"the shard is cut or damaged after {len(seen)} samples: {error}")


class _Entry(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end; here only the end mark is.

    And it reads a header's extension, whatever its size; one here has room for any name.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Entry":
        entry = super().frombuf(buf, encoding, errors)
        if entry.size > MAX_EXTENSION and entry.type in _EXTENSIONS:
            raise tarfile.ReadError(f"a header of {entry.size} bytes")
        return entry

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Entry":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end mark, but {error}") from error


class _Unzipped:
    """A stream, and of gzip files one after the other what they hold; tarfile drops all but the first."""

    def __init__(self, stream: Any):
        self.stream, self.zipped, self.file = stream, None, zlib.decompressobj(wbits=31)
        self.error: zlib.error | None = None

    def read(self, size: int) -> bytes:
        """Some bytes, not always `size`; none at the end."""
        while self.error is None and (block := self.stream.read(size)):
            if self.zipped is None:
                self.zipped = block.startswith(b"\x1f\x8b")
            if plain := self._unzip(block) if self.zipped else block:
                return plain
        if self.error:
            raise self.error
        return b""

    def _unzip(self, block: bytes) -> bytes:
        plain = b""
        while block := block.lstrip(b"\0") if self.file.eof else block:  # zeros may pad a file
            if self.file.eof:
                self.file = zlib.decompressobj(wbits=31)
            try:
                plain += self.file.decompress(block)
            except zlib.error as error:  # when what came before has been read
                self.error = error
                return plain
            block = self.file.unused_data
        return plain


def _sample(place: str, key: str, files: dict[str, Any], seen: set[str]) -> Iterator[Record | Damage]:
    """What the files of one key come to; nothing for no files."""
    if not files:
        return
    name = f"{place}/{key}"
    if key in seen or None in files.values():
        yield Damage(name, "the key is there twice in the shard")
        return
    seen.add(key)
    kinds = [kind for kind in _IMAGES if kind in files]
    if len(kinds) != 1:
        found = f"the images {' and '.join(kinds)}" if kinds else "no image"
        yield Damage(
            name, f"{found}; it has {', '.join(sorted(files))}, expected one of {', '.join(_IMAGES)}"
        )
        return
    try:
        yield Record(name, _label(files), files[kinds[0]])
    except (ValueError, RecursionError) as error:
        yield Damage(name, f"no label: {error}")


def _label(files: dict[str, bytes]) -> int | str:
    if "cls" in files:
        text = files["cls"].decode().strip()
        label = int(text) if re.fullmatch(r"-?\d+", text) else text
    elif "json" in files:
        content = json.loads(files["json"])
        content = content if isinstance(content, dict) else {}
        label = next((content[name] for name in _LABELS if name in content), None)
    else:
        raise ValueError("expected .cls or .json")
    if type(label) not in (int, str) or label == "":
        raise ValueError(f"{label!r:.80} is neither a number nor a name")
    return label  # type: ignore[return-value]


def _unfit(entry: tarfile.TarInfo) -> str | None:
    """Why an entry of a tar file is refused."""
    if entry.name.startswith("/") or ".." in entry.name.split("/"):
        return "a name that leads out of the archive"
    if not entry.isreg():
        return "a link or a device, not a file"
    if entry.size > MAX_BYTES:
        return f"{entry.size} bytes, more than {MAX_BYTES}"
    return None


def _folder_name(shard: str) -> str:
    """The name of the shard's folder, or of the one above where the folder is named train, test or the like;
    nothing else of a URL, which may hold secrets.
    """
    if is_remote(shard):
        url = urlparse(shard)
        folder: PurePath = PurePosixPath("" if url.scheme == "pipe" else url.path).parent
    else:
        folder = Path(shard).resolve().parent
    if _PART.fullmatch(folder.name.casefold()):
        folder = folder.parent
    return folder.name or "shards"


def _kinds(shards: Sequence[str]) -> dict[str, str | None]:
    """Of each shard "test", "val" or None, which is train."""
    places = {s: PurePosixPath(urlparse(s).path) if is_remote(s) else PurePath(s) for s in shards}
    # Where all lie in one folder, its name says nothing about one of them.
    apart = len({place.parent for place in places.values()}) > 1
    kinds = {}
    for shard, place in places.items():
        names = [place.name, place.parent.name] if apart else [place.name]
        words = [found[-1][0] for name in names if (found := _PART.findall(name.casefold()))]
        word = [*words, "train"][0]  # the last one of a name says more: dev-kit-train-0.tar
        kinds[shard] = None if word.startswith("train") else "test" if word.startswith("test") else "val"
    return kinds


def is_remote(url: str) -> bool:
    return re.match(r"[a-z]{2,}:", url) is not None  # a single letter names a drive of Windows
