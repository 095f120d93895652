"""Without a server: what STRIP costs an image by the published algorithm, by the Adversarial Robustness Toolbox, by us.

They are compared on the network and the clean faces that the server is measured with. Where the number of overlays,
batch or classes is varied, the network is an untrained DeepID: what it answers says nothing, so nothing exits early.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import keras
import numpy as np
from numpy.typing import NDArray

from benchmarks.detection.art_strip import art_entropies
from detector.calibration import ThresholdRule
from detector.scores import score_bits
from detector.strip import perturb, perturbation_entropies_bits, weighted_overlays
from exporter.architectures import deepid
from exporter.badnet import MODEL_FILE, PREPROCESSING, TEST_FILE, VALIDATION_FILE
from exporter.convert import repaired_graph, sentinel_graph, to_onnx
from exporter.entropies import OnProgress, entropy_matrix, open_graph
from exporter.fused import fuse
from exporter.keras_files import load_model
from samples.hdf5 import read_hdf5

Way = Callable[[NDArray[np.uint8]], Any]
"""Something that is done to a batch, (batch, height, width, channels), uint8."""

ALPHA = 0.5
SHAPE = (55, 47, 3)
CLASSES, OVERLAYS, BATCH = 1283, 10, 32
"""What the cost is measured at where it is not varied: the source report's network, and its number of overlays."""
VARIED = {
    "overlays": (1, 3, 10, 30, 100),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "classes": (43, 1283, 10_000),
}
IMAGES = 64
"""Of each way, so many are timed in a round."""
_SLOW_IMAGES = 2
_CALIBRATION_IMAGES = 200


def compare(badnet: Path, rounds: int, report: OnProgress) -> dict[str, list[float]]:
    """Return the milliseconds that an image costs in each round, by what is done to it.

    The network is the same for all. The published algorithm takes one image at a time and goes through the classes of
    each prediction in a loop; it and the toolbox are measured with Keras, as their users have it, and with onnxruntime,
    which is what we have.

    Args:
        badnet: folder of a trained BadNet, see `exporter.badnet`.
        rounds: how often each has its turn.
        report: told how far it is.
    """
    clean = read_hdf5(badnet / VALIDATION_FILE).images[: OVERLAYS + _CALIBRATION_IMAGES]
    bench = _Bench(load_model(badnet / MODEL_FILE), clean[:OVERLAYS], clean[OVERLAYS:])
    images = read_hdf5(badnet / TEST_FILE).images[:IMAGES]

    def by_keras(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(bench.model.predict(pixels / np.float32(255), verbose=0))

    ways: dict[str, tuple[Way, int]] = {
        "bare network": (bench.bare, IMAGES),
        "published loop, Keras": (lambda batch: published(by_keras, batch, bench.overlays), _SLOW_IMAGES),
        "published loop, onnxruntime": (lambda batch: published(bench.predict, batch, bench.overlays), _SLOW_IMAGES),
        "ART, Keras": (lambda batch: _art(by_keras, batch, bench.overlays), _SLOW_IMAGES),
        "ART, onnxruntime": (lambda batch: _art(bench.predict, batch, bench.overlays), _SLOW_IMAGES),
        "ours, ensemble": (bench.ensemble, IMAGES),
        "ours, fused, nothing shared, no early exit": (bench.unshared, IMAGES),
        "ours, fused, no early exit": (bench.whole, IMAGES),
        "ours, fused": (bench.fused, IMAGES),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(rounds + 1):
        for name, (way, count) in ways.items():
            step = min(count, BATCH)
            started = time.perf_counter()
            for start in range(0, count, step):
                way(images[start : start + step])
            if done:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - started) / count)
        report("Per image, without a server", done, rounds)
    return times


def vary(rounds: int, report: OnProgress) -> dict[str, list[dict[str, float]]]:
    """Return what an image costs, in units of the bare network, by number of overlays, batch and classes.

    Args:
        rounds: how often each has its turn.
        report: told how far it is.
    """
    found: dict[str, list[dict[str, float]]] = {}
    total, done = sum(map(len, VARIED.values())), 0
    for name, values in VARIED.items():
        found[name] = []
        for value in values:
            size = {"overlays": OVERLAYS, "batch": BATCH, "classes": CLASSES, name: value}
            keras.utils.set_random_seed(0)
            bench = _Bench(deepid(size["classes"], SHAPE), _pictures(size["overlays"], 0), _pictures(100, 2))
            images = _pictures(size["batch"], 1)
            ways = {"ensemble": bench.ensemble, "fused": bench.whole}
            ratios: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(rounds + 1):
                bare = _seconds(bench.bare, images)
                for way, call in ways.items():
                    spent = _seconds(call, images)
                    if turn:
                        ratios[way].append(spent / bare)
            found[name].append({name: value} | {way: statistics.median(each) for way, each in ratios.items()})
            done += 1
            report(f"Cost by {name}", done, total)
    return found


def published(
    predict: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    images: NDArray[np.uint8],
    overlays: NDArray[np.uint8],
) -> list[float]:
    """Return the STRIP entropy of each image, in bits, as the source report computes it: class by class.

    Args:
        predict: the network: (images, height, width, channels), 0..255, to (images, classes).
        images: (images, height, width, channels), uint8.
        overlays: (perturbations, height, width, channels), uint8.
    """
    entropies = []
    for image in images:
        blends = [ALPHA * image.astype(np.float32) + (1 - ALPHA) * overlay.astype(np.float32) for overlay in overlays]
        total = 0.0
        for row in predict(np.stack(blends)):
            for probability in row:
                if probability > 0:
                    total -= float(probability) * math.log2(probability)
        entropies.append(total / len(overlays))
    return entropies


class _Bench:
    """A network that takes pixels / 255, with all that is timed of it, calibrated for STRIP."""

    def __init__(self, model: keras.Model, overlays: NDArray[np.uint8], calibration: NDArray[np.uint8]) -> None:
        self.model, self.overlays = model, overlays
        network = to_onnx(model)
        badnet, repaired = sentinel_graph(network, PREPROCESSING), repaired_graph(network, PREPROCESSING)
        self._weighted = weighted_overlays(overlays, ALPHA)
        self._badnet, self._repaired = open_graph(badnet.SerializeToString()), open_graph(repaired.SerializeToString())
        entropies = entropy_matrix(self._badnet, calibration, overlays, ALPHA)
        of_both = badnet, repaired, overlays, ALPHA, ThresholdRule().calibrate(entropies), entropies
        self._fused = open_graph(fuse(*of_both).graph.SerializeToString())
        self._whole = open_graph(fuse(*of_both, early_exit=False).graph.SerializeToString())
        with patch("exporter.fused._MOST_SHARED_BYTES", 0):
            self._unshared = open_graph(fuse(*of_both, early_exit=False).graph.SerializeToString())

    def predict(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probabilities of images, (images, classes)."""
        (probabilities,) = self._badnet.run(None, {"perturbations": pixels[:, None].astype(np.float32)})
        return np.asarray(probabilities[:, 0])

    def bare(self, images: NDArray[np.uint8]) -> Any:
        """Run the network that is served."""
        return self._repaired.run(None, {"image": images})

    def ensemble(self, images: NDArray[np.uint8]) -> Any:
        """Do what the ensemble's models do."""
        (probabilities,) = self._badnet.run(None, {"perturbations": perturb(images, self._weighted, ALPHA)})
        return score_bits(perturbation_entropies_bits(probabilities), "strip"), self.bare(images)

    def unshared(self, images: NDArray[np.uint8]) -> Any:
        """Run the fused graph with the sentinel's beginning, and all of the rest, in every blend."""
        return self._unshared.run(None, {"image": images})

    def whole(self, images: NDArray[np.uint8]) -> Any:
        """Run the fused graph where nothing exits early."""
        return self._whole.run(None, {"image": images})

    def fused(self, images: NDArray[np.uint8]) -> Any:
        """Run the fused graph."""
        return self._fused.run(None, {"image": images})


def _art(predict: Callable[..., Any], images: NDArray[np.uint8], overlays: NDArray[np.uint8]) -> Any:
    return art_entropies(predict, images, overlays, len(overlays), 0, lambda *_: None)


def _seconds(way: Way, images: NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    for _ in range(max(1, IMAGES // len(images))):
        way(images)
    return time.perf_counter() - started


def _pictures(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
