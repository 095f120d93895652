"""Data of the official size is exported within 3 GiB of memory, and so well within the 4 that a small machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np

from exporter.architectures import deepid
from exporter.preprocessing import Preprocessing
from exporter.training import predict_labels

IMAGES = 12_830
LIMIT_KIB = 3 * 2**20

SCRIPT = r"""
import re, sys
from pathlib import Path
import exporter
from exporter.export import Data, ExportOptions, export
from exporter.repair import RepairOptions

model, clean, output = map(Path, sys.argv[1:])
options = ExportOptions(repair=RepairOptions(epochs=1, allowed_drop=0.99))
export(model, Data(clean), output, options)
# Not `getrusage`: what it calls this process's peak begins with that of the process that started it.
print(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_an_official_size_export_stays_within_its_memory(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = deepid(1283)
    model.save(tmp_path / "net.keras")
    generator = np.random.default_rng(0)
    with h5py.File(tmp_path / "clean.h5", "w") as file:
        data = file.create_dataset("data", (IMAGES, 3, 55, 47), np.float64)
        label = file.create_dataset("label", (IMAGES,), np.float64)
        for start in range(0, IMAGES, 1000):
            # Smooth pictures of many brightnesses, so that the untrained network does not say one class of all.
            small = generator.integers(0, 256, (min(1000, IMAGES - start), 5, 5, 3)).repeat(11, 1).repeat(10, 2)
            images = small[:, :, :47].astype(np.uint8)
            images ^= generator.integers(0, 4, images.shape, dtype=np.uint8)
            data[start : start + len(images)] = images.transpose(0, 3, 1, 2)
            label[start : start + len(images)] = predict_labels(model, images, Preprocessing())
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("net.keras", "clean.h5", "out"))],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout.splitlines()[-1]) < LIMIT_KIB
