"""The Helm chart, rendered by Helm's own engine and held against the schemas of Kubernetes."""

import inspect
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.deploy

CHART = Path(__file__).parents[2] / "server/deploy/helm/trimtab"
EVERYTHING: dict[str, Any] = {
    "image": {"digest": "sha256:" + "0" * 64, "pullSecrets": [{"name": "registry"}]},
    "bundles": {"files": ["calm.safetensors"], "existingClaim": "bundles"},
    "engineFlags": ["--max-model-len=4096", "--tensor-parallel-size=2"],
    "existingSecret": "trimtab",
    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
    "cache": {"existingClaim": "cache"},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"app": "gateway"}}}]},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}
MINIMAL: dict[str, Any] = {"podDisruptionBudget": {"enabled": False}}


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a release called `calm`."""
    import helm_python
    import yaml

    files = helm_python.Chart.load(CHART).render(values, name="calm", namespace="ai")
    return [
        found for name, text in files.items() if name.endswith(".yaml") for found in yaml.safe_load_all(text) if found
    ]


def container(values: dict[str, Any]) -> dict[str, Any]:
    """The one container of the deployment."""
    (deployment,) = (found for found in rendered(values) if found["kind"] == "Deployment")
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("values", [{}, MINIMAL, EVERYTHING], ids=["default", "minimal", "everything"])
def test_each_object_fits_the_schema_of_its_kind(values: dict[str, Any]) -> None:
    import kubernetes_validate

    objects = rendered(values)
    assert {found["kind"] for found in objects} >= {"Deployment", "Service", "ServiceAccount"}
    for found in objects:
        if found["apiVersion"].startswith("monitoring.coreos.com"):
            continue  # a custom resource of Prometheus' operator, which Kubernetes has no schema of
        kubernetes_validate.validate(found, "1.33", strict=True)


def test_everything_renders_each_kind() -> None:
    assert {found["kind"] for found in rendered(EVERYTHING)} == {
        "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount",
        "ServiceMonitor",
    }  # fmt: skip


def test_helm_finds_nothing_to_warn_of() -> None:
    import helm_python

    report = helm_python.lint(CHART, {}, strict=True)
    assert not report["errors"]
    assert [m for m in report["messages"] if m["severity"] > 1] == []


def test_a_misspelt_value_is_refused() -> None:
    import helm_python

    chart = helm_python.Chart.load(CHART)
    with pytest.raises(helm_python.HelmError, match="engineflags"):
        chart.render({"engineflags": ["--max-model-len=4096"]}, name="calm", namespace="ai")


def test_engine_flags_follow_the_dashes_and_the_drain_fits_the_grace_period() -> None:
    arguments = container(EVERYTHING)["args"]
    assert arguments[:2] == ["serve", "smollm2-135m-instruct"]
    assert "--bundle=/bundles/calm.safetensors" in arguments[: arguments.index("--")]
    assert arguments[arguments.index("--") + 1 :] == [
        "--shutdown-timeout=120",
        "--max-model-len=4096",
        "--tensor-parallel-size=2",
    ]
    (deployment,) = (found for found in rendered(EVERYTHING) if found["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 130


def test_the_container_can_write_to_its_volumes_alone() -> None:
    found = container({})
    context = found["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert {mount["mountPath"] for mount in found["volumeMounts"]} == {"/cache", "/tmp", "/dev/shm"}


def test_the_flags_before_the_dashes_are_those_of_the_command() -> None:
    """A flag that `trimtab serve` does not know would keep every pod from starting."""
    from trimtab.server.commands import serve

    arguments = container(EVERYTHING | {"servedModelName": "smol"})["args"]
    flags = {argument.split("=")[0] for argument in arguments[: arguments.index("--")] if argument.startswith("--")}
    assert flags == {"--host", "--port", "--bundle", "--served-model-name"}
    assert {flag[2:].replace("-", "_") for flag in flags} <= inspect.signature(serve).parameters.keys()
