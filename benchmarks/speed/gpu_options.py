"""What onnxruntime's options on a GPU do to the fused graph: how far entropies are off, how soon it answers."""

from __future__ import annotations

import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.speed.contenders import FUSED, FUSED_WHOLE
from exporter.entropies import OnProgress
from model_repository.manifest import read_manifest

SEARCHES = ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")
"""How cuDNN's algorithms are chosen; the first is onnxruntime's default."""
BATCHES = (1, 8, 32, 64)
_NEW_SIZES = range(2, 33, 2)
_REPEATS = 30


def compare_options(folder: Path, images: NDArray[np.uint8], report: OnProgress) -> list[dict[str, Any]]:
    """Return, for each graph and choice of options, how it does.

    Args:
        folder: of `export_all`.
        images: (images, height, width, channels), uint8, at least 64.
        report: told how far it is.
    """
    onnxruntime.preload_dlls()
    found: list[dict[str, Any]] = []
    graphs, choices = (FUSED_WHOLE, FUSED), [*product(("0", "1"), SEARCHES)]
    for name in graphs:
        path = folder / name / "fused" / read_manifest(folder / name)["active"] / "model.onnx"
        expected = _entropies(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), images)
        for tf32, search in choices:
            cuda = "CUDAExecutionProvider", {"use_tf32": tf32, "cudnn_conv_algo_search": search}
            session = onnxruntime.InferenceSession(path, providers=[cuda, "CPUExecutionProvider"])
            _milliseconds(session, images[:1])  # loads cuDNN
            row: dict[str, Any] = {"graph": name, "use_tf32": tf32, "search": search}
            row["new_size_ms"] = [_milliseconds(session, images[:size]) for size in _NEW_SIZES]
            row["ms"] = {}
            for batch in BATCHES:
                times = [_milliseconds(session, images[:batch]) for _ in range(_REPEATS)]
                row["ms"][str(batch)] = statistics.median(times[_REPEATS // 6 :])
            row["entropy_off_bits"] = float(np.abs(_entropies(session, images) - expected).max())
            found.append(row)
            report("Comparing options of onnxruntime", len(found), len(graphs) * len(choices))
    return found


def options_table(found: list[dict[str, Any]]) -> Table:
    """Return it as a table."""
    columns = (f"batch {batch} (ms)" for batch in BATCHES)
    table = Table("graph", "TF32", "search", *columns, "new batch size (ms)", "entropy off (bits)", title="On the GPU")
    for row in found:
        table.add_row(
            row["graph"],
            "yes" if row["use_tf32"] == "1" else "no",
            row["search"],
            *(f"{row['ms'][str(batch)]:.2f}" for batch in BATCHES),
            f"{statistics.median(row['new_size_ms']):.0f}",
            f"{row['entropy_off_bits']:.0e}",
        )
    return table


def _entropies(session: onnxruntime.InferenceSession, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(session.run(["sentinel_entropies"], {"image": images[:64]})[0])


def _milliseconds(session: onnxruntime.InferenceSession, images: NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    session.run(None, {"image": images})
    return 1e3 * (time.perf_counter() - started)
