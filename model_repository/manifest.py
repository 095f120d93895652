"""The manifest of a model repository: what it must consist of, and where that came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.errors import RepositoryError

MANIFEST_NAME = "manifest.json"
FORMAT = 4

MODELS = ("guarded", "strip_perturb", "badnet", "strip_entropy", "repaired", "strip_verdict")
"""Every model of the ensemble. A version consists of one version of each; it may share some with others."""

FUSED = "fused"
"""One model more has a version in the fused layout: the ensemble's graphs in one, which serves instead of them."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(repository: Path, versions: dict[str, Any], active: str) -> None:
    """Write `manifest.json` over all files that lie in `repository` now.

    Args:
        repository: the model repository, complete but for its manifest.
        versions: by version number, what each version is: `identity`, which no other version of any repository has;
            `models`, the version number of each model that it consists of; `previous`, the version that was active when
            it was written, None for the first; `contract`; `fused`, where it has that model, what it is; and where it
            came from.
        active: the version that the configs in `repository` have Triton serve.
    """
    files = {name: sha256_of(repository / name) for name in sorted(_files(repository))}
    manifest = {"format": FORMAT, "active": active, "versions": versions, "files": files}
    text = json.dumps(manifest, indent=2, sort_keys=False) + "\n"
    (repository / MANIFEST_NAME).write_text(text, encoding="utf-8")


def read_manifest(repository: Path) -> dict[str, Any]:
    """Return the manifest of `repository`, unverified.

    Raises:
        RepositoryError: there is no manifest, or none that this version of Stripwire understands.
    """
    path = repository / MANIFEST_NAME
    if not repository.is_dir():
        raise RepositoryError(
            f"{repository}: no such folder, expected a model repository written by `stripwire export`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RepositoryError(
            f"{repository}: has no {MANIFEST_NAME}, expected a model repository written by `stripwire export`"
        ) from None
    except (OSError, ValueError) as error:
        raise RepositoryError(f"{path}: cannot be read ({error}); export the repository again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise RepositoryError(f"{path}: got manifest format {got!r}, expected {FORMAT}; export the repository again")
    files, versions = manifest.get("files"), manifest.get("versions")
    if not (isinstance(files, dict) and isinstance(versions, dict) and versions):
        raise RepositoryError(f"{path}: lists no files or versions; export the repository again")
    for number, version in versions.items():
        if not (number.isascii() and number.isdigit() and _is_version(version, versions)):
            raise RepositoryError(f"{path}: version {number!r} is malformed; export the repository again")
        parts = [f"{model}/{number}/" for model, number in version["models"].items()]
        incomplete = [part for part in parts if not any(name.startswith(part) for name in files)]
        if incomplete:
            raise RepositoryError(
                f"{path}: version {number} lacks {', '.join(incomplete)}; export the repository again"
            )
    active = manifest.get("active")
    if not (isinstance(active, str) and active in versions):
        raise RepositoryError(f"{path}: active version {active!r} is none of its own; export the repository again")
    return manifest


def verify_repository(repository: Path) -> dict[str, Any]:
    """Check every file of `repository` against its manifest, and return the manifest.

    Raises:
        RepositoryError: a file is missing, was altered, or is not listed. Such a repository must not be served.
    """
    manifest = read_manifest(repository)
    listed: dict[str, str] = manifest["files"]
    present = set(_files(repository))
    problems = [f"{name} is missing" for name in sorted(listed.keys() - present)]
    problems += [f"{name} is not listed" for name in sorted(present - listed.keys())]
    problems += [
        f"{name} was altered" for name in sorted(listed.keys() & present) if _digest(repository / name) != listed[name]
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise RepositoryError(
            f"{repository}: does not match its {MANIFEST_NAME}: {shown}. It is not served; restore it or "
            "export it again"
        )
    return manifest


def next_version(versions: Mapping[str, Any]) -> str:
    """Return the number of the version to come: no number is given twice, whatever is active."""
    return str(max(map(int, versions), default=0) + 1)


def _is_version(version: Any, versions: dict[str, Any]) -> bool:
    """Say whether a version's entry has what the rest of Stripwire reads from it."""
    if not (isinstance(version, dict) and isinstance(version.get("models"), dict) and "contract" in version):
        return False
    if not isinstance(version.get("identity"), str):
        return False
    models = version["models"]
    known = version.get("previous", "") in (None, *versions)
    fused = {FUSED} if isinstance(version.get(FUSED), dict) else set()
    return known and models.keys() == {*MODELS, *fused} and all(type(number) is int for number in models.values())


def _digest(path: Path) -> str | None:
    """Return the SHA-256 of a file; None for a link or a folder, which no manifest lists."""
    return sha256_of(path) if path.is_file() and not path.is_symlink() else None


def _files(repository: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(repository):
        # A linked folder hides files; an empty one can be a version, such as an ensemble's.
        odd = [
            sub for sub in subfolders if (Path(folder) / sub).is_symlink() or not any((Path(folder) / sub).iterdir())
        ]
        for name in (*files, *odd):
            relative = (Path(folder) / name).relative_to(repository).as_posix()
            if relative != MANIFEST_NAME:
                names.append(relative)
    return names
