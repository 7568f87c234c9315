"""A small Hub on this machine: what `huggingface_hub` calls to create, upload to, list and download a model.

Uploads go over Git LFS' basic transfer, so clients need `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .local_server import LocalServer

LFS_SUFFIX = ".safetensors"


@dataclass
class Repository:
    """A model repository: branch or pull request (`refs/pr/1`, ...) to the files at its tip."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or of a commit."""
        shas = {self.sha(branch): files for branch, files in self.branches.items()}
        return self.branches.get(revision, shas.get(revision))

    def sha(self, branch: str) -> str:
        """The commit at the tip of a branch."""
        listing = [f"{path} {hashlib.sha256(data).hexdigest()}" for path, data in self.branches[branch].items()]
        return hashlib.sha1("\n".join(sorted(listing)).encode()).hexdigest()


class HubServer(LocalServer):
    """`with HubServer() as hub:` answers at `hub.url`.

    Attributes:
        repositories: by id.
        uploaded: sha256 to the content of each file that came by LFS.
        requests: method and path of every request, in order.
        refusal: a status with which every request is answered, or None.
    """

    user, token = "user", "hf_" + "a1B2" * 8

    def __init__(self, refusal: int | None = None):
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.refusal = refusal
        self.lock = threading.Lock()
        super().__init__(_Handler, "hub")


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self._body()  # read even where it is refused: the connection is used again
        url = urlsplit(self.path)
        path, query = unquote(url.path).strip("/"), parse_qs(url.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            if self.hub.refusal is not None:
                self._json({"error": "refused"}, self.hub.refusal)
            elif path.startswith("api/"):
                self._api(path.removeprefix("api/"), query, body)
            elif path.endswith(".git/info/lfs/objects/batch"):
                if self._may_write(path.removesuffix(".git/info/lfs/objects/batch"), proposal=True):
                    self._lfs_batch(json.loads(body))
            elif path.startswith("storage/"):
                self._store(path.removeprefix("storage/"), body)
            else:
                self._resolve(path)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status: int = 200, code: str | None = None) -> None:
        headers = {"Content-Type": "application/json"} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps(value).encode(), headers)

    # Rights

    def _knows(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _may_write(self, repo_id: str, proposal: bool = False) -> bool:
        """Answers the request where it may not. Anyone logged in may propose a change of what is there."""
        if not self._knows():
            self._json({"error": "Invalid username or password."}, 401)
        elif not repo_id.startswith(f"{self.hub.user}/") and not (proposal and repo_id in self.hub.repositories):
            self._json({"error": "You have no rights in this namespace."}, 403)
        else:
            return True
        return False

    def _readable(self, repo_id: str) -> Repository | None:
        """Answers the request where there is none, or none for this reader."""
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and not self._knows()):
            self._json({"error": "Repository not found"}, 404 if self._knows() else 401, "RepoNotFound")
            return None
        return found

    # The API

    def _api(self, path: str, query: dict, body: bytes) -> None:
        if path == "repos/create":
            self._create(json.loads(body))
        elif path == "validate-yaml":
            self._validate(json.loads(body)["content"])
        elif not path.startswith("models/"):
            self._json({"error": "Not found"}, 404)
        else:
            _, user, name, *rest = path.split("/")
            action, revision = rest[0] if rest else "revision", "/".join(rest[1:]) or "main"
            if action in ("preupload", "commit"):
                if self._may_write(f"{user}/{name}", proposal="create_pr" in query):
                    getattr(self, f"_{action}")(f"{user}/{name}", revision, "create_pr" in query, body)
            elif found := self._readable(f"{user}/{name}"):
                self._describe(f"{user}/{name}", found, action, revision)

    def _create(self, wanted: dict) -> None:
        repo_id = f"{wanted['organization'] or self.hub.user}/{wanted['name']}"
        if self._may_write(repo_id):
            exists = repo_id in self.hub.repositories
            self.hub.repositories.setdefault(repo_id, Repository(wanted.get("visibility") == "private"))
            self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, 409 if exists else 200)

    def _validate(self, content: str) -> None:
        try:
            data = yaml.safe_load(content.split("---\n")[1])
            problem = None if isinstance(data, dict) else "no metadata"
        except (IndexError, yaml.YAMLError) as error:
            problem = str(error)
        self._json({"errors": [{"message": problem}] if problem else [], "warnings": []}, 400 if problem else 200)

    def _preupload(self, repo_id: str, revision: str, create_pr: bool, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIX) else "regular" for path in paths}
        self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def _lfs_batch(self, batch: dict) -> None:
        assert "basic" in batch["transfers"]
        objects = []
        for item in batch["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/storage/{item['oid']}"}}
            objects.append(item if item["oid"] in self.hub.uploaded else {**item, "actions": upload})
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._json({"error": "The content is not what its name says."}, 400)
            return
        self.hub.uploaded[oid] = body
        self._json({})

    def _commit(self, repo_id: str, revision: str, create_pr: bool, body: bytes) -> None:
        found = self.hub.repositories[repo_id]
        branch = f"refs/pr/{len(found.branches)}" if create_pr else revision
        files = dict(found.branches.get(revision, {}))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                found.messages.append(value["summary"])
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
        found.branches[branch] = files
        sha = found.sha(branch)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{branch.rsplit('/', 1)[1]}"
        self._json(answer)

    def _describe(self, repo_id: str, found: Repository, action: str, revision: str) -> None:
        files = found.files(revision)
        if files is None:
            self._json({"error": "Revision not found"}, 404, "RevisionNotFound")
        elif action == "tree":
            entries = []
            for path, data in files.items():
                entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                if path.endswith(LFS_SUFFIX):
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                entries.append(entry)
            self._json(entries)
        else:
            sha = revision if revision not in found.branches else found.sha(revision)
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": repo_id, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def _resolve(self, path: str) -> None:
        user, name, _, revision, *rest = path.split("/")
        found = self._readable(f"{user}/{name}")
        if found is None:
            return
        data = (found.files(revision) or {}).get("/".join(rest))
        if data is None:
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")
            return
        sha = found.sha(revision) if revision in found.branches else revision
        self._send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha})
