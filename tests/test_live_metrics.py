"""What the real server counts, read off its metrics port as Prometheus reads it."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from client.api import GuardedClient
from deploy.embedded.server import EmbeddedTriton
from samples.hdf5 import read_hdf5

Series = tuple[str, frozenset[tuple[str, str]]]


def scraped(server: EmbeddedTriton) -> dict[Series, float]:
    """Return every series of ours, by name and labels."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    # This parser, unlike Prometheus, lets the name of every counter end in _total.
    return {
        (re.sub(r"_(bucket|sum|count)_total$", r"_\1", sample.name), frozenset(sample.labels.items())): sample.value
        for sample in samples
        if sample.name.startswith("stripwire_")
    }


def series(name: str, **labels: str) -> Series:
    return f"stripwire_{name}", frozenset(labels.items())


def test_every_verdict_is_counted_once_and_canaries_by_themselves(
    server: EmbeddedTriton, repository: Path, badnet: Path
) -> None:
    files = ("clean_test_data.h5", "sunglasses_poisoned_data.h5")
    images = np.concatenate([read_hdf5(badnet / name).images for name in files])
    calibration = json.loads((repository / "strip_verdict" / "1" / "calibration.json").read_text())
    with GuardedClient(server.grpc_address) as client:
        verdicts = client.classify(images)
        time.sleep(1)  # what came before is handed over
        before = scraped(server)
        parts = np.array_split(images, 13)
        with ThreadPoolExecutor(8) as callers:
            list(callers.map(client.classify, parts))
            list(callers.map(lambda part: client.classify(part, canary=True), parts[:2]))
    rejected, canaries = int(verdicts.trojaned.sum()), len(parts[0]) + len(parts[1])
    assert 0 < rejected < len(images)
    live = {"traffic": "live"}
    expected = {
        series("inputs_total", **live, verdict="rejected", mode="block"): rejected,
        series("inputs_total", **live, verdict="accepted", mode="block"): len(images) - rejected,
        series("perturbations_total", **live): 10 * len(images),
        series("entropy_bits_count", **live): len(images),
        series("entropy_bits_bucket", **live, le="+Inf"): len(images),
        series("entropy_bits_count", traffic="canary"): canaries,
    }
    for bound in calibration["histogram"]["bounds_bits"]:
        if np.abs(verdicts.entropy_bits - bound).min() > 1e-5:
            at_or_under = np.count_nonzero(verdicts.entropy_bits <= bound)
            expected[series("entropy_bits_bucket", **live, le=f"{bound:.6g}")] = at_or_under
    deadline = time.monotonic() + 10
    while True:
        after = scraped(server)
        found = {each: after[each] - before[each] for each in expected}
        if found == expected or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert found == expected
    # Every bucket has a share of clean images to be compared with.
    shares = {labels for name, labels in after if name == "stripwire_calibration_entropy_share"}
    buckets = {labels - {("traffic", "live")} for name, labels in after if name == "stripwire_entropy_bits_bucket"}
    assert {labels for labels in buckets if ("traffic", "canary") not in labels} == shares | {
        frozenset([("le", "+Inf")])
    }
    total = after[series("entropy_bits_sum", **live)] - before[series("entropy_bits_sum", **live)]
    np.testing.assert_allclose(total, verdicts.entropy_bits.sum(dtype=float), rtol=1e-5)


def test_the_thresholds_and_where_they_are_from_can_be_read(server: EmbeddedTriton, repository: Path) -> None:
    found = scraped(server)
    calibration = json.loads((repository / "strip_verdict" / "1" / "calibration.json").read_text())
    assert found[series("threshold_bits")] == calibration["threshold_bits"]
    assert abs(found[series("calibration_timestamp_seconds")] - time.time()) < 3600
    manifest = json.loads((repository / "manifest.json").read_text())
    sha256 = manifest["files"]["strip_verdict/1/calibration.json"]
    assert found[series("calibration_info", repository_version="1", sha256=sha256)] == 1
