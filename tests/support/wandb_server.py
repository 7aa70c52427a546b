"""A wandb server on loopback: enough GraphQL and file stream for the real client to run a sweep's agents.

    with WandbServer() as server:
        server.propose = lambda number: {"learning_rate": 1e-3}  # what trial `number`, from 1, is to try
        server.faults.append(Fault("file_stream", status=500, times=2))
        subprocess.run(command, env=os.environ | server.environment(), check=True)

It does what a sweep's server does: hands out runs up to run_cap and tells agents to exit then, hands a run out again
that was marked as preempting and whose agent went silent or left with an exit code other than 0, and passes on stop
commands. `requests` lists what came, `unknown` the operations that nothing here answers. For wandb 0.31.
"""

import base64
import dataclasses
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

ENTITY = "someone"


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next `times` requests whose operation or path matches the regular expression `what`."""

    what: str
    times: int = 1
    status: int = 0  # answer with this status and nothing else
    drop: bool = False  # close the connection without an answer


@dataclasses.dataclass
class Run:
    """A run as the server knows it."""

    name: str
    sweep: str | None = None
    config: dict = dataclasses.field(default_factory=dict)  # {name: {"value": value}}, as the client sends it
    history: list = dataclasses.field(default_factory=list)  # rows
    summary: dict = dataclasses.field(default_factory=dict)
    tags: list = dataclasses.field(default_factory=list)
    files: set = dataclasses.field(default_factory=set)
    exitcodes: list = dataclasses.field(default_factory=list)  # one per time that it ended
    starts: int = 0
    preempting: bool = False
    stop: bool = False  # the server wants it to end
    agent: str | None = None  # who has it in hand

    @property
    def state(self):
        if self.agent is None and not self.exitcodes:
            return "running" if self.starts else "pending"
        return "running" if self.agent else "failed" if self.exitcodes[-1] else "finished"


class WandbServer:
    """The server; a context manager. `runs` {name: Run}, `sweeps` {id: dictionary}, `agents` {id: last heartbeat}."""

    silence = 20.0  # seconds without a heartbeat after which an agent is given up; wandb's own takes minutes

    def __init__(self):
        self.runs, self.sweeps, self.agents, self.sweep_of = {}, {}, {}, {}
        self.requests, self.unknown, self.faults, self.artifacts = [], [], [], []
        self.propose = lambda number: {}
        self._stopped, self._again, self._lock = {}, [], threading.RLock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.handle_error = lambda request, address: None  # a client that was killed
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._http.shutdown()
        self._http.server_close()

    def environment(self):
        """The environment in which the client talks to this server."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
            "WANDB_SILENT": "true",
        }

    # Sweep

    def hand_out(self, agent):
        """The commands for an agent that reports for duty: a run, or exit."""
        sweep_id = self.sweep_of[agent]
        sweep = self.sweeps[sweep_id]
        mine = [run for run in self.runs.values() if run.sweep == sweep_id]
        for run in mine:
            if run.agent and time.monotonic() - self.agents[run.agent] > self.silence:
                run.agent = None
                if run.preempting:
                    self._again.append(run.name)
        if self._again:
            run = self.runs[self._again.pop(0)]
        elif len(mine) < sweep.get("run_cap", 1000):
            parameters = {name: spec["value"] for name, spec in sweep["parameters"].items() if "value" in spec}
            parameters |= self.propose(len(mine) + 1)
            config = {name: {"value": value} for name, value in parameters.items()}
            run = Run(f"trial{len(mine) + 1}", sweep_id, config)
            self.runs[run.name] = run
        elif any(run.agent for run in mine):
            return []
        else:
            return [{"type": "exit"}]
        run.agent, run.stop = agent, False
        return [{"type": "run", "run_id": run.name, "args": run.config}]

    def heartbeat(self, agent, states):
        """The commands for an agent: stop for a run that is to end, what to do next for an idle one."""
        self.agents[agent] = time.monotonic()
        for name in states:
            if self.runs[name].stop and not self._stopped.get((agent, name)):
                self._stopped[agent, name] = True
                return [{"type": "stop", "run_id": name}]
        busy = any(run.agent == agent for run in self.runs.values())
        return [] if busy or states else self.hand_out(agent)

    def complete(self, run, exitcode):
        """A run has ended; with another code than 0, one that is preempting is handed out again."""
        run.exitcodes.append(exitcode)
        run.agent = None
        if exitcode and run.preempting and run.sweep:
            self._again.append(run.name)

    # GraphQL: one method per operation

    def on_Viewer(self, v):
        teams = {"edges": [{"node": {"id": "e", "name": ENTITY}}]}
        user = {"id": "u", "name": ENTITY, "username": ENTITY, "email": "nobody@example.com", "admin": False}
        return {"viewer": {**user, "entity": ENTITY, "flags": "{}", "deletedAt": None, "teams": teams}}

    on_GetViewer = on_GetDefaultEntity = on_Viewer

    def on_ServerFeaturesQuery(self, v):
        return {"serverInfo": {"features": []}}

    def on_UpsertSweep(self, v):
        sweep_id = f"sweep{len(self.sweeps) + 1}"
        self.sweeps[sweep_id] = yaml.safe_load(v["config"])
        sweep = {"name": sweep_id, "project": self.project(v["projectName"])}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def on_GetSweep(self, v):
        sweep = self.sweeps.get(v["name"])
        return {"project": {"sweep": sweep and self.describe_sweep(v["name"], sweep)}}

    def on_CreateAgent(self, v):
        agent = f"agent{len(self.agents) + 1}"
        self.agents[agent], self.sweep_of[agent] = time.monotonic(), v["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def on_Heartbeat(self, v):
        commands = self.heartbeat(v["id"], json.loads(v["runState"]))
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}

    def on_RunResumeStatus(self, v):
        run = self.runs.get(v["name"])
        bucket = self.describe_resumable(run) if run and run.starts else None
        return {"model": {**self.project(v["project"]), "bucket": bucket}}

    def on_UpsertBucket(self, v):
        name = v.get("name") or base64.b64decode(v["id"]).decode()
        run = self.runs.setdefault(name, Run(name))
        inserted, run.starts = not run.starts, run.starts + 1
        run.config |= json.loads(v["config"]) if v.get("config") else {}
        run.tags = v.get("tags") or run.tags
        return {"upsertBucket": {"bucket": self.describe_bucket(run, v.get("project")), "inserted": inserted}}

    def on_CreateRunFiles(self, v):
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def on_Runs(self, v):
        wanted = json.loads(v["filters"])["$and"][0]["sweep"]
        runs = [run for run in self.runs.values() if run.sweep == wanted]
        edges = [{"node": self.describe_run(run), "cursor": run.name} for run in runs]
        page = {"hasNextPage": False, "endCursor": None}
        whole = {
            "internalId": "1",
            "runCount": len(runs),
            "readOnly": False,
            "runs": {"edges": edges, "pageInfo": page},
        }
        return {"project": whole}

    def on_Run(self, v):
        return {"project": {"internalId": "1", "readOnly": False, "run": self.describe_run(self.runs[v["name"]])}}

    def on_RunSampledHistory(self, v):
        keys = json.loads(v["specs"][0])["keys"]
        rows = [row for row in self.runs[v["name"]].history if set(keys) <= set(row)]
        return {"project": {"run": {"sampledHistory": [[{key: row[key] for key in keys} for row in rows]]}}}

    def on_OrganizationCoreWeaveOrganizationID(self, v):
        return {"entity": {"organization": None}}

    def on_ArtifactType(self, v):
        return {"project": {"artifact": None}}

    def on_CreateArtifact(self, v):
        artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
        self.artifacts.append(v["input"])
        return {"createArtifact": {"artifact": artifact}}

    # Their parts

    def project(self, name):
        return {"id": "p", "name": name, "entity": {"id": "e", "name": ENTITY}}

    def describe_sweep(self, name, sweep):
        counts = {"runCount": len(self.runs), "runCountExpected": sweep.get("run_cap"), "bestLoss": None}
        texts = {"__typename": "Sweep", "id": name, "name": name, "displayName": None, "description": None}
        times = {"createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00"}
        return {**texts, **times, **counts, "method": sweep["method"], "state": "RUNNING", "config": yaml.dump(sweep)}

    def describe_bucket(self, run, project):
        texts = {"id": base64.b64encode(run.name.encode()).decode(), "name": run.name, "displayName": run.name}
        counts = {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0}
        more = {"description": None, "config": json.dumps(run.config), "sweepName": run.sweep}
        return {**texts, **counts, **more, "project": self.project(project), "files": {"edges": []}}

    def describe_resumable(self, run):
        tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
        state = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": json.dumps(run.summary), "tags": run.tags}
        return {**self.describe_bucket(run, None), **state, "wandbConfig": json.dumps({"t": 1})}

    def describe_run(self, run):
        return self.describe_bucket(run, "onechip") | {
            **{"state": run.state, "summaryMetrics": json.dumps(run.summary), "tags": run.tags, "group": None},
            **{"jobType": None, "commit": None, "readOnly": False, "createdAt": "2026-01-01T00:00:00Z"},
            **{"heartbeatAt": "2026-01-01T00:00:00Z", "notes": None, "systemMetrics": "{}", "historyKeys": None},
            **{"user": {"name": ENTITY, "username": ENTITY}, "projectId": "1", "internalId": "1", "updatedAt": None},
        }

    def stream(self, name, body):
        """Takes a part of a run's file stream; lines replace those from their offset on, as wandb's do."""
        run = self.runs[name]
        for file, chunk in (body.get("files") or {}).items():
            rows = [json.loads(line) for line in chunk["content"]] if "json" in file else []
            if file == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = rows
            elif file == "wandb-summary.json" and rows:
                run.summary = rows[-1]
        run.preempting |= bool(body.get("preempting"))
        if body.get("complete"):
            self.complete(run, body.get("exitcode"))

    # HTTP

    def find_fault(self, what):
        for fault in self.faults:
            if fault.times and re.search(fault.what, what):
                fault.times -= 1
                return fault
        return None

    def answer(self, path, body):
        """(status, JSON) for a request."""
        with self._lock:
            if path.endswith("/file_stream"):
                self.stream(path.split("/")[-2], body)
                return 200, {}
            if path.startswith("/upload/"):
                _, _, run, file = path.split("/", 3)
                self.runs[run].files.add(file)
                return 200, {}
            if path.startswith("/sdk/otel/"):  # the client's telemetry
                return 200, {}
            operation = re.search(r"(?:query|mutation)\s+(\w+)", body.get("query", ""))
            handler = operation and getattr(self, f"on_{operation[1]}", None)
            if handler is None:
                self.unknown.append((path, operation and operation[1], body))
                return 200, {"data": {}}
            return 200, {"data": handler(body.get("variables") or {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state = None

    def _take(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        body = json.loads(raw) if raw.startswith(b"{") and not path.startswith("/upload/") else {}
        operation = re.search(r"(?:query|mutation)\s+(\w+)", body.get("query", "")) if body else None
        what = operation[1] if operation else path
        self.server_state.requests.append((what, body.get("variables") or body))
        fault = self.server_state.find_fault(what)
        if fault and fault.drop:
            self.close_connection = True
            return
        status, answer = (fault.status, {}) if fault else self.server_state.answer(path, body)
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_POST = do_PUT = _take

    def log_message(self, *arguments):
        pass
