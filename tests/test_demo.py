"""The demo, small: it ends with a table, pictures, numbers, and a repository that can be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from model_repository.manifest import verify_repository
from tests.test_stripwire import run


def rows_of_the_readme() -> list[str]:
    lines = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    first = lines.index("| | clean accuracy | attack success | recovered accuracy | FAR | FRR |") + 2
    return [line.split("|")[1].strip().replace("\\*", "*") for line in lines[first : first + 5]]


def test_the_demo_ends_with_a_table_pictures_and_a_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("STRIPWIRE_CACHE_DIR", str(tmp_path / "cache"))
    output = tmp_path / "demo"
    for _ in range(2):  # the second run finds the BadNet in the cache, and replaces the output
        assert run(monkeypatch, "demo", "--identities", "15", "--output", output) == 0
        said = capsys.readouterr().out
        # The table of the README has the same rows, and nothing is explained that is not there.
        rows = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│ ") and "%" in line]
        assert rows == rows_of_the_readme()
        assert "* on the inputs that the guard accepts" in [line.strip() for line in said.splitlines()]
        assert "not measured" not in said
        assert "stripwire serve" in said
    assert len(list((tmp_path / "cache").iterdir())) == 1
    verify_repository(output / "repository")
    for name in ("faces.png", "detection.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 300
    assert len(list((output / "images").glob("*.png"))) == 8
    results = json.loads((output / "results.json").read_text())
    assert results["ours"]["guarded"]["false_rejection"]["count"] == 150
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
