"""Example manifests and the Helm chart: valid Kubernetes, and nothing in them that may do more than it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from slos_serve.ray_serve.ports import DEFAULT_PORTS, PortRange
from slos_serve.version import VERSION as PACKAGE_VERSION
from slos_serve.vllm_plugin.front.metrics import FrontMetrics
from slos_serve.vllm_plugin.metrics import EngineLabels
from tests.unit.deploy.manifests import EXAMPLES, OTHERS, ROOT, VERSION, at, documents, pod_specs, unsafe

kubernetes_validate = pytest.importorskip("kubernetes_validate")

CHART = ROOT / "deploy" / "helm" / "slos-serve"
FILES = sorted(EXAMPLES.rglob("*.yaml"))
EVERYTHING = {
    "model": "m",
    "servedModelName": "small",
    "vllmArgs": ["--max-model-len", "8192"],
    "profile": {"configMap": "p"},
    "apiKey": {"secret": "s"},
    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "cache": {"claim": "c"},
    "podMonitor": {"enabled": True},
    "autoscaling": {"enabled": True},
}


def check(document: dict[str, Any]) -> None:
    """Raise or fail on what Kubernetes would refuse, and on a pod that may do more than it needs."""
    fields = OTHERS.get(document["kind"])
    if fields is None:
        kubernetes_validate.validate(document, VERSION, strict=True)
    else:
        for path, kind in fields.items():
            assert isinstance(at(document, path), kind), path
    for pod in pod_specs(document):
        assert not unsafe(pod)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_example_is_valid(path: Path) -> None:
    found = documents(path.read_text(encoding="utf-8"))
    assert found
    for document in found:
        check(document)


def test_an_invalid_document_is_found() -> None:
    bad = documents((EXAMPLES / "deployment.yaml").read_text(encoding="utf-8"))[0]
    bad["spec"]["replicsa"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        check(bad)


def test_ports_of_the_ray_cluster_are_let_through() -> None:
    service = documents((EXAMPLES / "rayservice.yaml").read_text(encoding="utf-8"))[0]
    policy = documents((EXAMPLES / "networkpolicy.yaml").read_text(encoding="utf-8"))[1]
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    used = {int(value) for group in groups for name, value in group["rayStartParams"].items() if name.endswith("-port")}
    publications = PortRange.of_text(
        at(yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0], "args.publish_ports")
    )
    assert publications == PortRange.of_text(DEFAULT_PORTS)
    used |= {publications.first, publications.last}
    inside = policy["spec"]["ingress"][1]["ports"]
    for port in used:
        assert any(entry["port"] <= port <= entry.get("endPort", entry["port"]) for entry in inside), port


def test_llm_ds_picker_scores_by_metrics_that_servers_have() -> None:
    """Fields as llm-d's router 0.10 reads them; every plug-in that is named is declared."""
    picker = documents((EXAMPLES / "llm-d" / "endpoint-picker.yaml").read_text(encoding="utf-8"))[0]
    plugins = {plugin.get("name", plugin["type"]): plugin for plugin in picker["plugins"]}
    (engine,) = plugins["core-metrics-extractor"]["parameters"]["engineConfigs"]
    scraped = {metric["attributeKey"]: metric["metricSpec"] for metric in engine["customMetrics"]}
    front = FrontMetrics([], EngineLabels())
    own = {sample.name for family in front.registry.collect() for sample in family.samples}
    assert set(scraped.values()) <= own
    for plugin in plugins.values():
        if plugin["type"] == "endpoint-attribute-scorer":
            parameters = plugin["parameters"]
            assert parameters["attributeKey"] in scraped
            assert parameters["algorithm"]["type"] in ("linear_higher_is_better", "linear_lower_is_better")
            assert len(parameters["algorithm"]["normalization"]) == 1
    for profile in picker["schedulingProfiles"]:
        assert {entry["pluginRef"] for entry in profile["plugins"]} <= set(plugins)


@pytest.mark.parametrize("values", [{"model": "m"}, EVERYTHING], ids=["defaults", "everything"])
def test_the_chart_renders_to_valid_manifests(values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python")
    chart = helm.Chart.load(str(CHART))
    chart.validate_schema(values)
    rendered = [
        document for text in chart.render(values=values).values() if "kind:" in text for document in documents(text)
    ]
    kinds = {document["kind"] for document in rendered}
    assert kinds >= {"Deployment", "Service", "ConfigMap", "NetworkPolicy"}
    assert ({"PodMonitor", "ScaledObject"} <= kinds) == (values is EVERYTHING)
    for document in rendered:
        check(document)


def answers_end_first(deployment: dict[str, Any]) -> bool:
    """Whether vLLM waits for answers under way, and ends before Kubernetes ends it."""
    (spec,) = pod_specs(deployment)
    (args,) = [container["args"] for container in spec["containers"]]
    (timeout,) = [int(word.partition("=")[2]) for word in args if word.startswith("--shutdown-timeout=")]
    return bool(0 < timeout < spec["terminationGracePeriodSeconds"])


@pytest.mark.parametrize("grace_s", [60, 600])
def test_answers_under_way_may_end_before_a_pod_goes(grace_s: int) -> None:
    example = (ROOT / "examples" / "kubernetes" / "deployment.yaml").read_text(encoding="utf-8")
    assert all(answers_end_first(one) for one in documents(example) if one["kind"] == "Deployment")
    helm = pytest.importorskip("helm_python")
    rendered = helm.Chart.load(str(CHART)).render(values={"model": "m", "terminationGracePeriodSeconds": grace_s})
    (deployment,) = [one for text in rendered.values() if "kind: Deployment" in text for one in documents(text)]
    assert answers_end_first(deployment)


def test_a_chart_without_a_model_is_refused() -> None:
    helm = pytest.importorskip("helm_python")
    chart = helm.Chart.load(str(CHART))
    with pytest.raises(helm.HelmError, match="model"):
        chart.validate_schema({})
    assert not [
        message for message in helm.lint(str(CHART), values={"model": "m"})["messages"] if message["severity"] > 1
    ]


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert (chart["version"], chart["appVersion"]) == (PACKAGE_VERSION, PACKAGE_VERSION)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_copies_what_there_is_and_runs_as_nobody(name: str) -> None:
    text = (ROOT / "deploy" / "docker" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    copied = [words for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for words in line.split()[:-1]]
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line.startswith("!")}
    assert copied
    for path in copied:
        assert (ROOT / path).exists() and path.partition("/")[0] in let_in, path
    last_stage = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last_stage, re.MULTILINE)
    assert "install -d -o slos -g slos /var/cache/slos-serve" in last_stage
    assert not re.search(r"(KEY|TOKEN|PASSWORD)=", text)


def test_the_page_has_ten_commands_that_name_files_there_are() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"# (\d+)$", page, re.MULTILINE) == [str(number) for number in range(1, 11)]
    for path in set(re.findall(r"(?:examples|deploy)/[\w./-]+[\w]", page)):
        assert (ROOT / path).exists(), path
