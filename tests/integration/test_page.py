"""The page, in a real browser: what moves, what acts, what it refuses, and who can use it."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from services.service import Service
from steepest.client import Client, Job
from steepest.records import records_of
from steepest.report import report_html
from tests.support.choices import full
from tests.support.service import until

pytestmark = pytest.mark.cluster

SCREENSHOTS = os.environ.get("STEEPEST_SCREENSHOTS", "")  # a directory to leave them in
LOOKS = [(1440, "light"), full(1440, "dark"), full(390, "light"), full(390, "dark")]


@pytest.fixture
def visit(browser: Browser, service: Service) -> Iterator[Callable[..., Page]]:
    """Open a page; at the end there must have been no error on its console and no request to another host."""
    pages: list[Page] = []
    problems: list[str] = []
    own = f"http://127.0.0.1:{service.http_port}"

    def call(path: str, width: int = 1440, theme: Any = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(own) else problems.append(request.url))
        page.goto(own + path)
        pages.append(page)
        return page

    yield call
    for page in pages:
        page.close()
    assert problems == []


def name_of(job: Job) -> str:
    return job.name.split("/")[1]


def heading(page: Page, text: str) -> Any:
    return page.get_by_role("heading", name=text)


def test_charts_move_and_every_button_acts(visit: Callable[..., Page], submit: Callable[..., Job]) -> None:
    job = submit("slow", arguments={"delay": 0.002}, steps=100_000, clip={"norm": 0.5})
    until(lambda: job.get().step > 5)
    page = visit(f"/jobs/{name_of(job)}")
    expect(page.locator(".headline .pill")).to_have_text("running")
    step = page.locator("dt", has_text="Step").first.locator("xpath=following-sibling::dd")
    before = step.inner_text()
    expect(step).not_to_have_text(before)
    drawn = "() => document.querySelector('[data-chart=loss] canvas').toDataURL()"
    image = page.evaluate(drawn)
    page.wait_for_function(f"before => ({drawn})() !== before", arg=image)
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".headline .pill")).to_have_text("paused")
    assert job.get().state == "PAUSED"
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".headline .pill")).to_have_text("running")
    page.get_by_role("button", name="Scale", exact=True).click()
    page.get_by_label("Number of workers").fill("2")
    page.get_by_role("dialog").get_by_role("button", name="Scale").click()
    expect(page.locator("td.name", has_text="worker-1")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Leave it").click()
    assert job.get().state == "RUNNING"
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
    expect(page.locator(".headline .pill")).to_have_text("cancelled")
    assert job.get().state == "CANCELLED"
    expect(page.get_by_role("button", name="Pause")).to_have_count(0)


@pytest.fixture(scope="module")
def finished(service: Service) -> Any:
    """A job with everything that a page can show, and another one to compare it with."""
    from steepest.client import Client
    from tests.support.service import TASKS

    with Client(f"127.0.0.1:{service.grpc_port}") as client:
        jobs = [
            client.submit(
                f"{TASKS}:evaluated",
                name=f"shown-{index}",
                steps=120,
                data={"global_batch": 24, "micro_batch": 12},
                optimizer={"name": "adamw", "lr": 0.003 * (1 + index)},
                clip={"norm": 0.5},
                telemetry={"histograms_every": 2, "curvature_every": 10},
                eval_every=20,
                checkpoint_every=50,
                best={"metric": "loss"},
            )
            for index in range(2)
        ]
        for job in jobs:
            job.wait()
        yield name_of(jobs[0])


@pytest.mark.parametrize(("width", "theme"), LOOKS)
def test_a_page_is_whole_and_accessible(
    visit: Callable[..., Page], finished: str, submit: Callable[..., Job], width: int, theme: str
) -> None:
    for path, what in ((f"/jobs/{finished}", "job"), ("/", "jobs")):
        page = visit(path, width, theme)
        if what == "job":
            expect(page.locator("[data-chart=loss] canvas")).to_be_visible()
            expect(page.locator("[data-chart=curvature] canvas")).to_be_visible()
            expect(page.get_by_role("img", name="A signal of each parameter")).to_be_visible()
            expect(page.locator(".events li").first).to_contain_text("all 120 steps are done")
        else:
            expect(page.get_by_role("link", name=finished)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        found = Axe().run(page).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
        if SCREENSHOTS:
            page.wait_for_timeout(500)
            page.screenshot(path=f"{SCREENSHOTS}/{what}-{width}-{theme}.png", full_page=True)


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])
def test_a_report_is_whole_accessible_and_loads_nothing(
    browser: Browser, client: Client, finished: str, tmp_path: Path, width: int, theme: Any
) -> None:
    job = client.job(finished)
    text = report_html(job.get(), records_of(job.history(), job.evaluations()), job.events(), "0")
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{tmp_path}/report.html")
    expect(heading(page, finished)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = Axe().run(page).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/report-{width}-{theme}.png", full_page=True)
    page.close()


def test_a_row_of_the_heat_map_opens_its_layer(visit: Callable[..., Page], finished: str) -> None:
    page = visit(f"/jobs/{finished}")
    heat = page.get_by_role("img", name="A signal of each parameter")
    box = heat.bounding_box()
    assert box is not None
    heat.click(position={"x": box["width"] / 2, "y": 2})
    expect(heading(page, "‖g‖ of 0.weight")).to_be_visible()
    expect(page.get_by_role("img", name="Magnitudes from")).to_be_visible()
    expect(heading(page, "|g| of 0.weight, element by element")).to_be_visible()
    if SCREENSHOTS:
        page.wait_for_timeout(500)
        page.screenshot(path=f"{SCREENSHOTS}/layer-1440-light.png", full_page=True)
    page.get_by_label("Open a layer by its name").fill("0.bias")
    page.keyboard.press("Enter")
    expect(heading(page, "‖g‖ of 0.bias")).to_be_visible()
    heat.focus()
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(heading(page, "‖g‖ of 3.bias")).to_be_visible()


def test_activation_functions_are_signals_of_the_heat_map(
    visit: Callable[..., Page], service: Service, submit: Callable[..., Job]
) -> None:
    job = submit("regression", steps=30)
    job.wait()
    seen = [record for record in job.history(signals=True) if record["activations"]]
    assert [record["step"] for record in seen] == [*range(20), 20]
    assert set(seen[0]["activations"]) == {"activation_share", "activation_rms"}
    [(name, size)] = seen[0]["activations"]["activation_rms"].items()
    assert size > 0
    path = f"/api/jobs/{name_of(job)}/layers?signal=activation_rms"
    rows = json.loads(ask(service, path)[1])
    assert (rows["names"], rows["sizes"]) == ([name], [1])
    assert 10 ** rows["values"][0][0] == pytest.approx(size, rel=1e-2)
    refused = json.loads(ask(service, f"{path}&name=0.weight")[1])["error"]
    assert refused.endswith(f"'0.weight' is no activation function of {job.name}")
    page = visit(f"/jobs/{name_of(job)}")
    page.get_by_label("Signal of the layers").select_option("activation_rms")
    expect(page.get_by_text("1 activation function, from the input")).to_be_visible()
    page.get_by_label("Open a layer by its name").fill(name)
    page.keyboard.press("Enter")
    expect(heading(page, f"RMS of activations of {name}")).to_be_visible()
    page.get_by_label("Open a layer by its name").fill("0.weight")
    page.keyboard.press("Enter")
    expect(heading(page, "‖g‖ of 0.weight")).to_be_visible()


def test_zoom_scale_smoothing_and_comparison(visit: Callable[..., Page], finished: str) -> None:
    page = visit(f"/jobs/{finished}")
    chart = page.locator("[data-chart=loss] .u-over")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, y, steps=5)
    with page.expect_request(lambda request: "/series?" in request.url and "last=" in request.url):
        page.mouse.up()
    with page.expect_request(lambda request: "/series?" in request.url and "last=" not in request.url):
        page.get_by_role("button", name="All steps").click()
    log = page.get_by_role("button", name="Log scale")
    log.click()
    expect(log).to_have_attribute("aria-pressed", "true")
    page.get_by_label("Compare with another job").select_option("shown-1")
    expect(page.locator("[data-chart=loss] .u-legend")).to_contain_text("shown-1: training")
    expect(page.locator("tr.differs", has_text="optimizer.lr")).to_contain_text("0.006")
    page.get_by_label("Smoothing").fill("0.9")
    expect(page.locator("[data-chart=loss] canvas")).to_be_visible()


def test_jobs_are_searched_filtered_and_sorted(visit: Callable[..., Page], finished: str) -> None:
    page = visit("/")
    page.get_by_label("Search jobs").fill("shown-")
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_role("button", name="Job", exact=True).click()
    expect(page.locator("tbody tr a").first).to_have_text("shown-0")
    page.get_by_role("button", name="Job", exact=True).click()
    expect(page.locator("tbody tr a").first).to_have_text("shown-1")
    page.get_by_role("button", name="failed").click()
    expect(page.locator(".empty")).to_contain_text("No job fits")
    page.get_by_role("button", name="all").click()
    page.get_by_role("link", name="shown-0").click()
    expect(heading(page, "shown-0")).to_be_visible()
    page.go_back()
    expect(heading(page, "Training jobs")).to_be_visible()


def test_words_of_user_code_never_become_markup(visit: Callable[..., Page], submit: Callable[..., Job]) -> None:
    job = submit("prints_markup", steps=2)
    job.wait()
    page = visit(f"/jobs/{name_of(job)}")
    expect(page.locator(".log")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator(".log img").count() == 0


def test_a_job_that_is_not_there(visit: Callable[..., Page], service: Service) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{service.http_port}/api/jobs/nobody")
    assert refused.value.code == 404
    assert "there is no job trainingJobs/nobody" in json.loads(refused.value.read())["error"]


def ask(service: Service, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(  # the service's own
        f"http://127.0.0.1:{service.http_port}{path}", body, named, method=method
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_layers_beyond_what_a_page_can_show_share_rows(
    service: Service, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = json.loads(ask(service, f"/api/jobs/{finished}/layers?points=4")[1])
    assert whole["sizes"] == [1] * len(whole["names"])
    monkeypatch.setattr("services.dashboard.views.MAX_LAYERS", 4)
    few = json.loads(ask(service, f"/api/jobs/{finished}/layers?points=4")[1])
    assert len(few["names"]) == 4
    assert sum(few["sizes"]) == len(whole["names"])
    first = few["sizes"][0]
    assert few["values"][0] == [max(column) for column in zip(*whole["values"][:first], strict=True)]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("series?names=nonsense", 400, "'nonsense' is no series; there are: apply_seconds"),
        ("series", 400, "no series is named"),
        ("series?names=loss&points=0", 400, "points"),
        ("series?names=loss&first=-1", 400, "first"),
        ("series?names=loss&last=1e9", 400, "last"),
        ("layers?name=nowhere", 400, "'nowhere' is no parameter"),
        ("histograms?name=nowhere", 400, "'nowhere' is no parameter"),
        ("live?cursor=elsewhere", 400, "does not come from this service"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused(
    service: Service, finished: str, path: str, status: int, words: str
) -> None:
    code, answer = ask(service, f"/api/jobs/{finished}/{path}")
    assert (code, words in json.loads(answer)["error"]) == (status, True), answer


def test_curvature_has_the_steps_that_it_is_measured_in(service: Service, finished: str) -> None:
    found = json.loads(ask(service, f"/api/jobs/{finished}/curvature?first=15")[1])
    assert found["steps"] == list(range(20, 120, 10))
    least, most = found["smallest_eigenvalue"]["mean"], found["sharpness"]["mean"]
    assert all(low < high for low, high in zip(least, most, strict=True))
    assert found["stable"]["mean"] == [None] * 10  # of AdamW


def test_a_spike_survives_any_zoom(service: Service, finished: str) -> None:
    whole = json.loads(ask(service, f"/api/jobs/{finished}/series?names=loss,gradient_norm")[1])
    assert whole["steps"] == list(range(120))
    few = json.loads(ask(service, f"/api/jobs/{finished}/series?names=gradient_norm&points=7")[1])
    assert len(few["steps"]) == 7
    assert max(few["series"]["gradient_norm"]["max"]) == max(whole["series"]["gradient_norm"]["max"])
    assert min(few["series"]["gradient_norm"]["min"]) == min(whole["series"]["gradient_norm"]["min"])


def test_other_sites_cannot_press_buttons_or_read(service: Service, finished: str) -> None:
    path = f"/api/jobs/{finished}/cancel"
    assert ask(service, path, "POST", b"{}")[0] == 403
    evil = {"X_Steepest_Page": "1", "Origin": "http://evil.example"}
    assert ask(service, path, "POST", b"{}", **evil)[0] == 403
    code, answer = ask(service, path, "POST", b"{}", X_Steepest_Page="1")
    assert code == 409
    assert "SUCCEEDED" in json.loads(answer)["error"]
    assert ask(service, "/", Host="evil.example")[0] == 400
    assert ask(service, f"/api/jobs/{finished}/scale", "POST", b"{", X_Steepest_Page="1")[0] == 400
    assert ask(service, f"/api/jobs/{finished}/explode", "POST", b"", X_Steepest_Page="1")[0] == 400
    with urllib.request.urlopen(f"http://127.0.0.1:{service.http_port}/") as answered:
        policy = answered.headers["Content-Security-Policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert ask(service, "/static/../app.py")[0] == 404
    assert ask(service, "/static/%2e%2e/app.py")[0] == 404
