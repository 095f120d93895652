"""Two servers share the requests, and what is measured is told as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scaling
from tests.networks import images_of, write_small_repository

REQUESTS = [images_of((8, 7, 3), 4, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled") / "repository"
    write_small_repository(folder)
    return folder


def test_one_server_and_two_have_their_turns_and_the_end_of_one_is_survived(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[int] = []
    rounds = scaling.throughput(
        repository, REQUESTS, 2, 2, 0.5, pinned=True, report=lambda _, done, total: told.append(total - done)
    )
    assert told == [1, 0]
    assert [sorted(each) for each in rounds] == [["1", "2"]] * 2
    assert all(0 < figures["p50_ms"] <= figures["p99_ms"] for each in rounds for figures in each.values())
    end = scaling.end_of_a_server(repository, REQUESTS, 2, 0.5, "SIGKILL", retries=True)
    assert (end["failed"], end["statuses"]) == (0, [])
    assert end["requests"] > 4
    about = {"hardware": "this machine", "load_average": 0.5}
    scaling.show(about | {"throughput": {scaling.PINNED: rounds}, "ends": [end]})
    printed = capsys.readouterr().out
    assert "one core each" in printed
    assert "SIGKILL" in printed
