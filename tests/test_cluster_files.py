"""The files of cluster/ say what their readers accept, and each check is shown a broken copy that it must refuse."""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import SHARED_DATA
from weaksam import pipeline
from weaksam.config import parse_settings, read_value
from weaksam.metrics import SERIES
from weaksam.submit import ClusterSettings, cluster_faults

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
RAY_FILES = ["aws.yaml", "gcp.yaml"]
SUBMIT_FILES = ["local.yaml", "gpu.yaml"]
MANIFESTS = {"raycluster.yaml": "rayclusters", "rayjob.yaml": "rayjobs"}


def load(name: str) -> Any:
    """A file of cluster/; a key given twice is a fault, as it is to a strict server."""
    return read_value((CLUSTER / name).read_text())


def changed(content: Any, path: str, value: Any) -> Any:
    """A deep copy with `value` at the dotted `path`, in which numbers are indices."""
    content = copy.deepcopy(content)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target = content
    for part in parents:
        target = target[part]
    target[last] = value
    return content


def strings(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for value in content.values():
            yield from strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from strings(value)
    elif isinstance(content, str):
        yield content


def ray_package() -> Path:
    spec = importlib.util.find_spec("ray")  # not imported: only its files are read
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


# The files of `weaksam submit`


def submit_faults(content: dict[str, Any]) -> list[str]:
    """What is wrong with a file of `--cluster`, also with its overrides of configs/coco17.yaml."""
    settings, faults = parse_settings(ClusterSettings, content, where="cluster")
    faults += cluster_faults(settings, "cluster") if isinstance(settings, ClusterSettings) else []
    given = ["steps.images.root=s3://bucket/coco", "steps.proposals.sam.checkpoint=s3://bucket/sam.pth"]
    try:
        pipeline.parse(str(ROOT / "configs" / "coco17.yaml"), [*given, *content["overrides"]])
    except Exception as error:  # whatever it is, it is a fault of the file
        faults.append(str(error))
    return faults


@pytest.mark.parametrize("name", SUBMIT_FILES)
def test_a_file_for_submit_keeps_the_contract(name: str) -> None:
    assert not submit_faults(load(name))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("adress", "http://127.0.0.1:8265"),
        ("address", "127.0.0.1:8265"),
        ("env", {"OMP_NUM_THREADS": 1}),
        ("entrypoint.gpus", 1),
        ("env", {"AWS_SECRET_ACCESS_KEY": "x"}),
        ("overrides", ["steps.proposals.nms=0.5"]),
        ("overrides", ["steps.proposals.resources.no_such_key=1"]),
    ],
)
def test_a_broken_file_for_submit_is_refused(path: str, value: Any) -> None:
    assert submit_faults(changed(load("gpu.yaml"), path, value))


def test_the_driver_stays_on_the_head_of_a_cluster_with_spot_nodes() -> None:
    entrypoint = load("gpu.yaml")["entrypoint"]  # Ray places a driver that asks for anything on any node
    assert (entrypoint["cpus"], entrypoint["memory"], entrypoint["resources"]) == (0, None, {})


# The files of `ray up`


def launcher_faults(content: dict[str, Any]) -> list[str]:
    schema = json.loads((ray_package() / "autoscaler" / "ray-schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(content)]


@pytest.mark.parametrize("name", RAY_FILES)
def test_a_launcher_file_is_what_ray_up_accepts(name: str) -> None:
    assert not launcher_faults(load(name))


@pytest.mark.parametrize("name", RAY_FILES)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("max_worker", 3),
        ("max_workers", "3"),
        ("docker.shm_size", "8g"),
        ("available_node_types.gpu.spot", True),
        ("available_node_types.gpu.resources", {"GPU": 0.5}),
        ("head_start_ray_commands", "ray start"),
    ],
)
def test_a_broken_launcher_file_is_refused(name: str, path: str, value: Any) -> None:
    assert launcher_faults(changed(load(name), path, value))


def is_spot(node_config: dict[str, Any]) -> bool:
    return (
        node_config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or node_config.get("scheduling", {}).get("provisioningModel") == "SPOT"
    )


@pytest.mark.parametrize("name", RAY_FILES)
def test_the_head_is_on_demand_and_works_at_nothing_while_workers_are_spot(name: str) -> None:
    content = load(name)
    kinds = content["available_node_types"]
    head, gpu, cpu = kinds["head"], kinds["gpu"], kinds["cpu"]
    assert content["head_node_type"] == "head"
    assert not is_spot(head["node_config"])
    assert head["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in content["head_start_ray_commands"][-1]
    assert all(is_spot(kind["node_config"]) for kind in (gpu, cpu))
    assert gpu["resources"]["GPU"] == 1
    assert gpu["min_workers"] == 0 < gpu["max_workers"]
    assert "GPU" not in cpu["resources"]
    assert gpu["max_workers"] + cpu["max_workers"] <= content["max_workers"]


@pytest.mark.parametrize("name", RAY_FILES)
def test_every_node_has_its_environment_its_shared_memory_and_the_token(name: str) -> None:
    content = load(name)
    docker = content["docker"]
    for setting in (
        "RAY_AUTH_MODE=token",
        "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S=30",
        "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    ):
        assert f"-e {setting}" in docker["run_options"]
    kinds = content["available_node_types"]
    per_kind = [docker["head_run_options"], *(kinds[kind]["docker"]["worker_run_options"] for kind in ("gpu", "cpu"))]
    assert all(any(option.startswith("--shm-size=") for option in options) for options in per_kind)
    assert "--gpus=all" in kinds["gpu"]["docker"]["worker_run_options"]
    home = re.search(r"HOME=(\S+)", (CLUSTER / "Dockerfile").read_text())
    assert home
    assert list(content["file_mounts"]) == [f"{home.group(1)}/.ray/auth_token"]


# The manifests of KubeRay


def strict(schema: Any, *, is_root: bool = False) -> Any:
    """An openAPIV3Schema as JSON Schema that refuses what a server with strict field validation refuses.

    A structural schema says a node's fields beside its value validations (anyOf, not, ...), so only `properties`,
    `items` and `additionalProperties` are walked. An object that names no fields has none.
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
    if is_root:  # the server knows the fields of these itself
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


def cluster_of(content: dict[str, Any]) -> dict[str, Any]:
    return content["spec"].get("rayClusterSpec", content["spec"])


def pods_of(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = cluster_of(content)
    groups = {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


@pytest.mark.parametrize(("name", "plural"), MANIFESTS.items())
def test_a_manifest_is_what_a_strict_server_accepts(name: str, plural: str) -> None:
    assert not manifest_faults(plural, load(f"kuberay/{name}"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("apiVersion", "ray.io/v1alpha1"),
        ("kind", "RayCluster"),
        ("metadata.nam", "weaksam"),
        ("spec.backofLimit", 3),
        ("spec.backoffLimit", "3"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.img", "x"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resources.limits.memory", 1.5),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.volumes.0.emptyDir.size", "5Gi"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.tolerations.0.operators", "Exists"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", "8"),
    ],
)
def test_a_broken_manifest_is_refused(path: str, value: Any) -> None:
    assert manifest_faults("rayjobs", changed(load("kuberay/rayjob.yaml"), path, value))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_the_groups_their_devices_and_shared_memory(name: str) -> None:
    content = load(f"kuberay/{name}")
    cluster, pods = cluster_of(content), pods_of(content)
    assert list(pods) == ["head", "gpu", "cpu"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for kind, pod in pods.items():
        (container,) = pod["containers"]
        assert (container["resources"]["limits"].get("nvidia.com/gpu") == "1") == (kind == "gpu")
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert shm["medium"] == "Memory"
        gigabytes = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
        assert int(shm["sizeLimit"].removesuffix("Gi")) >= 0.3 * gigabytes  # what Ray takes for its object store
        assert pod["securityContext"]["runAsNonRoot"]
    assert any(toleration["key"] == "nvidia.com/gpu" for toleration in pods["gpu"]["tolerations"])


def test_both_manifests_describe_the_same_pods() -> None:
    assert pods_of(load("kuberay/raycluster.yaml")) == pods_of(load("kuberay/rayjob.yaml"))


def test_the_job_of_a_manifest_is_a_right_command_that_is_retried_on_a_new_cluster() -> None:
    spec = load("kuberay/rayjob.yaml")["spec"]
    python, dash_m, module, config, *overrides = spec["entrypoint"].split()
    assert (python, dash_m, module) == ("python", "-m", "jobs.pipeline")
    _, parsed = pipeline.parse(str(ROOT / config), overrides)
    assert parsed
    assert spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] > 0
    assert spec["ttlSecondsAfterFinished"] > 0


# The image


def docker_faults(text: str) -> list[str]:
    """Sources that are not there or not sent to the builder, what is not pinned, a user that is root."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    commands = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    faults = []
    for verb, rest in commands:
        for source in rest.split()[:-1] if verb == "COPY" else ():
            if not (ROOT / source).exists():
                faults.append(f"{source}: not in the repository")
            if ignored[0] == "*" and not any(fnmatch.fnmatch(source, line[1:]) for line in ignored if line[0] == "!"):
                faults.append(f"{source}: left out by .dockerignore")
    if [rest for verb, rest in commands if verb == "USER"][-1:] in ([], ["root"], ["0"]):
        faults.append("runs as root")
    if "--constraint constraints.txt" not in text:
        faults.append("versions are not those of constraints.txt")
    return faults


def test_the_image_is_made_of_what_is_here() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert not docker_faults(text)
    for setting in ("MALLOC_MMAP_THRESHOLD_=1073741824", "MALLOC_TRIM_THRESHOLD_=8589934592", "RAY_AUTH_MODE=token"):
        assert setting in text
    assert "ARG WEAKSAM_GIT_COMMIT" in text
    assert "WEAKSAM_GIT_COMMIT=${WEAKSAM_GIT_COMMIT}" in text


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("COPY jobs jobs", "COPY job jobs", "job: not in the repository"),
        ("COPY jobs jobs", "COPY tests tests", "tests: left out by .dockerignore"),
        ("USER weaksam", "USER root", "runs as root"),
        ("--constraint constraints.txt", "", "versions are not those of constraints.txt"),
    ],
)
def test_a_broken_image_is_refused(old: str, new: str, fault: str) -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert old in text
    assert fault in docker_faults(text.replace(old, new))


def test_the_manifests_have_the_ray_that_the_image_has() -> None:
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for name in MANIFESTS:
        assert str(cluster_of(load(f"kuberay/{name}"))["rayVersion"]) == pinned


def test_every_file_runs_the_same_image() -> None:
    images = {load(name)["docker"]["image"] for name in RAY_FILES}
    images |= {pod["containers"][0]["image"] for name in MANIFESTS for pod in pods_of(load(f"kuberay/{name}")).values()}
    assert images == {"${WEAKSAM_IMAGE}"}


# Monitoring


@cache
def metrics_of_ray() -> frozenset[str]:
    """Names that Ray's own dashboards ask for: those it exports under these very names."""
    folder = ray_package() / "dashboard" / "modules" / "metrics" / "dashboards"
    return frozenset(name for path in folder.glob("*.py") for name in re.findall(r"\bray_[a-z0-9_]+", path.read_text()))


def metrics_in(expr: str) -> set[str]:
    """The metrics of a PromQL expression: its names, less functions, labels, ranges and what is in quotes."""
    bare = re.sub(r"\"[^\"]*\"", "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without|on|ignoring) *\([^)]*\)", "", bare)
    return {name for name, call in re.findall(r"([a-zA-Z_:][\w:]*)\b *(\()?", bare) if not call} - {"and", "or"}


def dashboard_faults(content: dict[str, Any]) -> list[str]:
    faults = []
    for panel in content["panels"]:
        if panel["type"] == "row":
            continue
        exprs = [target["expr"] for target in panel["targets"]]
        if not exprs:
            faults.append(f"{panel['title']}: asks for nothing")
        for expr in exprs:
            if not (names := metrics_in(expr)) or expr.count("(") != expr.count(")"):
                faults.append(f"{panel['title']}: {expr} is no question")
            faults += [f"{panel['title']}: {name} does not exist" for name in names - set(SERIES) - metrics_of_ray()]
    ids = [panel["id"] for panel in content["panels"]]
    return faults + (["an id is used twice"] if len(set(ids)) < len(ids) else [])


def test_every_panel_asks_for_metrics_that_exist() -> None:
    content = json.loads((CLUSTER / "grafana.json").read_text())
    assert not dashboard_faults(content)
    asked = {
        name
        for panel in content["panels"]
        for target in panel.get("targets", [])
        for name in metrics_in(target["expr"])
    }
    assert asked >= set(SERIES), "a metric of ours is shown nowhere"
    assert any(name.startswith("ray_data_") for name in asked)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((CLUSTER / "grafana.json").read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize(
    "expr",
    [
        "rate(ray_weaksam_images_total[1m])",
        "rate(weaksam_images_done_total[1m])",
        "rate(ray_weaksam_encoder_seconds[1m])",
        "ray_data_no_such_thing",
        "sum(ray_weaksam_images_done_total",
        'sum by (step) ("text")',
    ],
)
def test_a_broken_panel_is_refused(expr: str) -> None:
    content = json.loads((CLUSTER / "grafana.json").read_text())
    (first, *_) = [index for index, panel in enumerate(content["panels"]) if panel["type"] != "row"]
    assert dashboard_faults(changed(content, f"panels.{first}.targets.0.expr", expr))


def prometheus_faults(content: dict[str, Any]) -> list[str]:
    schema = {
        "type": "object",
        "additionalProperties": False,
        "required": ["global", "scrape_configs"],
        "properties": {
            "global": {
                "type": "object",
                "additionalProperties": False,
                "patternProperties": {"^(scrape|evaluation)_interval$": {"type": "string", "pattern": r"^\d+s$"}},
            },
            "scrape_configs": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["job_name", "file_sd_configs"],
                    "properties": {
                        "job_name": {"type": "string"},
                        "file_sd_configs": {
                            "type": "array",
                            "minItems": 1,
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["files"],
                                "properties": {
                                    "files": {
                                        "type": "array",
                                        "minItems": 1,
                                        "items": {"pattern": r"/prom_metrics_service_discovery\.json$"},
                                    },
                                    "refresh_interval": {"type": "string", "pattern": r"^\d+[sm]$"},
                                },
                            },
                        },
                    },
                },
            },
        },
    }
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(content)]


def test_prometheus_finds_the_nodes_in_the_file_that_ray_writes() -> None:
    assert not prometheus_faults(load("prometheus.yaml"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("scrape_config", []),
        ("scrape_configs", []),
        ("scrape_configs.0.file_sd_configs.0.files", ["/tmp/ray/nodes.json"]),
        ("global.scrape_interval", 15),
    ],
)
def test_a_broken_scrape_config_is_refused(path: str, value: Any) -> None:
    assert prometheus_faults(changed(load("prometheus.yaml"), path, value))


# All of them

_SECRETS = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----|\"private_key\"|\b[0-9a-f]{32,}\b"
    r"|(SECRET_ACCESS_KEY|SESSION_TOKEN|AUTH_TOKEN|PASSWORD|ACCOUNT_KEY)\s*[=:]\s*[\"']?(?!\.\.\.|~/)[^\s\"'$<]",
    re.IGNORECASE,
)


def test_no_file_has_credentials() -> None:
    files = [path for path in CLUSTER.rglob("*") if path.is_file()]
    assert len(files) >= 10
    for path in files:
        assert not _SECRETS.search(path.read_text()), path


@pytest.mark.parametrize(
    "text",
    [
        "AWS_ACCESS_KEY_ID: AKIA" + 16 * "A",
        "AWS_SECRET_ACCESS_KEY: " + "abc/def+",
        "-e RAY_AUTH_TOKEN=" + "mine",
        "token: " + 8 * "0a1b2c3d",
        "-----BEGIN RSA " + "PRIVATE KEY-----",
    ],
)
def test_credentials_are_recognised(text: str) -> None:
    assert _SECRETS.search(text)


def test_every_name_to_be_filled_in_is_named_in_the_command_above_it() -> None:
    for name in [*RAY_FILES, *(f"kuberay/{name}" for name in MANIFESTS)]:
        text = (CLUSTER / name).read_text()
        (listed,) = re.findall(r"envsubst '([^']+)'", text)
        used = {match for value in strings(load(name)) for match in re.findall(r"\$\{(\w+)\}", value)}
        assert used == {part.removeprefix("$") for part in listed.split()}, name


def test_the_readme_names_every_file_and_only_files_that_are_there() -> None:
    text = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert path.relative_to(CLUSTER).as_posix() in text, path
    for named in re.findall(r"\b(?:cluster|configs)/[\w/.]+\.(?:yaml|json)\b", text):
        assert (ROOT / named).is_file(), named
