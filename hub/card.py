"""The dataset card: YAML front matter and two templates, filled from the metadata of one artifact or several.

`card_template.md` is the card, `card_set_template.md` the part in it that every set has.

Metadata is free text to a great extent. Prose gets it escaped (`plain`); code blocks get it in a form in
which no line can end the block or look like one of our markers, which stand at the start of a line.
"""

import html
import json
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from textwrap import indent
from typing import Any

import yaml

from distilled_data import Artifact, Metadata, UsageError
from distilled_data.files import regular
from distilled_data.format import ARTIFACT_FILE, CARD_FILE, MANIFEST_FILE, PARQUET_FILE, PREVIEW_FILE
from distilled_data.manifest import inside

TEMPLATE = Path(__file__).with_name("card_template.md")
SET_TEMPLATE = Path(__file__).with_name("card_set_template.md")
# The Hub refuses a card with an identifier it does not know (huggingface.co/docs/hub/repositories-licenses);
# these are the ones that data is usually under.
HUB_LICENCES = {
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "cc", "cc0-1.0",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "odc-by", "odbl", "pddl", "other", "unknown",
}  # fmt: skip

_HOW_MEASURED = (
    "Test accuracy in percent after the last epoch, mean ± standard deviation over runs that differ in their "
    "seed; another number of runs is in brackets. The random images are as many real ones, with the same "
    "kind of labels and the same training budget. The best epoch is chosen on the test set: that column is "
    "there only to compare with papers."
)
_HELD_OUT = ' Rows of "validation" were tested on training images that were held out, not on the test set.'
_BY_TEACHER = (
    ' Labels "teacher" are not those stored: the networks that gave them labelled every augmented batch.'
)
_OTHER_TEACHER = (
    " The soft labels of the random images are of other networks than those of a set that was not made here."
)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_KEY = re.compile(r"^(?=[\w.-]+[ \t]*:)", re.MULTILINE)  # where the text of a key of the front matter starts
_COMMENT = re.compile(r"^#.*\n", re.MULTILINE)
_SECTION = (
    re.compile(  # never over another marker: one that lost its end must not take the text up to the next
        r"^<!-- distilled-data:begin (\w+)(?:(?!^<!-- distilled-data:).)*^<!-- distilled-data:end \1 -->$",
        re.DOTALL | re.MULTILINE,
    )
)
_URL = re.compile(r"https?://[\w./~%?=+:#-]+")


def render_card(
    artifacts: Artifact | Mapping[str, Artifact], existing: str | None = None, *, repo_id: str | None = None
) -> str:
    """The card, as Markdown, of one artifact or of several by their folders, the default one first.

    Of an `existing` card everything is kept but the marked sections and the YAML keys written here; marked
    sections that it lacks are added after the one before them. Without `repo_id` the example loads from the
    current folder. Raises `UsageError` when the YAML of `existing` cannot be read.
    """
    sets = {"": artifacts} if isinstance(artifacts, Artifact) else artifacts
    theirs, written, comments, body = _split((existing or "").replace("\r\n", "\n"))
    tags = theirs.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    if not isinstance(tags, list) or not all(isinstance(tag, (str, int, float)) for tag in tags):
        raise UsageError(f"the tags of the existing card must be a list of words, got {_short(tags)}")
    ours = {"license": theirs.get("license") or "unknown"} | _front_matter(sets)
    method = ["ncfm"] if all(_made_here(artifact.metadata) for artifact in sets.values()) else []
    ours["tags"] = _different(["dataset-distillation", *method, "distilled-data", *tags])
    header = yaml.safe_dump(ours, sort_keys=False, allow_unicode=True)
    # As they are written: YAML would make another value of `language: no` or `version: 1.10`.
    kept = "".join(text for name, text in written.items() if name not in ours)
    lines = kept.splitlines(keepends=True)
    header += "".join(comment for comment in comments if comment not in lines) + kept
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(_fields(sets, repo_id))
    return f"---\n{header}---\n\n{_merge(body, text)}"


def _made_here(metadata: Metadata) -> bool:
    """By our engine, which stores its settings: another project's set has none, nor one made of tensors."""
    return "settings" in metadata.recipe


def read_card(folder: Path) -> str | None:
    """The card in a folder, if there is one. Raises `UsageError` for what cannot be read as a text."""
    path = folder / CARD_FILE
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    try:
        content = regular(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if target.parent not in (home, home.parent.parent / "blobs"):  # the second is of the Hub's own cache
        # A card is published word for word, and a folder of somebody else's may point to any file.
        raise UsageError(f"{path} is a link to {target}, outside of the folder; put the card itself there")
    return text_of(content, str(path))


def text_of(content: bytes, where: str) -> str:
    """A card from its bytes. Raises `UsageError` naming `where` they are from."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text ({error}); save it as that") from error


def _split(card: str) -> tuple[dict[str, Any], dict[str, str], list[str], str]:
    """The front matter of a card as values, as the text of every key, its comments, and what follows it."""
    match = _FRONT_MATTER.match(card)
    if match is None:
        return {}, {}, [], card
    try:
        front = yaml.safe_load(match[1]) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(
            f"the front matter of the existing card is not valid YAML, correct it: {error}"
        ) from error
    if not isinstance(front, dict):
        raise UsageError(
            f"the front matter of the existing card must be keys and values, got {_short(front)}"
        )
    parts = [part for part in _KEY.split(match[1]) if _KEY.match(part)]
    written = {part.partition(":")[0].strip(): part for part in parts}
    if set(written) != set(front):  # keys in quotes or braces: write them anew
        written = {
            name: yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True)
            for name, value in front.items()
        }
    return front, written, _COMMENT.findall(match[1]), card[match.end() :]


def _short(value: object) -> str:
    """Of a value of YAML, a few lines of which may stand for more than the memory holds."""
    return reprlib.repr(value)[:80]


def _merge(body: str, text: str) -> str:
    """`body` with the marked sections of `text` in the place of its own."""
    fresh = {match[1]: match[0] for match in _SECTION.finditer(text)}
    left = dict(fresh)
    gone = "\0"  # a section that the card has no more; no text holds this character
    merged = _SECTION.sub(lambda match: left.pop(match[1], gone), body)
    merged = re.sub(rf"{gone}\n*", "", merged).strip("\n")
    ordered = list(fresh.values())
    for number, section in enumerate(ordered):
        if section in merged:
            continue
        after = ordered[number - 1] if number else None
        before = next((later for later in ordered[number:] if later in merged), None)
        if after is not None:
            merged = merged.replace(after, f"{after}\n\n{section}", 1)
        elif before is not None:
            merged = merged.replace(before, f"{section}\n\n{before}", 1)
        else:
            merged = f"{merged}\n\n{section}"
    return merged.lstrip("\n") + "\n"


def _front_matter(sets: Mapping[str, Artifact]) -> dict[str, Any]:
    every = [artifact.metadata for artifact in sets.values()]
    metadata = every[0]
    sizes = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    views = max(m.ipc * len(m.classes) * m.factor**2 for m in every)
    front = {
        "pretty_name": f"{metadata.dataset}, distilled to {_sizes(sets)}",
        "task_categories": ["image-classification"],
        "size_categories": [next((name for limit, name in sizes.items() if views < limit), "1M<n<10M")],
        "source_datasets": _different(str(m.source.get("id") or m.dataset) for m in every),
        "library_name": "distilled-data",
        "configs": [
            {
                "config_name": folder or "default",
                **({} if number else {"default": True}),
                "data_files": [{"split": "train", "path": inside(folder, PARQUET_FILE)}],
            }
            for number, folder in enumerate(sets)
        ],
    }
    licences = _different("-".join(str(m.source.get("license") or "").lower().split()) for m in every)
    if licences != [""]:
        front["license"] = licences[0] if len(licences) == 1 and licences[0] in HUB_LICENCES else "other"
    return front


def _fields(sets: Mapping[str, Artifact], repo_id: str | None) -> dict[str, object]:
    folder, artifact = next(iter(sets.items()))
    metadata, several = artifact.metadata, len(sets) > 1
    every = [artifact.metadata for artifact in sets.values()]
    others = [row for m in every if not _made_here(m) for row in m.results]
    classes = len(metadata.classes)
    fields: dict[str, object] = {
        "title": f"{plain(metadata.dataset)}, distilled to {_sizes(sets)}",
        "dataset": plain(metadata.dataset),
        "amount": f"{metadata.ipc * classes} synthetic images, {metadata.ipc} for each of {classes} classes,",
        "classes": classes,
        "channels": metadata.channels,
        "height": metadata.height,
        "width": metadata.width,
        "load": f'from_hub("{repo_id}")',
        "loading": "`ipc=k` loads only the first k images of each class.",
        "load_dataset": f'"{repo_id}"',
        "results": _results([row for m in every for row in _rows(m, several)])
        + _OTHER_TEACHER * any(row.get("labels") == "soft" for row in others),
        "source": _sources(sets),
        "preview": inside(folder, PREVIEW_FILE),
        "sets": "\n\n".join(_set(name, artifact).rstrip("\n") for name, artifact in sets.items()),
    }
    if several:
        fields |= {
            "amount": f"Sets of synthetic images, {_sizes(sets)} for {classes} classes,",
            "loading": f"The example loads `{folder}/`; `ipc=k` loads the set that was made for k images "
            "per\nclass, or else the first k of a larger one.",
            "load_dataset": f'"{repo_id}", "{folder}"',
        }
    if repo_id is None:
        parquet = inside(folder, PARQUET_FILE)
        fields |= {"load": 'from_folder(".")', "load_dataset": f'"parquet", data_files="{parquet}"'}
    return fields


def _set(folder: str, artifact: Artifact) -> str:
    metadata, tensors = artifact.metadata, artifact.tensors
    stored = json.loads(metadata.to_json())
    classes = stored.pop("classes")
    fields = {
        "suffix": f"_{folder}" if folder else "",
        "place": f"`{folder}/`" if folder else "it",
        "classes": len(classes),
        "tensors": " and ".join(
            f"`{name}` {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            for name, tensor in tensors.items()
        ),
        "bytes": f"{sum(tensor.nbytes for tensor in tensors.values()):,}",
        "mean": _numbers(metadata.mean),
        "std": _numbers(metadata.std),
        "whitening": "No ZCA whitening."
        if _made_here(metadata)
        else "Whether it was whitened (ZCA), its makers know.",
        "packing": _packing(metadata),
        "labels": _labels(artifact),
        "content_hash": artifact.content_hash,
        "class_names": json.dumps(dict(enumerate(classes)), indent=1, ensure_ascii=False),
        "recipe": _facts({name: value for name, value in metadata.recipe.items() if name != "settings"})
        or "The recipe was not recorded.",
        "configuration": json.dumps(stored, indent=1, sort_keys=True, ensure_ascii=False),
        "artifact": inside(folder, ARTIFACT_FILE),
        "parquet": inside(folder, PARQUET_FILE),
        "preview": inside(folder, PREVIEW_FILE),
        "manifest": inside(folder, MANIFEST_FILE),
    }
    return Template(SET_TEMPLATE.read_text(encoding="utf-8")).substitute(fields)


def _sizes(sets: Mapping[str, Artifact]) -> str:
    """ "10 images per class", "1, 10 and 50 images per class"."""
    *most, last = sorted(artifact.metadata.ipc for artifact in sets.values())
    return f"{', '.join(map(str, most))} and {images_per_class(last)}" if most else images_per_class(last)


def images_per_class(ipc: int) -> str:
    return f"{ipc} image{'' if ipc == 1 else 's'} per class"


def _rows(metadata: Metadata, several: bool) -> list[Mapping[str, Any]]:
    """Its results; among `several` sets those of its first images must not be taken for another set's."""
    own = (None, metadata.ipc)
    return [
        {**row, "ipc": f"{row['ipc']}, the first of {metadata.ipc}"}
        if several and row.get("ipc") not in own
        else row
        for row in metadata.results
    ]


def _results(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "No evaluation was recorded."
    header = (
        "Network", "Protocol", "Images per class", "Labels", "Runs", "Distilled", "Random real images",
        "Full dataset", "Distilled, best epoch", "Measured on",
    )  # fmt: skip
    lines = [header, ["---"] * len(header)]
    for row in rows:
        names = [plain(row.get(name, "-")) for name in ("network", "ipc", "labels", "n")]
        names.insert(1, _protocol(row))
        scores = [_score(row, kind) for kind in ("last", "random", "full", "best")]
        lines.append([*names, *scores, plain(row.get("device", "-"))])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    told = f"{table}\n\n{_HOW_MEASURED}{_tested_on(rows)}"
    if any(row.get("split", "test") != "test" for row in rows):
        told += _HELD_OUT
    return told + _BY_TEACHER if any(row.get("labels") == "teacher" for row in rows) else told


def _tested_on(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many images the test set has, if all rows that say it say the same."""
    tested = [row for row in rows if row.get("split", "test") == "test" and "test_images" in row]
    counts = _different(str(row["test_images"]) for row in tested)
    return f" The test set has {plain(*counts)} images." if len(counts) == 1 else ""


def _protocol(row: Mapping[str, Any]) -> str:
    """What was measured how: "ncfm, 400 epochs", what was changed to the set's own recipe, and the split
    unless it is the real test set.
    """
    words = [str(row.get("protocol", "-"))]
    if "epochs" in row:
        words.append(f"{row['epochs']} epochs")
    if "changes" in row:
        words.append(str(row["changes"]))
    if row.get("split", "test") != "test":
        words.append(str(row["split"]))
    return plain(", ".join(words))


def _score(row: Mapping[str, Any], kind: str) -> str:
    mean, std = row.get(f"{kind}_mean"), row.get(f"{kind}_std")
    if not _is_number(mean):
        return "-"
    score = f"{mean:.1f} ± {std:.1f}" if _is_number(std) else f"{mean:.1f}"
    runs = row.get(f"{kind}_n", row.get("n"))
    return score if runs == row.get("n") else f"{score} ({plain(runs)})"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e30  # larger whole numbers have no decimals


def _packing(metadata: Metadata) -> str:
    if metadata.factor == 1:
        return "Factor 1: every stored image is one training image."
    factor, training = metadata.factor, metadata.ipc * metadata.factor**2
    return (
        f"Factor {factor}: every stored image is a grid of {factor} x {factor} tiles. Each tile, enlarged to "
        f"{metadata.height} x {metadata.width} pixels (bilinear, `align_corners=False`), is one training "
        f"image; tiles go row by row, so that each class has {training} training images."
    )


def _labels(artifact: Artifact) -> str:
    if artifact.logits is None:
        return "The class alone; there are no soft labels."
    labels = artifact.metadata.labels
    teacher = plain(_listed(labels.get("teacher") or "not recorded"))
    kind, origin = "Raw teacher logits", f"Teacher: {teacher}."
    if not _made_here(artifact.metadata) and not labels.get("teacher"):
        kind, origin = "Logits", "Whether a teacher gave them or they were learned, its makers know."
    return (
        f"{kind} for every training image; soft labels are softmax(logits / temperature) with the "
        f"temperature {plain(labels.get('temperature', 1.0))}. {origin}"
    )


def _sources(sets: Mapping[str, Artifact]) -> str:
    """Of all sets; where they differ, of which."""
    texts = {folder: _source(artifact.metadata) for folder, artifact in sets.items()}
    different = _different(texts.values())
    if len(different) == 1:
        return different[0]
    names = [", ".join(f"`{folder}/`" for folder in texts if texts[folder] == text) for text in different]
    return "\n\n".join(f"**{name}:** {text}" for name, text in zip(names, different, strict=True))


def _different(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _source(metadata: Metadata) -> str:
    source = dict(metadata.source)
    licence, citation = source.pop("license", None) or "not recorded", source.pop("citation", None)
    parts = [
        f"Made from {plain(metadata.dataset)}. Its licence: {plain(licence)}. The images are derived from "
        "it, so what that licence asks holds for them too.",
        _facts(source),
    ]
    if citation:
        parts += ["Please cite the source:", indent(str(citation).strip(), "    ", lambda line: True)]
    return "\n\n".join(part for part in parts if part)


def _facts(content: Mapping[str, Any]) -> str:
    """One line for each entry."""
    return "\n".join(f"- **{plain(name)}**: {plain(_listed(content[name]))}" for name in sorted(content))


def _listed(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def plain(value: object) -> str:
    """`value` on one line of Markdown that shows its characters as they are; web addresses become links."""
    words = []
    for word in str(value).split():
        if _URL.fullmatch(word):
            words.append(f"<{word}>")
        else:
            words.append(re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(word, quote=False)))
    return " ".join(words)
