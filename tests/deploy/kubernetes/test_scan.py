"""The Job of docs/scaling.md that scans an archive: its script, on a real server, and its manifest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import kubernetes_validate
import numpy as np
import yaml

from deploy.embedded.server import EmbeddedTriton
from tests.deploy.kubernetes.manifests import Pod, of_kind, rendered
from tests.networks import images_of, write_small_repository

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
SERVICE = "stripwire-headless.stripwire.svc"


def test_each_index_of_the_job_scans_its_shard_and_a_failure_leaves_no_verdicts(tmp_path: Path) -> None:
    found = re.search(r"- \|\n((?: {14}.*\n)+)", PAGE)
    assert found is not None
    archive, verdicts = tmp_path / "archive", tmp_path / "verdicts"
    archive.mkdir()
    verdicts.mkdir()
    for index in range(2):
        np.save(archive / f"shard-{index:04}.npy", images_of((8, 7, 3), 70, seed=index))  # more than a batch
    write_small_repository(tmp_path / "repository")
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with EmbeddedTriton(tmp_path / "repository") as server:
        script = textwrap.dedent(found[1]).replace(f"{SERVICE}:8001", server.grpc_address)
        script = script.replace("/archive", str(archive)).replace("/verdicts", str(verdicts))
        for index, status in enumerate((0, 0, 2)):
            environment = {"PATH": programs, "PYTHONPATH": str(ROOT), "JOB_COMPLETION_INDEX": str(index)}
            run = subprocess.run(["sh", "-c", script], env=environment, check=False, capture_output=True, text=True)  # noqa: S607
            assert run.returncode == status, run.stderr
    assert sorted(path.name for path in verdicts.glob("*.json")) == ["shard-0000.json", "shard-0001.json"]
    assert len(json.loads((verdicts / "shard-0001.json").read_text())) == 70


def test_the_job_is_a_caller_that_the_policies_let_through() -> None:
    (block,) = (text for text in re.findall(r"(?s)```yaml\n(.*?)```", PAGE) if "kind: Job" in text)
    job = yaml.safe_load(block)
    for version in ("1.30", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(job, version, strict=True)
    pod = Pod("scan", job["spec"]["template"]["metadata"]["labels"], job["spec"]["template"]["spec"])
    (policy,) = (one for one in of_kind(rendered("cpu"), "NetworkPolicy") if one["metadata"]["name"] == "server")
    callers = policy["spec"]["ingress"][0]["from"][0]
    assert callers["podSelector"]["matchLabels"].items() <= pod.labels.items()
    (label,) = callers["namespaceSelector"]["matchLabels"].items()
    assert f"kubectl label namespace {job['metadata']['namespace']} {'='.join(label)}" in PAGE
    name, namespace, _ = SERVICE.split(".")
    assert (name, namespace) in {
        (one["metadata"]["name"], one["metadata"]["namespace"]) for one in of_kind(rendered("cpu"), "Service")
    }
    (container,) = pod.containers
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod.spec["volumes"]}
