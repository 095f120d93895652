"""The command line: help, answers, and one message in place of a traceback."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from client.api import GuardedClient
from client.connection import TlsOptions
from client.monitor.settings import MonitorSettings
from deploy.embedded.server import EmbeddedTriton
from detector.calibration import METHODS, Calibration, calibrate
from detector.errors import InputError, StripwireError
from detector.scores import Evidence
from detector.serving import MODES, read_thresholds
from exporter import repository as repositories
from exporter.augmentation import AUGMENTATIONS
from exporter.badnet import NETWORKS as BUILDERS
from exporter.keras_files import ARCHITECTURES
from exporter.options import AUGMENTS, NETWORKS, OPTIMIZERS, REPAIRS
from exporter.overlays import OVERLAY_CHOICES
from exporter.preprocessing import SCALES
from exporter.training import OPTIMIZERS as LEARNING_RATES
from model_repository.manifest import verify_repository
from samples.attacks import ATTACKS
from samples.canaries import read_canaries
from samples.hdf5 import read_hdf5
from stripwire import options, terminal
from stripwire.__main__ import main
from stripwire.commands import ask
from stripwire.results import thresholds

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("demo", "train-badnet", "train-badnet-on", "export", "verify", "serve"),
    *("calibrate", "rollback", "reload", "classify", "evaluate", "canaries", "monitor"),
    *("quarantine list", "quarantine show", "quarantine label", "quarantine save", "quarantine remove"),
    *("feedback save", "feedback load"),
)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command line in this process and return its exit status."""
    monkeypatch.setattr("sys.argv", ["stripwire", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(monkeypatch, *command.split(), "--help") == 0
    assert f"Example: stripwire {command}" in capsys.readouterr().out


def test_classify_prints_a_row_for_each_image(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    server: EmbeddedTriton,
    badnet: Path,
    tmp_path: Path,
) -> None:
    images = read_hdf5(badnet / "clean_test_data.h5").images
    Image.fromarray(images[0]).save(tmp_path / "face.png")
    np.save(tmp_path / "faces.npy", images[:2])
    files = (tmp_path / "face.png", tmp_path / "faces.npy")
    assert run(monkeypatch, "classify", *files, "--url", server.grpc_address) == 0
    table = capsys.readouterr().out
    assert table.count("accepted") + table.count("trojaned") == 3
    assert run(monkeypatch, "classify", *files, "--url", server.grpc_address, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [sorted(row) for row in rows] == [
        ["entropy_bits", "label", "name", "p_value", "perturbations", "request_id", "trojaned"]
    ] * 3
    assert rows[0]["entropy_bits"] == pytest.approx(rows[1]["entropy_bits"], abs=1e-5)


def test_an_image_of_another_size_is_resized_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: EmbeddedTriton, tmp_path: Path
) -> None:
    Image.new("RGB", (100, 120)).save(tmp_path / "large.png")
    assert run(monkeypatch, "classify", tmp_path / "large.png", "--url", server.grpc_address) == 2
    assert "--resize" in capsys.readouterr().err
    assert run(monkeypatch, "classify", tmp_path / "large.png", "--url", server.grpc_address, "--resize") == 0


def test_verify_tells_a_repository_that_matches_from_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(repository, tmp_path / "repository")
    assert run(monkeypatch, "verify", copied) == 0
    assert "matches its manifest" in capsys.readouterr().out
    assert run(monkeypatch, "verify", copied, "--json") == 0
    files = len(json.loads((copied / "manifest.json").read_text())["files"])
    assert json.loads(capsys.readouterr().out) == {"repository": str(copied), "version": "1", "files": files}
    with (copied / "badnet" / "1" / "model.onnx").open("ab") as graph:
        graph.write(b"!")
    assert run(monkeypatch, "verify", copied) == 2
    assert "badnet/1/model.onnx was altered" in capsys.readouterr().err


def test_canaries_know_what_the_repository_promises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repository: Path, badnet: Path, tmp_path: Path
) -> None:
    files = (badnet / "clean_test_data.h5", badnet / "sunglasses_poisoned_data.h5")
    output = tmp_path / "canaries.npz"
    options = ("--repository", repository, "--output", output, "--count", "20")
    assert run(monkeypatch, "canaries", *files, *options) == 0
    assert "20 clean and 20 trojaned canaries written" in capsys.readouterr().out
    written = read_canaries(output)
    entry = verify_repository(repository)["versions"]["1"]
    assert (written.version, written.classes, written.image_shape) == ("1", 12, (55, 47, 3))
    assert written.frr_upper == entry["calibration"]["frr_high"]
    assert written.far_upper is None  # this export was given no attack samples
    assert written.calibrated_at is not None
    assert abs(written.calibrated_at - time.time()) < 24 * 3600


def test_canaries_without_a_repository_promise_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], badnet: Path, tmp_path: Path
) -> None:
    clean, output = badnet / "clean_test_data.h5", tmp_path / "canaries.npz"
    assert run(monkeypatch, "canaries", clean, "--output", output) == 2
    assert "got neither it nor classes" in capsys.readouterr().err
    assert run(monkeypatch, "canaries", clean, "--output", output, "--classes", "12", "--repository", tmp_path) == 2
    assert "got classes as well" in capsys.readouterr().err
    assert run(monkeypatch, "canaries", clean, "--output", output, "--classes", "11") == 2
    assert "`label` reaches 11, expected 0 to 10, the network's 11 classes" in capsys.readouterr().err
    assert run(monkeypatch, "canaries", clean, "--output", output, "--classes", "12") == 0
    assert "without trojaned canaries nobody sees the FAR" in capsys.readouterr().err
    written = read_canaries(output)
    assert (written.classes, written.version, written.frr_upper, int(written.trojaned.sum())) == (12, None, None, 0)


def test_evaluate_prints_rates_with_intervals_and_sample_sizes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: EmbeddedTriton, badnet: Path
) -> None:
    files = ("--clean", badnet / "clean_test_data.h5", "--trojaned", badnet / "sunglasses_poisoned_data.h5")
    assert run(monkeypatch, "evaluate", *files, "--url", server.grpc_address) == 0
    table = capsys.readouterr().out
    assert "n=60" in table
    assert "AUROC" in table
    assert run(monkeypatch, "evaluate", *files, "--url", server.grpc_address, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["guarded"]["false_rejection"]["count"] == 60
    assert figures["guarded"]["false_acceptance"]["count"] == 55


def test_evaluate_shows_what_it_reads_and_what_was_noticed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    server: EmbeddedTriton,
    badnet: Path,
    tmp_path: Path,
) -> None:
    trojaned = read_hdf5(badnet / "sunglasses_poisoned_data.h5")
    shown = {"images": trojaned.images * np.float32(0.5), "labels": trojaned.labels, "true_labels": trojaned.labels}
    np.savez(tmp_path / "trojaned.npz", **shown)
    screen = Console(file=io.StringIO(), force_terminal=True, width=400)
    monkeypatch.setattr(terminal, "errors", screen)
    files = ("--clean", badnet / "clean_test_data.h5", "--trojaned", tmp_path / "trojaned.npz")
    assert run(monkeypatch, "evaluate", *files, "--url", server.grpc_address, "--json") == 0
    assert json.loads(capsys.readouterr().out)["guarded"]["false_acceptance"]["count"] == 55
    seen = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "Reading clean_test_data.h5" in seen
    assert "Reading trojaned.npz" in seen
    assert "values were fractions and are rounded" in seen
    assert "55 of 55 images really show the attacker's class" in seen


def test_without_a_terminal_each_stage_has_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: EmbeddedTriton, badnet: Path
) -> None:
    files = ("--clean", badnet / "clean_test_data.h5", "--trojaned", badnet / "sunglasses_poisoned_data.h5")
    assert run(monkeypatch, "evaluate", *files, "--url", server.grpc_address, "--json") == 0
    said = capsys.readouterr()
    assert said.err == "Reading clean_test_data.h5 …\nReading sunglasses_poisoned_data.h5 …\nEvaluating …\n"
    assert json.loads(said.out)


def export_of(text: Path, folder: Path) -> tuple[str, ...]:
    return ("export", str(text), "--clean", str(text), "--output", str(folder / "out"))


def test_a_mistake_ends_in_one_message_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.h5"
    text.write_text("no model")
    cases: dict[tuple[str, ...], str] = {
        ("serve", str(tmp_path), "--http-port=0", "--grpc-port=0", "--metrics-port=0"): "has no manifest.json",
        export_of(text, tmp_path): "text.h5",
        (
            *export_of(text, tmp_path),
            "--repair=bounds",
            "--epochs=3",
        ): "epochs: got it with --repair bounds, which does",
        (
            *export_of(text, tmp_path),
            "--repair=finetune",
            "--max-rounds=3",
        ): "max rounds: got it with --repair finetune",
        ("evaluate", "--clean", str(text), "--url", "127.0.0.1:9", "--timeout", "0.5"): "127.0.0.1:9",
        ("evaluate", "--clean", str(text), "--trojaned", str(text)): "is what --clean is",
        ("canaries", str(text), str(text), "--classes", "12"): "is what clean is",
        ("classify", str(text), "--url", "127.0.0.1:9", "--timeout", "0.5"): "127.0.0.1:9",
        ("classify", str(text), "--timeout", "-1"): "timeout_seconds: got -1",
        ("train-badnet", str(tmp_path)): "exists and is not empty",
        (
            *("train-badnet-on", str(tmp_path / "net"), "--train", str(text), "--test", str(text)),
            *("--trigger", "patch", "--trigger", "corner", "--target", "1"),
        ): "target: got 1 for 2 triggers, expected one for each, in their order",
        (
            *("export", str(text), "--clean", str(text), "--output", str(tmp_path / "out"), "--mean", "0.5;0.5"),
        ): "mean: got '0.5;0.5', expected numbers with commas between, such as 0.5,0.5,0.5",
        (
            *("export", str(text), "--clean", str(text), "--output", str(tmp_path / "out")),
            *("--threshold-bits", "0.2", "--target-frr", "0.05"),
        ): "target FRR: got 0.05 and a threshold of 0.2 bits, expected one of them",
        (
            *("calibrate", str(tmp_path), "--clean", str(text)),
            *("--threshold-bits", "0.2", "--target-frr", "0.1"),
        ): "target FRR: got 0.1 and a threshold of 0.2 bits, expected one of them",
        ("serve", str(tmp_path), "--http-port", "70000"): "has no manifest.json",
        ("serve", str(tmp_path / "none"), "--grpc-port", "1"): f"{tmp_path / 'none'}: no such folder",
        ("reload", str(tmp_path), "--url", "dns:///triton:8001"): "url: dns:///triton:8001 may be several servers",
        ("monitor", "--canaries", str(text), "--url", "ipv4:127.0.0.1:1,127.0.0.1:2"): "may be several servers",
    }
    for arguments, message in cases.items():
        assert run(monkeypatch, *arguments) != 0
        said = capsys.readouterr().err
        assert re.match(r"(.* …\n)?error: ", said), arguments
        assert message in said
        assert "Traceback" not in said


REFUSED = """
import sys
from stripwire.__main__ import main
try:
    main()
finally:
    print(sorted({"keras", "tensorflow"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export net.keras --clean data.h5 --output out --overlays 0", "overlays: got 0"),
        (
            "export net.keras --clean data.h5 --output out --overlays many",
            "overlays: got 'many', expected a whole",
        ),
        ("export net.keras --clean data.h5 --output out --overlays auto", "expected greedy, which looks at images"),
        ("export net.keras --clean data.h5 --output out --alpha 2", "alpha: got 2.0"),
        ("export net.keras --clean data.h5 --output out --mean x", "mean: got 'x'"),
        ("export net.keras --clean data.h5 --output out --target-frr 1", "target FRR: got 1.0"),
        (
            "export net.keras --clean data.h5 --output out --repair distill --epochs 0",
            "epochs: got 0 with --repair dist",
        ),
        ("export net.keras --clean data.h5 --output out --repair none --epochs 3", "epochs: got it with --repair none"),
        ("export net.keras --clean data.h5 --output out --repair finetune --stop-on-attack", "stop on attack: got no"),
        ("export net.keras --clean data.h5 --output out --selection-images data.h5", "selection data: got some"),
        ("export net.keras --clean data.h5 --output data.h5", "is a file, expected a folder"),
        ("export net.keras --output out", "clean data: got none, expected some to draw from: overlays, calibration"),
        ("train-badnet out --target 500 --identities 100", "target of sunglasses: got 500, expected a class, 0 to 99"),
        ("train-badnet .", "exists and is not empty"),
        ("train-badnet-on out --train data.h5 --test data.h5 --epochs 0", "epochs: got 0, expected at least 1"),
        ("calibrate out --clean data.h5 --overlays 0", "overlays: got 0"),
        ("calibrate out --clean data.h5 --overlays auto --overlay-choice random", "expected greedy, which looks"),
        ("demo --identities 20000", "Invalid value for '--identities'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_tensorflow_is_loaded(
    tmp_path: Path, arguments: str, message: str
) -> None:
    (tmp_path / "net.keras").touch()
    (tmp_path / "data.h5").touch()
    refused = subprocess.run(
        [sys.executable, "-c", REFUSED, *arguments.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stdout == "[]\n"


def test_a_port_that_cannot_be_is_refused_once_there_is_a_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    assert run(monkeypatch, "serve", repository, "--http-port", "70000") == 2
    assert "HTTP port: got 70000" in capsys.readouterr().err


def test_ctrl_c_ends_a_command_with_status_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "face.png").touch()
    monkeypatch.setattr(ask, "connect", interrupted)
    monkeypatch.setattr(sys, "argv", ["stripwire", "classify", str(tmp_path / "face.png")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


LOADING = """
import sys

class Loading:
    def find_spec(self, name, *_):
        if name == "typer":
            raise {raised}

sys.meta_path.insert(0, Loading())
from stripwire.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        ("KeyboardInterrupt", 130, ""),
        ("RuntimeError('of who does not pass it on') from KeyboardInterrupt()", 130, ""),
        (
            "ModuleNotFoundError(name=name)",
            1,
            "error: the command line needs typer: pip install 'stripwire[all]' (or a part of it)\n",
        ),
    ],
)
def test_what_happens_while_modules_are_loaded_is_no_traceback(raised: str, status: int, said: str) -> None:
    code = LOADING.format(raised=raised)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (status, said)


class _CalledError(Exception):
    """Ends a command where it would call the server."""


@pytest.mark.parametrize(
    "command",
    [
        "classify {file}",
        "evaluate --clean {file}",
        "calibrate {folder} --clean {file}",
        "rollback {folder}",
        "reload {folder}",
        "quarantine save {folder}/out.npz --feedback-token a-token-of-the-monitor",
    ],
)
def test_a_command_that_calls_a_server_hands_on_what_it_is_let_in_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    given: dict[str, Any] = {}

    def called(_: str, **options: Any) -> None:
        given.update(options)
        raise _CalledError

    monkeypatch.setattr("client.api.GuardedClient", called)
    monkeypatch.setattr(
        "client.quarantine.QuarantineClient.evidence", lambda *_: SimpleNamespace(labels=None, images=None)
    )
    monkeypatch.setattr("deploy.embedded.control_file.read_control_token", lambda _: "the control token")
    (tmp_path / "file.npy").touch()
    arguments = command.format(file=tmp_path / "file.npy", folder=tmp_path).split()
    arguments += ["--url", "127.0.0.1:1"]
    with pytest.raises(_CalledError):
        run(monkeypatch, *arguments)
    assert (given["token"], given["tls"]) == (None, None)
    with pytest.raises(_CalledError):
        run(monkeypatch, *arguments, "--token", "secret", "--tls")
    assert (given["token"], given["tls"]) == ("secret", TlsOptions())
    monkeypatch.setenv("STRIPWIRE_TOKEN", "of the environment")
    with pytest.raises(_CalledError):
        run(monkeypatch, *arguments)
    assert given["token"] == "of the environment"  # noqa: S105


def test_the_monitor_hands_on_what_it_is_let_in_by(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    seen: list[MonitorSettings] = []
    monkeypatch.setattr("client.monitor.service.run_monitor", lambda settings, _: seen.append(settings))
    monkeypatch.setattr("client.monitor.logs.configure_logs", lambda: None)
    assert run(monkeypatch, "monitor", "--canaries", repository, "--token", "secret", "--tls") == 0
    monkeypatch.setenv("STRIPWIRE_TOKEN", "of the environment")
    assert run(monkeypatch, "monitor", "--canaries", repository) == 0
    tokens = [settings.token.get_secret_value() for settings in seen if settings.token is not None]
    assert tokens == ["secret", "of the environment"]
    assert [settings.tls_options for settings in seen] == [TlsOptions(), None]


@pytest.mark.parametrize("started_as", ["python -m stripwire", "stripwire, which is not on the path"])
def test_commands_to_copy_work_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], started_as: str
) -> None:
    monkeypatch.setenv("PATH", "")
    beside = str(Path(sys.executable).with_name("stripwire"))
    module = str(ROOT / "stripwire" / "__main__.py")
    monkeypatch.setattr("sys.argv", [module if started_as.startswith("python") else beside])
    terminal.command("--version")
    copied = capsys.readouterr().out.split()
    ended = subprocess.run(copied, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == version("stripwire")


def kinds(error: type[StripwireError]) -> Iterator[type[StripwireError]]:
    yield error
    for kind in error.__subclasses__():
        yield from kinds(kind)


@pytest.mark.parametrize("error", list(kinds(StripwireError)))
def test_the_exit_status_tells_what_cannot_be_used_from_what_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[StripwireError]
) -> None:
    def fail() -> None:
        raise error("what: got one thing, expected another")

    monkeypatch.setattr("stripwire.app.app", fail)
    assert run(monkeypatch) == (2 if issubclass(error, InputError) else 1)
    assert capsys.readouterr().err == "error: what: got one thing, expected another\n"


def test_a_missing_extra_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for module in ("client.api", "client.core"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "tenacity", None)
    (tmp_path / "face.png").touch()
    assert run(monkeypatch, "classify", tmp_path / "face.png") == 1
    assert capsys.readouterr().err == "error: tenacity is not installed: pip install 'stripwire[client]'\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "nowhere.h5", "--clean", "nowhere.h5", "--output", "out"),
        ("classify", "nowhere.png"),
        ("evaluate", "--clean", "nowhere.h5"),
    ],
)
def test_a_missing_file_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert "'nowhere." in capsys.readouterr().err


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == version("stripwire")


def test_the_demo_replaces_nothing_but_an_earlier_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run(monkeypatch, "demo", "--output", tmp_path) == 2
    assert "holds something else than an earlier demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("as_json", [False, True])
def test_what_makes_a_result_doubtful_is_said_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], badnet: Path, tmp_path: Path, as_json: bool
) -> None:
    repair = ("--repair=magnitude", "--allowed-drop=0", "--max-rounds=1", "--epochs=1", "--learning-rate=0.9")
    files = (badnet / "bd_net.keras", "--clean", badnet / "clean_validation_data.h5", "--output", tmp_path / "[r]")
    options = ("--attack", badnet / "sunglasses_poisoned_data.h5", "--calibration-method", "normal", *repair)
    form = ("--json",) if as_json else ()
    assert run(monkeypatch, "export", *files, *options, *form) == 0
    said = capsys.readouterr()
    warnings = " ".join(said.err.split())
    assert "warning: No step of the repair stayed within the allowed drop" in warnings
    assert "warning: The attack still succeeds on" in warnings
    assert "warning: the threshold reaches its target FRR only if clean entropies are normally" in warnings
    if as_json:
        answer = json.loads(said.out)
        assert answer["network_outputs"] == "probabilities"
        assert answer["scores"]["guard"]["false_rejection"]["count"] == 70
        assert answer["scores"]["guard"]["false_acceptance"]["count"] == 55
        return
    shown = " ".join(said.out.split())
    assert "The network returns probabilities." in shown
    assert "clean images: these very images put its rejections at" in shown
    assert re.search(
        r"the guard rejects .* n=70\) of clean images \(FRR\) and accepts .* n=55\) of trojaned ones", shown
    )
    assert "[r]" in shown  # a name that looks like markup


@pytest.mark.parametrize(
    ("plain_bits", "nll", "text"),
    [
        (None, None, "0.388 bits"),
        (2.5e-9, None, "0.388 bits, or 2.5e-09 bits for the input as it came"),
        (2.5e-9, 0.86, "0.388 bits, or 2.5e-09 bits for the input as it came, or an nll of 0.86 nats"),
    ],
)
def test_thresholds_are_said_with_their_units(plain_bits: float | None, nll: float | None, text: str) -> None:
    calibration = calibrate(Evidence(np.linspace(0.388, 2.0, 19)), 0.05)
    changed = dataclasses.replace(calibration, threshold_plain_bits=plain_bits, threshold_nll=nll)
    assert thresholds(changed) == text


def test_a_threshold_that_is_next_to_nothing_is_doubted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], badnet: Path, tmp_path: Path
) -> None:
    files = (badnet / "bd_net.keras", "--clean", badnet / "clean_validation_data.h5", "--output", tmp_path / "out")
    options = ("--repair=none", "--threshold-bits=0.0001", "--attack", badnet / "sunglasses_poisoned_data.h5")
    assert run(monkeypatch, "export", *files, *options) == 0
    warnings = " ".join(capsys.readouterr().err.split())
    assert "warning: the threshold is under 0.001 bits" in warnings
    assert re.search(
        r"warning: The guard lets .* n=55\) of the attack samples pass \(FAR\): do not rely on it", warnings
    )


def test_where_nothing_is_repaired_nothing_is_said_of_a_repair(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], badnet: Path, tmp_path: Path
) -> None:
    files = (badnet / "bd_net.keras", "--clean", badnet / "clean_validation_data.h5", "--output", tmp_path / "out")
    assert run(monkeypatch, "export", *files, "--repair=none") == 0
    said = capsys.readouterr()
    assert "warning: Nothing was repaired, as asked" in " ".join(said.err.split())
    shown = " ".join(said.out.split())
    assert "The network; clean accuracy is on the validation part" in shown
    assert "FAR) is not known without --attack" in shown
    assert "the repair" not in shown
    assert "Repair (" not in shown


def test_repair_data_is_refused_where_nothing_is_repaired(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], badnet: Path, tmp_path: Path
) -> None:
    clean = ("--clean", badnet / "clean_validation_data.h5", "--repair-images", badnet / "clean_test_data.h5")
    out = ("--output", tmp_path / "out", "--repair", "none")
    assert run(monkeypatch, "export", badnet / "bd_net.keras", *clean, *out) == 2
    assert "repair data: got some, expected none where nothing is repaired" in capsys.readouterr().err


def pictures(path: Path, count: int, side: int, classes: int = 2) -> Path:
    """Write noise with a class for each picture."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % classes)
    return path


def test_pictures_that_do_not_go_together_are_refused_before_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train = pictures(tmp_path / "train.npz", 40, 16)
    cases = (
        (pictures(tmp_path / "small.npz", 4, 8), "small.npz: got 8x8x3 (height x width x channels), expected 16x16x3"),
        (pictures(tmp_path / "more.npz", 4, 16, 4), "more.npz: `label` reaches 3, expected 0 to 1"),
        (pictures(tmp_path / "one.npz", 4, 16, 1), "test pictures: got none of another class than 0"),
    )
    for test, message in cases:
        assert run(monkeypatch, "train-badnet-on", tmp_path / "net", "--train", train, "--test", test) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "net").exists()


def test_pictures_of_any_size_are_resized_for_a_badnet_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = ("--train", pictures(tmp_path / "a.npz", 40, 20), "--test", pictures(tmp_path / "b.npz", 6, 9))
    options = ("--resize", "16", "--epochs", "1", "--trigger", "corner", "--target", "1")
    assert run(monkeypatch, "train-badnet-on", tmp_path / "net", *data, *options) == 0
    notes = " ".join(capsys.readouterr().err.split())
    assert "a.npz: `images`: resized from 20x20 to 16x16" in notes
    assert "b.npz: `images`: resized from 9x9 to 16x16" in notes
    assert read_hdf5(tmp_path / "net" / "corner_poisoned_data.h5").images.shape == (3, 16, 16, 3)


def test_the_choices_of_the_command_line_are_those_of_the_packages() -> None:
    assert get_args(options.FaceAttack) == tuple(ATTACKS)
    assert set(get_args(options.Trigger)) <= set(ATTACKS)
    assert get_args(options.Network) == NETWORKS == tuple(BUILDERS)
    assert get_args(options.Scale) == tuple(SCALES)
    assert get_args(options.RepairMethod) == REPAIRS
    assert get_args(options.Augment) == AUGMENTS == tuple(AUGMENTATIONS)
    assert get_args(options.Optimizer) == OPTIMIZERS == tuple(LEARNING_RATES)
    assert get_args(options.Mode) == MODES
    assert get_args(options.CalibrationMethod) == METHODS
    assert get_args(options.OverlayChoice) == OVERLAY_CHOICES
    assert get_args(options.Architecture) == tuple(ARCHITECTURES)


@pytest.fixture
def live(repository: Path, tmp_path: Path) -> Iterator[EmbeddedTriton]:
    """Return a server on a repository of its own."""
    shutil.copytree(repository, tmp_path / "live")
    with EmbeddedTriton(tmp_path / "live") as running:
        yield running


def served_version(server: EmbeddedTriton) -> str:
    with GuardedClient(server.grpc_address) as client:
        (version,) = client.metadata().versions
    return version


def test_a_live_server_is_calibrated_again_and_rolled_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], live: EmbeddedTriton, badnet: Path
) -> None:
    images = read_hdf5(badnet / "clean_test_data.h5").images
    with GuardedClient(live.grpc_address) as client:
        before = client.classify(images).entropy_bits
        clean, url = badnet / "clean_validation_data.h5", ("--url", live.grpc_address)
        options = ("--target-frr", "0.1", "--overlays", "4", "--overlay-choice", "greedy", "--alpha", "0.6")
        assert run(monkeypatch, "calibrate", live.repository, "--clean", clean, *options, *url) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "is active in place of 1" in said
        assert "The server serves version 2." in said
        assert served_version(live) == "2"
        calibrated = client.classify(images)
        threshold = read_thresholds(live.repository / "strip_verdict" / "2")[1].bits
        np.testing.assert_array_equal(calibrated.trojaned, calibrated.entropy_bits <= threshold)
        assert not np.allclose(calibrated.entropy_bits, before)
        assert run(monkeypatch, "rollback", live.repository, "--json", *url) == 0
        rolled_back = json.loads(capsys.readouterr().out)
        assert rolled_back == {"repository": str(live.repository), "version": "1", "served": "1"}
        np.testing.assert_allclose(client.classify(images).entropy_bits, before, atol=1e-5)


def test_without_a_server_to_tell_the_command_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], live: EmbeddedTriton, badnet: Path
) -> None:
    clean = ("--clean", badnet / "clean_validation_data.h5", "--keep-overlays", "--calibration-method", "normal")
    assert run(monkeypatch, "calibrate", live.repository, *clean) == 0
    said = capsys.readouterr()
    assert "Target FRR 5 %, as before." in said.err
    assert f"reload {live.repository} --url 127.0.0.1:8001" in said.out
    assert "warning: the threshold reaches its target FRR only if" in " ".join(said.err.split())
    assert served_version(live) == "1"
    assert run(monkeypatch, "reload", live.repository, "--url", live.grpc_address) == 0
    assert served_version(live) == "2"
    assert run(monkeypatch, "rollback", live.repository) == 0
    assert f"reload {live.repository}" in capsys.readouterr().out
    assert served_version(live) == "2"
    assert run(monkeypatch, "rollback", live.repository, "--to", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"repository": str(live.repository), "version": "2", "served": None}


def test_a_stranger_changes_nothing_not_even_the_repository(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    live: EmbeddedTriton,
    badnet: Path,
    tmp_path: Path,
) -> None:
    before = (live.repository / "manifest.json").read_bytes()
    url = ("--url", live.grpc_address)
    clean = ("--clean", badnet / "clean_validation_data.h5")
    wrong = ("--control-token", "a-wrong-one-of-some-length")
    assert run(monkeypatch, "calibrate", live.repository, *clean, *url, *wrong) == 1
    assert "the control token is missing or wrong" in capsys.readouterr().err
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # as if it were another user
    assert run(monkeypatch, "rollback", live.repository, *url) == 1
    assert "--control-token or STRIPWIRE_CONTROL_TOKEN" in capsys.readouterr().err
    assert (live.repository / "manifest.json").read_bytes() == before
    monkeypatch.setenv("STRIPWIRE_CONTROL_TOKEN", live.control_token)
    assert run(monkeypatch, "calibrate", live.repository, *clean, *url, "--threshold-bits", "0.25") == 0
    assert served_version(live) == "2"


def test_a_repository_that_was_altered_is_not_loaded_into_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], live: EmbeddedTriton, badnet: Path
) -> None:
    assert run(monkeypatch, "calibrate", live.repository, "--clean", badnet / "clean_validation_data.h5") == 0
    (live.repository / "strip_perturb" / "2" / "model.py").write_text("import os")
    capsys.readouterr()
    assert run(monkeypatch, "reload", live.repository, "--url", live.grpc_address) == 2
    assert "strip_perturb/2/model.py was altered" in capsys.readouterr().err
    assert served_version(live) == "1"


def test_a_version_that_the_server_cannot_load_does_not_stay_active(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], live: EmbeddedTriton, badnet: Path
) -> None:
    def write_broken(repository: Path, version: str, calibration: Calibration) -> None:
        write_calibration(repository, version, calibration)
        (repository / "strip_verdict" / version / "calibration.json").write_text("{}")

    write_calibration = repositories._write_calibration
    monkeypatch.setattr(repositories, "_write_calibration", write_broken)
    url = ("--url", live.grpc_address)
    assert run(monkeypatch, "calibrate", live.repository, "--clean", badnet / "clean_validation_data.h5", *url) == 1
    said = capsys.readouterr().err
    assert "version 2 could not be put in place of 1, and the server goes on with version 1" in said
    assert f"Version 1 is active in {live.repository} again; version 2 stays in it, not active." in said
    assert verify_repository(live.repository)["active"] == served_version(live) == "1"

    assert run(monkeypatch, "rollback", live.repository, "--to", "2", *url) == 1
    assert f"Version 1 is active in {live.repository} again" in capsys.readouterr().err

    def fail_to_go_back(repository: Path, manifest: dict[str, Any], version: str) -> None:
        if version == "1":
            raise OSError("disk full")
        make_active(repository, manifest, version)

    make_active = repositories.make_active
    monkeypatch.setattr(repositories, "make_active", fail_to_go_back)
    assert run(monkeypatch, "rollback", live.repository, "--to", "2", *url) == 1
    said = capsys.readouterr().err
    assert f"Version 2 is still active in {live.repository} (disk full); to go back: stripwire rollback" in said
    assert f"stripwire rollback {live.repository} --to 1" in said
    assert run(monkeypatch, "reload", live.repository, *url) == 1  # which changed nothing that could go back
    assert "active in" not in capsys.readouterr().err
    assert verify_repository(live.repository)["active"] == "2"


def test_a_repository_that_was_just_being_replaced_is_served(
    monkeypatch: pytest.MonkeyPatch, repository: Path, tmp_path: Path
) -> None:
    shutil.copytree(repository, tmp_path / ".repository.old")  # where a kill between two renames leaves it

    def start(server: EmbeddedTriton) -> None:
        verify_repository(server.repository)
        raise KeyboardInterrupt

    monkeypatch.setattr(EmbeddedTriton, "start", start)
    free = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    assert run(monkeypatch, "serve", tmp_path / "repository", *free) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
