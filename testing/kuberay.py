"""Validates manifests against KubeRay's CustomResourceDefinitions, as a server with strict field validation does."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml

from testing.places import SHARED_DATA


def strict(schema: Any, *, is_root: bool = False) -> Any:
    """Returns an openAPIV3Schema as JSON Schema that is as strict as a server with strict field validation.

    A structural schema declares the fields of a node outside its value validations (anyOf, not, ...), so the function
    only walks `properties`, `items` and `additionalProperties`. An object that names no fields must have none.
    """
    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        result["items"] = strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    elif (
        schema.get("type") == "object"
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        result["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    if is_root:  # the schema leaves out these fields, which the server knows
        result["properties"] |= {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    **{name: {"type": "string"} for name in ("name", "generateName", "namespace")},
                    **{
                        name: {"type": "object", "additionalProperties": {"type": "string"}}
                        for name in ("labels", "annotations")
                    },
                },
            },
        }
        result["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return result


@cache
def manifest_schema(plural: str) -> jsonschema.Draft202012Validator:
    path = SHARED_DATA / "kuberay_crd" / f"ray.io_{plural}.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CustomResourceDefinition is not at {path}")
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"], is_root=True)
    schema["properties"]["kind"] = {"const": definition["spec"]["names"]["kind"]}
    return jsonschema.Draft202012Validator(schema)


def manifest_faults(plural: str, content: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in manifest_schema(plural).iter_errors(content)]
