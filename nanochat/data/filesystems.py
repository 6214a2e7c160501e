"""Differences between fsspec's file systems: open one, list its files, classify its errors."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import PurePath, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec

from nanochat.common import UserError, first_line

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}


def open_filesystem(data: str) -> tuple[Any, str]:
    """(an fsspec file system, the path in it). UserError names a package that is missing."""
    if "::" in data:  # for zip://inner::https://host/archive.zip fsspec gives zip://inner as the file's address
        raise UserError(
            f"--data {data}: files inside another file (::) cannot be read; unpack it and give its files' address"
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
    fs.invalidate_cache()  # of listings made earlier in this process
    return fs, path


def ending_of(path: PurePath) -> str:
    """What to call the kind of a file that cannot be used: its ending."""
    return path.suffix.lower() or "without an ending"


def list_files(
    fs: Any, path: str, usable: Callable[[PurePosixPath], Any]
) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
    """(path -> info of the usable files, how many others of each kind). FileNotFoundError if there is no such path."""
    web = "http" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    fixed = None  # of a pattern, the folder before its first wildcard
    if any(c in path for c in "*[") and not (web and fs.exists(path)):
        matches = fs.glob(path, detail=True)
        fixed = re.split(r"[*\[]", path)[0].rpartition("/")[0]
    elif web and not usable(PurePosixPath(urlsplit(path).path)):
        matches = {path: {"type": "directory"}}  # on a web server a folder is a page with links
    else:
        matches = {path: fs.info(path)}
    found: dict[str, dict[str, Any]] = {}
    unused: Counter[str] = Counter()
    for match, info in matches.items():
        if info["type"] != "directory":
            below = {match: info}
        else:
            below = linked_files(fs, match) if web else fs.find(match, detail=True)
        for name, details in below.items():
            plain = PurePosixPath(urlsplit(name).path if web else name)
            below_given = name.removeprefix(match if fixed is None else fixed).split("/")
            if any(part.startswith(".") for part in below_given):
                unused["hidden"] += 1
            elif usable(plain):
                found[name] = details
            else:
                unused[ending_of(plain)] += 1
    if web:  # a page with links has no sizes
        found = {name: fs.info(name) if info.get("size") is None else info for name, info in found.items()}
    return found, unused


def linked_files(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """fs.find() for the web, where find() takes a page that cannot be fetched (the server is down) for an empty folder.

    Only folders below are entered: a listing also links to its parent, and to itself in another sort order."""
    found: dict[str, dict[str, Any]] = {}
    here = folder.rstrip("/") + "/"
    for info in fs.ls(folder, detail=True):
        name = info["name"]
        if info["type"] == "file":
            found[name] = info
        elif name.startswith(here) and name != here and not name.startswith(here + "."):
            found |= linked_files(fs, name)
    return found


VERSION_KEYS = (
    "ETag etag md5Hash generation version_id Content-MD5 LastModified last_modified Last-Modified mtime updated created"
)
NETWORK_LIBRARIES = "aiohttp botocore aiobotocore gcsfs google requests urllib3 httpx huggingface_hub azure"


def version_of(info: dict[str, Any]) -> str:
    """Identifies a file's version, from what its file system says; empty if it says nothing."""
    return next((f"{key} {info[key]}" for key in VERSION_KEYS.split() if info.get(key)), "")


# ---------------------------------------------------------------------------------------------------
# Errors


def classify(error: Exception) -> str | None:
    """ "missing", "shorter" (than the requested range), "denied", or "network" if another attempt may help; None for a
    bug."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):  # fsspec's for any error
        return classify(error.__cause__)
    response = getattr(error.__cause__ or error, "response", None)  # botocore's, whose errors s3fs translates in part
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    status = str(getattr(error, "status", None) or getattr(error, "code", None) or code)
    if isinstance(error, FileNotFoundError | IsADirectoryError) or status in (
        "404",
        "410",
        "NoSuchBucket",
        "NoSuchKey",
    ):
        return "missing"
    if status in ("416", "InvalidRange"):
        return "shorter"
    if isinstance(error, PermissionError) or status in ("401", "403") or "Credentials" in type(error).__name__:
        return "denied"
    from_network = type(error).__module__.split(".")[0] in NETWORK_LIBRARIES.split()
    return "network" if from_network or isinstance(error, OSError | TimeoutError | EOFError) else None


def brief(error: Exception) -> str:
    """The first line of the error, or of its cause where fsspec's own has only the address; at most 120 characters."""
    return first_line(error.__cause__ or error)
