"""Schemas that documents must fit: of what Kubernetes knows, and of custom resources; unknown keys are faults."""

from __future__ import annotations

import functools
import importlib.resources
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from referencing import Registry, Resource

from tests.deploy.kubernetes.manifests import Document, named

CUSTOM = json.loads((Path(__file__).parent / "crds.json").read_text())
VERSIONS = ("1.30", kubernetes_validate.latest_version())
"""The oldest Kubernetes that has all we ask of it by default, and the newest that there is a schema of."""


def fault(document: Document, version: str = VERSIONS[-1]) -> str | None:
    """Return what is wrong with a document, to the last key; None where nothing is."""
    return _fault(json.dumps(document), version)


@functools.cache
def _fault(text: str, version: str) -> str | None:
    document = json.loads(text)
    name = CUSTOM["kinds"].get(f"{document['apiVersion']} {document['kind']}")
    try:
        if name is not None:
            _custom_validator(name).validate(document)
        else:
            kubernetes_validate.validate(document, version, strict=True)
    except jsonschema.ValidationError as error:
        return f"{named(document)}: {error.json_path}: {error.message}"
    return None


@functools.cache
def _custom_validator(name: str) -> Any:
    """Return what checks a custom resource; what it embeds of Kubernetes is as strict."""
    schemas = importlib.resources.files(kubernetes_validate) / "kubernetes-json-schema"
    strict = schemas / f"v{kubernetes_validate.latest_version()}-local-strict" / "_definitions.json"
    registry = Resource.from_contents(json.loads(strict.read_text())) @ Registry()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{name}",
        "$defs": CUSTOM["$defs"],
    }
    return jsonschema.Draft202012Validator(schema, registry=registry)
