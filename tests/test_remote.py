"""The remote environments: what Dockerfile.gpu installs works, and cluster.yaml is what Ray understands."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT, project

IMPORTS = "import torch, transformers, sae_lens, transformer_lens, ray, lib.run, lib.model.cluster, lib.model.sae_training, lib.model.steering"


def steps() -> list[str]:
    """The commands of Dockerfile.gpu's RUN instructions, in order."""
    text = (ROOT / "Dockerfile.gpu").read_text().replace("\\\n", " ")
    return [step.strip() for line in re.findall(r"^RUN (.*)$", text, re.MULTILINE) for step in line.split("&&")]


def test_the_steps_are_found():
    assert [step.split()[0] for step in steps()] == ["python", "useradd", "chown", "grep", "python", "rm", "python"]


@pytest.mark.full
def test_what_the_dockerfile_installs_works(tmp_path):
    """Its steps in a new environment that holds only torch, as the base image does; the user and the image itself are left out."""
    home, venv = project(tmp_path / "study"), tmp_path / "venv"
    for name in ("requirements.lock", "requirements-cluster.lock", "pyproject.toml", "README.md"):
        (home / name).write_bytes((ROOT / name).read_bytes())
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}

    def do(command: str) -> str:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=home, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr[-2000:])
        return done.stdout
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pins = (ROOT / "requirements.lock").read_text()
    do(f"python -m pip install --quiet --no-deps {re.search(r'^torch==.*$', pins, re.MULTILINE)[0]}")
    for step in steps():
        if step.split()[0] not in ("useradd", "chown"):
            do(step.replace("/tmp/requirements.lock", shlex.quote(str(tmp_path / "requirements.lock"))))
    do(f"python -c {shlex.quote(IMPORTS)}")
    assert "03_extract" in do("python -m lib.run --list")
    assert "torch==" in do("python -m pip freeze")


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_cluster_yaml_fits_rays_schema(cluster):
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    cluster["available_node_types"]["worker"]["min_worker"] = 0  # a misspelling would start none, or never stop
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        jsonschema.validate(cluster, schema)


def test_cluster_workers_are_spot_machines_from_zero(cluster):
    types = cluster["available_node_types"]
    worker, head = types["worker"], types[cluster["head_node_type"]]
    assert worker["min_workers"] == 0 < worker["max_workers"] == cluster["max_workers"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} and "InstanceMarketOptions" not in head["node_config"]
    assert worker["resources"]["GPU"] == 1 and worker["node_config"]["ImageId"] == head["node_config"]["ImageId"]


def test_cluster_nodes_share_the_cache_of_the_image(cluster):
    dockerfile = (ROOT / "Dockerfile.gpu").read_text()
    mounts = [option.split()[1].split(":") for option in cluster["docker"]["run_options"] if option.startswith("--volume")]
    inside = dict(reversed(mount) for mount in mounts)
    assert re.search(r"EMPATHY_CACHE=(\S+)", dockerfile)[1] in inside and all(path.startswith("/shared/") for path in inside.values())
    assert any("mount -t nfs4" in command and " /shared" in command for command in cluster["initialization_commands"])
    words = set(re.findall(r"\b[A-Z]{3,}(?:-[A-Z]+)?\b", re.sub(r"#.*", "", (ROOT / "cluster.yaml").read_text())))
    assert {"AMI", "SECURITY-GROUP", "FILE-SYSTEM", "IMAGE"} <= words


def test_documented_commands_exist():
    """What docs/cluster.md tells one to type is there: options, modules, studies."""
    text = (ROOT / "docs/cluster.md").read_text()
    shown = subprocess.run([sys.executable, "-m", "lib.run", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for command in re.findall(r"python -m lib\.run ([^\n\"`]*)", text):
        assert all(option in shown for option in re.findall(r"--[a-z]+", command))
        assert all((ROOT / "params" / f"{name}.yaml").exists() for name in re.findall(r"--study ([a-z][\w.-]+)", command))
    for module in re.findall(r"python -m (lib\.[\w.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()
