"""A server that speaks enough of W&B's protocol for the real client to log to it, on loopback.

It keeps what it is sent. It can also be made to misbehave: `refuse` hangs up, `stall` answers nothing,
`limit` answers 429, `drop` breaks off in the middle of every other answer, `slow` takes its time.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Behaviour = Literal["fine", "refuse", "stall", "limit", "drop", "slow"]


VIEWER = {"id": "u", "entity": "us", "username": "us", "email": "", "flags": "{}"}
"""Whose key it is."""


@dataclass
class Received:
    """One run, as the server has it."""

    name: str = ""
    job_type: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by line
    summary: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    exit_code: int | None = None


@dataclass
class Artifact:
    """One artifact, as the server has it."""

    name: str
    type: str
    aliases: set[str]
    tags: set[str]
    committed: bool = False


class WandbServer(ThreadingHTTPServer):
    """See the module. `url` is what WANDB_BASE_URL is to be."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour: Behaviour = "fine"
        self.runs: dict[str, Received] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.files: dict[str, bytes] = {}
        self.views: dict[str, dict[str, Any]] = {}  # by name
        self.requests = 0
        self.lock = threading.Lock()
        self.ending = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up, and that is all right."""

    def run_of(self, run_id: str) -> Received:
        return self.runs.setdefault(run_id, Received())

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What a GraphQL operation gets."""
        variables = variables.get("input") or variables
        match operation:
            case "Viewer":
                return {"viewer": {**VIEWER, "teams": {"edges": []}}}
            case "GetViewer":
                more = {"name": "us", "admin": False, "deletedAt": None, "apiKeys": {"edges": []}}
                return {
                    "viewer": {**VIEWER, **more, "teams": {"edges": [{"node": {"name": "control-team"}}]}}
                }
            case "GetDefaultEntity":
                return {"viewer": VIEWER}
            case "Run":
                return {"project": {"id": "p", "internalId": "1", "run": self._found(variables["name"])}}
            case "View":
                nodes = [{"node": view} for name, view in self.views.items() if name == variables["viewName"]]
                return {"project": {"allViews": {"edges": nodes}}}
            case "RunResumeStatus":
                return {"model": self._resumable(variables["name"])}
            case "UpsertView2":
                view = {"id": f"view {variables['name']}", **variables}
                self.views[variables["name"]] = view
                return {"upsertView": {"view": {"id": view["id"], "name": variables["name"]}}}
            case "UpsertBucket":
                return {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}
            case "CreateRunFiles":
                names = variables["files"]
                files = [{"name": n, "uploadUrl": f"{self.url}/upload/{variables['run']}/{n}"} for n in names]
                return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
            case "ArtifactType":  # which type an artifact of that name has already
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                return {"createArtifact": {"artifact": self._create(variables)}}
            case "CreateArtifactManifest" | "UpdateArtifactManifest":
                url = f"{self.url}/upload/manifest/{variables.get('artifactID', 'x')}"
                file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": url, "uploadHeaders": []}
                manifest = {"artifactManifest": {"id": "m", "file": file}}
                return {operation[0].lower() + operation[1:]: manifest}
            case "CreateArtifactFiles":
                edges = [{"node": self._slot(spec)} for spec in variables["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "CommitArtifact":
                self.artifacts[variables["artifactID"]].committed = True
                return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}
        return {}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.run_of(variables["name"])
        run.name = variables.get("displayName") or run.name
        run.job_type = variables.get("jobType") or run.job_type
        run.group = variables.get("groupName") or run.group
        if variables.get("config"):
            run.config |= {key: entry["value"] for key, entry in json.loads(variables["config"]).items()}
        project = {"id": "p", "name": variables.get("project") or "p", "entity": {"id": "e", "name": "us"}}
        names = {"id": variables["name"], "name": variables["name"], "displayName": run.name}
        more = {"description": "", "config": "{}", "sweepName": None, "historyLineCount": 0}
        return {**names, **more, "project": project}

    def _found(self, run_id: str) -> dict[str, Any] | None:
        """A run, as those who look for it get it."""
        found = self.runs.get(run_id)
        names = ("tags", "sweepName", "state", "commit", "heartbeatAt", "description", "notes")
        return found and {
            **dict.fromkeys(names),
            "id": run_id,
            "name": run_id,
            "displayName": found.name,
            "group": found.group,
            "jobType": found.job_type,
            "user": {"name": "us", "username": "us"},
            "config": "{}",
            "summaryMetrics": "{}",
            "systemMetrics": "{}",
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00Z",
            "historyLineCount": len(found.history),
            "projectId": "1",
        }

    def _resumable(self, run_id: str) -> dict[str, Any]:
        """What a run that is resumed begins with."""
        found = self.runs.get(run_id)
        bucket = None
        if found is not None:
            last = [json.dumps(found.history[max(found.history)])] if found.history else []
            bucket = {
                "id": run_id,
                "name": run_id,
                "displayName": found.name,
                "summaryMetrics": json.dumps(found.summary),
                "config": json.dumps({name: {"value": value} for name, value in found.config.items()}),
                "historyLineCount": len(found.history),
                "historyTail": json.dumps(last),
                "eventsLineCount": 0,
                "eventsTail": "[]",
                "logLineCount": 0,
                "tags": [],
                "wandbConfig": '{"t": 1}',  # "t" says that it has begun
            }
        return {"id": "p", "name": "p", "entity": {"id": "e", "name": "us"}, "bucket": bucket}

    def _create(self, variables: dict[str, Any]) -> dict[str, Any]:
        identifier = f"a{len(self.artifacts)}"
        self.artifacts[identifier] = Artifact(
            name=variables["artifactCollectionName"],
            type=variables["artifactTypeName"],
            aliases={entry["alias"] for entry in variables.get("aliases") or []},
            tags={entry["tagName"] for entry in variables.get("tags") or []},
        )
        sequence = {"id": "s", "latestArtifact": None}
        return {"id": identifier, "state": "PENDING", "artifactSequence": sequence}

    def _slot(self, spec: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/upload/{spec['artifactID']}/{spec['name']}"
        names = {"id": spec["name"], "name": spec["name"], "displayName": spec["name"]}
        return {**names, "uploadUrl": url, "uploadHeaders": [], "artifact": {"id": spec["artifactID"]}}

    def stream(self, run_id: str, content: dict[str, Any]) -> None:
        """What a run's file stream brings."""
        run = self.run_of(run_id)
        files = content.get("files") or {}
        history = files.get("wandb-history.jsonl") or {"offset": 0, "content": []}
        for line, text in enumerate(history["content"], start=history["offset"]):
            run.history[line] = json.loads(text)
        for text in (files.get("wandb-summary.json") or {"content": []})["content"]:
            run.summary |= json.loads(text)
        if content.get("complete"):
            run.complete, run.exit_code = True, content.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle(b"")

    def do_PUT(self) -> None:
        self._handle(self._body())

    def do_POST(self) -> None:
        self._handle(self._body())

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def _handle(self, body: bytes) -> None:
        with self.server.lock:
            self.server.requests += 1
            number = self.server.requests
        match self.server.behaviour:
            case "refuse":
                self.close_connection = True
                return
            case "stall":
                self.server.ending.wait(600)
                self.close_connection = True
                return
            case "limit":
                self._reply(429, {"error": "rate limit exceeded"}, {"Retry-After": "1"})
                return
            case "slow":
                self.server.ending.wait(0.2)
            case "drop" if number % 2:
                self.send_response(200)
                self.send_header("content-length", "1000")
                self.end_headers()
                self.wfile.write(b'{"data"')
                self.close_connection = True
                return
        with self.server.lock:
            answer = self._answer(body)
        self._reply(200, answer)

    def _answer(self, body: bytes) -> dict[str, Any]:
        parts = self.path.strip("/").split("/")
        if parts[0] == "graphql":
            request = json.loads(body)
            # Not every part of the client says "operationName".
            named = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            return {"data": self.server.answer(named[1] if named else "", request.get("variables") or {})}
        if parts[0] == "files" and parts[-1] == "file_stream":
            self.server.stream(parts[-2], json.loads(body))
            return {"exitcode": None, "limits": {}}
        if parts[0] == "upload":
            self.server.files["/".join(parts[1:])] = body
        return {}

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            body = b""
            while length := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _reply(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "content-type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server until the end of the block."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()
            thread.join(10)
            time.sleep(0)
