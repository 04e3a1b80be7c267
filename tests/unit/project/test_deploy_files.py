"""Manifests, Dockerfiles and scripts of deploy/."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from oarlock.cli.main import make_parser
from support.deploy_folder import DEPLOY, ROOT, make_program

SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
DOCKERFILES = sorted(DEPLOY.rglob("Dockerfile"))
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002, "openai": 8080}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def resource(kind: str) -> dict[str, Any]:
    (found,) = [d for path in (DEPLOY / "kubernetes/base").glob("*.yaml") for d in documents(path) if d["kind"] == kind]
    return found


# Kubernetes


def test_every_manifest_is_listed_in_its_kustomization():
    for folder in ("base", "gpu"):
        kustomization = documents(DEPLOY / "kubernetes" / folder / "kustomization.yaml")[0]
        named = [*kustomization.get("resources", []), *(patch["path"] for patch in kustomization.get("patches", []))]
        assert all((DEPLOY / "kubernetes" / folder / name).exists() for name in named)
        files = {path.name for path in (DEPLOY / "kubernetes" / folder).glob("*.yaml")} - {"kustomization.yaml"}
        assert files == {name for name in named if name.endswith(".yaml")}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_manifests_have_the_required_fields(path):
    versions = {"Deployment": "apps/v1", "Service": "v1", "PersistentVolumeClaim": "v1"}
    versions["Kustomization"] = "kustomize.config.k8s.io/v1beta1"
    for document in documents(path):
        assert document["apiVersion"] == versions[document["kind"]]
        if document["kind"] != "Kustomization":
            assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])


def test_service_and_probes_reach_the_pod():
    deployment, service = resource("Deployment"), resource("Service")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    (container,) = pod["spec"]["containers"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == PORTS
    for port in service["spec"]["ports"]:
        assert port["targetPort"] == port["name"] and port["port"] == PORTS[port["name"]]
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert probes["livenessProbe"]["path"] == "/v2/health/live"
    assert probes["readinessProbe"]["path"] == probes["startupProbe"]["path"] == "/v2/health/ready"


def test_the_pod_writes_only_its_own_folders_and_is_unprivileged():
    spec = resource("Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(volumes) == {mount["name"] for mount in mounts.values()}
    assert mounts["/models"]["readOnly"] and volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert {"/models", "/tmp", "/dev/shm"} == set(mounts)
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == resource("PersistentVolumeClaim")["metadata"]["name"]
    assert set(container["resources"]) == {"requests", "limits"}


def test_the_gpu_patch_matches_the_container():
    (patch,) = documents(DEPLOY / "kubernetes/gpu/gpu.yaml")
    deployment = resource("Deployment")
    assert patch["metadata"]["name"] == deployment["metadata"]["name"]
    (patched,), (plain,) = (d["spec"]["template"]["spec"]["containers"] for d in (patch, deployment))
    assert patched["name"] == plain["name"]
    assert patched["resources"]["limits"]["nvidia.com/gpu"] == "1"
    image = documents(DEPLOY / "kubernetes/gpu/kustomization.yaml")[0]["images"][0]
    assert plain["image"].split(":")[0] == image["name"]


# Docker

INSTRUCTIONS = {
    "ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL",
    "ENTRYPOINT", "CMD",
}  # fmt: skip


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles(path):
    found = instructions(path)
    assert {word for word, _ in found} <= INSTRUCTIONS
    arguments = {rest.partition("=")[0] for word, rest in found if word == "ARG"}
    assert dict(found)["FROM"] == "${BASE}" and "BASE" in arguments
    assert [rest for word, rest in found if word == "USER"] == ["10001:10001"]
    for word, rest in found:
        if word in ("ENTRYPOINT", "CMD"):
            assert json.loads(rest)
        if word == "HEALTHCHECK":
            command = json.loads(rest.partition("CMD ")[2])
            compile(command[2], "healthcheck", "exec")
            assert "/v2/health/ready" in command[2]
        if word == "RUN":
            check = subprocess.run(["bash", "-n"], input=rest, text=True, capture_output=True, check=False)
            assert check.returncode == 0, check.stderr


def test_the_image_copies_existing_files_and_ignores_the_rest():
    folder = DEPLOY / "docker"
    kept = {line[1:] for line in (folder / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [
        word for kind, rest in instructions(folder / "Dockerfile") if kind == "COPY" for word in shlex.split(rest)[:-1]
    ]
    assert set(sources) == kept and all((ROOT / source).exists() for source in sources)
    version = next(rest for kind, rest in instructions(folder / "Dockerfile") if rest.startswith("PADDLE_VERSION="))
    pinned = re.search(r"^paddlepaddle==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert version.partition("=")[2] == pinned[1]


def test_the_image_starts_the_oarlock_server():
    entry = json.loads(dict(instructions(DEPLOY / "docker/Dockerfile"))["ENTRYPOINT"])
    assert entry[:2] == ["oarlock", "serve"]
    assert make_parser().parse_args(entry[1:]).folder == Path("/models")


@pytest.mark.parametrize("name", ["docker", "triton"])
def test_compose_files(name):
    (service,) = documents(DEPLOY / name / "compose.yaml")[0]["services"].values()
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["tmpfs"] == ["/tmp"]
    assert any(volume.endswith(":/models:ro") for volume in service["volumes"])
    for port in service["ports"]:
        host, outside, inside = port.split(":")
        assert host == "127.0.0.1" and outside == inside and int(inside) in PORTS.values()


# scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    assert path.read_text().startswith("#!/usr/bin/env bash\n#") and "set -euo pipefail" in path.read_text()
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_fastdeploy_runs_the_start_script_in_the_image(tmp_path):
    docker, model = make_program(tmp_path, "docker"), tmp_path / "my model"
    model.mkdir()
    environment = {**os.environ, "DOCKER": str(docker), "MODEL": str(model), "IMAGE": "fd:2", "PORT": "9000"}
    command = ["bash", str(DEPLOY / "fastdeploy/run.sh"), "--tensor-parallel-size", "2"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "start.sh" in refused.stderr
    (model / "start.sh").write_text("")
    words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[0] == "run" and f"{model}:/model:ro" in words and "127.0.0.1:9000:9000" in words
    assert words[-5:] == ["fd:2", "bash", "/model/start.sh", "--tensor-parallel-size", "2"]
