"""The files of cluster/ say what their readers accept, and each check is shown a broken copy that it must refuse."""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from testing.kuberay import manifest_faults
from testing.places import ROOT
from weaksam import pipeline
from weaksam.cluster.settings import ClusterSettings, cluster_faults, resource_overrides
from weaksam.core.config import parse_settings
from weaksam.core.yaml_files import read_value

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
    """What is wrong with a file of `--cluster`, also with what it does to configs/coco17.yaml."""
    settings, faults = parse_settings(ClusterSettings, content, where="cluster")
    if settings is None:
        return faults
    faults += cluster_faults(settings, "cluster")
    config = str(ROOT / "configs" / "coco17.yaml")
    given = ["steps.images.root=s3://bucket/coco", "steps.proposals.sam.checkpoint=s3://bucket/sam.pth"]
    try:
        run_file = pipeline.parse(config, given)
        pipeline.with_defaults(run_file, resource_overrides(settings, run_file))
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
        ("pools", {"no_such_key": 1}),
        ("trainings.workers", 0),
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
    assert pipeline.parse(str(ROOT / config), overrides).steps
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
