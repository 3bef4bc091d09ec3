"""Publishing: a plan, which is plain data that can be read before anything happens, and one commit of it."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from distilled_data import FormatError, UsageError
from distilled_data.format import ARTIFACT_FILE, CARD_FILE, FOLDER_FILES, read_artifact, verify_folder

from .card import render_card


@dataclass(frozen=True)
class PlannedFile:
    path: str  # in the repository
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class PushPlan:
    """What `push` is going to do; `str(plan)` describes it."""

    folder: Path
    repo_id: str
    files: tuple[PlannedFile, ...]
    message: str  # of the commit
    parent: str | None  # commit this is planned against; None: the repository is created
    tag: str | None  # set on the new commit
    private: bool  # of a repository that is created
    card: str = field(repr=False)  # the remote card, where there is one, brought up to date
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        visibility = "private" if self.private else "public"
        lines = [
            f"push to https://huggingface.co/datasets/{self.repo_id}",
            f"  parent   {self.parent or f'none: a {visibility} repository is created'}",
            f"  message  {self.message}",
            f"  tag      {self.tag or 'none'}",
        ]
        lines += [f"  {file.path:<22}{file.size:>14,} bytes  sha256 {file.sha256}" for file in self.files]
        return "\n".join(lines)


def plan_push(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> PushPlan:
    """Plan publishing a complete artifact folder to the dataset repository `repo_id`, tagged `revision`.

    Reads the Hub and changes nothing. Where the repository has a card, it is that card which is brought up
    to date: the words of the folder's own card are used only where there is none. Raises `FormatError` and
    `IntegrityError` for an unfit folder, `UsageError` for a tag that exists.
    """
    folder = Path(folder)
    verify_folder(folder)
    artifact = read_artifact(folder / ARTIFACT_FILE)
    api = HfApi(token=token)
    parent, card = None, folder / CARD_FILE
    try:
        info = api.dataset_info(repo_id)
    except RepositoryNotFoundError:
        pass  # it is created by `push`
    else:
        parent = info.sha
        tags = api.list_repo_refs(repo_id, repo_type="dataset").tags
        if revision in {tag.name for tag in tags}:
            raise UsageError(
                f"{repo_id} has a tag {revision!r} already, and tags are never moved. Choose another."
            )
        if CARD_FILE in {file.rfilename for file in info.siblings or ()}:
            card = Path(api.hf_hub_download(repo_id, CARD_FILE, repo_type="dataset", revision=parent))
    merged = render_card(
        artifact, card.read_text(encoding="utf-8") if card.exists() else None, repo_id=repo_id
    )
    metadata = artifact.metadata
    return PushPlan(
        folder=folder,
        repo_id=repo_id,
        files=_planned_files(folder, merged),
        message=f"{metadata.dataset}: {metadata.ipc} images per class, content {artifact.content_hash[:12]}",
        parent=parent,
        tag=revision,
        private=private,
        card=merged,
        token=token,
    )


def push(plan: PushPlan) -> str:
    """Publish in one commit on top of the planned parent, then tag it; return the URL of the commit.

    Raises `UsageError` when the folder changed since it was planned. When the repository changed, the Hub
    refuses the commit and nothing of it is published.
    """
    verify_folder(plan.folder)
    if _planned_files(plan.folder, plan.card) != plan.files:
        raise UsageError(f"{plan.folder} is not what it was when the push was planned. Plan it again.")
    api = HfApi(token=plan.token)
    parent = plan.parent
    if parent is None:
        # Not exist_ok: a repository that appeared meanwhile may have a card that the plan did not see.
        api.create_repo(plan.repo_id, repo_type="dataset", private=plan.private)
        parent = api.dataset_info(plan.repo_id).sha
    commit = api.create_commit(
        plan.repo_id,
        [
            CommitOperationAdd(
                file.path, plan.card.encode() if file.path == CARD_FILE else plan.folder / file.path
            )
            for file in plan.files
        ],
        commit_message=plan.message,
        repo_type="dataset",
        parent_commit=parent,
    )
    if plan.tag is not None:
        api.create_tag(plan.repo_id, tag=plan.tag, revision=commit.oid, repo_type="dataset")
    return commit.commit_url


def _planned_files(folder: Path, card: str) -> tuple[PlannedFile, ...]:
    files = []
    for name in FOLDER_FILES:
        if name != CARD_FILE and not (folder / name).is_file():
            raise FormatError(f"{folder} has no {name}. Write it with hub.complete_folder({str(folder)!r}).")
        content = card.encode() if name == CARD_FILE else (folder / name).read_bytes()
        files.append(PlannedFile(name, len(content), hashlib.sha256(content).hexdigest()))
    return tuple(files)
