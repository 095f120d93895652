"""Versions on the real server: switched while it serves, never mixed, refused to strangers, and back again."""

from __future__ import annotations

import json
import shutil
import stat
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from client.api import GuardedClient
from client.control import ModelControl, control_headers
from deploy.embedded.control_file import control_file, read_control_token
from deploy.embedded.server import EmbeddedTriton
from detector.calibration import fixed_threshold
from detector.errors import AccessDeniedError, InputError, ServerError, SetupError
from exporter.convert import repaired_graph, sentinel_graph, to_onnx
from exporter.fused import fuse
from exporter.preprocessing import Preprocessing
from exporter.repository import Recalibrated, ServedModel, activate, write_recalibration, write_repository
from model_repository.manifest import read_manifest, verify_repository, write_manifest
from stripwire.connection import controlled
from stripwire.options import Access
from tests.conftest import wait_for
from tests.networks import small_network
from tests.test_live_metrics import scraped, series

SHAPE, CLASSES = (8, 7, 3), 5
REJECTS_ALL, ACCEPTS_ALL = 10.0, 0.0  # bits; no entropy over 5 classes exceeds 2.33


def overlays(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (4, *SHAPE), dtype=np.uint8)


def recalibrated(seed: int, threshold_bits: float) -> Recalibrated:
    calibration = fixed_threshold(np.array([1.0, 2.0]), threshold_bits)
    return Recalibrated(calibration, overlays(seed), 0.5, {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository of four versions, with overlays of their own: 2 accepts what others reject, 4 is fused."""
    network = to_onnx(small_network(SHAPE, CLASSES))
    graphs = (sentinel_graph(network, Preprocessing()), repaired_graph(network, Preprocessing()))
    calibration = fixed_threshold(np.array([1.0, 2.0]), REJECTS_ALL)
    folder = tmp_path_factory.mktemp("versions") / "repository"
    write_repository(folder, ServedModel(*graphs, overlays(1), 0.5, calibration, CLASSES, {}))
    write_recalibration(folder, "1", recalibrated(2, ACCEPTS_ALL))
    write_repository(folder, ServedModel(*graphs, overlays(3), 0.5, calibration, CLASSES, {}))
    fused = fuse(*graphs, overlays(4), 0.5, calibration, np.ones((2, 4)))
    write_repository(folder, ServedModel(*graphs, overlays(4), 0.5, calibration, CLASSES, {}, fused))
    return folder


@pytest.fixture
def repository(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "repository")
    activate(tmp_path / "repository", "1")
    return tmp_path / "repository"


@contextmanager
def controlling(server: EmbeddedTriton, token: str | None = None) -> Iterator[ModelControl]:
    headers = control_headers(token or server.control_token)
    with GuardedClient(server.grpc_address, headers=headers, timeout_seconds=120) as client:
        yield ModelControl(client)


def switch_to_active(control: ModelControl, repository: Path) -> bool:
    manifest = verify_repository(repository)
    return control.switch(manifest["active"], manifest["versions"])


class Traffic:
    """Asks for a verdict again and again, from several threads, and keeps all that was answered."""

    def __init__(self, address: str, threads: int = 6) -> None:
        self.failures: list[str] = []
        self.answers: Counter[tuple[str, bool, float]] = Counter()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(address, 1 + n % 3)) for n in range(threads)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        self.wait_for(lambda: len(self.answers) > 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < give_up_at
            time.sleep(0.01)

    def count(self, version: str) -> int:
        return sum(count for (answered, _, _), count in self.answers.copy().items() if answered == version)

    def _ask(self, address: str, batch: int) -> None:
        image = triton_grpc.InferInput("image", [batch, *SHAPE], "UINT8")
        image.set_data_from_numpy(np.zeros((batch, *SHAPE), np.uint8))
        with triton_grpc.InferenceServerClient(address) as client:
            while not self._ended.is_set():
                try:
                    answer = client.infer("guarded", [image])
                except InferenceServerException as error:
                    self.failures.append(str(error))
                    continue
                version = answer.get_response().model_version
                for trojaned, entropy in zip(answer.as_numpy("trojaned"), answer.as_numpy("entropy"), strict=True):
                    self.answers[version, bool(trojaned[0]), round(float(entropy[0]), 3)] += 1


@pytest.mark.parametrize("mode", ["block", "shadow"])
def test_a_server_under_load_switches_without_a_failed_or_mixed_answer(repository: Path, mode: str) -> None:
    with EmbeddedTriton(repository, mode=mode) as server, controlling(server) as control:
        with Traffic(server.grpc_address) as traffic:
            for version in ("2", "3", "4", "2"):  # calibrated again, exported again, in the other layout, and back
                activate(repository, version)
                assert switch_to_active(control, repository)
                assert control.served()[0] == version
                before = traffic.count(version)
                traffic.wait_for(lambda version=version, before=before: traffic.count(version) > before)  # type: ignore[misc]
        assert traffic.failures == []
        # One entropy and one verdict for each version: overlays and threshold always came from the same.
        assert sorted((version, trojaned) for version, trojaned, _ in traffic.answers) == [
            ("1", True),
            ("2", False),
            ("3", True),
            ("4", True),
        ]
        assert len({entropy for _, _, entropy in traffic.answers}) == 4
        with triton_grpc.InferenceServerClient(server.grpc_address) as client:
            verdict = client.get_model_config("strip_verdict").config
        assert verdict.parameters["mode"].string_value == mode
        served = {("guarded", "2"), *((name, str(number)) for name, number in control.served()[1].items())}
        traffic.wait_for(lambda: {key for key, state in control.states().items() if state != "UNAVAILABLE"} == served)


def test_a_server_that_serves_the_version_already_is_left_alone(repository: Path) -> None:
    with EmbeddedTriton(repository) as server, controlling(server) as control:
        log = server.server_log()
        assert not switch_to_active(control, repository)
        assert server.server_log() == log


def test_a_version_that_does_not_load_leaves_the_server_with_the_one_it_had(repository: Path) -> None:
    with EmbeddedTriton(repository) as server, controlling(server) as control:
        (repository / "strip_verdict" / "2" / "calibration.json").write_text("{}")
        write_manifest(repository, read_manifest(repository)["versions"], "1")
        activate(repository, "2")
        with Traffic(server.grpc_address) as traffic:
            with pytest.raises(ServerError, match=r"goes on with version 1: .*no usable calibration"):
                switch_to_active(control, repository)
            assert control.served()[0] == "1"
            activate(repository, "3")
            assert switch_to_active(control, repository)  # which works again
        assert traffic.failures == []
        assert {version for version, _, _ in traffic.answers} <= {"1", "3"}


def test_a_server_on_another_repository_is_left_as_it_was(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    write_recalibration(other, "1", recalibrated(4, ACCEPTS_ALL))
    with EmbeddedTriton(repository) as server, controlling(server) as control, Traffic(server.grpc_address) as traffic:
        with pytest.raises(ServerError, match="goes on with version 1"):
            switch_to_active(control, other)
        before = traffic.count("1")
        traffic.wait_for(lambda: traffic.count("1") > before)
    assert traffic.failures == []


def test_a_repository_that_the_server_does_not_serve_is_refused_before_anything_is_touched(
    repository: Path, tmp_path: Path
) -> None:
    network = to_onnx(small_network(SHAPE, CLASSES))
    graphs = (sentinel_graph(network, Preprocessing()), repaired_graph(network, Preprocessing()))
    calibration = fixed_threshold(np.array([1.0, 2.0]), ACCEPTS_ALL)
    stranger = tmp_path / "stranger"
    write_repository(stranger, ServedModel(*graphs, overlays(7), 0.5, calibration, CLASSES, {}))
    with EmbeddedTriton(repository) as server, controlling(server) as control:
        log = server.server_log()
        activate(repository, "2")  # so that the server could not even go back by its files
        refused = pytest.raises(ServerError, match=r"serves another repository \(its version 1\), and was not touched")
        with refused:  # at the version number that the server has
            switch_to_active(control, stranger)
        with refused, controlled(server.grpc_address, None, 10.0, Access(), stranger):  # before any work
            pytest.fail("it was not refused")
        write_recalibration(stranger, "1", recalibrated(4, ACCEPTS_ALL))
        with refused:
            switch_to_active(control, stranger)
        assert server.server_log() == log
        assert control.served()[0] == "1"
        assert switch_to_active(control, repository)


class LosesAnAnswer(GuardedClient):
    """A client that does not get one answer about the ensemble, though what it asked for is done."""

    answers_left = 0

    def ask(self, model: str, call: Callable[..., Any]) -> Any:
        answer = super().ask(model, call)
        if model == "guarded":
            self.answers_left -= 1
            if self.answers_left == -1:
                raise ServerError("the answer was lost")
        return answer


@pytest.mark.parametrize(
    "answers", [4, 6, 7]
)  # to the exchange, to what is served then, to whether the old one is idle
def test_a_switch_whose_answer_alone_is_lost_has_succeeded(repository: Path, answers: int) -> None:
    with EmbeddedTriton(repository) as server:
        headers = control_headers(server.control_token)
        client = LosesAnAnswer(server.grpc_address, headers=headers, timeout_seconds=120)
        with client:
            client.answers_left = answers
            activate(repository, "2")
            assert switch_to_active(ModelControl(client), repository)
            assert client.answers_left < 0
            assert ModelControl(client).served()[0] == "2"


@pytest.mark.parametrize("token", [None, "a-wrong-one-of-some-length"])
def test_without_the_token_no_model_can_be_loaded(repository: Path, token: str | None) -> None:
    with EmbeddedTriton(repository) as server:
        with GuardedClient(server.grpc_address, headers=control_headers(token)) as client:
            activate(repository, "2")
            with pytest.raises(AccessDeniedError, match="the control token is missing or wrong"):
                switch_to_active(ModelControl(client), repository)
        headers = {} if token is None else {"stripwire-control": token}
        for path in ("models/guarded/load", "models/guarded/unload", "index"):
            url = f"http://{server.http_address}/v2/repository/{path}"
            with pytest.raises(urllib.error.HTTPError, match="403") as refused:
                urllib.request.urlopen(urllib.request.Request(url, b"{}", headers, method="POST"))
            refused.value.close()


def test_the_token_is_in_no_command_line_and_no_log_and_only_its_owner_can_read_it(repository: Path) -> None:
    with EmbeddedTriton(repository) as server:
        command_line = Path(f"/proc/{server.process_id}/cmdline").read_bytes()
        assert b"stripwire-control=****" in command_line
        assert server.control_token.encode() not in command_line
        assert server.control_token not in server.server_log()
        port = int(server.grpc_address.rpartition(":")[2])
        path = control_file(port)
        assert read_control_token(port) == server.control_token
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()
    assert read_control_token(port) is None


def test_a_folder_that_others_can_read_gets_no_token(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    control_file(1).parent.mkdir(mode=0o755)
    with pytest.raises(SetupError, match="open to others"):
        EmbeddedTriton(repository).start()
    with pytest.raises(SetupError, match="open to others"):
        read_control_token(1)


def test_a_token_that_triton_would_misread_is_refused(repository: Path) -> None:
    for token in ("short", "with,comma-and-more-of-it", "with blanks and more of it"):
        with pytest.raises(InputError, match="control token: expected at least 16"):
            EmbeddedTriton(repository, control_token=token)


def test_the_manifest_knows_what_each_version_consists_of(exported: Path) -> None:
    versions = verify_repository(exported)["versions"]
    assert versions["2"]["models"] == {
        "guarded": 2,
        "strip_perturb": 2,
        "badnet": 1,
        "strip_entropy": 1,
        "repaired": 1,
        "strip_verdict": 2,
    }
    assert [version["previous"] for version in versions.values()] == [None, "1", "2", "3"]
    assert json.loads((exported / "manifest.json").read_text())["active"] == "4"
    assert not (exported / "badnet" / "2").exists()


def test_counters_go_on_and_gauges_follow_through_every_switch(repository: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8)
    with (
        EmbeddedTriton(repository, quarantine=repository.parent / "quarantine") as server,
        GuardedClient(server.grpc_address) as client,
        controlling(server) as control,
    ):
        sent = rejected = 0

        def is_told(version: str, bits: float) -> bool:
            found = scraped(server)
            by_verdict = {
                verdict: sum(
                    value
                    for (name, labels), value in found.items()
                    if name == "stripwire_inputs_total" and {("traffic", "live"), ("verdict", verdict)} <= labels
                )
                for verdict in ("accepted", "rejected")
            }
            info = {
                dict(labels)["repository_version"]: value
                for (name, labels), value in found.items()
                if name == "stripwire_calibration_info"
            }
            return (
                by_verdict == {"accepted": sent - rejected, "rejected": rejected}
                and found[series("threshold_bits")] == bits
                and {number for number, value in info.items() if value} == {version}
                and found[series("quarantine_kept_total")] == rejected
            )

        # The model strip_verdict of version 3 and 4 is exported, that of 2 calibrated: each has a process of its own.
        for version in ("2", "1", "4", "3", "4", "2"):
            activate(repository, version)
            assert switch_to_active(control, repository)
            for _ in range(3):
                verdicts = client.classify(images)
                sent, rejected = sent + len(images), rejected + int(verdicts.trojaned.sum())
            bits = ACCEPTS_ALL if version == "2" else REJECTS_ALL
            wait_for(lambda version=version, bits=bits: is_told(version, bits))  # type: ignore[misc]
        assert 0 < rejected < sent
