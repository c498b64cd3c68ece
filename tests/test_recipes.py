"""The Dockerfile and the scripts for clusters name what exists and restart what a restart helps."""

import os
import pathlib
import re
import subprocess
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCKERFILE, EXAMPLES = (ROOT / "Dockerfile").read_text(), ROOT / "examples"
CONTINUE, HELPLESS = (74, 75, 134), (1, 2, 3, 4)  # exit statuses of docs/reliability.md


def test_everything_copied_is_there():
    lines = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M)
    sources = [word for line in lines for word in line.split()]
    assert "pyproject.toml" in sources
    assert [name for name in sources if not (ROOT / name).exists()] == []


def test_the_extras_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    text = DOCKERFILE + (EXAMPLES / "gke.yaml").read_text()
    named = {name for found in re.findall(r"EXTRAS=([\w,]+)", text) for name in found.split(",")}
    assert {"app", "cuda", "tpu", "gcs"} <= named <= set(extras)


@pytest.mark.parametrize(
    ("of_tasks", "status"),
    [
        *(((n, n), n) for n in (0, *HELPLESS, *CONTINUE)),
        ((75, 2), 2),
        ((1, 134), 1),
        ((74, 75), 75),
    ],
)
def test_slurm_requeues_a_job_if_and_only_if_the_same_command_continues(tmp_path, of_tasks, status):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    one, other = of_tasks
    scripts = {
        "srun": f'SLURM_PROCID=0 "$@"; SLURM_PROCID=1 "$@"; exit {max(of_tasks)}',
        "python": f"[ $SLURM_PROCID = 0 ] && exit {one}; exit {other}",
        "scontrol": 'echo "$@" > requeued',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", EXAMPLES / "slurm.sh"], cwd=tmp_path, env={"PATH": path, "SLURM_JOB_ID": "17"}
    )
    requeued = tmp_path / "requeued"
    assert run.returncode == status
    assert requeued.exists() == (status in CONTINUE)
    assert not requeued.exists() or requeued.read_text() == "requeue 17\n"
    assert not list(tmp_path.glob("statuses.*"))


def test_kubernetes_gives_up_on_statuses_that_a_restart_does_not_help():
    job = yaml.safe_load((EXAMPLES / "gke.yaml").read_text())["spec"]
    rules = job["podFailurePolicy"]["rules"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # else the policy is rejected
    assert [r["onExitCodes"]["values"] for r in rules if r["action"] == "FailJob"] == [
        list(HELPLESS)
    ]
