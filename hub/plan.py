"""The plan of a push: what the repository holds, what it is to hold, and so which files change.

A repository holds one set in its root, as a folder does. When a set of another size comes, both get a folder
of their own, `ipc10/` and `ipc50/`, with one card over them and an index of their manifests.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi

from distilled_data import AccessError, Artifact, ConflictError, FormatError, IntegrityError, UsageError
from distilled_data.client import LIBRARY, call, check_arguments
from distilled_data.format import CARD_FILE, FOLDER_FILES, MANIFEST_FILE
from distilled_data.manifest import (
    Fingerprint,
    Index,
    Manifest,
    configuration_name,
    inside,
    read_manifest,
    verify_folder,
)
from distilled_data.terminal import without_login

from .card import images_per_class, read_card, render_card
from .repository import Contents, git_hash, hub_hash, look

_TAG = re.compile(r"(?!.*(\.\.|//|@\{))[\w.][\w./+@-]*(?<!\.lock)(?<![./])")


@dataclass(frozen=True)
class PushOptions:
    """What is published how. Raises `UsageError` for what does not go together."""

    revision: str | None = None  # tag of the commit
    private: bool = False  # the repository is, or is created so
    gated: Literal["auto", "manual"] | None = None  # likewise: who reads it consents to its conditions
    create_pr: bool = False  # open a pull request instead of committing
    default: bool = False  # make this set the one that is loaded without `ipc`; else the first one stays it
    force: bool = False  # move a tag that exists; replace what is not a sound set of the same classes
    endpoint: str | None = None  # address of the Hub; None: HF_ENDPOINT, or huggingface.co
    token: str | None = field(default=None, repr=False)  # None: HF_TOKEN, or the stored login

    def __post_init__(self):
        tag = self.revision
        if tag is not None and (not _TAG.fullmatch(tag) or re.fullmatch("[0-9a-f]{40}", tag)):
            raise UsageError(f"{tag!r} cannot be a tag; expected one like v1 or 2026-01")
        if self.create_pr and tag:
            raise UsageError("a pull request cannot be tagged before it is merged; leave out one of the two")


def hub_api(options: PushOptions) -> HfApi:
    return HfApi(endpoint=options.endpoint, token=options.token, library_name=LIBRARY)


@dataclass(frozen=True)
class PlannedFile:
    path: str  # in the repository
    change: str  # new, changed, unchanged, moved, removed
    size: int  # bytes
    hash: str  # sha256; of a small file that is moved or removed, its git object
    content: Path | bytes | str | None = field(repr=False)  # file, bytes, or where in the repository it was


@dataclass(frozen=True)
class PushPlan:
    """What `push` is going to do; `str(plan)` describes it. Made by `plan_push`."""

    folder: Path
    repo_id: str
    url: str
    parent: str | None  # commit this is planned against; None: the repository is created
    settings: dict[str, Any]  # of the repository, to be made before the commit: private, gated
    tagged: str | None  # commit that has the tag now
    files: tuple[PlannedFile, ...]
    message: str  # of the commit
    options: PushOptions

    @property
    def changes(self) -> list[PlannedFile]:
        return [file for file in self.files if file.change != "unchanged"]

    @property
    def moves_tag(self) -> bool:
        return self.tagged is not None and (bool(self.changes) or self.tagged != self.parent)

    def __str__(self) -> str:
        options = self.options
        made = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        made = made or ("as they are" if self.parent else "the account's default")
        change = f"{'pull request' if options.create_pr else 'commit'}: {self.message}"
        tag = f"{options.revision or 'none'}{f', moved from {self.tagged}' if self.moves_tag else ''}"
        lines = [
            f"push to {self.url}",
            f"  parent   {self.parent or 'none: the repository is created'}",
            f"  settings {made}",
            f"  change   {change if self.changes else 'none, everything is there already'}",
            f"  tag      {tag}",
        ]
        width = max(len(file.path) for file in self.files)
        lines += [
            f"  {file.change:<9}  {file.path:<{width}}  {file.size:>11,} bytes  "
            f"{'sha256' if len(file.hash) == 64 else 'git'} {file.hash}"
            for file in self.files
        ]
        return "\n".join(lines)


def plan_push(folder: str | Path, repo_id: str, options: PushOptions | None = None) -> PushPlan:
    """Plan publishing a complete artifact folder to the dataset repository `repo_id` ("org/name").

    Reads the Hub and changes nothing. Where the repository has a card, it is that card which is brought up
    to date: the words of the folder's own card are used only where there is none.

    Raises `FormatError` and `IntegrityError` for an unfit folder, `UsageError` for a tag that exists and for
    a repository that holds something else, `ConflictError` for a folder that others change meanwhile,
    `AccessError`, `HubError`.
    """
    folder, options = Path(folder), options or PushOptions()
    check_arguments(repo_id, options.token, options.endpoint)
    manifest = read_manifest(folder)
    artifact = verify_folder(folder)
    api = hub_api(options)
    if "/" not in repo_id:
        repo_id = f"{call(repo_id, api.whoami)['name']}/{repo_id}"
    remote = contents_for(api, repo_id, options)
    wanted, sets = _wanted(folder, artifact, remote, options)
    card = read_card(folder) if remote.card is None else remote.card
    wanted[CARD_FILE] = render_card(sets, card, repo_id=repo_id).encode()
    metadata = artifact.metadata
    plan = PushPlan(
        folder=folder,
        repo_id=repo_id,
        url=f"{without_login(api.endpoint)}/datasets/{repo_id}",
        parent=remote.head,
        settings=_settings(repo_id, remote, options),
        tagged=remote.tagged,
        files=_planned_files(repo_id, folder, wanted, remote, options.force),
        message=f"{metadata.dataset}: {images_per_class(metadata.ipc)}, content {artifact.content_hash[:12]}",
        options=options,
    )
    if read_manifest(folder) != manifest:  # the card is of what was there before
        raise ConflictError(f"{folder} changed while the push was planned. Nothing was pushed.")
    if plan.moves_tag and not options.force:
        raise UsageError(
            f"{repo_id} has a tag {options.revision!r} already, on {remote.tagged}, and whoever uses it "
            "relies on that. Choose another one, or move it with --force."
        )
    return plan


def contents_for(api: HfApi, repo_id: str, options: PushOptions) -> Contents:
    """What lies at `repo_id`; raises where nothing can be published by these options, whatever the set."""
    remote = look(api, repo_id, tag=options.revision, force=options.force)
    if remote.head is None and options.create_pr:
        raise AccessError(f"{repo_id} does not exist, so there is nothing to open a pull request for")
    if remote.head is None and options.revision == "main":
        raise UsageError(f"{repo_id} would have a branch 'main'; a tag of the same name would hide it")
    if ".gitignore" in remote.files:
        raise UsageError(
            f"{repo_id} has a .gitignore, by which the Hub leaves files out of a commit without a word. "
            "Remove it there, or publish elsewhere."
        )
    _settings(repo_id, remote, options)
    return remote


def _settings(repo_id: str, remote: Contents, options: PushOptions) -> dict[str, Any]:
    """What `push` has to set before there is anything to read."""
    missing: dict[str, Any] = {}
    if options.private and not remote.private:
        missing["private"] = True
    if options.gated and remote.gated != options.gated:
        missing["gated"] = options.gated
    if missing and (options.create_pr or set(remote.files) - {CARD_FILE, ".gitattributes"}):
        raise UsageError(
            f"{repo_id} exists and is not {' and '.join(missing)}. Change that on its page first, or leave "
            "the flag out."
        )
    return missing


def _wanted(
    folder: Path, artifact: Artifact, remote: Contents, options: PushOptions
) -> tuple[dict[str, Path | bytes | str], dict[str, Artifact]]:
    """Where the content of every file comes from, and the sets by their folders, the default first.

    The content is in a local file, in bytes, or at a path in the repository, from where it moves.
    """
    files = {name: folder / name for name in FOLDER_FILES if name != CARD_FILE}
    ours = configuration_name(artifact.metadata.ipc)
    places = {
        known: known or configuration_name(remote.sets[known].artifact.metadata.ipc) for known in remote.sets
    }
    for known, found in remote.sets.items():
        _check_same(found.artifact, artifact, replaced=places[known] == ours and options.force)
    others = {known: found for known, found in remote.sets.items() if places[known] != ours}
    if not others and ours not in remote.sets:
        return dict(files), {"": artifact}
    wanted: dict[str, Path | bytes | str] = {f"{ours}/{name}": local for name, local in files.items()}
    sets = {ours: artifact}
    manifests = {ours: (folder / MANIFEST_FILE).read_bytes()}
    for known, found in others.items():
        place = places[known]
        sets[place], manifests[place] = found.artifact, (found.folder / MANIFEST_FILE).read_bytes()
        wanted |= {f"{place}/{name}": f"{known}/{name}" if known else name for name in found.manifest.files}
        wanted[f"{place}/{MANIFEST_FILE}"] = manifests[place]
    first = ours if options.default else places[next(iter(remote.sets))]
    order = sorted(sets, key=lambda place: (place != first, sets[place].metadata.ipc))
    prints = {place: Fingerprint.of_bytes(manifests[place]) for place in order}
    wanted[MANIFEST_FILE] = Index(first, prints).to_bytes()
    return wanted, {place: sets[place] for place in order}


def _check_same(there: Artifact, ours: Artifact, replaced: bool) -> None:
    one, two = there.metadata, ours.metadata
    if (one.dataset, one.classes) != (two.dataset, two.classes) and not replaced:
        raise UsageError(
            f"the repository holds {one.dataset} with {len(one.classes)} classes, this is {two.dataset} with "
            f"{len(two.classes)}, or with other names. Publish it elsewhere, or over a set of its size with "
            "--force."
        )


def _planned_files(
    repo_id: str, folder: Path, wanted: Mapping[str, Path | bytes | str], remote: Contents, force: bool
) -> tuple[PlannedFile, ...]:
    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest)
    published = {
        inside(name, file): fingerprint
        for name, found in remote.sets.items()
        for file, fingerprint in found.manifest.files.items()
    }
    ours = {CARD_FILE, MANIFEST_FILE, *published, *(inside(name, MANIFEST_FILE) for name in remote.sets)}
    planned = []
    for path, content in wanted.items():
        there = remote.files.get(path)
        if isinstance(content, str):
            entry = remote.files.get(content)
            same = content == path or (there and entry and hub_hash(there) == hub_hash(entry))
            change = "unchanged" if same else "moved"
            if entry is None or (change == "moved" and remote.sha256(content) != published[content].sha256):
                raise IntegrityError(
                    f"{repo_id} {'lacks' if entry is None else 'has altered'} {content}, which its manifest "
                    "names. Publish that set anew."
                )
            size, digest = entry.size, hub_hash(entry)
        else:
            data = content if isinstance(content, bytes) else _local(content, folder, manifest)
            found = Fingerprint.of_bytes(data)
            size, digest, change = found.size, found.sha256, "new"
            if there is not None:
                same = hub_hash(there) == (found.sha256 if there.lfs else git_hash(data))
                change = "unchanged" if same else "changed"
        if there and change in ("changed", "moved") and path not in ours and not force:
            raise UsageError(
                f"{repo_id} has a {path} of something else. Publish elsewhere, or over it with --force."
            )
        planned.append(PlannedFile(path, change, size, digest, content))
    gone = {content for content in wanted.values() if isinstance(content, str)}
    gone |= {inside(place, name) for place in remote.broken for name in FOLDER_FILES if name != CARD_FILE}
    for path in sorted((gone & set(remote.files)) - set(wanted)):
        entry = remote.files[path]
        planned.append(PlannedFile(path, "removed", entry.size, hub_hash(entry), None))
    return tuple(planned)


def _local(path: Path, folder: Path, manifest: Manifest) -> bytes:
    """A file of the folder, as the manifest that is published with it has it."""
    name = path.relative_to(folder).as_posix()
    if name != MANIFEST_FILE and name not in manifest.files:
        raise FormatError(
            f"the manifest of {folder} lacks {name}. Write it with hub.complete_folder({str(folder)!r})."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}. Write the folder anew.") from error
    if name != MANIFEST_FILE:
        manifest.files[name].check(path, "Write the folder anew.", data)
    return data
