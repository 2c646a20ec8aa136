"""A Hub on loopback: the part of its HTTP interface that huggingface_hub uses, with files on disk and faults on order.

    with HubServer(tmp_path) as hub:
        hub.fail("PUT /lfs/", Drop(10_000), Status(500))    # the next two uploads of a file
        ...                                                 # the real client, with hub.environment()

Large files go by LFS: the client's own HF_HUB_DISABLE_XET switches off its other protocol, which is a binary's.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_thisIsTheTokenOfTheTests0123456789"
USER = "tester"
LFS_FROM = 10_000  # bytes; the Hub itself goes by type and size


@dataclass
class Status:
    """Answer with this status in place of the right answer."""

    code: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Drop:
    """Cut the connection once so many bytes of the request's body have come."""

    after: int = 0


@dataclass
class Slow:
    """Wait so many seconds, then answer rightly."""

    seconds: float


@dataclass
class Repo:
    private: bool
    files: dict[str, str] = field(default_factory=dict)  # path -> SHA-256 of the content
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    messages: list[str] = field(default_factory=list)


class HubServer:
    """Listens on a free port of loopback while its `with` block lasts.

    Args:
        folder: holds the contents, by their SHA-256.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.repos, self.requests, self.gone = Path(folder), {}, [], False
        self.faults: list[tuple[str, object]] = []
        self.lock = threading.RLock()
        (self.folder / "contents").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What has the real client talk to this server, with nothing in its caches."""
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return settings | ({"HF_TOKEN": token} if token else {})

    def fail(self, pattern: str, *faults: object) -> None:
        """Order faults for the next requests whose "METHOD /path" begins with a match of `pattern`, one each."""
        with self.lock:
            self.faults += [(pattern, fault) for fault in faults]

    def fault_of(self, request: str) -> object:
        with self.lock:
            for number, (pattern, _) in enumerate(self.faults):
                if re.match(pattern, request):
                    return self.faults.pop(number)[1]
        return None

    def path_of(self, digest: str) -> Path:
        return self.folder / "contents" / digest

    def keep(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.path_of(digest).write_bytes(content)
        return digest

    def content(self, repo: str, path: str) -> bytes:
        """A file of a repository as it is now."""
        return self.path_of(self.repos[repo].files[path]).read_bytes()

    def write(self, repo: str, path: str, content: bytes) -> None:
        """As if its owner had edited a file on the site."""
        with self.lock:
            self.commit(repo, {path: self.keep(content)}, "an edit")

    def commit(self, repo: str, changes: dict[str, str | None], message: str) -> str:
        held = self.repos[repo]
        for path, digest in changes.items():
            if digest is None:
                held.files.pop(path, None)
            else:
                held.files[path] = digest
        listing = json.dumps([len(held.commits), sorted(held.files.items())])
        held.commits.append(hashlib.sha1(listing.encode()).hexdigest())
        held.messages.append(message)
        return held.commits[-1]


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    # ------------------------------------------------------------------------------------------ in and out
    def answer(self, code: int, body: object = b"", **headers: object) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: int, kind: str, message: str) -> None:
        self.answer(code, {"error": message}, X_Error_Code=kind, X_Error_Message=message)

    def cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def body(self, at_most: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline().strip(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
                if at_most is not None and len(content) >= at_most:
                    break
            else:
                self.rfile.readline()
            return content
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if at_most is None else min(length, at_most))

    # ------------------------------------------------------------------------------------------- the routes
    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        request = f"{self.command} {self.route}"
        self.hub.requests.append(request)
        if self.hub.gone:
            return self.cut()
        fault = self.hub.fault_of(request)
        if isinstance(fault, Drop):
            self.body(at_most=fault.after)
            return self.cut()
        if isinstance(fault, Slow):
            time.sleep(fault.seconds)
        content = self.body()
        if isinstance(fault, Status):
            return self.answer(fault.code, {"error": "as ordered"}, **fault.headers)
        for method, pattern, needs_token, action in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method:
                if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.refuse(401, "", "Invalid credentials in Authorization header")
                with self.hub.lock:
                    return action(self, content, **match.groupdict())
        return self.refuse(404, "EntryNotFound", f"no route for {request}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def repo(self, name: str) -> Repo | None:
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.refuse(401 if "Authorization" not in self.headers else 404, "RepoNotFound", "Repository not found")
            return None
        return found

    def who_am_i(self, _: bytes) -> None:
        self.answer(200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, content: bytes) -> None:
        asked = json.loads(content)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        code = 409 if name in self.hub.repos else 200
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos.setdefault(name, Repo(bool(private)))
        prefix = "" if asked.get("type", "model") == "model" else f"{asked['type']}s/"
        self.answer(code, {"url": f"{self.hub.url}/{prefix}{name}", "id": name, "name": name, "error": "it exists"})

    def preupload(self, content: bytes, name: str, **_: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        files = []
        for file in json.loads(content)["files"]:
            mode = "lfs" if file["size"] > LFS_FROM else "regular"
            oid = repo.files.get(file["path"]) if mode == "lfs" else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def lfs_batch(self, content: bytes, name: str) -> None:
        objects = []
        for wanted in json.loads(content)["objects"]:
            href = f"{self.hub.url}/lfs/{wanted['oid']}"
            there = self.hub.path_of(wanted["oid"]).exists()
            objects.append(wanted | ({} if there else {"actions": {"upload": {"href": href}}}))
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, content: bytes, oid: str) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(422, "", "the content does not have this SHA-256")
        self.hub.keep(content)
        self.answer(200)

    def commit(self, content: bytes, name: str, **_: str) -> None:
        if self.repo(name) is None:
            return
        changes, message = {}, ""
        for line in content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                changes[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if not self.hub.path_of(value["oid"]).exists():
                    return self.refuse(400, "", f"{value['path']} was not uploaded")
                changes[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                changes[value["path"]] = None
        oid = self.hub.commit(name, changes, message)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})

    def info(self, _: bytes, name: str, revision: str = "main") -> None:
        repo = self.repo(name)
        if repo is None:
            return
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        known = revision in ("main", *repo.commits)
        if not known:
            return self.refuse(404, "RevisionNotFound", f"no revision {revision}")
        self.answer(200, {"_id": name, "id": name, "modelId": name, "sha": repo.commits[-1], "private": repo.private,
                          "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, _: bytes, name: str, **__: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        entries = []
        for path, digest in sorted(repo.files.items()):
            size = self.hub.path_of(digest).stat().st_size
            entry = {"type": "file", "path": path, "oid": digest[:40], "size": size}
            lfs = {"oid": digest, "size": size, "pointerSize": 130}
            entries.append(entry | ({"lfs": lfs} if size > LFS_FROM else {}))
        self.answer(200, entries)

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        if path not in repo.files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound",
                               X_Repo_Commit=repo.commits[-1])  # fmt: skip
        content = self.hub.content(name, path)
        etag = f'"{repo.files[path]}"'
        self.answer(200, content, ETag=etag, X_Repo_Commit=repo.commits[-1], Accept_Ranges="bytes")

    def validate_yaml(self, content: bytes) -> None:
        import yaml  # what the Hub asks of a card's head: YAML, a mapping, a licence of its list

        text = json.loads(content)["content"]
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            data = yaml.safe_load(head[1]) if head else {}
        except yaml.YAMLError as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        licence = data.get("license")
        wrong = licence is not None and licence not in (
            "apache-2.0",
            "mit",
            "cc-by-4.0",
            "cc0-1.0",
            "openrail",
            "other",
        )
        errors = [{"message": f'"license" is {licence}'}] if wrong else []
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
REPO = rf"/api/(?:models|spaces|datasets)/{NAME}"
SITE = rf"/(?:spaces/|datasets/)?{NAME}"
ROUTES = [
    ("GET", r"/api/whoami-v2", True, Handler.who_am_i),
    ("POST", r"/api/repos/create", True, Handler.create),
    ("POST", rf"{REPO}/preupload/(?P<revision>[^/]+)", True, Handler.preupload),
    ("POST", rf"{SITE}\.git/info/lfs/objects/batch", True, Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", False, Handler.lfs_put),  # a signed address on the Hub: no token goes there
    ("POST", rf"{REPO}/commit/(?P<revision>[^/]+)", True, Handler.commit),
    ("GET", rf"{REPO}/revision/(?P<revision>[^/]+)", False, Handler.info),
    ("GET", REPO, False, Handler.info),
    ("GET", rf"{REPO}/tree/(?P<revision>[^/]+)", False, Handler.tree),
    ("GET HEAD", rf"{SITE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", False, Handler.resolve),
    ("POST", r"/api/validate-yaml", False, Handler.validate_yaml),
]
