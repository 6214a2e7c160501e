"""What fsspec's file systems have in common, and what they do not: opening one, listing files, what an error means."""

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec

from nanochat.common import UserError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}


def open_filesystem(data: str) -> tuple[Any, str]:
    """(an fsspec file system, the path in it). UserError that names the package which is missing."""
    if "::" in data:  # of zip://inner::https://host/archive.zip fsspec gives zip://inner as the file's address
        raise UserError(
            f"--data {data}: what lies inside another file (::) cannot be read; unpack it, and give the "
            "address of its files"
        )
    protocol = data.split("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(data)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        fix = f"pip install 'nanochat[{extra}]'" if extra else f"install the package that fsspec names: {brief(error)}"
        raise UserError(f"--data {data}: {protocol}:// needs a package that is not installed: {fix}") from error
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"--data {data}: {brief(error)}; give a path, or a URL such as s3://bucket/folder") from error
    fs.invalidate_cache()  # what was listed earlier in this process
    return fs, path


def list_files(fs: Any, path: str, usable: Callable[[PurePosixPath], Any]) -> dict[str, dict[str, Any]]:
    """Path and facts of the usable files. FileNotFoundError if nothing is there."""
    web = "http" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    fixed = None  # what a pattern says of itself, before its first wildcard
    if any(c in path for c in "*[") and not (web and fs.exists(path)):
        matches = fs.glob(path, detail=True)
        fixed = re.split(r"[*\[]", path)[0].rpartition("/")[0]
    elif web and not usable(PurePosixPath(urlsplit(path).path)):
        matches = {path: {"type": "directory"}}  # to a web server a folder is a page with links
    else:
        matches = {path: fs.info(path)}
    found: dict[str, dict[str, Any]] = {}
    for match, info in matches.items():
        if info["type"] != "directory":
            below = {match: info}
        else:
            below = linked_files(fs, match) if web else fs.find(match, detail=True)
        for name, facts in below.items():
            plain = PurePosixPath(urlsplit(name).path if web else name)
            below_given = name.removeprefix(match if fixed is None else fixed).split("/")
            if usable(plain) and not any(part.startswith(".") for part in below_given):
                found[name] = facts
    if web:  # a page with links tells no sizes
        found = {name: fs.info(name) if facts.get("size") is None else facts for name, facts in found.items()}
    return found


def linked_files(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """fs.find() for the web, which takes a page that it cannot fetch, as when the server is down, for an empty one.

    Of folders only those below are entered: a listing links to its parent, too, and to itself in another order."""
    found: dict[str, dict[str, Any]] = {}
    here = folder.rstrip("/") + "/"
    for info in fs.ls(folder, detail=True):
        name = info["name"]
        if info["type"] == "file":
            found[name] = info
        elif name.startswith(here) and name != here and not name.startswith(here + "."):
            found |= linked_files(fs, name)
    return found


def version_of(info: dict[str, Any]) -> str:
    """What a file system says of which version of a file this is."""
    names = (
        "ETag",
        "etag",
        "md5Hash",
        "generation",
        "version_id",
        "Content-MD5",
        "LastModified",
        "last_modified",
        "Last-Modified",
        "mtime",
        "updated",
        "created",
    )
    return next((f"{name} {info[name]}" for name in names if info.get(name)), "")


# ---------------------------------------------------------------------------------------------------
# What went wrong


def trouble(error: Exception) -> str | None:
    """ "missing", "shorter" (than the part that was asked for), "denied", or "network" for what another attempt may
    heal; None for a mistake in the program."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):  # what fsspec makes of any
        return trouble(error.__cause__)
    answer = getattr(error.__cause__ or error, "response", None)  # botocore's, whose errors s3fs translates in part
    said = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
    status = getattr(error, "status", None) or getattr(error, "code", None) or said
    name = type(error).__name__
    gone = (404, 410, "404", "NoSuchBucket", "NoSuchKey")
    if isinstance(error, FileNotFoundError | IsADirectoryError) or status in gone:
        return "missing"
    if status in (416, "416", "InvalidRange"):
        return "shorter"
    if isinstance(error, PermissionError) or status in (401, 403, "403") or "Credentials" in name:
        return "denied"
    library = type(error).__module__.split(".")[0]
    from_network = library in (
        "aiohttp",
        "botocore",
        "aiobotocore",
        "gcsfs",
        "google",
        "requests",
        "urllib3",
        "httpx",
        "huggingface_hub",
        "azure",
    )
    return "network" if from_network or isinstance(error, OSError | TimeoutError | EOFError) else None


def brief(error: Exception) -> str:
    """The error's first line, or that of its cause where fsspec put only the address in it."""
    words = str(error.__cause__ or error).strip().splitlines()
    return (words[0].rstrip(". ") if words and words[0] else type(error).__name__)[:120]
