"""A hub of models on loopback: repositories that are created, written by commits (LFS for large files), and read."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".pt", ".png")


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def owns(user: str | None, name: str) -> bool:
    """Whether a repository is in the user's namespace, or in that of the organisation that each of them has."""
    return user is not None and name.partition("/")[0] in (user, f"{user}-org")


@dataclass
class Repo:
    """A model: commits, the first first, each (id, message, files by name)."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    def add(self, message: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits.append((commit, message, files))
        return commit

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][2]

    def at(self, revision: str) -> tuple[str, str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class FakeHub:
    """`faults[part of a path]` is a list of what happens to the next requests with it: a status, or "drop"."""

    USERS: ClassVar = {"hf_alice": "alice", "hf_bob": "bob"}  # who may write to repositories of their own, by token

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}  # large files by SHA-256
        self.faults: dict[str, list[object]] = defaultdict(list)
        self.requests: list[str] = []  # "METHOD path"
        self.after: dict[str, Any] = {}  # called once after a request with this in its path was served
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None: ...

            def serve(self) -> None:
                hub.serve(self)

            do_GET = do_HEAD = do_POST = do_PUT = serve

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None: ...  # clients that hang up are expected

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, part: str) -> int:
        """Requests so far with this in "METHOD path"."""
        return sum(part in request for request in self.requests)

    def serve(self, request: Any) -> None:
        path = unquote(urlsplit(request.path).path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.requests.append(f"{request.command} {path}")
        fault = next((faults.pop(0) for part, faults in self.faults.items() if part in path and faults), None)
        if fault == "drop":
            request.close_connection = True
            return
        if isinstance(fault, int):
            return self.answer(request, fault)
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.USERS:
            return self.answer(request, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        self.route(request, path, body, self.USERS.get(token))
        for part in [part for part in self.after if part in path]:
            self.after.pop(part)()
        return None

    def route(self, request: Any, path: str, body: bytes, user: str | None) -> None:
        if path == "/api/repos/create":
            return self.create(request, json.loads(body), user)
        if path == "/api/whoami-v2":
            value = {"name": user, "orgs": [{"name": f"{user}-org"}]}
            return self.answer(request, 200 if user else 401, value=value)
        if path == "/api/validate-yaml":
            return self.validate(request, json.loads(body)["content"])
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self.answer(request, 400)
            self.store[match[1]] = body
            return self.answer(request, 200)
        match = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+?)(?:(\.git/info/lfs/objects/batch)|/(preupload|commit|revision|resolve)/([^/]+)(?:/(.+))?)?",
            path,
        )
        repo = self.repos.get(match[1]) if match else None
        if match is None or repo is None or (repo.private and not owns(user, match[1])):
            return self.answer(request, 404 if user else 401, {"X-Error-Code": "RepoNotFound"})
        verb = match[3] or ("batch" if match[2] else "info")
        if verb in ("preupload", "commit", "batch") and not owns(user, match[1]):
            return self.answer(request, 403, {"X-Error-Message": "Forbidden"})
        if verb in ("info", "revision", "resolve"):
            return self.read(request, match[1], repo, verb, match[4] or "main", match[5])
        value = [json.loads(line) for line in body.splitlines()] if verb == "commit" else json.loads(body)
        return getattr(self, verb)(request, match[1], repo, value)

    def create(self, request: Any, asked: dict[str, Any], user: str | None) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if not owns(user, name):
            return self.answer(request, 403, {"X-Error-Message": "Forbidden"})
        if name in self.repos:
            return self.answer(request, 409, value={"url": f"{self.url}/{name}"})
        self.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.repos[name].add("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(request, 200, value={"url": f"{self.url}/{name}"})

    def validate(self, request: Any, content: str) -> None:
        """The rules of the hub's front matter that matter here."""
        front = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        errors = [] if isinstance(front.get("license", "mit"), str) else [{"message": '"license" must be a string'}]
        warnings = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        self.answer(request, 400 if errors else 200, value={"errors": errors, "warnings": warnings})

    def preupload(self, request: Any, name: str, repo: Repo, asked: dict[str, Any]) -> None:
        files = []
        for file in asked["files"]:
            have, large = repo.files.get(file["path"]), file["path"].endswith(LFS_SUFFIXES)
            oid = None if have is None else hashlib.sha256(have).hexdigest() if large else git_hash(have)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(request, 200, value={"files": files})

    def batch(self, request: Any, name: str, repo: Repo, asked: dict[str, Any]) -> None:
        objects = []
        for file in asked["objects"]:
            known = file["oid"] in self.store
            actions = {} if known else {"actions": {"upload": {"href": f"{self.url}/lfs/{file['oid']}"}}}
            objects.append(file | actions)
        self.answer(request, 200, value={"transfer": "basic", "objects": objects})

    def commit(self, request: Any, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        files, header = dict(repo.files), lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.commits[-1][0]):
            return self.answer(request, 412, {"X-Error-Message": "a commit has happened since"})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.store[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.add(header["summary"], files)
        if self.faults["lose the answer"]:
            self.faults["lose the answer"].pop()
            request.close_connection = True
            return None
        value = {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}
        return self.answer(request, 200, value=value)

    def read(self, request: Any, name: str, repo: Repo, verb: str, revision: str, file: str | None) -> None:
        found = repo.at(revision)
        if found is None:
            return self.answer(request, 404, {"X-Error-Code": "RevisionNotFound"})
        commit, _, files = found
        if verb == "resolve":
            if repo.gated:
                return self.answer(request, 403, {"X-Error-Code": "GatedRepo"})
            return self.send_file(request, commit, files, file or "")
        siblings = []
        for path, data in files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_hash(data)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        value = {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}
        return self.answer(request, 200, value=value)

    def send_file(self, request: Any, commit: str, files: dict[str, bytes], file: str) -> None:
        if file not in files:
            return self.answer(request, 404, {"X-Error-Code": "EntryNotFound"})
        data, large = files[file], file.endswith(LFS_SUFFIXES)
        etag = hashlib.sha256(data).hexdigest() if large else git_hash(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        start = int(re.sub(r"\D", "", request.headers.get("Range") or "0"))
        if request.command == "GET" and self.faults["cut"]:
            self.faults["cut"].pop()
            request.send_response(200)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
            return None
        if request.command == "GET" and self.faults["corrupt"]:
            self.faults["corrupt"].pop()
            data = data[:-1] + bytes([data[-1] ^ 1])
        status = 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(request, status, headers, body=data[start:])

    def answer(
        self,
        request: Any,
        status: int,
        headers: dict[str, str] | None = None,
        value: Any = None,
        body: bytes | None = None,
    ) -> None:
        data = body if body is not None else b"" if value is None else json.dumps(value).encode()
        request.send_response(status)
        for key, text in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            request.send_header(key, text)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
