"""A service with TLS and tokens, as people and their browsers meet it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from playwright.sync_api import Browser, expect

from steepest.bundle import bundle_task
from steepest.client import Client
from steepest.errors import PermissionDeniedError, ServiceUnavailableError, SpecError, UnauthenticatedError
from steepest.jobs import JobInfo
from tests.support.certificates import Certificates, certificates
from tests.support.command import run
from tests.support.documented import is_documented
from tests.support.programs import need_program
from tests.support.service import COMMAND, TASKS, free_port, serving, until

pytestmark = pytest.mark.cluster
OUTSIDE = Path(__file__).parents[1] / "support" / "outside"
PROTOS = Path(__file__).parents[2] / "proto"
SCREENSHOTS = os.environ.get("STEEPEST_SCREENSHOTS", "")


class _Closed(NamedTuple):
    """A service with tokens. tokens: by role."""

    address: str
    page: str
    files: Certificates
    tokens: dict[str, str]
    audit: Path

    def client(self, role: str) -> Client:
        return Client(self.address, token=self.tokens[role], tls_ca=self.files.authority)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Closed]:
    directory = tmp_path_factory.mktemp("closed")
    data, files, tokens = directory / "data", certificates(directory), {}
    for role, name in (("viewer", "eye"), ("submitter", "hand"), ("admin", "head")):
        made = run("token", "create", name, "--role", role, "--data-dir", str(data), "--json")
        tokens[role] = json.loads(made.stdout)["token"]
    # On all addresses: what would be refused without TLS and a token.
    options = ["--host", "0.0.0.0", "--port", "0", "--http-port", str(port := free_port()), "--data-dir", str(data)]
    pair = ["--tls-cert", str(files.certificate), "--tls-key", str(files.key), "--cpus", "2"]
    process = subprocess.Popen([*COMMAND, "serve", *options, *pair], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = process.stderr.readline()
    assert process.stderr.readline() == "ready\n", first
    found = re.search(r"gRPC 0\.0\.0\.0:(\d+)  HTTP https://0\.0\.0\.0:(\d+)", first)
    assert found is not None, first
    yield _Closed(f"127.0.0.1:{found[1]}", f"https://127.0.0.1:{port}", files, tokens, data / "audit.jsonl")
    process.terminate()
    process.communicate(timeout=60)


def test_roles_and_owners(closed: _Closed) -> None:
    with closed.client("viewer") as viewer, closed.client("submitter") as hand, closed.client("admin") as head:
        with pytest.raises(PermissionDeniedError, match="may only look"):
            viewer.submit(f"{TASKS}:slow", steps=10)
        job = hand.submit(f"{TASKS}:slow", steps=100_000)
        other = head.submit(f"{TASKS}:slow", steps=10)
        assert (job.get().owner, other.get().owner) == ("hand", "head")
        assert {info.owner for info in viewer.list()} == {"hand", "head"}
        with pytest.raises(PermissionDeniedError, match="belongs to 'head'"):
            hand.job(other.name).cancel()
        with pytest.raises(PermissionDeniedError, match="may only look"):
            viewer.job(job.name).cancel()
        until(lambda: job.get().step > 0)
        head.job(job.name).cancel()
        assert isinstance(list(job.watch())[-1], JobInfo)
    with Client(closed.address, tls_ca=closed.files.authority) as nobody, pytest.raises(UnauthenticatedError):
        list(nobody.list())


def test_the_command(closed: _Closed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEEPEST_TLS_CA", str(closed.files.authority))
    refused = run("list", "--server", closed.address)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert is_documented("a token is missing", refused.stderr)
    wrong = run("list", "--server", closed.address, "--token", "wrong")
    assert wrong.returncode == 2
    assert is_documented("a token is wrong", wrong.stderr)
    listed = run("list", "--server", closed.address, "--token", closed.tokens["viewer"], "--json")
    assert listed.returncode == 0, listed.stderr
    owned = run("list", "--server", closed.address, "--token", closed.tokens["admin"], "--filter", "owner = nobody")
    assert owned.returncode == 0, owned.stderr
    assert "trainingJobs/" not in owned.stdout
    assert all(job["owner"] in ("hand", "head") for job in json.loads(listed.stdout)["jobs"])


def test_a_client_does_not_tell_its_token_to_who_may_listen(closed: _Closed, tmp_path: Path) -> None:
    for address in ("192.0.2.1:50051", "localhost.example.com:50051", "127.0.0.1.example.com:50051"):
        with pytest.raises(SpecError, match="for all to read"):
            Client(address, token="secret")
    with pytest.raises(ServiceUnavailableError):  # an authority that has not signed the service's certificate
        Client(closed.address, token="secret", tls_ca=certificates(tmp_path).authority)


def _get(closed: _Closed, path: str, token: str = "") -> tuple[int, Any]:
    request = urllib.request.Request(closed.page + path)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(
            request, context=ssl.create_default_context(cafile=closed.files.authority)
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_http_takes_the_same_tokens(closed: _Closed) -> None:
    for path in ("/metrics", "/api/jobs", "/api/live", "/api/jobs/x/series"):
        assert _get(closed, path)[0] == 401
        assert _get(closed, path, "wrong")[0] == 401
    assert _get(closed, "/healthz") == _get(closed, "/readyz") == (200, b"ok\n")
    status, metrics = _get(closed, "/metrics", closed.tokens["viewer"])
    assert (status, b"steepest_" in metrics) == (200, True)


def test_who_changes_what_on_either_port_is_noted(closed: _Closed) -> None:
    before = len(closed.audit.read_text().splitlines()) if closed.audit.exists() else 0
    with closed.client("submitter") as hand:
        job = hand.submit(f"{TASKS}:slow", name="noted", steps=100_000)
        until(lambda: job.get().step > 0)
        for token in ("viewer", "submitter"):
            own = {"X-Steepest-Page": "1", "Authorization": f"Bearer {closed.tokens[token]}"}
            request = urllib.request.Request(f"{closed.page}/api/jobs/noted/pause", b"{}", own, method="POST")
            with contextlib.suppress(urllib.error.HTTPError):
                context = ssl.create_default_context(cafile=closed.files.authority)
                urllib.request.urlopen(request, context=context).close()
        until(lambda: job.get().state == "PAUSED")
        job.cancel()
        job.get()
    assert _get(closed, "/api/jobs", "wrong")[0] == 401
    found = [json.loads(line) for line in closed.audit.read_text().splitlines()[before:]]
    name = "trainingJobs/noted"
    noted = [(line["caller"], line["method"], line["target"], line["outcome"]) for line in found]
    assert noted[0][:2] == ("hand", "UploadCode")
    assert noted[1:] == [
        ("hand", "CreateTrainingJob", name, "ok"),
        ("eye", "pause", name, "PermissionDenied"),
        ("hand", "pause", name, "ok"),
        ("hand", "CancelTrainingJob", name, "ok"),
        ("", "GET /api/jobs", "", "Unauthenticated"),
    ]
    assert all(token not in closed.audit.read_text() for token in closed.tokens.values())


def test_the_page_asks_for_a_token(closed: _Closed, browser: Browser) -> None:
    with closed.client("submitter") as hand, closed.client("admin") as head:
        own = hand.submit(f"{TASKS}:slow", steps=100_000).name.split("/")[1]
        other = head.submit(f"{TASKS}:slow", steps=100_000).name.split("/")[1]
        context = browser.new_context(ignore_https_errors=True, viewport={"width": 1000, "height": 700})
        page = context.new_page()
        page.goto(f"{closed.page}/jobs/{own}")
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("unknown here")
        if SCREENSHOTS:
            page.screenshot(path=f"{SCREENSHOTS}/sign-in.png")
        page.get_by_label("Token").fill(closed.tokens["submitter"])
        page.get_by_role("button", name="Sign in").click()
        expect(page.locator(".headline .pill")).to_be_visible()
        assert page.evaluate("document.cookie") == ""  # no script reads the token
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        until(lambda: hand.job(own).get().has_ended)
        page.goto(f"{closed.page}/jobs/{other}")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        expect(page.locator(".toast.bad")).to_contain_text("belongs to 'head'")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        head.job(other).cancel()
        context.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "takes TLS (--tls-cert and --tls-key) and a token (steepest token create"),
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key come together"),
        (["--tls-cert", "none.pem", "--tls-key", "none.pem"], "is not there"),
        (["--tls-cert", "ca.pem", "--tls-key", "key.pem"], "are no certificate and its key"),
        (["--tls-client-ca", "ca.pem"], "--tls-client-ca takes --tls-cert and --tls-key"),
        (["--tls-cert", "cert.pem", "--tls-key", "key.pem", "--tls-client-ca", "key.pem"], "holds no certificate"),
    ],
)
def test_a_service_that_would_be_open_does_not_start(tmp_path: Path, options: list[str], said: str) -> None:
    certificates(tmp_path)
    ran = run("serve", "--port", "0", "--http-port", "0", "--data-dir", "data", *options, directory=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert said in ran.stderr


def test_callers_may_have_to_show_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = certificates(tmp_path)
    own, other = (tmp_path / "own-cert.pem", tmp_path / "own-key.pem"), tmp_path / "other"
    other.mkdir()
    certificates(other)  # of another authority
    monkeypatch.setattr("steepest.client.CONNECT_SECONDS", 2.0)
    tls = ["--tls-cert", str(files.certificate), "--tls-key", str(files.key), "--tls-client-ca", str(files.authority)]
    port = free_port()
    with serving(tmp_path / "data", *tls, "--http-port", str(port)) as address:
        with Client(address, tls_ca=files.authority, certificate=own) as client:
            assert client.server_info().tls
        for wrong in (None, (other / "own-cert.pem", other / "own-key.pem")):
            with pytest.raises(ServiceUnavailableError):
                Client(address, tls_ca=files.authority, certificate=wrong)
        context = ssl.create_default_context(cafile=str(files.authority))
        with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
            urllib.request.urlopen(f"https://127.0.0.1:{port}/healthz", context=context, timeout=10).read()
        context.load_cert_chain(*own)
        assert urllib.request.urlopen(f"https://127.0.0.1:{port}/healthz", context=context, timeout=10).status == 200
        monkeypatch.setenv("STEEPEST_CLIENT_CERT", str(own[0]))
        with pytest.raises(SpecError, match="STEEPEST_CLIENT_CERT: is set without STEEPEST_CLIENT_KEY"):
            Client(address, tls_ca=files.authority)
        monkeypatch.setenv("STEEPEST_CLIENT_KEY", str(own[1]))
        assert run("list", "--server", address, "--tls-ca", str(files.authority)).returncode == 0


def test_tokens_are_made_listed_and_revoked(tmp_path: Path) -> None:
    data = ["--data-dir", str(tmp_path)]
    assert "there is none" in run("token", "list", *data).stderr
    assert run("token", "create", "Eve!", *data).returncode == 2
    assert "allowed: viewer, submitter, admin" in run("token", "create", "eve", "--role", "root", *data).stderr
    made = run("token", "create", "eve", *data)
    assert made.stdout.startswith("steepest_")
    assert "there is a token 'eve'" in run("token", "create", "eve", *data).stderr
    assert run("token", "revoke", "eve", *data).returncode == 0
    assert run("token", "revoke", "eve", *data).returncode == 2
    [row] = json.loads(run("token", "list", *data, "--json").stdout)["tokens"]
    assert (row["name"], row["role"], row["revoked"] is not None) == ("eve", "submitter", True)


def test_tokens_are_those_of_the_service_with_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "steepest.toml").write_text(f'data_dir = "{tmp_path / "of-the-file"}"\n')
    made = ("token", "create", "--config", str(tmp_path / "steepest.toml"))
    assert run(*made, "ann").returncode == 0
    assert "ann" in run("token", "list", "--data-dir", str(tmp_path / "of-the-file")).stdout
    monkeypatch.setenv("STEEPEST_DATA_DIR", str(tmp_path / "of-the-environment"))
    assert run(*made, "bob").returncode == 0
    assert "bob" in run("token", "list").stdout
    assert "ann" not in run("token", "list").stdout
    assert "no setting of that name" in run("token", "list", "--config", str(_misspelt(tmp_path))).stderr


def _misspelt(directory: Path) -> Path:
    path = directory / "misspelt.toml"
    path.write_text('data_directory = "kept"\n')
    return path


@pytest.mark.full
def test_a_service_takes_its_settings_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "steepest.toml").write_text(
        'port = 0\nhttp_port = 0\ndata_dir = "kept"\n[health_actions]\nupdate_ratio = "cancel"\n'
    )
    command = [*COMMAND, "serve", "--config", "steepest.toml"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.strip().endswith("data kept")
        address = line.split()[1]
        with Client(address) as client:
            task = f"{Path(__file__).parents[1] / 'support' / 'sick.py'}:healthy"
            job = client.submit(task, steps=100_000, optimizer={"name": "sgd", "lr": 5e-6})
            for _ in job.watch():
                pass
            assert job.get().state == "CANCELLED"
            assert job.get().spec.health.actions == {"update_ratio": "cancel"}
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_client_in_another_language_is_made_from_the_protos_alone(closed: _Closed, tmp_path: Path) -> None:
    npm, node = need_program("npm", "npm"), need_program("node", "nodejs")
    outside = tmp_path / "outside"
    shutil.copytree(OUTSIDE, outside)
    install = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(outside)]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=120)
    bundle = bundle_task(f"{TASKS}:slow")
    (tmp_path / "code.zip").write_bytes(bundle.data)
    hand = [closed.address, str(closed.files.authority), closed.tokens["submitter"]]
    code = [str(tmp_path / "code.zip"), bundle.module, bundle.function]
    ran = subprocess.run(
        [node, str(outside / "client.mjs"), str(PROTOS), *hand, *code], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    saw = json.loads(ran.stdout)
    assert (saw["refused"], saw["role"]) == (grpc.StatusCode.UNAUTHENTICATED.value[0], "submitter")
    assert saw["invalid"][0] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "steps: -1" in saw["invalid"][1]
    assert (saw["once"], saw["listed"], saw["workers"], saw["in_order"]) == (True, [True], 2, True)
    assert saw["states"] == ["QUEUED", "STARTING", "RUNNING", "PAUSING", "PAUSED", "RUNNING", "SUCCEEDED"]
    assert (saw["step"], saw["records"]) == (120, 120)
    assert {"model.safetensors", "optimizer.safetensors", "manifest.json"} <= saw["files"].keys()
    assert saw["deleted"] == grpc.StatusCode.NOT_FOUND.value[0]
