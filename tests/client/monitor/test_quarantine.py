"""What a real server rejected is seen and labelled: over HTTP, by the command, and in a real browser."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright

from client.api import GuardedClient
from client.monitor.quarantine import QuarantineCollector, QuarantineView
from client.monitor.record import FeedbackRecord
from client.quarantine import QuarantineClient
from deploy.embedded.server import EmbeddedTriton
from detector.errors import AccessDeniedError, InputError, RecordError, ServerError
from detector.quarantine import FOLDER_VARIABLE, Quarantine, Rejected, quarantined, request_id_of
from samples.readers import read_samples
from tests.client.monitor.conftest import CLASSES, ROOT, SHAPE, TOKEN, Monitor, TextPage, monitoring, serving, stripwire
from tests.conftest import skip_or_fail, wait_for
from tests.test_live_metrics import scraped, series

IMAGES = np.random.default_rng(5).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


@dataclass(frozen=True)
class Watched:
    """A server that has rejected `IMAGES` as `<name>.0` to `<name>.2`, and a monitor beside it."""

    server: EmbeddedTriton
    folder: Path
    monitor: Monitor
    name: str

    @property
    def url(self) -> str:
        return str(self.monitor.http.base_url).rstrip("/")

    def send(self, images: NDArray[np.uint8], name: str) -> None:
        given = triton_grpc.InferInput("image", images.shape, "UINT8").set_data_from_numpy(images)
        with triton_grpc.InferenceServerClient(self.server.grpc_address) as client:
            client.infer("guarded", [given], request_id=name)

    def listing(self, **params: Any) -> dict[str, Any]:
        answer = self.monitor.http.get("/v1/quarantine", params=params, headers=bearer())
        assert answer.status_code == 200
        return dict(answer.json())


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(params=["ensemble", "fused"])
def watched(
    request: pytest.FixtureRequest,
    exported: Path,
    tmp_path: Path,
    canary_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Watched]:
    folder = tmp_path / "quarantine"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    version = {"ensemble": "1", "fused": "2"}[request.param]
    with serving(exported, tmp_path, version) as server:
        options = ("--quarantine", folder, "--metrics-url", f"http://{server.metrics_address}/metrics")
        with monitoring(canary_file, server.grpc_address, "--canaries-per-minute", "600", *options) as monitor:
            found = Watched(server, folder, monitor, f"{request.param}-7f3a")
            found.send(IMAGES, found.name)
            wait_for(lambda: len(quarantined(folder)) == 3)
            yield found


def test_what_was_rejected_is_listed_shown_and_labelled(watched: Watched) -> None:
    wait_for(lambda: watched.monitor.metric("stripwire_canary_total", truth="clean", verdict="rejected") > 2)
    found = watched.listing()
    assert (found["kept"], found["unlabelled"]) == (3, 3)  # and no canary
    assert {about["request_id"] for about in found["inputs"]} == {f"{watched.name}.{row}" for row in range(3)}
    with GuardedClient(watched.server.grpc_address) as client:
        verdicts = client.classify(IMAGES, probabilities=True)
    assert verdicts.probabilities is not None
    for about in found["inputs"]:
        row = int(about["request_id"].rpartition(".")[2])
        assert about["label"] == verdicts.probabilities[row].argmax()
        assert about["entropy_bits"] == pytest.approx(float(verdicts.entropy_bits[row]), rel=1e-4)
        assert about["scores"] == ["entropy"]
        answer = watched.monitor.http.get(f"/v1/quarantine/{about['key']}.png", headers=bearer())
        assert answer.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), IMAGES[row])

    wait_for(lambda: len(quarantined(watched.folder)) == 6)
    assert set(verdicts.request_ids) <= {about["request_id"] for about in watched.listing()["inputs"]}
    with QuarantineClient(watched.url, TOKEN) as quarantine:
        key = quarantine.find(f"{watched.name}.1")["key"]
        assert quarantine.label(key, "trojaned")
        assert not quarantine.label(key, "trojaned")
        with pytest.raises(InputError, match="in the record, which stays"):
            quarantine.label(key, "clean")
    assert watched.listing(labelled="false")["unlabelled"] == 5
    assert watched.monitor.metric("stripwire_feedback_total", truth="trojaned", verdict="rejected") == 1
    assert watched.monitor.metric("stripwire_quarantine_inputs", truth="unlabelled") == 5
    assert watched.monitor.metric("stripwire_quarantine_inputs", truth="trojaned") == 1

    wait_for(lambda: scraped(watched.server)[series("quarantine_kept_total")] == 6)


def run(of: Watched | Monitor, *arguments: str, columns: int = 160) -> subprocess.CompletedProcess[str]:
    monitor = of if isinstance(of, Monitor) else of.monitor
    return stripwire(monitor, "quarantine", *arguments, columns=columns)


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_the_command_lists_shows_and_labels(watched: Watched, tmp_path: Path) -> None:
    assert "3 inputs are kept, 3 not labelled" in run(watched, "list").stdout
    one, two = (f"{watched.name}.{row}" for row in (1, 2))
    picture = tmp_path / "input.png"
    shown = run(watched, "show", one, "--output", str(picture))
    assert json.loads(shown.stdout)["request_id"] == one
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), IMAGES[1])
    again = run(watched, "show", one, "--output", str(picture))
    assert (again.returncode, "exists" in again.stderr) == (2, True)
    unknown = run(watched, "label", "clean", one, "nobody.0")
    assert (unknown.returncode, "not in the quarantine" in unknown.stderr) == (2, True)
    assert run(watched, "label", "clean", one, two).stdout == "2 recorded as clean.\n"
    assert run(watched, "label", "clean", one).stdout == "0 recorded as clean, 1 had been before.\n"
    assert [about["truth"] for about in json.loads(run(watched, "list", "--all", "--json").stdout)["inputs"]] == [
        "clean",
        "clean",
        None,
    ]
    conflict = run(watched, "label", "trojaned", one)
    assert (conflict.returncode, "Traceback" in conflict.stderr) == (2, False)

    unknown = run(watched, "remove", one, "nobody.0")
    assert (unknown.returncode, "not in the quarantine" in unknown.stderr) == (2, True)
    watched.send(IMAGES[1:2], f"{watched.name}-again")
    wait_for(lambda: len(quarantined(watched.folder)) == 4)
    assert run(watched, "remove", one, f"{watched.name}-again.0").stdout == "2 removed.\n"
    assert {request_id_of(key) for key in quarantined(watched.folder)} == {f"{watched.name}.0", two}
    # What it was is known as before.
    assert watched.monitor.metric("stripwire_feedback_total", truth="clean", verdict="rejected") == 2


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_what_people_marked_is_saved_as_data_that_the_other_commands_read(watched: Watched, tmp_path: Path) -> None:
    watched.send(IMAGES[:1], "copy")
    wait_for(lambda: len(quarantined(watched.folder)) == 4)
    names = [*(f"{watched.name}.{row}" for row in range(2)), "copy.0"]
    assert run(watched, "label", "trojaned", *names).returncode == 0
    assert run(watched, "label", "clean", f"{watched.name}.2").returncode == 0
    trojaned, asked, clean = (str(tmp_path / f"{name}.npz") for name in ("trojaned", "asked", "clean"))
    saved = run(watched, "save", trojaned, "--label", "3")
    assert saved.stdout == f"2 trojaned inputs written to {trojaned}. Labels: 3, as asked.\n"
    assert saved.stderr == "Fetching images …\n1 of 3 inputs are left out: copies of others, pixel by pixel\n"
    samples = read_samples(Path(trojaned)).samples
    np.testing.assert_array_equal(samples.images, IMAGES[:2])  # in the order in which they came
    assert samples.labels.tolist() == [3, 3]
    assert Path(trojaned).stat().st_mode & 0o777 == 0o600

    with GuardedClient(watched.server.grpc_address) as client:
        original = client.original_probabilities(IMAGES).argmax(axis=1)
        answered = client.classify(IMAGES, probabilities=True).probabilities
    assert answered is not None
    assert (
        "what the original network answers" in run(watched, "save", asked, "--url", watched.server.grpc_address).stdout
    )
    np.testing.assert_array_equal(read_samples(Path(asked)).samples.labels, original[:2])
    assert "1 clean inputs written" in run(watched, "save", clean, "--truth", "clean").stdout
    assert read_samples(Path(clean)).samples.labels.tolist() == [answered[2].argmax()]

    files = ("--clean", clean, "--trojaned", trojaned)
    evaluated = stripwire(watched.monitor, "evaluate", *files, "--url", watched.server.grpc_address, "--json")
    assert json.loads(evaluated.stdout)["guarded"]["false_acceptance"]["count"] == 2
    options = ("--classes", str(CLASSES), "--output", str(tmp_path / "chosen.npz"))
    assert "1 clean and 2 trojaned canaries" in stripwire(watched.monitor, "canaries", clean, trojaned, *options).stdout


def kept(folder: Path, *images: NDArray[np.uint8]) -> None:
    """Keep inputs, named a.0, a.1 and so on."""
    writer = Quarantine(folder)
    for number, image in enumerate(images):
        writer.offer(Rejected(f"a.{number}", image, 1, 0.5, 0.01, ("entropy",), "1", 1e9))
    writer.close()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_name_is_listed_whole_where_it_fits(canary_file: Path, tmp_path: Path, columns: int) -> None:
    writer = Quarantine(tmp_path / "quarantine")
    ids = [f"{'3f2b9c0e7d1a4b5c8e6f0a1b2c3d4e5f'}.999", "a.0", f"{'x' * 100}.0"]
    scores = ("entropy", "plain_entropy", "nll")
    for request_id in ids:
        writer.offer(Rejected(request_id, IMAGES[0], 1282, 1.234e-5, 0.000123, scores, "1", 1.7e9))
    writer.close()
    with monitoring(canary_file, "127.0.0.1:1", "--quarantine", tmp_path / "quarantine") as monitor:
        listed = run(monitor, "list", columns=columns).stdout
    assert max(map(len, listed.splitlines())) <= columns
    for shown in (*ids[:2], "2023-11-14 22:13:20", "1282", "1.23e-05", "0.00012", "plain_entropy, nll"):
        assert shown in listed
    assert "".join(line.split("│")[0].strip() for line in listed.splitlines() if "xx" in line) == ids[2]


def test_what_cannot_be_saved_is_told_and_nothing_is_written(canary_file: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "quarantine", tmp_path / "saved.npz"
    kept(folder, IMAGES[0], IMAGES[1], IMAGES[2][:4])
    with monitoring(canary_file, "127.0.0.1:1", "--quarantine", folder) as monitor:
        save = partial(run, monitor, "save")
        for arguments, message in (
            ((output, "--label", "0"), "no input in the quarantine is marked trojaned, expected some; mark them"),
            ((output, "a.0"), "label: got none, expected the class that the attacker wants"),
            ((output, "a.0", "--label", "0", "--url", "127.0.0.1:1"), "expected one of them"),
            ((output, "a.7", "--label", "0"), "'a.7' is not in the quarantine"),
            ((output, "a.0", "a.2", "--label", "0"), "a.2 has shape (4, 7, 3) and a.0 (8, 7, 3), expected one shape"),
            ((tmp_path / "saved.h5", "a.0", "--label", "0"), "expected a name that ends with .npz"),
            ((tmp_path / "no" / "saved.npz", "a.0", "--label", "0"), f"{tmp_path / 'no'} is no folder"),
        ):
            refused = save(*map(str, arguments))
            assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
        run(monitor, "label", "clean", "a.1")
        assert "a.1 is marked clean, expected trojaned" in save(str(output), "a.1", "--label", "0").stderr
        assert [path for path in tmp_path.iterdir() if "saved" in path.name] == []
        assert save(str(output), "a.0", "--label", "0").returncode == 0
        content = output.read_bytes()
        assert f"{output} exists" in save(str(output), "a.1", "--truth", "clean").stderr
        assert output.read_bytes() == content
        assert (monitor.http.get("/v1/quarantine?truth=odd", headers=bearer())).status_code == 422


def test_more_inputs_are_saved_than_one_answer_tells(
    canary_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.quarantine._PAGE", 2)
    images = np.random.default_rng(1).integers(0, 256, (5, 4, 3, 5), dtype=np.uint8)  # of no kind that PNG knows
    kept(tmp_path / "quarantine", *images)
    with monitoring(canary_file, "127.0.0.1:1", "--quarantine", tmp_path / "quarantine") as monitor:
        told: list[tuple[int, int]] = []
        with QuarantineClient(str(monitor.http.base_url), TOKEN) as client:
            for about in client.listing()["inputs"]:
                client.label(about["key"], "trojaned")
            found = client.evidence("trojaned", on_progress=lambda *counts: told.append(counts))
            assert client.image("00000000000000000001-gone.0") is None
        np.testing.assert_array_equal(found.images, images)
        assert (found.labels.tolist(), found.notes, told[-1]) == ([1] * 5, (), (5, 5))


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_an_id_that_is_used_again_names_another_input(watched: Watched) -> None:
    with QuarantineClient(watched.url, TOKEN) as quarantine:
        first = quarantine.find(f"{watched.name}.0")
        assert quarantine.label(first["key"], "clean")
        # Nor does what somebody says of the request speak for the input.
        feedback = {"request_id": f"{watched.name}.0", "truth": "clean", "verdict": "rejected"}
        assert watched.monitor.give(**feedback).status_code == 201
        watched.send(IMAGES[1:2], watched.name)
        wait_for(lambda: len(quarantined(watched.folder)) == 4)
        second = quarantine.find(f"{watched.name}.0")
        assert second["key"] != first["key"]
        assert second["truth"] is None
        assert quarantine.label(second["key"], "trojaned")
        assert quarantine.remove(f"{watched.name}.0") == 2  # whoever asks for its removal means all of that name
        assert len(quarantined(watched.folder)) == 2


def test_what_is_no_number_can_be_listed(tmp_path: Path) -> None:
    folder = tmp_path / "quarantine"
    writer = Quarantine(folder)
    writer.offer(Rejected("a.0", IMAGES[0], 1, math.nan, 0.0, ("not_finite",), "1", 1e9))
    writer.close()
    with FeedbackRecord(tmp_path / "record.sqlite") as record:
        found = QuarantineView(folder, record).listing(10, labelled=True)
        assert json.loads(json.dumps(found, allow_nan=False))["inputs"][0]["entropy_bits"] is None


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    with FeedbackRecord(tmp_path / "record.sqlite") as record:
        assert QuarantineView(tmp_path / "not yet", record).listing(10, labelled=True)["kept"] == 0
        (tmp_path / "a file").touch()
        with pytest.raises(RecordError, match="cannot be read"):
            QuarantineView(tmp_path / "a file", record).listing(10, labelled=True)
        assert list(QuarantineCollector(QuarantineView(tmp_path / "a file", record)).collect()) == []


@pytest.mark.parametrize(
    ("url", "token", "message"),
    [
        ("http://[::1", TOKEN, "expected a URL"),
        ("http://127.0.0.1:port", TOKEN, "expected a URL"),
        ("ftp://127.0.0.1", TOKEN, "expected a URL"),
        ("http://127.0.0.1:8003", "tökén", "printable ASCII"),
        ("http://127.0.0.1:8003", None, "got none"),
        ("http://example.org:8003", TOKEN, "another machine"),
    ],
)
def test_an_address_or_token_that_cannot_be_used_is_told(url: str, token: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuarantineClient(url, token)


def test_no_proxy_sees_the_token(canary_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with monitoring(canary_file, "127.0.0.1:1", "--quarantine", tmp_path) as monitor:
        for host in ("127.0.0.1", "localhost"):
            url = f"http://{host}:{monitor.http.base_url.port}"
            with QuarantineClient(url, TOKEN) as client:
                assert client.listing()["kept"] == 0


def test_what_is_no_monitor_is_told(page_of_text: TextPage) -> None:
    with pytest.raises(ServerError, match="answers no JSON"), QuarantineClient(page_of_text.url, TOKEN) as client:
        client.listing()


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_nobody_without_the_token_or_from_another_site_gets_in(watched: Watched) -> None:
    (key, *_) = quarantined(watched.folder)
    http = watched.monitor.http
    for path in ("/v1/quarantine", f"/v1/quarantine/{key}.png", f"/v1/quarantine/{key}.npy"):
        assert http.get(path).status_code == 401
    assert http.delete(f"/v1/quarantine/{key}").status_code == 401
    elsewhere = bearer() | {"Origin": "http://evil.example"}
    assert http.delete(f"/v1/quarantine/{key}", headers=elsewhere).status_code == 403
    assert http.delete("/v1/quarantine/..%2Fsecret", headers=bearer()).status_code == 404
    assert len(quarantined(watched.folder)) == 3
    feedback = {"request_id": f"{watched.name}.0", "truth": "clean", "verdict": "rejected"}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        answer = http.post("/v1/feedback", json=feedback, headers=bearer() | headers)
        assert answer.status_code == 403
        assert "another site" in answer.json()["error"]
    assert watched.monitor.metric("stripwire_feedback_refused_total", reason="cross_site") == 4
    for path, status in (
        ("/v1/quarantine?limit=0", 422),
        ("/v1/quarantine?limit=many", 422),
        (f"/v1/quarantine?limit={'9' * 5000}", 422),
        ("/v1/quarantine?labelled=2", 422),
        ("/v1/quarantine/..%2Fsecret.png", 404),
        ("/v1/quarantine/00000000000000000001-gone.0.png", 404),
        ("/quarantine/app.py", 404),
    ):
        assert http.get(path, headers=bearer()).status_code == status
    with pytest.raises(AccessDeniedError, match="feedback token"), QuarantineClient(watched.url, "wrong") as client:
        client.listing()


def test_a_monitor_without_a_quarantine_says_so(canary_file: Path) -> None:
    with monitoring(canary_file, "127.0.0.1:1") as monitor:
        assert monitor.http.get("/quarantine").status_code == 404
        url = str(monitor.http.base_url)
        with pytest.raises(ServerError, match="--quarantine"), QuarantineClient(url, TOKEN) as client:
            client.listing()


@pytest.mark.parametrize("watched", ["ensemble"], indirect=True)
def test_a_quarantine_that_cannot_be_written_fails_no_request(watched: Watched) -> None:
    shutil.rmtree(watched.folder)
    with GuardedClient(watched.server.grpc_address) as client:
        assert client.classify(IMAGES).trojaned.all()

    wait_for(lambda: scraped(watched.server)[series("quarantine_dropped_total", reason="failed")] == 3)
    assert watched.listing() == {"kept": 0, "unlabelled": 0, "inputs": []}


@pytest.fixture(scope="module")  # for as long as it runs, no other test can have an event loop
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        skip_or_fail("Chromium is not installed (Debian: apt-get install chromium)")
    quiet = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=quiet)
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser, watched: Watched) -> Iterator[Page]:
    """Yield the page, opened with the token, and let none of its scripts fail."""
    opened = browser.new_page()
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda said: troubles.append(said.text) if "Content Security" in said.text else None)
    opened.goto(f"{watched.url}/quarantine")
    opened.get_by_label("Feedback token").fill("wrong")
    opened.keyboard.press("Enter")
    expect(opened.locator("#away")).to_have_text("That is not the feedback token.")
    opened.get_by_label("Feedback token").fill(TOKEN)
    opened.keyboard.press("Enter")
    expect(opened.locator("article")).to_have_count(3)
    yield opened
    assert troubles == []
    opened.close()


def known(watched: Watched, row: int) -> str | None:
    found = {about["request_id"]: about["truth"] for about in watched.listing()["inputs"]}
    truth: str | None = found[f"{watched.name}.{row}"]
    return truth


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_the_page_shows_inputs_and_labels_them_by_one_key(watched: Watched, page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text("3 kept, 3 of them not labelled")
    pictures = page.locator("article img")
    for index in range(3):
        expect(pictures.nth(index)).to_have_js_property("naturalWidth", SHAPE[1])
    expect(page.locator("article.chosen .id")).to_have_text(f"{watched.name}.2")  # the newest
    page.keyboard.press("t")  # and on to the next
    expect(page.locator("article.chosen .id")).to_have_text(f"{watched.name}.1")
    page.keyboard.press("c")
    page.keyboard.press("c")
    page.keyboard.press("z")
    page.keyboard.press("z")
    expect(page.locator("article.chosen .id")).to_have_text(f"{watched.name}.1")  # marked before the last
    page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    wait_for(lambda: known(watched, 0) == "clean")
    assert known(watched, 2) == "trojaned"
    assert known(watched, 1) is None  # it was taken back
    expect(page.locator("article")).to_have_count(1, timeout=15_000)  # it looks again every five seconds
    watched.send(IMAGES[:1], "later")
    expect(page.locator("article .id").last).to_have_text("later.0", timeout=15_000)


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_the_page_removes_an_input_once_it_is_sure(watched: Watched, page: Page) -> None:
    asked: list[str] = []

    def answer_with(accept: bool) -> Callable[[Dialog], None]:
        def answer(dialog: Dialog) -> None:
            asked.append(dialog.message)
            dialog.accept() if accept else dialog.dismiss()

        return answer

    page.once("dialog", answer_with(accept=False))
    page.locator("article .remove").first.click()
    assert asked == [f"Remove {watched.name}.2 for good? What was said of it stays in the record."]
    assert len(quarantined(watched.folder)) == 3
    page.keyboard.press("t")  # and, before it is recorded:
    page.once("dialog", answer_with(accept=True))
    page.locator("article .remove").first.click()
    expect(page.get_by_role("status")).to_have_text("2 kept, 2 of them not labelled")
    expect(page.locator("article")).to_have_count(2)
    assert {request_id_of(key) for key in quarantined(watched.folder)} == {f"{watched.name}.{row}" for row in (0, 1)}
    assert watched.monitor.metric("stripwire_feedback_total", truth="trojaned", verdict="rejected") == 1


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_a_key_that_is_held_down_marks_one_input(watched: Watched, page: Page) -> None:
    for _ in range(6):  # the first is a press, the others are repeats
        page.keyboard.down("c")
    page.keyboard.up("c")
    wait_for(lambda: known(watched, 2) == "clean")
    assert (known(watched, 1), known(watched, 0)) == (None, None)


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_what_was_not_recorded_is_said_until_it_is_read(watched: Watched, page: Page) -> None:
    (key, *_) = quarantined(watched.folder)
    assert watched.monitor.give(request_id=key, truth="clean", verdict="rejected").status_code == 201
    page.keyboard.press("t")
    expect(page.locator("#unrecorded")).to_contain_text("was not recorded", timeout=15_000)
    page.wait_for_timeout(6000)  # it looks again meanwhile
    expect(page.locator("#unrecorded")).to_contain_text("was not recorded")
    # A refusal that may pass keeps the mark.
    page.route("**/v1/feedback", lambda route: route.fulfill(status=503, json={"error": "the disk is full"}))
    page.locator("article", has_text=f"{watched.name}.0").get_by_role("button", name="trojaned").click()
    expect(page.locator("#unrecorded")).to_contain_text("is not recorded yet: the disk is full", timeout=15_000)
    page.unroute("**/v1/feedback")
    wait_for(lambda: known(watched, 0) == "trojaned")


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_a_mark_is_sent_when_the_page_is_left_and_kept_while_the_monitor_is_away(watched: Watched, page: Page) -> None:
    page.get_by_role("button", name="trojaned").first.click()
    page.goto("about:blank")
    wait_for(lambda: known(watched, 2) == "trojaned")
    page.goto(f"{watched.url}/quarantine")  # the token is remembered, for this tab
    page.get_by_label("show labelled ones").check()
    expect(page.locator("article", has_text=f"{watched.name}.2").locator(".truth")).to_have_text("trojaned")
    page.route("**/v1/**", lambda route: route.abort())
    page.locator("article", has_text=f"{watched.name}.1").click()
    page.keyboard.press("c")
    expect(page.locator("#away")).to_contain_text("cannot be reached", timeout=15_000)
    page.unroute("**/v1/**")
    wait_for(lambda: known(watched, 1) == "clean")


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for file in (ROOT / "client" / "monitor" / "page").iterdir():
        text = file.read_text()
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text  # what callers name their requests is text


@pytest.mark.parametrize("watched", ["fused"], indirect=True)
def test_the_page_runs_no_script_of_others(watched: Watched) -> None:
    for path in ("/quarantine", "/quarantine/page.js", "/quarantine/page.css"):
        answer = httpx.get(f"{watched.url}{path}")
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
