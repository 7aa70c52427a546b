"""A Hugging Face Hub on loopback: enough of its HTTP interface for the real client to download from and upload to.

    with Hub() as hub:
        commit = hub.add_repo("someone/data", {"shard_00000.parquet": raw}, repo_type="dataset")
        hub.faults.append(Fault("GET", "shard_00000", status=500, times=2))
        subprocess.run(command, env=os.environ | hub.environment(), check=True)

The client reads its endpoint when it is imported, so run it in a process of its own, or let `connected_hub` hand this
process's client another one. Large files (see `is_lfs`)
travel as they do on the Hub: `resolve` redirects to another host and names size and SHA-256 in headers, uploads go by
git-lfs. `requests` lists all that came, `unknown` what no handler was found for. For huggingface_hub 1.27 to 2.4.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path matches the regular expression `path`."""

    method: str
    path: str
    times: int = 1
    status: int = 0  # answer with this status and nothing else
    headers: dict = dataclasses.field(default_factory=dict)  # with it, e.g. {"Retry-After": "1"}
    stall: bool = False  # half the body, then silence until the hub stops
    cut: bool = False  # half the body, then the connection closes
    short: bool = False  # a whole, well-formed answer with half the bytes
    flip: bool = False  # the right length, one bit wrong


@dataclasses.dataclass
class Repo:
    """A repository: its commits, oldest first, each a dict from path to bytes; branches besides main, by name."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds a commit with exactly `files`; returns its 40-digit name."""
        name = hashlib.sha1(f"{len(self.commits)} {sorted(files)} {id(self)}".encode()).hexdigest()
        self.commits[name] = dict(files)
        return name

    def head(self) -> str:
        return list(self.commits)[-1]


def is_lfs(path: str) -> bool:
    """Whether the Hub would store this file outside git."""
    return path.endswith((".parquet", ".safetensors", ".bin"))


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def git_blob(raw: bytes) -> str:
    """The name git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


class Hub:
    """The server; a context manager that stops it and ends every stalled answer."""

    def __init__(self, users: dict[str, str] | None = None):
        self.users = users or {"hf_loopback": "someone"}  # token -> name
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path with query)
        self.tokens: list[str | None] = []  # of the same requests
        self.unknown: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (self.handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.cdn = f"http://localhost:{self.server.server_address[1]}/cdn"  # another host, as the client sees it
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict[str, str]:
        """What to set for a client's process."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def add_repo(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model", commit: str = "") -> str:
        """Adds a repository with one commit, under the name `commit` if that is given; returns the commit."""
        repo = self.repos.setdefault((repo_type, repo_id), Repo())
        name = repo.commit(files)
        if commit:
            repo.commits[commit] = repo.commits.pop(name)
        return commit or name

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """What is in a repository at its newest commit."""
        repo = self.repos[repo_type, repo_id]
        return repo.commits[repo.head()]

    def count(self, method: str, path: str) -> int:
        """How many requests of `method` had a path that matches."""
        return sum(m == method and bool(re.search(path, p)) for m, p in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@contextlib.contextmanager
def connected_hub(monkeypatch, **options):
    """A Hub that this process's client talks to. Nothing waits long: hub.slept has the pauses asked for, in seconds."""
    from onechip import hubclient

    library, real_sleep = hubclient.load_hub(), time.sleep

    def sleep(seconds):
        hub.slept.append(seconds)
        real_sleep(min(seconds, 0.01))

    with Hub(**options) as hub:
        hub.slept = []
        monkeypatch.setattr(library, "HfApi", functools.partial(library.HfApi, endpoint=hub.url))
        monkeypatch.setattr(time, "sleep", sleep)
        monkeypatch.setattr(hubclient, "STALL", 0.4)
        library.close_session()  # its connections have the usual time-out
        yield hub
    assert not hub.unknown
    library.close_session()


class _Refusal(Exception):
    """An answer with an error: status and the Hub's X-Error-Code."""

    def __init__(self, status: int, code: str = "", text: str = ""):
        self.status, self.code, self.text = status, code, text or code


# (method, pattern of the path, name of the handler below)
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", "info"),
    ("GET", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
    ("POST", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", r"/api/(?P<kind>\w+)s/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/((?P<kind>dataset|space)s/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
    ("GET", r"/cdn/(?P<kind>\w+)/(?P<repo>[^/]+/[^/]+)/(?P<revision>\w+)/(?P<path>.+)", "cdn"),
    ("GET", r"/((?P<kind>dataset|space)s/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    routes = _ROUTES
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route("GET")

    def do_HEAD(self):
        self.route("HEAD")

    def do_POST(self):
        self.route("POST")

    def do_PUT(self):
        self.route("PUT")

    def do_DELETE(self):
        self.route("DELETE")

    def route(self, method):
        """Finds the handler for a request, lets a fault come first, turns refusals into answers."""
        self.body = self.read_body()
        self.url, query = urllib.parse.urlsplit(self.path), urllib.parse.urlsplit(self.path).query
        self.query = urllib.parse.parse_qs(query)
        path = urllib.parse.unquote(self.url.path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((method, self.path))
        self.hub.tokens.append(self.token)
        self.fault = self.hub.take_fault(method, path)
        try:
            if self.fault and self.fault.status:
                return self.answer(b"", self.fault.status, self.fault.headers)
            for wanted, pattern, name in self.routes:
                match = re.fullmatch(pattern, path)
                if match and wanted == ("GET" if method == "HEAD" else method):
                    return getattr(self, name)(**match.groupdict())
            self.hub.unknown.append((method, self.path))
            raise _Refusal(404, "", f"no handler for {method} {path}")
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.text} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.answer(json.dumps({"error": refusal.text}).encode(), refusal.status, headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, raw: bytes, status: int = 200, headers: dict | None = None, kind: str = "application/json"):
        """Sends an answer, spoiled as the fault wants it."""
        fault = self.fault or Fault("", "")
        half = len(raw) // 2
        if fault.flip:
            raw = raw[:half] + bytes([raw[half] ^ 1]) + raw[half + 1 :]
        if fault.short:
            raw = raw[:half]
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        broken = fault.cut or fault.stall
        self.wfile.write(raw[:half] if broken else raw)
        self.wfile.flush()
        if fault.stall:
            self.hub.stopping.wait()
        if broken:
            self.close_connection = True

    def send_json(self, value, status: int = 200):
        self.answer(json.dumps(value).encode(), status)

    # ---- who and what

    def user(self) -> str:
        if self.token not in self.hub.users:
            raise _Refusal(401, "", "Invalid user token.")
        return self.hub.users[self.token]

    def find(self, kind, repo, write: bool = False) -> Repo:
        found = self.hub.repos.get((kind or "model", repo))
        if write and self.user() != repo.split("/")[0]:
            raise _Refusal(403, "", f"You don't have the rights to write to {repo}")
        if found is None or (found.private and self.token not in self.hub.users):
            raise _Refusal(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return found

    def files(self, kind, repo, revision) -> tuple[str, dict[str, bytes]]:
        found = self.find(kind, repo)
        commit = found.head() if revision in (None, "main") else found.branches.get(revision, revision)
        if commit not in found.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, found.commits[commit]

    def whoami(self):
        self.send_json({"type": "user", "name": self.user(), "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self):
        self.send_json({"errors": [], "warnings": []})

    def create(self):
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or self.user()}/{wanted['name']}"
        if wanted.get("organization") not in (None, self.user()):
            raise _Refusal(403, "", f"You don't have the right to create a repo under {wanted['organization']}")
        key = (wanted.get("type") or "model", repo)
        if key in self.hub.repos:
            return self.send_json({"error": "You already created this repo", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.repos[key] = Repo(private=wanted.get("private") or wanted.get("visibility") == "private")
        self.hub.repos[key].commit({})
        self.send_json({"url": f"{self.hub.url}/{repo}", "name": repo})

    # ---- reading

    def entry(self, path, raw) -> dict:
        entry = {"type": "file", "path": path, "size": len(raw), "oid": git_blob(raw)}
        if is_lfs(path):
            entry["lfs"] = {"oid": sha256(raw), "size": len(raw), "pointerSize": 134}
        return entry

    def info(self, kind, repo, revision):
        commit, files = self.files(kind, repo, revision)
        siblings = [{"rfilename": path} for path in files]
        self.send_json({"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def tree(self, kind, repo, revision, path):
        _, files = self.files(kind, repo, revision)
        self.send_json([self.entry(p, raw) for p, raw in files.items() if p.startswith(path or "")])

    def paths_info(self, kind, repo, revision):
        _, files = self.files(kind, repo, revision)
        paths = urllib.parse.parse_qs(self.body.decode())["paths"]
        self.send_json([self.entry(path, files[path]) for path in paths if path in files])

    def resolve(self, kind, repo, revision, path):
        commit, files = self.files(kind, repo, revision)
        if path not in files:
            raise _Refusal(404, "EntryNotFound", f"no {path}")
        raw = files[path]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not is_lfs(path):
            return self.send_file(raw, headers | {"ETag": f'"{git_blob(raw)}"'})
        headers |= {"X-Linked-Etag": f'"{sha256(raw)}"', "X-Linked-Size": str(len(raw))}
        place = f"{self.hub.cdn}/{kind or 'model'}/{repo}/{commit}/{urllib.parse.quote(path)}"
        self.answer(b"", 302, headers | {"Location": place})

    def cdn(self, kind, repo, revision, path):
        raw = self.hub.repos[kind, repo].commits[revision][path]
        self.send_file(raw, {"ETag": f'"{sha256(raw)[:32]}"', "Accept-Ranges": "bytes"})

    def send_file(self, raw, headers):
        """The whole file, or the part that a Range header asks for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self.answer(raw, 200, headers, "application/octet-stream")
        first, last = int(wanted[1]), int(wanted[2] or len(raw) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(raw)}"
        self.answer(raw[first : last + 1], 206, headers, "application/octet-stream")

    # ---- writing

    def preupload(self, kind, repo, revision):
        self.find(kind, repo, write=True)
        files = [
            {"path": file["path"], "uploadMode": "lfs" if is_lfs(file["path"]) else "regular", "shouldIgnore": False}
            for file in json.loads(self.body)["files"]
        ]
        self.send_json({"files": files})

    def commit(self, kind, repo, revision):
        found = self.find(kind, repo, write=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        files = dict(found.commits[found.head()])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise _Refusal(400, "", f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif line["key"] == "deletedFolder":
                files = {path: raw for path, raw in files.items() if not path.startswith(value["path"])}
        name = found.commit(files)
        self.send_json({"success": True, "commitOid": name, "commitUrl": f"{self.hub.url}/{repo}/commit/{name}"})

    def lfs_batch(self, kind, repo):
        self.find(kind, repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if sha256(self.body) != oid:
            raise _Refusal(400, "", "SHA-256 does not match")
        self.hub.lfs[oid] = self.body
        self.answer(b"")


Hub.handler = _Handler
