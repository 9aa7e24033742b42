"""The components of cluster/k8s, which overlays add to it: GPU types, proxies, Redis for the head's state, monitors.

Gateway API and Prometheus' operator have no schema here: what their API documents require is looked for by hand.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from pia_ray.config.catalog import load
from pia_ray.config.serve import load_serve
from pia_ray.weights.checkpoint import Part
from pia_ray.weights.copies import Source, references
from tests.cluster.manifests import (
    COMPONENTS,
    K8S,
    KUBERNETES,
    Mapping,
    build,
    documents,
    faults,
    name_of,
    needs_kustomize,
    resources,
)

GPU_TYPES = ("gpu-l4-gke", "gpu-l4-karpenter", "gpu-a10g-karpenter")
OURS = {name: found for folder in sorted(COMPONENTS.iterdir()) for name, found in resources(folder)}
NATIVE = [name for name in OURS if name.startswith(("StatefulSet/", "Service/", "Ingress/"))]

LEFT_OF_SMALLEST = {
    # Cores and GiB: of the machine, kept by the cloud's formula (GKE: 25 % of 4 GiB, 20 % of 4, 10 % of 8, and 100 MiB;
    # EKS: 255 MiB, 11 MiB for each of 58 pods, and 100 MiB), and taken by daemon sets. 3 % are the kernel's.
    "g2-standard-4": (4 - 0.08 - 0.4, 16 * 0.97 - 2.7 - 0.6),
    "g5.xlarge": (4 - 0.08 - 0.4, 16 * 0.97 - 1.0 - 0.6),
}


def overlay(folder: Path, *components: str) -> list[Mapping]:
    """What kustomize makes of cluster/k8s with these components."""
    shutil.copytree(K8S, folder / "k8s")
    values = {"resources": ["k8s"], "components": [f"k8s/components/{name}" for name in components]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(values))
    return build(folder)


def gpu_groups(built: list[Mapping]) -> dict[str, Mapping]:
    """Pod specs of the GPU worker groups by name."""
    found = {name_of(each): each["spec"] for each in built if each["kind"] in ("RayJob", "RayService")}
    groups = [
        *found["RayJob/pia-ray-catalog"]["rayClusterSpec"]["workerGroupSpecs"],
        *found["RayService/pia-ray"]["rayClusterConfig"]["workerGroupSpecs"],
    ]
    return {group["groupName"]: group["template"]["spec"] for group in groups}


@pytest.mark.parametrize("name", NATIVE)
def test_a_kubernetes_object_of_a_component_has_only_what_kubernetes_knows(name: str):
    kubernetes_validate.validate(OURS[name], KUBERNETES, strict=True)


@needs_kustomize
@pytest.mark.parametrize("gpu", GPU_TYPES)
def test_one_component_puts_all_gpu_workers_on_one_type_and_spot_workers_on_spot(tmp_path: Path, gpu: str):
    built = overlay(tmp_path, gpu)
    assert not [each for each in built if each["kind"] == "GpuNodes"]  # Kubernetes does not know it
    (nodes,) = documents(COMPONENTS / gpu / "nodes.yaml")
    selectors = {name: pod["nodeSelector"] for name, pod in gpu_groups(built).items()}
    assert selectors == {"gpu-spot": nodes["spot"], "gpu-on-demand": nodes["onDemand"], "gpu": nodes["onDemand"]}
    shared = nodes["spot"].items() & nodes["onDemand"].items()
    assert len(shared) == 1  # the GPU; the other label tells spot from on-demand
    assert {key for key, _ in nodes["spot"].items() - shared} == {key for key, _ in nodes["onDemand"].items() - shared}


@needs_kustomize
def test_gpu_workers_fit_the_smallest_nodes_with_an_l4_and_an_a10g(tmp_path: Path):
    for pod in gpu_groups(overlay(tmp_path)).values():
        (container,) = pod["containers"]
        asked = container["resources"]["requests"]
        for cores, gib in LEFT_OF_SMALLEST.values():
            assert float(asked["cpu"]) <= cores
            assert float(asked["memory"].removesuffix("Gi")) <= gib


@needs_kustomize
def test_all_components_at_once_make_objects_that_kubernetes_and_kuberay_know(tmp_path: Path):
    built = overlay(tmp_path, "gpu-l4-gke", "ingress-nginx", "gateway", "redis", "monitoring")
    names = [name_of(each) for each in built]
    assert len(names) == len(set(names))
    assert {each["metadata"].get("namespace") for each in built if each["kind"] != "Namespace"} == {"pia-ray"}
    (service,) = [each for each in built if each["kind"] == "RayService"]
    options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    (redis,) = [each for each in built if name_of(each) == "Service/pia-ray-redis"]
    assert options["redisAddress"] == f"{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}"
    for each in built:
        if each["apiVersion"] == "ray.io/v1":
            assert faults(each) == []


def test_redis_keeps_each_change_on_its_disk_and_asks_for_the_password_that_ray_sends():
    (component,) = documents(COMPONENTS / "redis" / "kustomization.yaml")
    (patch,) = yaml.safe_load(component["patches"][0]["patch"])
    (container,) = OURS["StatefulSet/pia-ray-redis"]["spec"]["template"]["spec"]["containers"]
    (variable,) = container["env"]
    assert patch["value"]["redisPassword"]["valueFrom"] == variable["valueFrom"]
    assert f'--requirepass "${variable["name"]}"' in container["command"][-1]
    assert "--appendonly yes" in container["command"][-1]
    (mount,) = container["volumeMounts"]
    assert f"--dir {mount['mountPath']}" in container["command"][-1]


def test_routes_and_ingress_lead_to_the_service_that_kuberay_makes():
    service, port = "pia-ray-serve-svc", 8000
    backend = OURS["Ingress/pia-ray"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert (backend["name"], backend["port"]["number"]) == (service, port)
    (rule,) = OURS["HTTPRoute/pia-ray"]["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": service, "port": port}]
    (ray,) = documents(K8S / "rayservice.yaml")
    assert ray["metadata"]["name"] == "pia-ray"
    assert yaml.safe_load(ray["spec"]["serveConfigV2"])["http_options"]["port"] == port


def test_gateway_and_routes_have_what_the_gateway_api_requires():
    gateway, *routes = (OURS[name] for name in ("Gateway/pia-ray", "HTTPRoute/pia-ray", "HTTPRoute/pia-ray-redirect"))
    assert {each["apiVersion"] for each in (gateway, *routes)} == {"gateway.networking.k8s.io/v1"}
    assert set(gateway["spec"]) == {"gatewayClassName", "listeners"}
    listeners = {each["name"]: each for each in gateway["spec"]["listeners"]}
    for listener in listeners.values():
        assert {"name", "protocol", "port", "hostname"} == set(listener) - {"tls"}
    assert listeners["https"]["tls"]["certificateRefs"] == [{"kind": "Secret", "name": "pia-ray-tls"}]
    for route, section in zip(routes, ("https", "http"), strict=True):
        assert set(route["spec"]) == {"parentRefs", "hostnames", "rules"}
        assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"], "sectionName": section}]
        assert route["spec"]["hostnames"] == [listeners[section]["hostname"]]
        for rule in route["spec"]["rules"]:
            assert set(rule) <= {"matches", "filters", "timeouts", "backendRefs"}
            for duration in rule.get("timeouts", {}).values():
                assert re.fullmatch(r"([0-9]{1,5}(h|m|s|ms)){1,4}", duration)  # GEP-2257
    (redirect,) = routes[1]["spec"]["rules"][0]["filters"]
    assert redirect == {"type": "RequestRedirect", "requestRedirect": {"scheme": "https", "statusCode": 301}}


def test_monitors_scrape_ports_that_pods_have_with_the_token_that_the_endpoint_asks_for():
    (ray,) = documents(K8S / "rayservice.yaml")
    groups = [ray["spec"]["rayClusterConfig"]["headGroupSpec"], *ray["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    ports = [{each["name"] for each in container["ports"]} for container in containers]
    (nodes,) = OURS["PodMonitor/pia-ray-nodes"]["spec"]["podMetricsEndpoints"]
    assert all(nodes["port"] in each for each in ports)
    monitor = OURS["ServiceMonitor/pia-ray-endpoint"]["spec"]
    (endpoint,) = monitor["endpoints"]
    assert all(endpoint["port"] in each for each in ports)
    assert monitor["selector"]["matchLabels"] == {"ray.io/serve": f"{ray['metadata']['name']}-serve"}
    credentials = endpoint["authorization"]["credentials"]
    (token,) = [each for each in containers[0]["env"] if each["name"] == "PIA_RAY_METRICS_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"] == credentials
    for name in ("ServiceMonitor/pia-ray-endpoint", "PodMonitor/pia-ray-nodes", "PrometheusRule/pia-ray"):
        assert OURS[name]["apiVersion"] == "monitoring.coreos.com/v1"
        assert OURS[name]["metadata"]["labels"] == {"release": "prometheus"}


@needs_kustomize
def test_the_dashboard_is_a_config_map_that_grafana_s_sidecar_takes(tmp_path: Path):
    built = overlay(tmp_path, "monitoring")
    (found,) = [each for each in built if name_of(each) == "ConfigMap/pia-ray-dashboard"]
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(found["data"]["dashboard.json"])["uid"] == "pia-ray"


def test_runs_and_endpoint_read_the_copy_that_models_pull_leaves_in_the_bucket():
    catalog = load(K8S / "catalog.yaml", {}).model
    (ray,) = documents(K8S / "rayservice.yaml")
    (application,) = yaml.safe_load(ray["spec"]["serveConfigV2"])["applications"]
    assert load_serve(None, application["args"]).models == {catalog.name: catalog}
    parts = [Part(role, "any") for role in ("base", "motion_adapter", "vae")]
    copied = references([Source(part, Path("any")) for part in parts], "s3://my-videos/models/realistic-vision")
    assert copied.items() <= catalog.model_dump().items()
