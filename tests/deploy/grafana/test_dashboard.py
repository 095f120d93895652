"""The dashboard's file: generated, complete, and laid out without holes."""

from __future__ import annotations

import re
import sys

import pytest

from tests.deploy.grafana import board


# A Grafana from before dashboardv2 does not read that.
@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2:DeprecationWarning")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk is for Python 3.11 and later")
def test_the_file_is_what_is_generated() -> None:
    from deploy.grafana import dashboard

    assert dashboard.FILE.read_text(encoding="utf-8") == dashboard.generated(), "run `make dashboard`"


def test_every_panel_says_what_it_shows_and_in_what_unit() -> None:
    for panel in board.panels():
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_ids_and_titles_are_unique() -> None:
    everything = board.load()["panels"]
    for name in ("id", "title"):
        values = [panel[name] for panel in everything]
        assert len(set(values)) == len(values)


def test_panels_fill_the_grid_without_overlap() -> None:
    cells = [
        (x, y)
        for panel in board.load()["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    height = max(y for _, y in cells) + 1
    assert sorted(cells) == [(x, y) for x in range(24) for y in range(height)]


def test_rows_are_in_the_order_in_which_one_looks() -> None:
    rows = [panel["title"] for panel in board.load()["panels"] if panel["type"] == "row"]
    assert rows == ["Verdicts", "FAR and FRR", "Entropy", "Canaries", "Feedback and quarantine", "Triton"]


def test_every_variable_is_known_and_used() -> None:
    known = {variable["name"] for variable in board.load()["templating"]["list"]}
    expressions = [target.expression for panel in board.panels() for target in board.targets(panel)]
    used = {name for expression in expressions for name in re.findall(r"\$(\w+)", expression)}
    assert used == known - {"datasource"} | {"__rate_interval"}
    for expression in expressions:
        assert expression.count("{") == expression.count('namespace=~"$namespace", pod=~"$pod"}'), expression


def test_all_of_a_label_includes_that_it_is_absent() -> None:
    variables = {variable["name"]: variable for variable in board.load()["templating"]["list"]}
    for name in ("namespace", "pod"):
        assert variables[name]["allValue"] == ".*"
        assert variables[name]["current"]["value"] == "$__all"


def test_an_override_is_of_a_series_that_there_is() -> None:
    for panel in board.panels():
        legends = {target.legend for target in board.targets(panel)}
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["options"] in legends, panel["title"]
            for of in override["properties"]:
                assert of["id"] != "custom.fillBelowTo" or of["value"] in legends, panel["title"]
