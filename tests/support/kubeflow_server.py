# ruff: noqa: PLR0911, N815  (a server returns where it knows the answer; http.server wants names such as do_GET)
"""A server that speaks the v2beta1 REST API of Kubeflow Pipelines, after the models and paths of kfp-server-api.

It keeps pipelines, versions, experiments, runs and recurring runs in memory, checks what it is sent as strictly as the
real one does (names, required references, the twice quoted filter), and fails as a test scripts it:

    with KubeflowServer() as server:
        server.fail("POST", "/runs", 500, 503)          # the next two such calls; `after=True`: once it was done
        server.plays("RUNNING", "SUCCEEDED")            # the states of a run, one for each look at it
"""

import json
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.parser import BytesParser
from email.policy import HTTP
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, unquote_plus, urlsplit
from uuid import uuid4

import yaml

API = "/apis/v2beta1"
NEVER = "1970-01-01T00:00:00Z"  # what the real server sends for a time that has not come
ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
TIMEOUT = "timeout"
HANG_UP = "hang up"
Reply = tuple[int, Any]


@dataclass
class Step:
    """What a look at a run shows."""

    state: str
    tasks: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    ended: bool | None = None


@dataclass
class Fault:
    method: str
    path: str
    status: Any
    after: bool = False
    body: Any = None


def task(name: str, state: str, error: str = "", **more: Any) -> dict[str, Any]:
    """One entry of a run's task_details."""
    told: dict[str, Any] = {
        "task_id": f"task-{name}",
        "display_name": name,
        "state": state,
        "create_time": "2026-01-01T10:00:00Z",
        "start_time": "2026-01-01T10:00:00Z",
        "end_time": "2026-01-01T10:00:12.500Z" if state in ENDED else NEVER,
    }
    return told | ({"error": {"code": 13, "message": error}} if error else {}) | more


class KubeflowServer:
    """The server, on a port of its own. `multi_user` asks for namespaces, `token` and `cookie` for proof."""

    def __init__(
        self,
        multi_user: bool = False,
        token: str | None = None,
        cookie: str | None = None,
        tls: tuple[Path, Path] | None = None,
        login_page: bool = False,
    ) -> None:
        self.multi_user, self.token, self.cookie, self.login_page = multi_user, token, cookie, login_page
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.schedules: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.packages: dict[str, str] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.sleep_seconds = 0.5
        self._steps: list[Step] = [Step("SUCCEEDED")]
        self._faults: list[Fault] = []
        self._clock = 0
        self._lock = threading.RLock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def answer(self) -> None:
                server._serve(self)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  (clients hang up, as tests want)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*map(str, tls))
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://localhost:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    # The script

    def fail(self, method: str, path: str, *statuses: Any, after: bool = False, body: Any = None) -> None:
        """The next calls to paths that end with `path` answer these statuses, or TIMEOUT or HANG_UP.

        With `after`, the call does its work first, and only its answer is lost.
        """
        self._faults += [Fault(method, path, status, after, body) for status in statuses]

    def plays(self, *steps: str | Step) -> None:
        """What each look at a run shows; the last stays."""
        self._steps = [Step(step) if isinstance(step, str) else step for step in steps]

    def count(self, method: str, path: str) -> int:
        """How often a path was asked for."""
        return sum(1 for m, p, _ in self.requests if m == method and p.endswith(path))

    # One request

    def _serve(self, http: BaseHTTPRequestHandler) -> None:
        length = int(http.headers.get("Content-Length") or 0)
        body = http.rfile.read(length) if length else b""
        address = urlsplit(http.path)
        path = unquote(address.path)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        with self._lock:
            headers = {name.lower(): value for name, value in http.headers.items()}
            self.requests.append((http.command, path, headers))
            fault = self._fault(http.command, path)
            reply: Reply = (200, {})
            if fault is None or fault.after:
                reply = self._known(http.command, path, query, headers, body)
        if fault is None:
            self._send(http, *reply)
        elif fault.status == TIMEOUT:
            time.sleep(self.sleep_seconds)
            http.close_connection = True
        elif fault.status == HANG_UP:
            http.close_connection = True
        else:
            told = {"error": f"scripted {fault.status}", "message": f"scripted {fault.status}", "code": 13}
            self._send(http, fault.status, told if fault.body is None else fault.body)

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self._faults:
            if fault.method == method and path.endswith(fault.path):
                self._faults.remove(fault)
                return fault
        return None

    def _send(self, http: BaseHTTPRequestHandler, status: int, body: Any) -> None:
        text = isinstance(body, str)
        data = body.encode() if text else json.dumps(body).encode()
        http.send_response(status)
        if status == 302:
            http.send_header("Location", f"{self.url}/login")
        page = text and body.lstrip().startswith("<")
        http.send_header("Content-Type", "text/html" if page else "text/plain" if text else "application/json")
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        http.wfile.write(data)

    def _known(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Reply:
        if path.startswith("/login"):
            return 200, "<html>Log in to your account</html>"
        if path == f"{API}/healthz":
            return 200, {"commit_sha": "abc", "tag_name": "2.17.0", "multi_user": self.multi_user}
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            return self._login()
        if self.cookie and headers.get("cookie") != self.cookie:
            return self._login()
        if path.startswith("/apis/v1alpha1/runs/") and path.endswith("/log"):
            pod = path.split("/")[-2]
            return 200, self.logs.get(pod, '{"error_message":"Failed to read logs"}')
        if not path.startswith(API):
            return 404, "<html>no such page</html>"
        parts = path.removeprefix(f"{API}/").split("/")
        known: dict[str, Callable[..., Reply]] = {
            "pipelines": self._pipelines,
            "experiments": self._experiments,
            "runs": self._runs,
            "recurringruns": self._schedules,
        }
        if parts[0] not in known:
            return _error(404, "Not Found")
        kind = headers.get("content-type", "")
        return known[parts[0]](method, parts[1:], query, _body(kind, body))

    def _login(self) -> Reply:
        if self.login_page:
            return 302, "<html>moved</html>"
        return _error(401, "Request header error: there is no user identity header.")

    def _pipelines(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Reply:
        match (method, rest):
            case "GET", ["names", name]:
                if self.multi_user and not query.get("namespace"):
                    return _error(400, "A namespace is required")
                found = [p for p in self.pipelines.values() if p["name"] == name]
                return (200, found[0]) if found else _error(404, f"Pipeline {name} not found")
            case "POST", []:
                if self.multi_user and not body.get("namespace"):
                    return _error(400, "A namespace is required")
                if any(p["name"] == body["name"] for p in self.pipelines.values()):
                    return _error(409, f"The name {body['name']} already exist")
                return 200, self._keep(self.pipelines, "pipeline_id", body)
            case "POST", ["upload_version"]:
                return self._upload(query, body)
            case "GET", [pipeline_id, "versions"]:
                mine = [v for v in self.versions.values() if v["pipeline_id"] == pipeline_id]
                return self._listed("pipeline_versions", mine, query)
            case "GET", [_, "versions", version_id]:
                found = self.versions.get(version_id)
                return (200, found) if found else _error(404, f"PipelineVersion {version_id} not found")
        return _error(404, "Not Found")

    def _upload(self, query: dict[str, str], body: Any) -> Reply:
        if query.get("pipelineid") not in self.pipelines:
            return 400, {"error_message": "Failed to create a pipeline version", "error_details": "no pipeline"}
        siblings = [v for v in self.versions.values() if v["pipeline_id"] == query["pipelineid"]]
        if any(v["name"] == query["name"] for v in siblings):
            return 409, {"error_message": "Failed to create a pipeline version", "error_details": "exists"}
        spec, *platform = _documents(body)
        kept = {
            "pipeline_id": query["pipelineid"],
            "name": query["name"],
            "display_name": query["name"],
            "description": query.get("description", ""),
            "pipeline_spec": {"pipeline_spec": spec, "platform_spec": platform[0]} if platform else spec,
        }
        version = self._keep(self.versions, "pipeline_version_id", kept)
        self.packages[version["pipeline_version_id"]] = body
        return 200, version

    def _experiments(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Reply:
        if method == "GET" and not rest:
            if self.multi_user and not query.get("namespace"):
                return _error(400, "An experiment cannot have an empty namespace in multi-user mode")
            return self._listed("experiments", list(self.experiments.values()), query)
        if method == "POST" and not rest:
            if any(e["display_name"] == body["display_name"] for e in self.experiments.values()):
                return _error(409, f"experiment {body['display_name']} already exist")
            return 200, self._keep(self.experiments, "experiment_id", body)
        return _error(404, "Not Found")

    def _runs(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Reply:
        if method == "GET" and not rest:
            if self.multi_user and query.get("namespace") == "forbidden":
                return _error(403, "User 'ada' is not authorized with reason: no role in namespace forbidden")
            runs = [r for r in self.runs.values() if query.get("experiment_id") in (None, "", r["experiment_id"])]
            return self._listed("runs", runs, query)
        if method == "POST" and not rest:
            if problem := self._cannot_start(body):
                return problem
            kept = self._keep(self.runs, "run_id", body | {"state": "PENDING", "finished_at": NEVER, "looks": 0})
            return 200, kept
        run_id, _, verb = rest[0].partition(":")
        run = self.runs.get(run_id)
        if run is None:
            return _error(404, f"Run {run_id} not found")
        if method == "POST" and verb == "terminate":
            if run["state"] in ENDED:
                return _error(400, f"Failed to terminate a run {run_id}. Row not found")
            run["state"] = "CANCELING"
            return 200, {}
        if method == "GET" and not verb:
            return 200, self._look(run)
        return _error(404, "Not Found")

    def _look(self, run: dict[str, Any]) -> dict[str, Any]:
        step = self._steps[min(run["looks"], len(self._steps) - 1)]
        run["looks"] += 1
        run["state"] = step.state
        ended = step.state in ENDED if step.ended is None else step.ended
        run["finished_at"] = "2026-01-01T11:00:00Z" if ended else NEVER
        shown = run | {"run_details": {"task_details": step.tasks}}
        return shown | ({"error": {"code": 13, "message": step.error}} if step.error else {})

    def _schedules(self, method: str, rest: list[str], query: dict[str, str], body: Any) -> Reply:
        if method == "GET" and not rest:
            return self._listed("recurringRuns", list(self.schedules.values()), query)
        if method == "POST" and not rest:
            if problem := self._cannot_start(body):
                return problem
            cron = body["trigger"]["cron_schedule"]["cron"]
            if not cron.startswith("@") and len(cron.split()) != 6:
                return _error(400, f"Schedule cron is not a supported format. Error: {cron}")
            if not 1 <= int(body["max_concurrency"]) <= 10:
                return _error(400, "The max concurrency must be between 1 and 10")
            status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[body["mode"]]
            return 200, self._keep(self.schedules, "recurring_run_id", body | {"status": status})
        schedule_id, _, verb = rest[0].partition(":")
        if schedule_id not in self.schedules:
            return _error(404, f"Recurring run {schedule_id} not found")
        if method == "DELETE":
            del self.schedules[schedule_id]
        elif verb in ("enable", "disable"):
            self.schedules[schedule_id]["status"] = f"{verb.upper()}D"
        return 200, {}

    def _cannot_start(self, body: Any) -> Reply | None:
        reference = body.get("pipeline_version_reference", {})
        version = self.versions.get(reference.get("pipeline_version_id"))
        if version is None or version["pipeline_id"] != reference.get("pipeline_id"):
            return _error(400, "Failed to fetch the pipeline version")
        if body.get("experiment_id") not in self.experiments:
            return _error(400, "Failed to fetch the experiment")
        spec = version["pipeline_spec"].get("pipeline_spec", version["pipeline_spec"])
        takes = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        given = body.get("runtime_config", {}).get("parameters", {})
        if unknown := given.keys() - takes.keys():
            return _error(400, f"unknown parameters: {sorted(unknown)}")
        if lacking := {name for name, one in takes.items() if not one.get("isOptional")} - given.keys():
            return _error(400, f"missing parameters: {sorted(lacking)}")
        return None

    # Tables

    def _keep(self, table: dict[str, dict[str, Any]], key: str, entry: dict[str, Any]) -> dict[str, Any]:
        self._clock += 1
        created = datetime.fromtimestamp(1767261600 + self._clock, UTC).isoformat().replace("+00:00", "Z")
        entry = entry | {key: str(uuid4()), "created_at": created}
        table[entry[key]] = entry
        return entry

    def _listed(self, field: str, entries: list[dict[str, Any]], query: dict[str, str]) -> Reply:
        for predicate in json.loads(unquote_plus(query.get("filter") or "{}")).get("predicates", []):
            if predicate["operation"] != "EQUALS" or predicate["key"] != "display_name":
                return _error(400, f"unknown filter {predicate}")
            entries = [entry for entry in entries if entry["display_name"] == predicate["string_value"]]
        if sort := query.get("sort_by"):
            key, _, order = sort.partition(" ")
            entries = sorted(entries, key=lambda entry: entry[key], reverse=order == "desc")
        start = int(query.get("page_token") or 0)
        size = min(int(query.get("page_size") or 20), 200)
        page = {field: entries[start : start + size], "total_size": len(entries)}
        return 200, page | ({"next_page_token": str(start + size)} if start + size < len(entries) else {})


@cache
def _documents(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


def _error(status: int, message: str) -> Reply:
    return status, {"error": message, "message": message, "code": 3, "details": []}


def _body(kind: str, body: bytes) -> Any:
    """JSON, or the text of an uploaded file."""
    if kind.startswith("multipart/form-data"):
        message = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
        part = next(
            p for p in message.iter_parts() if p.get_param("name", header="content-disposition") == "uploadfile"
        )
        return part.get_payload(decode=True).decode()
    return json.loads(body) if body else {}
