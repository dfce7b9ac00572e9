"""The rendered manifests: valid for several Kubernetes versions, safe, complete, and at one with the platforms."""

import ipaddress
import json
import re

import kubernetes_validate
import pytest
import yaml
from support.overlays import MANIFESTS, VERSIONS, Object, Overlay, render

from guardloop.config.cluster import amount

KFP_SECRETS = {("kubeflow", "mlpipeline-minio-artifact")}  # installed by KFP itself, with SeaweedFS
FOREIGN = {  # pods that others install: KFP 2.17 and the cluster's DNS
    ("kube-system", "k8s-app", "kube-dns"): {53},
    ("kubeflow", "app", "ml-pipeline"): {8887, 8888},
    ("kubeflow", "component", "metadata-grpc-server"): {8080},
    ("kubeflow", "app", "seaweedfs"): {8333},
}
ARGO = "workflows.argoproj.io/workflow"


# Schemas


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(overlay: Overlay, version: str) -> None:
    for found in (*overlay.objects, *overlay.examples):
        kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_hub_egress_is_valid_and_goes_to_public_addresses_only(version: str) -> None:
    (policy,) = render(MANIFESTS / "components" / "hub-egress")
    kubernetes_validate.validate(policy, version, strict=True)
    (block,) = policy["spec"]["egress"][0]["to"]

    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"} <= set(block["ipBlock"]["except"])
    assert [port["port"] for port in policy["spec"]["egress"][0]["ports"]] == [443]


def test_the_schemas_do_refuse(overlay: Overlay) -> None:
    wrong = json.loads(json.dumps(overlay.one("Deployment", "mlflow")))
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_nothing_is_defined_twice_and_everything_has_a_namespace(overlay: Overlay) -> None:
    keys = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in overlay.objects]
    cluster_wide = {"Namespace", "PriorityClass"}

    assert len(keys) == len(set(keys))
    assert all((namespace is None) == (kind in cluster_wide) for kind, namespace, _ in keys)
    assert all(o["metadata"]["labels"]["app.kubernetes.io/part-of"] == "guardloop" for o in overlay.objects)


# Pods


def test_pods_meet_the_restricted_standard_with_a_read_only_root(overlay: Overlay) -> None:
    for workload, template in overlay.pods():
        spec, name = template["spec"], workload["metadata"]["name"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), name
        assert spec["automountServiceAccountToken"] is False, name
        assert all(v.keys() & {"emptyDir", "persistentVolumeClaim", "configMap", "secret"} for v in spec["volumes"])
        assert all("sizeLimit" in v["emptyDir"] for v in spec["volumes"] if "emptyDir" in v), name
        for container in _containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and not context.get("privileged"), name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert context["readOnlyRootFilesystem"] is True, name


def test_every_container_has_requests_limits_and_probes(overlay: Overlay) -> None:
    for _, template in overlay.pods():
        for container in _containers(template):
            for resource in ("cpu", "memory"):
                request = container["resources"]["requests"][resource]
                assert amount(request) <= amount(container["resources"]["limits"][resource])
            assert {"readinessProbe", "livenessProbe"} <= container.keys()


def test_every_image_is_named_by_digest(overlay: Overlay) -> None:
    images = [container["image"] for _, template in overlay.pods() for container in _containers(template)]

    assert images
    for image in images:
        name, _, digest = image.partition("@")
        assert re.search(r":v?\d+\.\d+", name), f"{image} does not say its version"
        # MLflow's was not to be had where this was written
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest) or "/mlflow/mlflow:" in image, f"{image} is not pinned"


def test_postgres_is_asked_as_its_own_user(overlay: Overlay) -> None:
    (container,) = overlay.one("StatefulSet", "postgres")["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"] for variable in container["env"]}
    for probe in ("readinessProbe", "livenessProbe"):
        shell, option, command = container[probe]["exec"]["command"]
        assert (shell, option) == ("sh", "-c")
        assert '--username "$POSTGRES_USER"' in command and "POSTGRES_USER" in variables


def test_services_find_their_pods_and_ports(overlay: Overlay) -> None:
    for service in overlay.all("Service"):
        pods = [t for w, t in overlay.pods() if _selects(service["spec"]["selector"], t) and _same(w, service)]
        assert len(pods) == 1, service["metadata"]["name"]
        named = {port["name"] for container in _containers(pods[0]) for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named


def test_a_disruption_budget_leaves_room_to_drain(overlay: Overlay) -> None:
    for budget in overlay.all("PodDisruptionBudget"):
        selected = budget["spec"]["selector"]["matchLabels"]
        (replicas,) = [w["spec"]["replicas"] for w, t in overlay.pods() if _selects(selected, t)]
        assert 0 < budget["spec"]["minAvailable"] < replicas


def test_our_namespaces_enforce_the_restricted_standard(overlay: Overlay) -> None:
    for namespace in overlay.all("Namespace"):
        labels = namespace["metadata"]["labels"]
        assert all(
            labels[f"pod-security.kubernetes.io/{mode}"] == "restricted" for mode in ("enforce", "audit", "warn")
        )


# Secrets and references


def test_no_secret_is_applied_and_examples_hold_none(overlay: Overlay) -> None:
    values = [value for secret in overlay.examples for value in secret["stringData"].values()]

    assert not overlay.all("Secret")
    assert all("REPLACE-ME" in value or value == "mlflow" for value in values)
    for found in overlay.all("ConfigMap"):
        assert not re.search(r"(?i)(password|secretkey|token)\s*[:=]\s*(?!secretkey)\S", yaml.dump(found["data"]))
    for _, template in overlay.pods():
        for variable in (v for container in _containers(template) for v in container["env"]):
            assert "value" not in variable or not re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", variable["name"])


def test_everything_that_a_pod_refers_to_exists_or_is_an_example(overlay: Overlay) -> None:
    for workload, template in overlay.pods():
        namespace, spec = workload["metadata"]["namespace"], template["spec"]
        assert _exists(overlay, "ServiceAccount", namespace, spec["serviceAccountName"])
        assert overlay.one("PriorityClass", spec["priorityClassName"])
        for container in _containers(template):
            for source in container.get("envFrom", []):
                assert _exists(overlay, "ConfigMap", namespace, source["configMapRef"]["name"])
            references = [v["valueFrom"]["secretKeyRef"] for v in container["env"] if "valueFrom" in v]
            for reference in references:
                assert reference["key"] in _example(overlay, namespace, reference["name"])
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            claimed = {c["metadata"]["name"] for c in workload["spec"].get("volumeClaimTemplates", [])}
            assert mounted == claimed | {volume["name"] for volume in spec["volumes"]}


def test_what_the_platform_names_is_in_the_namespace_of_the_runs(overlay: Overlay) -> None:
    cluster, namespace = overlay.cluster, overlay.namespace_of_runs()
    for volume in cluster.volumes:
        assert _exists(overlay, "PersistentVolumeClaim", namespace, volume.claim)
    for name in {source.name for source in cluster.config_maps}:
        found = overlay.one("ConfigMap", name)
        used = {key for source in cluster.config_maps if source.name == name for key in source.keys}
        assert found["metadata"]["namespace"] == namespace
        assert used == found["data"].keys(), "a key that is missing keeps a pod from starting"
    for secret in cluster.secrets:
        known = (namespace, secret.name) in KFP_SECRETS or _example(overlay, namespace, secret.name)
        assert (known and (known is True or secret.keys.keys() <= known)) or secret.optional, secret.name
    for name in cluster.pull_secrets:
        assert _example(overlay, namespace, name)


def test_stages_are_told_where_mlflow_answers_and_what_name_it_answers_to(overlay: Overlay) -> None:
    mlflow, service = overlay.one("ConfigMap", "mlflow")["data"], overlay.one("Service", "mlflow")
    environment = overlay.one("ConfigMap", "guardloop-environment")["data"]
    host = f"mlflow.{service['metadata']['namespace']}:{service['spec']['ports'][0]['port']}"

    assert environment["MLFLOW_TRACKING_URI"] == f"http://{host}"
    assert host in mlflow["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert environment["AWS_ENDPOINT_URL_S3"] == mlflow["MLFLOW_S3_ENDPOINT_URL"]


def test_the_launcher_is_told_of_the_same_store_and_may_read_its_secret(overlay: Overlay) -> None:
    launcher = overlay.one("ConfigMap", "kfp-launcher")
    scheme, _, path = launcher["data"]["defaultPipelineRoot"].partition("://")
    default = yaml.safe_load(launcher["data"]["providers"])[scheme]["default"]
    secret = default["credentials"]["secretRef"]
    environment = overlay.one("ConfigMap", "guardloop-environment")["data"]
    readable = [
        rule["resourceNames"]
        for rule in overlay.one("Role", "guardloop-runner")["rules"]
        if "secrets" in rule["resources"]
    ]

    assert launcher["metadata"]["namespace"] == overlay.namespace_of_runs()
    assert environment["AWS_ENDPOINT_URL_S3"].partition("://")[2] == default["endpoint"]
    assert default["disableSSL"] == environment["AWS_ENDPOINT_URL_S3"].startswith("http://")
    assert isinstance(default["maxRetries"], int)  # KFP reads it without looking whether it is there
    assert readable == [[secret["secretName"]]]
    assert secret["secretName"] in {s.name for s in overlay.cluster.secrets}
    assert path.endswith("v2/artifacts")  # what the bucket's lifecycle rule clears


# Rights


def test_the_runs_account_can_do_little(overlay: Overlay) -> None:
    (role,) = overlay.all("Role")
    (binding,) = overlay.all("RoleBinding")
    for rule in role["rules"]:
        assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
        assert not {"list", "watch", "delete", "update", "deletecollection", "escalate", "bind"} & set(rule["verbs"])
        if {"secrets", "configmaps"} & set(rule["resources"]):
            assert rule["verbs"] == ["get"] and rule["resourceNames"]
    assert not overlay.all("ClusterRole", "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [s["name"] for s in binding["subjects"]] == [overlay.cluster.service_account]


# Network


def test_every_pod_of_ours_and_of_a_run_is_closed_by_default(overlay: Overlay) -> None:
    closed = [
        (policy["metadata"]["namespace"], policy["spec"]["podSelector"])
        for policy in overlay.all("NetworkPolicy")
        if set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and policy["spec"].keys().isdisjoint({"ingress", "egress"})
    ]

    assert ("guardloop", {}) in closed
    assert (overlay.namespace_of_runs(), {"matchExpressions": [{"key": ARGO, "operator": "Exists"}]}) in closed


def test_every_flow_leads_from_pods_that_exist_to_pods_that_exist_and_listen(overlay: Overlay) -> None:
    for policy in overlay.all("NetworkPolicy"):
        name, spec, namespace = policy["metadata"]["name"], policy["spec"], policy["metadata"]["namespace"]
        assert _ports(overlay, namespace, spec["podSelector"]) is not None, f"{name} selects nothing"
        for rule in spec.get("egress", []):
            ports = {port["port"] for port in rule["ports"]}
            for peer in rule["to"]:
                if "ipBlock" in peer:
                    continue
                listening = _ports(overlay, _namespace(peer, namespace), peer["podSelector"])
                assert listening is not None, f"{name} leads to nothing"
                assert ports <= listening, f"{name}: nothing listens on {ports - listening}"
        for rule in spec.get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= (
                _ports(overlay, namespace, spec["podSelector"]) or set()
            )
            for peer in rule["from"]:
                found = _ports(overlay, _namespace(peer, namespace), peer["podSelector"])
                assert found is not None, f"{name} lets nothing in"


def test_the_store_can_be_reached_and_the_internet_cannot(overlay: Overlay) -> None:
    stores = [p for p in overlay.all("NetworkPolicy") if p["metadata"]["name"].endswith("-to-object-store")]
    open_to_all = [
        (policy["metadata"]["name"], port["port"])
        for policy in overlay.all("NetworkPolicy")
        for rule in policy["spec"].get("egress", [])
        for peer in rule["to"]
        for port in rule["ports"]
        if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
    ]

    assert len(stores) == 2 and all(len(policy["spec"]["egress"]) == 1 for policy in stores)
    assert open_to_all == []


def test_the_kubernetes_api_is_one_address_that_must_be_set_or_a_private_node() -> None:
    def blocks(overlay: Overlay) -> list[str]:
        (rule,) = overlay.one("NetworkPolicy", "runs-to-kubernetes-api")["spec"]["egress"]
        assert len(rule["ports"]) == 1
        return [peer["ipBlock"]["cidr"] for peer in rule["to"]]

    (block,) = blocks(Overlay("cluster"))
    assert block.startswith("203.0.113.") and block.endswith("/32")  # an address of documentation: it is to be edited
    text = (MANIFESTS / "overlays/cluster/runs/kustomization.yaml").read_text()
    assert re.search(rf"cidr: {re.escape(block)}\}} # edit", text)
    assert all(ipaddress.ip_network(one).is_private for one in blocks(Overlay("minikube")))


def test_both_ends_of_a_flow_that_we_can_close_are_open(overlay: Overlay) -> None:
    """What leaves for MLflow, PostgreSQL or a store in the cluster is let in there, on the same port."""
    let_in = {
        (policy["metadata"]["namespace"], str(policy["spec"]["podSelector"]), port["port"])
        for policy in overlay.all("NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        for port in rule["ports"]
    }
    for policy in overlay.all("NetworkPolicy"):
        name, own = policy["metadata"]["name"], policy["metadata"]["namespace"]
        for rule in policy["spec"].get("egress", []):
            for peer in (p for p in rule["to"] if "podSelector" in p):
                there = _namespace(peer, own)
                closed = there == "guardloop" or (
                    peer["podSelector"]["matchLabels"] == {"app": "seaweedfs"} and there != own
                )
                target = (there, str(peer["podSelector"]), rule["ports"][0]["port"])
                assert not closed or target in let_in, f"{name} is refused at its end"


# Room


def test_a_whole_run_of_the_platform_fits_the_quota() -> None:
    overlay = Overlay("cluster")
    runs, gpus = (overlay.one("ResourceQuota", name)["spec"] for name in ("runs", "gpus"))
    wide = [
        overlay.cluster.stage(name) for name in ("screen", "generate-responses")
    ]  # these run in every shard at once

    assert max(s.gpus for s in wide) * overlay.platform.shards <= int(gpus["hard"]["requests.nvidia.com/gpu"])
    for resource in ("cpu", "memory"):
        limit = max(amount(getattr(s, f"{resource}_limit")) for s in wide) * overlay.platform.shards
        request = max(amount(getattr(s, resource)) for s in wide) * overlay.platform.shards
        assert limit <= amount(runs["hard"][f"limits.{resource}"])
        assert request <= amount(runs["hard"][f"requests.{resource}"])


def test_the_quota_of_the_runs_counts_their_pods_only() -> None:
    overlay = Overlay("cluster")
    (scope,) = overlay.one("ResourceQuota", "runs")["spec"]["scopeSelector"]["matchExpressions"]
    assert scope == {"scopeName": "PriorityClass", "operator": "In", "values": ["guardloop-runs"]}
    # without a scope, KFP's own pods, which name no limits, would be refused
    for quota in (q for q in overlay.all("ResourceQuota") if q["metadata"]["namespace"] == "kubeflow"):
        assert "scopeSelector" in quota["spec"] or quota["spec"]["hard"].keys() == {"requests.nvidia.com/gpu"}
    assert all(limits["metadata"]["namespace"] == "guardloop" for limits in overlay.all("LimitRange"))


def test_our_services_fit_their_quota(overlay: Overlay) -> None:
    hard = overlay.one("ResourceQuota", "services")["spec"]["hard"]
    for kind in ("requests", "limits"):
        for resource in ("cpu", "memory"):
            needed = sum(
                (workload["spec"]["replicas"] + 1)
                * amount(container["resources"][kind][resource])  # one more: an update
                for workload, template in overlay.pods()
                for container in _containers(template)
            )
            assert needed <= amount(hard[f"{kind}.{resource}"]), f"{kind}.{resource}: {needed}"


# Parts


def _containers(template: Object) -> list[Object]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def _selects(labels: dict[str, str], template: Object) -> bool:
    return labels.items() <= template["metadata"]["labels"].items()


def _same(one: Object, other: Object) -> bool:
    return bool(one["metadata"]["namespace"] == other["metadata"]["namespace"])


def _exists(overlay: Overlay, kind: str, namespace: str, name: str) -> bool:
    return any(o["metadata"]["name"] == name and o["metadata"]["namespace"] == namespace for o in overlay.all(kind))


def _example(overlay: Overlay, namespace: str, name: str) -> set[str]:
    """The keys of the example Secret; empty if there is none."""
    found = [s for s in overlay.examples if s["metadata"] == {"name": name, "namespace": namespace}]
    return set(found[0]["stringData"]) if found else set()


def _namespace(peer: Object, own: str) -> str:
    labels = peer.get("namespaceSelector", {}).get("matchLabels", {})
    return labels.get("kubernetes.io/metadata.name", own)


def _ports(overlay: Overlay, namespace: str, selector: Object) -> set[int] | None:
    """The ports on which the selected pods listen; None if the selector selects no pod that we know of."""
    labels = selector.get("matchLabels", {})
    for (where, key, value), ports in FOREIGN.items():
        if where == namespace and labels == {key: value}:
            return ports
    if namespace == overlay.namespace_of_runs():
        of_a_run = {**overlay.cluster.labels, ARGO: "any"}
        wanted = [e["key"] for e in selector.get("matchExpressions", []) if e["operator"] == "Exists"]
        if labels.items() <= of_a_run.items() and set(wanted) <= of_a_run.keys() and (labels or wanted):
            return set()
    found = [t for w, t in overlay.pods() if w["metadata"]["namespace"] == namespace and _selects(labels, t)]
    if not found:
        return None
    return {port["containerPort"] for t in found for c in _containers(t) for port in c["ports"]}
