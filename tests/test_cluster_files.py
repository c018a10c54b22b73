"""The files of cluster/: valid for the tools that read them, and consistent with one another and with the package."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import typer
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import prepare_config, validate_config

from lrag_ray.cli.app import app
from tests.conftest import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
SCHEMAS = Path(os.environ.get("LRAG_KUBERAY") or REPOSITORY.parent / "shared" / "data" / "kuberay-1.7.0")
"""Folder of KubeRay's published schemas: $LRAG_KUBERAY, else ../shared/data/kuberay-1.7.0 beside the checkout."""


def manifest(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CLUSTER / "kuberay" / name).read_text(encoding="utf-8")))


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of Kubernetes as JSON Schema: what the API server would drop as unknown is an error."""
    made = {key: value for key, value in schema.items() if key in ("type", "enum", "required", "minItems", "pattern")}
    made |= {key: schema[key] for key in ("minimum", "maximum", "anyOf") if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        # A pattern is for the text.
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
    if "properties" in schema:
        made["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if isinstance(schema.get("additionalProperties"), Mapping):
        made["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        made["items"] = strict(schema["items"])
    return made


def problems(name: str, crd: str, found: dict[str, Any] | None = None) -> list[str]:
    """What the published schema has against a manifest."""
    if not SCHEMAS.is_dir():
        pytest.skip(f"no schemas of KubeRay: {SCHEMAS} is not a folder (set LRAG_KUBERAY)")
    with gzip.open(SCHEMAS / crd) as file:
        versions = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    validator = Draft202012Validator(strict(schema))
    return [f"{'/'.join(map(str, e.path))}: {e.message}" for e in validator.iter_errors(found or manifest(name))]


def test_manifests_are_valid_for_kuberay() -> None:
    assert problems("raycluster.yaml", "ray.io_rayclusters.yaml.gz") == []
    assert problems("rayjob.yaml", "ray.io_rayjobs.yaml.gz") == []


def test_the_validator_finds_what_the_api_server_would_drop_or_refuse() -> None:
    job = manifest("rayjob.yaml")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 6
    job["spec"]["deletionStrategy"]["deletionRules"][0]["condition"] = {"jobStatus": "STOPPED"}
    job["spec"]["backoffLimit"] = "three"
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    found = "\n".join(problems("rayjob.yaml", "ray.io_rayjobs.yaml.gz", job))
    for complaint in (
        "'maxReplica' was unexpected",
        "'STOPPED' is not one of",
        "'three' is not",
        "'template' is a req",
    ):
        assert complaint in found, found


def test_every_end_of_a_ray_job_has_a_deletion_rule_but_stopped() -> None:
    spec = manifest("rayjob.yaml")["spec"]
    rules = spec["deletionStrategy"]["deletionRules"]
    ends = {
        tuple(sorted(set(rule["condition"].items()) - {("ttlSeconds", rule["condition"]["ttlSeconds"])}))
        for rule in rules
    }
    assert ends == {(("jobStatus", "SUCCEEDED"),), (("jobStatus", "FAILED"),), (("jobDeploymentStatus", "Failed"),)}
    for end in ends:
        times = {
            rule["policy"]: rule["condition"]["ttlSeconds"]
            for rule in rules
            if set(end) <= set(rule["condition"].items())
        }
        # The cluster, which costs, before the record of the job.
        assert times["DeleteCluster"] < times["DeleteSelf"]
    assert spec["submissionMode"] == "HTTPMode" and spec["backoffLimit"] > 0
    assert not spec["shutdownAfterJobFinishes"], "KubeRay refuses it beside deletionRules"
    assert "STOPPED" in (CLUSTER / "kuberay" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_pods_wait_longer_than_they_drain_and_gpus_are_of_workers(name: str) -> None:
    spec = manifest(name)["spec"]
    spec = spec.get("rayClusterSpec", spec)
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    (group,) = spec["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (worker,) = pod["containers"]
    environment = {each["name"]: each.get("value") for each in worker["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1" and "memory" in worker["resources"]["limits"]
    assert group["minReplicas"] == 0 < group["maxReplicas"]
    named = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in worker["volumeMounts"]} <= named


def test_the_autoscaler_file_is_valid_for_ray_and_its_types_declare_memory() -> None:
    text = (CLUSTER / "autoscaler" / "gpu.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    # Without it no node is started for an actor with a history (see tests/cluster/test_autoscaling.py).
    assert types["gpu"]["resources"]["memory"] >= 100e9
    assert types["gpu"]["max_workers"] <= config["max_workers"]


def test_the_skypilot_file_has_what_a_task_has() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot" / "lrag.yaml").read_text(encoding="utf-8"))
    assert set(task) <= {"name", "num_nodes", "resources", "workdir", "envs", "secrets", "setup", "run"}
    assert set(task["secrets"].values()) == {None}, "secrets come from the command line"
    checked = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    # SkyPilot's own Ray must live.
    assert not {"6380", "8266"} & set(re.findall(r"\d{4}", re.sub(r"#.*", "", task["run"])))
    assert "ray stop" not in re.sub(r"#.*", "", task["run"])


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*/*.s*")), ids=lambda path: path.name)
def test_scripts_are_shell(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(path)], text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_slurm_workers_leave_before_the_head_and_have_time_to_store() -> None:
    def option(name: str, key: str) -> str:
        text = (CLUSTER / "slurm" / name).read_text(encoding="utf-8")
        (found,) = re.findall(rf"^#SBATCH --{key}=(\S+)", text, re.MULTILINE)
        return str(found)

    drain = int(re.findall(r"LRAG_DRAIN_S:-(\d+)", (CLUSTER / "slurm" / "common.sh").read_text(encoding="utf-8"))[0])
    workers, head, one = (
        int(option(f"{name}.sbatch", "signal").removeprefix("B:USR1@")) for name in ("workers", "head", "one")
    )
    assert workers > head + drain and one > drain
    for name in ("workers", "head", "one"):
        text = (CLUSTER / "slurm" / f"{name}.sbatch").read_text(encoding="utf-8")
        assert "#SBATCH --requeue" in text and option(f"{name}.sbatch", "open-mode") == "append"


def ray_starts(text: str) -> Iterator[list[str]]:
    """Words of every `ray start` in a script."""
    text = re.sub(r"#.*", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    for found in re.findall(r"ray start (.*?)(?: &|;|$)", text, re.MULTILINE):
        yield found.split()


@pytest.mark.parametrize("path", ["slurm/common.sh", "skypilot/lrag.yaml", "autoscaler/gpu.yaml"])
def test_options_of_ray_start_exist(path: str) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in [*parameter.opts, *parameter.secondary_opts]}
    text = (CLUSTER / path).read_text(encoding="utf-8")
    used = {word.partition("=")[0] for words in ray_starts(text) for word in words if word.startswith("--")}
    used |= {f"--{name}" for name in re.findall(r"--([a-z-]+)=\$\(\(first", text)}
    assert used and used <= known
    if path == "slurm/common.sh":
        assert "--dashboard-agent-listen-port" in used, "two nodes of one machine would meet at its default"


def test_commands_of_jobs_and_images_exist() -> None:
    """`lrag-ray run` and `python -m jobs.X` with the options that the files use."""
    entry = manifest("rayjob.yaml")["spec"]["entrypoint"]
    module = re.findall(r"python -m (\S+)", entry)[0]
    assert (REPOSITORY / module.replace(".", "/")).with_suffix(".py").is_file()
    run: Any = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    options = {name for parameter in run.params for name in parameter.opts}
    for path in [*CLUSTER.glob("slurm/*.sbatch"), CLUSTER / "skypilot" / "lrag.yaml"]:
        for line in re.findall(r"lrag-ray run (.*?) (?:&|\|\|)", path.read_text(encoding="utf-8")):
            assert {word for word in line.split() if word.startswith("--")} <= options, path


def test_the_image_is_installed_from_the_constraints() -> None:
    """The variant for CUDA 12 keeps every version but those of CUDA's own libraries."""
    script = (CLUSTER / "docker" / "install.sh").read_text(encoding="utf-8")
    (pipeline,) = re.findall(r"grep -vE .*?(?= > \"\$constraints\")", script, re.DOTALL)
    made = subprocess.run(
        ["bash", "-c", pipeline.replace("\\\n", " ")], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").split("\n")
    gone = {line.partition("==")[0] for line in set(pinned) - set(made)}
    assert {"torch", "torchvision", "triton"} <= gone
    assert all(name.startswith(("nvidia-", "cuda-", "torch", "triton")) for name in gone)
    torch = next(line for line in pinned if line.startswith("torch=="))
    assert f"{torch}+cu126" in made
    extras = set(re.findall(r"'\.\[(.*?)\]'", script)[0].split(","))
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


def test_the_dockerfile_copies_what_is_there_and_installs_as_the_makefile_does() -> None:
    """No image can be built here; what can be checked without is."""
    text = (CLUSTER / "docker" / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    steps = [(line.split()[0], line.split()[1:]) for line in lines if line.strip()]
    assert {name for name, _ in steps} <= {"FROM", "ARG", "RUN", "ENV", "WORKDIR", "COPY", "USER"}
    for name, words in steps:
        if name == "RUN":
            checked = subprocess.run(["bash", "-n"], input=" ".join(words), text=True, capture_output=True, check=False)
            assert checked.returncode == 0, checked.stderr
    copied = [word for name, words in steps if name == "COPY" for word in words[:-1]]
    assert all((REPOSITORY / path).exists() for path in copied), copied
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    # Files that setuptools reads, the packages, and what install.sh reads.
    read = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert packages | read <= set(copied)
    made = next(words for name, words in steps if name == "RUN" and "mkdir" in words)
    assert {word for word in made if word in packages} == packages, "empty ones, for the layer of the dependencies"
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    script = (CLUSTER / "docker" / "install.sh").read_text(encoding="utf-8")
    bare = r"--constraint \S+ --no-deps (.*)"
    assert re.findall(bare, script) == re.findall(bare, makefile) != []
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-", text, re.MULTILINE)
    assert f"command -v python{python}" in makefile
    for page in ("docker", "kuberay"):
        for file in re.findall(r"docker build -f (\S+)", (CLUSTER / page / "README.md").read_text(encoding="utf-8")):
            assert (REPOSITORY / file).is_file()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    from lrag_ray.engine import metrics

    board = json.loads((CLUSTER / "grafana" / "lrag-ray.json").read_text(encoding="utf-8"))
    asked = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_(lrag_\w+)", target["expr"])
    }
    documented = set(re.findall(r"^(lrag_\w+)", metrics.__doc__ or "", re.MULTILINE))
    assert asked == documented
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and len({target["refId"] for p in board["panels"] for target in p["targets"]}) == 1
