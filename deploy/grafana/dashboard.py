"""Writes `stripwire.json`, the Grafana dashboard: `python -m deploy.grafana.dashboard`, or `make dashboard`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, statetimeline, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.variants import Dataquery as Target
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana import expressions as ask

FILE = Path(__file__).with_name("stripwire.json")

_COLUMNS = 24
_HEIGHT = 8
_SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
_BITS = "suffix: bits"

Panel = timeseries.Panel | heatmap.Panel | statetimeline.Panel


class Query(NamedTuple):
    """What a panel asks.

    Attributes:
        expression: in PromQL.
        legend: the name of a series, `{{label}}` stands for a label's value.
    """

    expression: str
    legend: str


def generated() -> str:
    """Return the dashboard as the JSON that Grafana imports."""
    return json.dumps(_dashboard().build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _dashboard() -> builders.Dashboard:
    board = (
        builders.Dashboard("Stripwire")
        .uid("stripwire")
        .description("Verdicts on live inputs, FAR and FRR, and the health of the guard.")
        .tags(["stripwire"])
        .editable()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time("now-3h", "now")
        .refresh("30s")
        .variables(_variables())
    )
    y, number = 0, 0
    for title, lines in _rows().items():
        number += 1
        board.with_row(builders.Row(title).id(number).grid_pos(dashboard.GridPos(1, _COLUMNS, 0, y)))
        y += 1
        for line in lines:
            width = _COLUMNS // len(line)
            for index, panel in enumerate(line):
                number += 1
                board.with_panel(panel.id(number).grid_pos(dashboard.GridPos(_HEIGHT, width, index * width, y)))
            y += _HEIGHT
    return board


def _rows() -> dict[str, list[list[Panel]]]:
    """Return what stands in each row: lines of panels of equal width."""
    return {
        "Verdicts": [_verdicts()],
        "FAR and FRR": [_errors("canaries", "stripwire_canary_total"), _errors("feedback", "stripwire_feedback_total")],
        "Entropy": [_entropy()],
        "Canaries": [_canaries(), _health()],
        "Feedback and quarantine": [_feedback(), _quarantine()],
        "Triton": [_triton(), _machine()],
    }


def _verdicts() -> list[Panel]:
    return [
        _stacked(
            _lines(
                "Inputs by verdict",
                "Live inputs a second. Canaries are not among them. In shadow mode a rejected input is answered as if "
                "it were accepted.",
                "suffix: inputs/s",
                Query(ask.INPUTS, "{{verdict}}, {{mode}}"),
            )
        ),
        _lines(
            "Rejection rate",
            "Share of live inputs that are rejected: FRR on clean traffic, and more under attack. Absent without "
            "traffic.",
            "percentunit",
            Query(ask.REJECTION_RATE, "rejected"),
        ),
        _lines(
            "Blends per input",
            "How many blends the sentinel was asked about for each live input: all of them in the ensemble, fewer "
            "where the fused graph exits early. More than usual means more inputs near the threshold, or under it.",
            "short",
            Query(ask.BLENDS_PER_INPUT, "blends"),
        ),
    ]


def _errors(whence: str, metric: str) -> list[Panel]:
    """Return FRR and FAR from one counter, each with its interval and what calibration promised."""
    whom = {"canaries": "canaries", "feedback": "inputs that somebody gave feedback on"}[whence]
    return [
        _interval(
            f"FRR from {whence}",
            f"Share of clean {whom} that were rejected, over $window, with its 95 % interval (Wilson's). The guard "
            "keeps what was calibrated as long as the interval reaches under the dashed line.",
            ask.frr(metric),
            Query(ask.CALIBRATED_FRR_UPPER, "calibrated, at most"),
        ),
        _interval(
            f"FAR from {whence}",
            f"Share of trojaned {whom} that were accepted, over $window, with its 95 % interval (Wilson's). The dashed "
            "line is what export measured; there is none where it had no trojaned images.",
            ask.far(metric),
            Query(ask.CALIBRATED_FAR_UPPER, "measured, at most"),
        ),
    ]


def _entropy() -> list[Panel]:
    # Thresholds lie between a millionth of a bit and a whole one.
    near_zero = common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.SYMLOG).log(10)
    near_zero.linear_threshold(0.0001)
    return [
        _heat_map(
            "Entropies",
            "How many live inputs had which entropy. The threshold is the upper end of one of the buckets; the next "
            "panel has it as a line, since Grafana draws none over a heat map.",
            _BITS,
            Query(ask.ENTROPIES, "{{le}}"),
        ),
        _dashed(
            _lines(
                "Entropy and threshold",
                "Quantiles of the entropies of live inputs. What is at or under the threshold is rejected; consensus "
                "has further grounds.",
                _BITS,
                *(Query(expression, legend) for legend, expression in ask.ENTROPY_QUANTILES.items()),
                Query(ask.THRESHOLD, "threshold"),
            ).scale_distribution(near_zero),
            "threshold",
        ),
        _dashed(
            _lines(
                "Drift of the entropy",
                "Kolmogorov-Smirnov distance over $window: the most by which the share of live inputs at or under any "
                "bucket's bound differs from that of the clean images that calibrated. Over the dashed line it is more "
                "than chance: the pictures have changed, or many are trojaned.",
                "percentunit",
                Query(ask.DRIFT, "distance"),
                Query(ask.CHANCE, "by chance, at most"),
            ),
            "by chance, at most",
        ),
    ]


def _canaries() -> list[Panel]:
    return [
        _stacked(
            _lines(
                "Canaries by truth and verdict",
                "Canaries a second that got a verdict.",
                "suffix: canaries/s",
                Query(ask.CANARIES, "{{truth}}, {{verdict}}"),
            )
        ),
        _lines(
            "Canaries without a verdict",
            "Canaries a second that failed, by why.",
            "suffix: canaries/s",
            Query(ask.CANARY_ERRORS, "{{kind}}"),
        ),
        _lines(
            "Canary latency",
            "How long a canary waits for its verdict, over the network and through the whole guard.",
            "s",
            Query(ask.CANARY_P99_SECONDS, "p99"),
            Query(ask.CANARY_MEDIAN_SECONDS, "p50"),
        ),
    ]


def _health() -> list[Panel]:
    return [
        _states(
            "Ready, live, in control",
            "What the monitor says of each pod: ready while canaries get verdicts, live while a restart is not called "
            "for, and whether the server takes its control token, without which it loads no broken model again (absent "
            "where it has none).",
            Query(ask.IS_READY, "ready {{pod}}"),
            Query(ask.IS_LIVE, "live {{pod}}"),
            Query(ask.TAKES_CONTROL_TOKEN, "control {{pod}}"),
        ),
        _lines(
            "Models loaded again",
            "How often the monitor loaded a broken model again. Its metric says why, too.",
            "short",
            Query(ask.RELOADS, "{{model}}"),
        ),
        _lines(
            "Certificates last for",
            "How long until the server's certificate, and the monitor's own, end; of several pods, the first that "
            "does. Absent without TLS. StripwireCertificateExpires fires at 14 days.",
            "d",
            Query(ask.CERTIFICATE_DAYS, "{{certificate}}"),
            floor=None,  # one that has expired lasts for less than nothing
        ),
    ]


def _feedback() -> list[Panel]:
    return [
        _lines(
            "Feedback by truth and verdict",
            "Feedback taken over $window: what FRR and FAR from feedback rest on.",
            "short",
            Query(ask.FEEDBACK, "{{truth}}, {{verdict}}"),
        ),
        _lines(
            "Refused feedback",
            "Feedback over $window that was not taken, by why.",
            "short",
            Query(ask.REFUSALS, "{{reason}}"),
        ),
        _lines(
            "Feedback in the record",
            "All that the monitor has on its disk.",
            "short",
            Query(ask.RECORD, "{{truth}}, {{verdict}}"),
        ),
    ]


def _quarantine() -> list[Panel]:
    return [
        _lines(
            "Rejections by score",
            "Live inputs a second that each score rejects: the entropy of the blends, that of the input as it came, "
            "how little the repaired network believes (nll). Several may reject the same input.",
            "suffix: inputs/s",
            Query(ask.REJECTIONS, "{{score}}"),
        ),
        _lines(
            "Inputs in the quarantine",
            "Rejected inputs that are kept, by what somebody found out. Those that are not labelled wait for a look.",
            "short",
            Query(ask.QUARANTINE, "{{truth}}"),
        ),
        _lines(
            "Kept and dropped",
            "Rejected inputs a second that were kept, and that were not, by why: too many at once (busy), larger than "
            "all that may be kept, or a disk that fails.",
            "suffix: inputs/s",
            Query(ask.KEPT, "kept"),
            Query(ask.DROPPED, "dropped: {{reason}}"),
        ),
    ]


def _triton() -> list[Panel]:
    return [
        _lines(
            "Latency",
            "Mean time of a request in Triton, by model. guarded is the whole; the others are its parts.",
            "µs",
            Query(ask.LATENCY_MICROSECONDS, "{{model}}"),
        ),
        _lines(
            "Queue time",
            "Mean time that a request waits for a model, for others to share its batch or for one that runs.",
            "µs",
            Query(ask.QUEUE_MICROSECONDS, "{{model}}"),
        ),
        _lines(
            "Batch size",
            "Mean number of inputs in one execution of a model.",
            "short",
            Query(ask.BATCH_SIZE, "{{model}}"),
        ),
    ]


def _machine() -> list[Panel]:
    return [
        _lines(
            "Failed requests",
            "Requests a second that failed, by model; what fails within the guard also fails as guarded. Triton's "
            "metric says why, too.",
            "reqps",
            Query(ask.FAILURES, "{{model}}"),
        ),
        _lines(
            "GPU utilisation",
            "Absent where Triton has no GPU.",
            "percentunit",
            Query(ask.GPU_UTILISATION, "{{pod}} {{gpu_uuid}}"),
        ).max(1),
        _dashed(
            _lines(
                "GPU memory",
                "Used, and all there is. Absent where Triton has no GPU.",
                "bytes",
                Query(ask.GPU_MEMORY_USED, "{{pod}} {{gpu_uuid}}"),
                Query(ask.GPU_MEMORY_TOTAL, "all"),
            ),
            "all",
        ),
    ]


def _lines(title: str, description: str, unit: str, *queries: Query, floor: float | None = 0) -> timeseries.Panel:
    panel = timeseries.Panel().title(title).description(description).datasource(_SOURCE).unit(unit)
    if floor is not None:
        panel.min(floor)
    legend = common_builders.VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM)
    tooltip = common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
    panel.legend(legend.display_mode(common.LegendDisplayMode.LIST)).tooltip(tooltip.sort(common.SortOrder.DESCENDING))
    return panel.fill_opacity(10).show_points(common.VisibilityMode.NEVER).targets(_targets(queries))


def _stacked(panel: timeseries.Panel) -> timeseries.Panel:
    return panel.fill_opacity(40).stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))


def _dashed(panel: timeseries.Panel, legend: str) -> timeseries.Panel:
    """Draw one series as what the others are held against."""
    return panel.override_by_name(
        legend,
        [
            dashboard.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
            dashboard.DynamicConfigValue("custom.fillOpacity", 0),
            dashboard.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "red"}),
        ],
    )


def _interval(title: str, description: str, errors: ask.ErrorRate, target: Query) -> timeseries.Panel:
    """Return a panel of a rate within the band of its interval, and the line that it is to stay under."""
    rate, lower, upper = title.partition(" ")[0], "95 %, lower", "95 %, upper"
    queries = [Query(errors.upper, upper), Query(errors.rate, rate), Query(errors.lower, lower), target]
    panel = _dashed(_lines(title, description, "percentunit", *queries), target.legend)
    blue = dashboard.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "blue"})
    unseen = dashboard.DynamicConfigValue("custom.lineWidth", 0)
    unfilled = dashboard.DynamicConfigValue("custom.fillOpacity", 0)
    filled = dashboard.DynamicConfigValue("custom.fillOpacity", 20)
    band = dashboard.DynamicConfigValue("custom.fillBelowTo", lower)
    return (
        panel.override_by_name(upper, [blue, unseen, filled, band])
        .override_by_name(rate, [blue, unfilled])
        .override_by_name(lower, [blue, unseen, unfilled])
    )


def _heat_map(title: str, description: str, unit: str, query: Query) -> heatmap.Panel:
    target = _target(query, "A").format(PromQueryFormat.HEATMAP)
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit(unit)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .cell_values(heatmap.CellValues().unit("short"))
        .with_target(target)
    )


def _states(title: str, description: str, *queries: Query) -> statetimeline.Panel:
    steps = [dashboard.Threshold(None, "red"), dashboard.Threshold(1, "green")]
    return (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(_SOURCE)
        .unit("bool_yes_no")
        .thresholds(builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
        .color_scheme(builders.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
        .targets(_targets(queries))
    )


def _targets(queries: tuple[Query, ...]) -> list[Builder[Target]]:
    return [_target(query, chr(ord("A") + index)) for index, query in enumerate(queries)]


def _target(query: Query, name: str) -> prometheus.Dataquery:
    asked = prometheus.Dataquery().ref_id(name).expr(query.expression).legend_format(query.legend)
    return asked.range().datasource(_SOURCE)


def _variables() -> list[Builder[dashboard.VariableModel]]:
    labels = [_label_variable("namespace", ask.NAMESPACES), _label_variable("pod", ask.PODS)]
    variables: list[Builder[dashboard.VariableModel]] = [_source_variable(), *labels, _window_variable()]
    for variable in variables:  # the library gives each what only intervals have
        built = variable.build()
        built.auto = built.auto_count = built.auto_min = None
    return variables


def _source_variable() -> builders.DatasourceVariable:
    return builders.DatasourceVariable("datasource").label("Data source").type("prometheus")


def _label_variable(label: str, values: str) -> builders.QueryVariable:
    """Return a variable of a label's values; all of them include its absence."""
    return (
        builders.QueryVariable(label)
        .label(label.capitalize())
        .datasource(_SOURCE)
        .query(values)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard.VariableOption(True, "All", "$__all"))
    )


def _window_variable() -> builders.CustomVariable:
    return (
        builders.CustomVariable("window")
        .label("Window")
        .description("What FAR, FRR, drift and feedback are counted over.")
        .values("5m,15m,1h,6h,1d,7d")
        .current(dashboard.VariableOption(True, "1h", "1h"))
    )


if __name__ == "__main__":
    FILE.write_text(generated(), encoding="utf-8")
    print(f"{FILE} written")
