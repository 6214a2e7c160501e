"""Push an export to the Hugging Face hub, and pull a model from it.

The bytes go through Xet where hf_xet is installed and HF_HUB_DISABLE_XET is not set, else as Git LFS. All files of a
push are one commit: a push that is interrupted publishes nothing.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from filelock import FileLock

from nanochat.common import UserError, say, sha256_file, warn
from nanochat.data.download import STALL_SECONDS
from nanochat.formats.hub_client import Hub, lacks_xet, library_warnings, quiet_progress
from nanochat.formats.published import MODEL_FILE

# Files of an earlier push that the next one deletes where it does not replace them: other programs would load them.
OURS = re.compile(
    r"model[\w.-]*\.safetensors|model\.safetensors\.index\.json|(modeling|configuration)_\w+\.py|curves-\w+\.png|"
    r"generation_config\.json|chat_template\.jinja|onnx/model(_quantized)?\.onnx(_data)?"
)
# What a pull takes: weights and plain data, at the top of the repository.
READ = re.compile(
    r"(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|nanochat)\.json|"
    r"chat_template\.jinja|[\w.-]+\.safetensors|[\w.-]+\.safetensors\.index\.json"
)


@dataclass
class Push:
    """A push in preparation: what is on the hub now. `open_push` makes one, before anything is exported."""

    hub: Hub
    private: bool
    commit: str | None  # that the push follows; None for a new repository
    files: set[str]  # that are there


def open_push(name: str, private: bool, **settings: Any) -> Push:
    """Ask the hub about `name`. Raises UserError if nothing can be pushed there: no token, files of something else.

    `settings` go to Hub.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = Hub(name, to_write=True, **settings)
    if not huggingface_hub.get_token():
        raise UserError(f"to push to {hub.host}, {hub.login}")

    def look() -> Any:
        try:
            return hub.api.model_info(name, timeout=STALL_SECONDS)
        except RepositoryNotFoundError:
            return None

    found = hub.call(look)
    if found is None:
        check_owner(hub)
        return Push(hub, private, None, set())
    files = {file.rfilename for file in found.siblings or ()}
    if files - {".gitattributes", "README.md"} and "nanochat.json" not in files:
        raise UserError(f"{name} holds files that are no export of nanochat: {hub.url}; choose another name")
    if private and not found.private:
        raise UserError(f"{name} exists and is public; make it private in its settings first: {hub.url}/settings")
    return Push(hub, bool(found.private), found.sha, files)


def check_owner(hub: Hub) -> None:
    """Raise UserError if the token's owner can have no repository of this name, or one that the token does not show."""
    who = hub.call(hub.api.whoami)
    names = [str(who.get("name")), *(str(one.get("name")) for one in who.get("orgs") or ())]
    if hub.name.partition("/")[0] not in names:
        raise UserError(f"the token belongs to {names[0]}: push to {'/… or '.join(names[:5])}/…, or {hub.login}")


def push(folder: Path, to: Push, message: str) -> str:
    """Upload all files of `folder` as one commit with this message; returns the address of the model's page.

    Files there with the same names are replaced, in the newest version only; leftovers of an earlier push are deleted.
    """
    hub, paths = to.hub, list(files_of(folder))
    new = {path.relative_to(folder).as_posix() for path in paths}
    stale = sorted(name for name in to.files - new if OURS.fullmatch(name))
    if replaced := sorted(to.files & new):
        deleted = f" and deletes {', '.join(stale)}" if stale else ""
        say(f"{hub.name} exists: a new commit replaces {', '.join(replaced)}{deleted}; its history keeps them")
    size = sum(path.stat().st_size for path in paths)
    quiet_progress()
    if to.commit is None:
        create = {"private": to.private or None, "exist_ok": True}  # None: public, or as the organisation wants it
        hub.call(lambda: hub.api.create_repo(hub.name, **create))
        found = hub.call(lambda: hub.api.model_info(hub.name, timeout=STALL_SECONDS))
        to.commit, to.private = found.sha, bool(found.private)
    say(f"uploading {len(paths)} files, {size / 1e6:,.1f} MB, to {hub.url} ({'private' if to.private else 'public'})")

    def commit_all() -> None:
        operations: list[Any] = [huggingface_hub.CommitOperationDelete(name) for name in stale]
        for path in paths:
            operations.append(huggingface_hub.CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)))
        with library_warnings():
            hub.api.create_commit(hub.name, operations, commit_message=message, parent_commit=to.commit)

    def commit() -> None:
        try:
            commit_all()
        except ConnectionError as error:
            if not lacks_xet(error):
                raise
            warn(f"{hub.host} has no Xet storage; uploading as Git LFS (HF_HUB_DISABLE_XET=1 does so at once)")
            huggingface_hub.constants.HF_HUB_DISABLE_XET = True
            commit_all()

    hub.call(commit)
    return hub.url


def files_of(folder: Path) -> Iterator[Path]:
    """The regular files of an export, in order; hidden ones are left out. Raises UserError if it is none."""
    for name in ("config.json", "README.md", "nanochat.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no export of nanochat: it has no {name}")
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link; replace it by what it links to, or delete it")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def pull(name: str, base_dir: Path, revision: str = "main", **settings: Any) -> Path:
    """A folder with the files of a model on the hub that can be read here, downloaded once for each commit.

    Takes safetensors and what belongs to them, or else the last checkpoint of the published project. Sizes and hashes
    are compared with those that the hub states. `settings` go to Hub. Raises UserError.
    """
    hub = Hub(name, to_write=False, **settings)
    options = {"revision": revision, "files_metadata": True, "timeout": STALL_SECONDS}
    info = hub.call(lambda: hub.api.model_info(name, **options))
    if not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
        raise UserError(f"{hub.host} names no commit of {name}: is it a hub? Look at HF_ENDPOINT")
    folder = base_dir / "pulled" / name.replace("/", "--") / info.sha
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        files = {file.rfilename: file for file in info.siblings or ()}
        if not all((folder / name).is_file() for name in wanted(files)):  # an earlier version took fewer files
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.is_dir():  # complete if it is there
            download(hub, folder, info.sha, files)
    return folder


def download(hub: Hub, folder: Path, commit: str, files: dict[str, Any]) -> None:
    """Download what can be read into a neighbour of `folder`, and rename it. An interrupted download is continued."""
    names = wanted(files)
    if not names:
        raise UserError(f"{hub.name} has neither safetensors nor a published nanochat checkpoint: {hub.url}/tree/main")
    if strange := [name for name in names if type(files[name].size) is not int or files[name].size < 0]:
        raise UserError(f"{hub.url}: the hub states no size of {strange[0]}; is it a hub? Look at HF_ENDPOINT")
    total = sum(files[name].size for name in names)
    if total > (free := shutil.disk_usage(folder.parent).free):
        raise UserError(f"{hub.name} needs {total / 1e9:,.1f} GB, and {folder.parent} has {free / 1e9:,.1f} GB left")
    say(f"downloading {len(names)} files, {total / 1e6:,.1f} MB, from {hub.url} (commit {commit[:10]})")
    quiet_progress()
    part = folder.with_name(f"{commit}.part")
    for name in names:

        def fetch(name: str = name) -> str:
            with library_warnings():
                return hub.api.hf_hub_download(hub.name, name, revision=commit, local_dir=part)

        path, stated = Path(hub.call(fetch)), getattr(files[name].lfs, "sha256", None)  # of large files
        if path.stat().st_size != files[name].size or (stated and sha256_file(path) != stated):
            path.unlink()
            raise UserError(f"{hub.url}: {name} is not the file that the hub describes; run the command again")
    shutil.rmtree(part / ".cache", ignore_errors=True)  # the library's notes about what is complete
    part.rename(folder)


def wanted(names: Iterable[str]) -> list[str]:
    """Those of a repository's files to download: never code, and pickles only of the last published checkpoint."""
    names = sorted(names)
    found = [name for name in names if READ.fullmatch(name)]
    if any(name.endswith(".safetensors") for name in found):
        return found
    steps = [match[1] for name in names if (match := MODEL_FILE.fullmatch(name))]
    if not steps:
        return []
    last = max(steps, key=int)
    return [name for name in names if name in (f"meta_{last}.json", f"model_{last}.pt", "tokenizer.pkl")]
