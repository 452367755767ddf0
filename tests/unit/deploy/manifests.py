"""Reading and checking Kubernetes documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "kubernetes"
VERSION = "1.31"
# Kinds that are no part of Kubernetes: the fields that are used here, by path, with their types.
OTHERS: dict[str, dict[str, type]] = {
    "PodMonitor": {"spec.selector.matchLabels": dict, "spec.podMetricsEndpoints": list},
    "ScaledObject": {
        "spec.scaleTargetRef.name": str,
        "spec.minReplicaCount": int,
        "spec.maxReplicaCount": int,
        "spec.triggers": list,
    },
    "RayService": {
        "spec.serveConfigV2": str,
        "spec.rayClusterConfig.rayVersion": str,
        "spec.rayClusterConfig.headGroupSpec.rayStartParams": dict,
        "spec.rayClusterConfig.workerGroupSpecs": list,
    },
    "InferencePool": {
        "spec.selector.matchLabels": dict,
        "spec.targetPorts": list,
        "spec.endpointPickerRef.name": str,
        "spec.endpointPickerRef.port.number": int,
    },
    "EndpointPickerConfig": {"plugins": list, "schedulingProfiles": list, "dataLayer.sources": list},
}


def documents(text: str) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(text) if document is not None]


def at(document: Any, path: str) -> Any:
    """The value at a dotted path."""
    for name in path.split("."):
        document = document[name]
    return document


def pod_specs(document: Any) -> Iterator[dict[str, Any]]:
    """Every pod that a document describes."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pod_specs(value)
    elif isinstance(document, list):
        for value in document:
            yield from pod_specs(value)


def unsafe(pod: dict[str, Any]) -> list[str]:
    """What a pod may do that none of ours needs."""
    found = []
    if not pod["securityContext"].get("runAsNonRoot") or not pod["securityContext"].get("runAsUser"):
        found.append("runs as root")
    if pod.get("automountServiceAccountToken") is not False:
        found.append("has a token of the cluster")
    writable = {"/tmp", "/dev/shm", "/var/cache/slos-serve"}
    for container in pod["containers"]:
        context = container["securityContext"]
        if context.get("readOnlyRootFilesystem") is not True:
            found.append("can write its root")
        if context.get("allowPrivilegeEscalation") is not False or context["capabilities"]["drop"] != ["ALL"]:
            found.append("can gain privileges")
        mounts = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        if mounts != writable:
            found.append(f"writes to {sorted(mounts)}")
        found += [
            f"secret in {entry['name']}"
            for entry in container.get("env", ())
            if "KEY" in entry["name"] and "value" in entry
        ]
    return found
