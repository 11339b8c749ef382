"""A Hugging Face Hub in memory, answering over HTTP on the loopback interface.

It speaks the part of the Hub's API that `push_to_hub` and `from_pretrained` use: creating a repository, the model
card check, preupload, commits, model info, file lists and file contents. Every file is a regular git blob (no LFS, no
Xet), and the only branch is `main`; older commits stay readable by their id.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


USER = "tester"
TOKEN = "hf_token_of_the_tests"


@dataclass
class Commit:
    """One state of a repository: its id, its message and the bytes of all its files by path."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """The commits of a repository, oldest first."""

    commits: list[Commit] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, bytes]) -> Commit:
        """Make `files` the new state of the repository."""
        digest = hashlib.sha1(self.commits[-1].oid.encode() if self.commits else b"")
        digest.update(message.encode())
        for path, content in sorted(files.items()):
            digest.update(f"{path} {blob_id(content)}".encode())
        self.commits.append(Commit(digest.hexdigest(), message, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit that `revision`, "main" or a commit id, stands for."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


def blob_id(content: bytes) -> str:
    """The id git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubError(Exception):
    """An answer other than success; `code` goes into the header by which the client tells the errors apart."""

    def __init__(self, status: HTTPStatus, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """The Hub, running in a thread between `with HubServer() as hub:` and the end of the block.

    `hub.repositories` maps "namespace/name" to what was pushed, `hub.environment(...)` is what a client needs.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: str | os.PathLike) -> dict[str, str]:
        """Environment of a client process with its own empty cache in `home`.

        huggingface_hub and transformers read it when they are imported, so it is of no use to a process that has
        imported them already.
        """
        foreign = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a repository by path."""
        return self._find(repo_id, revision).files

    def messages(self, repo_id: str) -> list[str]:
        """The messages of all commits to a repository, oldest first."""
        return [commit.message for commit in self.repositories[repo_id].commits]

    def duplicate(self, repo_id: str, new_id: str) -> str:
        """Give a repository a second life under another name, with all its commits; the id of the last of them."""
        self.repositories[new_id] = Repository(list(self.repositories[repo_id].commits))
        return self.repositories[new_id].commits[-1].oid

    def _find(self, repo_id: str, revision: str) -> Commit:
        if repo_id not in self.repositories:
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", f"no repository {repo_id}")
        commit = self.repositories[repo_id].at(revision)
        if commit is None:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"no revision {revision} in {repo_id}")
        return commit

    # The answers, one method each: JSON-ready values, or raises HubError.

    def whoami(self) -> dict:
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body: bytes) -> tuple[HTTPStatus, dict]:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        status = HTTPStatus.CONFLICT if repo_id in self.repositories else HTTPStatus.OK
        if status is HTTPStatus.OK:
            self.repositories[repo_id] = Repository()
            self.repositories[repo_id].commit("initial commit", {".gitattributes": b""})
        return status, {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}

    def validate_yaml(self, body: bytes) -> dict:
        front_matter = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            valid = front_matter is None or isinstance(yaml.safe_load(front_matter[1]), dict | None)
        except yaml.YAMLError:
            valid = False
        if not valid:
            raise HubError(HTTPStatus.BAD_REQUEST, "InvalidMetadata", "the front matter of README.md is not YAML")
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo_id: str, revision: str) -> dict:
        present = self._find(repo_id, revision).files
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    "oid": blob_id(present[path]) if path in present else None,
                }
                for path in paths
            ]
        }

    def commit(self, body: bytes, repo_id: str, revision: str) -> dict:
        files, message = dict(self._find(repo_id, revision).files), ""
        for line in body.splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            match key:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "deletedFile":
                    del files[value["path"]]
                case _:
                    raise HubError(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented", f"commit operation {key}")
        commit = self.repositories[repo_id].commit(message, files)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{commit.oid}"}

    def info(self, repo_id: str, revision: str | None) -> dict:
        commit = self._find(repo_id, revision or "main")
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit.oid,
            "private": False,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def tree(self, repo_id: str, revision: str, folder: str | None) -> list[dict]:
        files = self._find(repo_id, revision).files
        if folder:
            files = {path: content for path, content in files.items() if path.startswith(f"{folder}/")}
            if not files:
                raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"no folder {folder} in {repo_id}")
        return [
            {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            for path, content in sorted(files.items())
        ]

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[Commit, bytes]:
        commit = self._find(repo_id, revision)
        if path not in commit.files:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"no file {path} in {repo_id} at {revision}")
        return commit, commit.files[path]


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
# Paths that answer with JSON; the methods' other arguments are the groups of the pattern.
_GET = [
    (re.compile(r"/api/whoami-v2"), HubServer.whoami),
    (re.compile(rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?"), HubServer.tree),
    (re.compile(rf"/api/models/{_REPO}(/revision/{_REVISION})?"), HubServer.info),
]
_POST = [
    (re.compile(r"/api/repos/create"), HubServer.create),
    (re.compile(r"/api/validate-yaml"), HubServer.validate_yaml),
    (re.compile(rf"/api/models/{_REPO}/preupload/{_REVISION}"), HubServer.preupload),
    (re.compile(rf"/api/models/{_REPO}/commit/{_REVISION}"), HubServer.commit),
]
_FILE = re.compile(rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)")


class _Handler(BaseHTTPRequestHandler):
    """Takes requests apart and puts answers together; what they mean is the `HubServer`'s business."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait 40 ms for the first

    def log_message(self, *args) -> None:
        """Say nothing: a test's output is for its failures."""

    def do_GET(self) -> None:
        self._answer(_GET)

    def do_HEAD(self) -> None:
        self._answer(_GET)

    def do_POST(self) -> None:
        self._answer(_POST, body=self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, routes: list, **body: bytes) -> None:
        path, hub = urlsplit(self.path).path, self.server.hub
        try:
            if body and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise HubError(HTTPStatus.UNAUTHORIZED, "Unauthorized", "writing needs the token")
            if not body and (match := _FILE.fullmatch(path)):
                with hub.lock:
                    commit, content = hub.resolve(**_arguments(match))
                self._send_file(commit, content)
                return
            for pattern, method in routes:
                if match := pattern.fullmatch(path):
                    with hub.lock:
                        answer = method(hub, **body, **_arguments(match))
                    status, answer = answer if isinstance(answer, tuple) else (HTTPStatus.OK, answer)
                    self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})
                    return
            raise HubError(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented", f"{self.command} {path}")
        except HubError as error:
            content = json.dumps({"error": str(error), "errors": [{"message": str(error)}]}).encode()
            self._send(error.status, content, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    def _send_file(self, commit: Commit, content: bytes) -> None:
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(HTTPStatus.PARTIAL_CONTENT, content[first : last + 1], headers)
        else:
            self._send(HTTPStatus.OK, content, headers)

    def _send(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _arguments(match: re.Match) -> dict[str, str | None]:
    return {name: value and unquote(value) for name, value in match.groupdict().items()}
