"""What is made in a Kubernetes cluster: golden text, hostile values, planted faults. Needs no cluster."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.container import ContainerSettings
from cluster.kubernetes import KubernetesSettings, Toleration, Volume
from cluster.profile import Profile
from launcher.backends.base import Job, Place
from launcher.backends.kubernetes import KubernetesBackend
from launcher.backends.kubernetes_check import check
from launcher.backends.kubernetes_manifest import object_name
from launcher.cli import main
from launcher.plan import load_profile, make_plan
from tests.fake_kubernetes import expanded
from tests.recipes import tiny_recipe, write_recipe
from vqscale.errors import UserError

GOLDEN = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: vq-tiny-1-tokenizer-3-XXXXXXXX
  namespace: training
  labels:
    app.kubernetes.io/name: vqscale
    vqscale/run: RUNLABEL
    vqscale/stage: tokenizer
    kueue.x-k8s.io/queue-name: main
spec:
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: true
    subdomain: vq-tiny-1-tokenizer-3-XXXXXXXX
  failurePolicy:
    maxRestarts: 0
  ttlSecondsAfterFinished: 86400
  replicatedJobs:
  - name: node
    replicas: 1
    template:
      spec:
        parallelism: 2
        completions: 2
        completionMode: Indexed
        backoffLimit: 0
        template:
          metadata:
            labels:
              app.kubernetes.io/name: vqscale
              vqscale/run: RUNLABEL
              vqscale/stage: tokenizer
          spec:
            terminationGracePeriodSeconds: 30
            serviceAccountName: trainer
            nodeSelector:
              zone: a
            tolerations:
            - key: nvidia.com/gpu
              operator: Exists
              effect: NoSchedule
            imagePullSecrets:
            - name: pull
            securityContext:
              runAsUser: 1000
              runAsGroup: 2000
              fsGroup: 2000
            affinity:
              nodeAffinity:
                requiredDuringSchedulingIgnoredDuringExecution:
                  nodeSelectorTerms:
                  - matchExpressions:
                    - key: kubernetes.io/hostname
                      operator: NotIn
                      values:
                      - bad-1
                preferredDuringSchedulingIgnoredDuringExecution:
                - weight: 100
                  preference:
                    matchExpressions:
                    - key: kubernetes.io/hostname
                      operator: NotIn
                      values:
                      - slow-1
                      - slow-2
            volumes:
            - name: volume-0
              persistentVolumeClaim:
                claimName: runs
                readOnly: false
            - name: shared-memory
              emptyDir:
                medium: Memory
            restartPolicy: Never
            priorityClassName: high
            containers:
            - name: node
              image: registry.example.org/vqscale:1
              workingDir: /opt/vqscale
              command:
              - sh
              - -c
              - PET_RDZV_CONF="is_host=$$((JOB_COMPLETION_INDEX == 0))" exec "$$@"
              - agent
              - /opt/venv/bin/python
              - -m
              - torch.distributed.run
              - --nnodes
              - '2'
              - --nproc-per-node
              - '2'
              - --max-restarts
              - '0'
              - --rdzv-backend
              - c10d
              - --rdzv-endpoint
              - vq-tiny-1-tokenizer-3-XXXXXXXX-node-0-0.vq-tiny-1-tokenizer-3-XXXXXXXX:29400
              - --rdzv-id
              - vq-tiny-1-tokenizer-3-XXXXXXXX
              - --signals-to-handle
              - SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2
              - --local-addr
              - $(POD_IP)
              - --log-dir
              - /runs/$$(x)/tiny-1/stages/tokenizer/attempt-003/ranks
              - --redirects
              - '3'
              - --tee
              - '3'
              - -m
              - --
              - pipelines.train_tokenizer
              - --run
              - /runs/$$(x)/tiny-1
              env:
              - name: POD_IP
                valueFrom:
                  fieldRef:
                    fieldPath: status.podIP
              - name: VQSCALE_NODE
                valueFrom:
                  fieldRef:
                    fieldPath: spec.nodeName
              - name: OMP_NUM_THREADS
                value: '4'
              - name: TORCH_DISABLE_SHARE_RDZV_TCP_STORE
                value: '1'
              - name: TORCH_ELASTIC_SHUTDOWN_TIMEOUT
                value: '30'
              - name: NCCL_DEBUG
                value: WARN
              - name: VQSCALE_ATTEMPT
                value: '3'
              - name: VQSCALE_GRACE_S
                value: '30'
              - name: VQSCALE_STAGE_OF
                value: /runs/$$(x)/tiny-1
              envFrom:
              - secretRef:
                  name: bucket
              resources:
                requests:
                  cpu: '8'
                  memory: 64Gi
                  nvidia.com/gpu: '2'
                limits:
                  cpu: '8'
                  memory: 64Gi
                  nvidia.com/gpu: '2'
              volumeMounts:
              - name: volume-0
                mountPath: /runs
                readOnly: false
              - name: shared-memory
                mountPath: /dev/shm
"""
FULL: dict[str, Any] = {
    "namespace": "training",
    "gpus_per_node": 2,
    "cpus_per_node": 8,
    "memory_gb": 64,
    "node_selector": {"zone": "a"},
    "tolerations": (Toleration(key="nvidia.com/gpu", effect="NoSchedule"),),
    "volumes": (Volume(claim="runs", path="/runs"),),
    "service_account": "trainer",
    "priority_class": "high",
    "queue": "main",
    "secrets": ("bucket",),
    "pull_secrets": ("pull",),
    "run_as": "1000:2000",
    "exclude": ("bad-1",),
    "avoid": ("slow-1", "slow-2"),
}
SMALL = {"cpus_per_node": 1, "volumes": (Volume(claim="runs", path="/runs"),)}
CONTAINER = {"image": "registry.example.org/vqscale:1", "workdir": "/opt/vqscale", "python": "/opt/venv/bin/python"}
RUN = "/runs/$(x)/tiny-1"


def golden_job(run: str = RUN, environment: dict[str, str] | None = None, **changes: Any) -> Job:
    recipe = tiny_recipe(resources={"processes": 4, "device": "cpu"}, data__streams=4)
    profile = Profile(
        name="here",
        backend="kubernetes",
        environment=environment or {"NCCL_DEBUG": "WARN"},
        container=ContainerSettings(**CONTAINER),
        kubernetes=KubernetesSettings(**{**FULL, **changes}),
    )
    return Job(recipe, profile, Path(run), ("tokenizer",), "/venv/bin/python", Path("/src"), {"tokenizer": Place(8, 2)})


def train_job() -> Job:
    return golden_job(kind="TrainJob", priority_class=None, secrets=())


def rendered(job: Job) -> dict[str, Any]:
    (command,) = KubernetesBackend().render(job, {"tokenizer": 3})
    made: dict[str, Any] = yaml.safe_load(command.script)
    return made


def test_the_manifest_is_golden() -> None:
    (command,) = KubernetesBackend().render(golden_job(), {"tokenizer": 3})
    name = object_name(Path(RUN), "tokenizer", 3)
    label = yaml.safe_load(command.script)["metadata"]["labels"]["vqscale/run"]
    assert command.script.replace(name, "vq-tiny-1-tokenizer-3-XXXXXXXX").replace(label, "RUNLABEL") == GOLDEN
    assert command.argv[1:] == (
        *("-m", "launcher.kube", "--grace", "30", "--"),
        f"{RUN}/stages/tokenizer/manifest.yaml",
    )


def test_a_train_job_asks_for_the_same() -> None:
    made, job_set = rendered(train_job()), rendered(golden_job())
    trainer = made["spec"]["trainer"]
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (made["apiVersion"], made["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert made["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 2)
    assert trainer["resourcesPerNode"] == container["resources"]
    assert trainer["env"] == [{"name": "PYTHONPATH", "value": "/opt/vqscale"}, *container["env"]]
    assert not [one for one in trainer["env"] if one["name"].startswith("PET_")], "Kubeflow refuses them"
    differing = [pair for pair in zip(container["command"], trainer["command"], strict=True) if pair[0] != pair[1]]
    assert [second for _, second in differing] == [
        'PET_RDZV_CONF="is_host=$$((PET_NODE_RANK == 0))" exec "$$@"',
        "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)",
    ]
    (patch,) = made["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    patched = replicated["template"]["spec"]["template"]["spec"]
    assert patched["volumes"] == pod["volumes"]
    assert patched["containers"] == [{"name": "node", "volumeMounts": container["volumeMounts"]}]
    assert patched["tolerations"] == pod["tolerations"]
    assert patched["affinity"] == pod["affinity"]


def test_render_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KubernetesBackend().render(golden_job())
    for name in ("OMP_NUM_THREADS", "KUBECONFIG", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "99")
    monkeypatch.chdir("/")
    after = KubernetesBackend().render(golden_job())
    assert after == before
    assert "AWS_SECRET" not in after[0].script, "nothing of the shell reaches the pods"


@pytest.mark.parametrize("job", [golden_job(), train_job(), golden_job(**dict.fromkeys(("queue", "memory_gb")))])
def test_what_is_made_passes_the_check(job: Job) -> None:
    check(rendered(job))


def _batch(tree: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job


def _pod(tree: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = _batch(tree)["template"]["spec"]
    return pod


def _rename(tree: dict[str, Any], old: str, new: str) -> None:
    tree[new] = tree.pop(old)


PLANTED: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("spec.replicatedJob", lambda t: _rename(t["spec"], "replicatedJobs", "replicatedJob")),
    ("spec.network.subDomain", lambda t: _rename(t["spec"]["network"], "subdomain", "subDomain")),
    ("restartPolicies", lambda t: _rename(_pod(t), "restartPolicy", "restartPolicies")),
    ("containers.0.volumeMount", lambda t: _rename(_pod(t)["containers"][0], "volumeMounts", "volumeMount")),
    ("containers.0.env.0.valuefrom", lambda t: _rename(_pod(t)["containers"][0]["env"][0], "valueFrom", "valuefrom")),
    ("completionmode", lambda t: _rename(_batch(t), "completionMode", "completionmode")),
    ("medum", lambda t: _rename(_pod(t)["volumes"][1]["emptyDir"], "medium", "medum")),
    ("maxRestarts", lambda t: t["spec"]["failurePolicy"].update(maxRestarts="0")),
    ("replicas", lambda t: t["spec"]["replicatedJobs"][0].update(replicas=True)),
    ("command", lambda t: _pod(t)["containers"][0].update(command="sh")),
    ("name", lambda t: _pod(t)["containers"][0].pop("name")),
    ("value", lambda t: _pod(t)["containers"][0]["env"][1].update(value=4)),
]  # fmt: skip


@pytest.mark.parametrize(("word", "plant"), PLANTED, ids=[word for word, _ in PLANTED])
def test_planted_faults_are_found(word: str, plant: Callable[[dict[str, Any]], None]) -> None:
    tree = rendered(golden_job())
    check(copy.deepcopy(tree))
    plant(tree)
    with pytest.raises(UserError, match="vq-tiny") as caught:
        check(tree)
    assert word in str(caught.value)


def test_planted_faults_of_a_train_job_are_found() -> None:
    tree = rendered(train_job())
    _rename(tree["spec"]["trainer"], "numNodes", "numnodes")
    with pytest.raises(UserError, match=r"unknown field spec\.trainer\.numnodes"):
        check(tree)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
NASTY = st.sampled_from(
    ["$(POD_IP)", "$$(POD_IP)", "$", "'; touch canary; '", "`x`", "a: b", "- x", "\n", "%", "&&", "~"]
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(value=TEXT | NASTY, run=TEXT | NASTY)
def test_no_value_is_read_as_anything_else(value: str, run: str) -> None:
    """Neither by YAML, nor by the cluster, which expands `$(NAME)`, nor by the shell in the pod."""
    root = f"/runs/{run.replace('/', '_')}x"
    made = rendered(golden_job(root, environment={"HOSTILE": value}))
    (container,) = _pod(made)["containers"]
    given_ = {"POD_IP": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    variables = {one["name"]: expanded(one["value"], given_) for one in container["env"] if "value" in one}
    assert variables["HOSTILE"] == value
    words = [expanded(word, given_) for word in container["command"]]
    dump = [
        "sh",
        "-c",
        words[2],
        "agent",
        "python3",
        "-c",
        "import json,sys,os; print(json.dumps([sys.argv[1:], os.environ['PET_RDZV_CONF']]))",
    ]
    told, store = json.loads(
        subprocess.run(
            [*dump, *words[5:]], env={**given_, "PATH": "/usr/bin:/bin"}, capture_output=True, check=True
        ).stdout
    )
    assert told[-1] == root
    assert told[told.index("--local-addr") + 1] == "10.0.0.1"
    assert store == "is_host=0"


@pytest.mark.parametrize("run", ["/runs/x", "/runs/" + "Ünï " * 40, "/runs/---", "/runs/" + "a" * 200])
def test_names_fit_where_they_go(run: str) -> None:
    name = object_name(Path(run), "tokenizer", 123)
    assert len(f"{name}-node-0-999") <= 63
    assert name.replace("-", "").isalnum()
    assert name == name.lower()
    assert name != object_name(Path(run), "tokenizer", 124)
    assert name != object_name(Path(run + "2"), "tokenizer", 123)


@pytest.mark.parametrize(
    "change",
    [
        {"namespace": "A b"},
        {"volumes": ()},
        {"volumes": (), "queue": "x"},
        {"node_selector": {"a": "b\nc"}},
        {"node_selector": {"a b": "c"}},
        {"kind": "Job"},
        {"run_as": "me"},
        {"exclude": ("a b",)},
        {"avoid": ("--x",)},
        {"kind": "TrainJob", "secrets": ("x",)},
        {"kind": "TrainJob", "priority_class": "x"},
        {"gpu_resource": "gpu: 1"},
        {"rendezvous_port": 80},
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        KubernetesSettings(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("backend: kubernetes", "go together"),
        ("kubernetes: {cpus_per_node: 1, volumes: [{claim: a, path: /a}]}", "go together"),
        ("backend: kubernetes\nkubernetes: {cpus_per_node: 1, volumes: [{claim: a, path: /a}]}", "container.image"),
        ("backend: ssh\nssh: {hosts: [a slots=1], cores: 1}\ncontainer: {image: x}", "knows no containers"),
        ("container: {image: x}", "knows no containers"),
        ("backend: slurm\nslurm: {cpus_per_task: 1}\ncontainer: {image: x}", "pyxis or apptainer"),
        ("backend: slurm\nslurm: {cpus_per_task: 1}\ncontainer: {image: 'a b', runtime: pyxis}", "container.image"),
        ("backend: slurm\nslurm: {cpus_per_task: 1}\ncontainer: {image: a, runtime: docker}", "container.runtime"),
    ],
)
def test_profiles_that_cannot_be_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text(f"name: mine\n{text}\n")
    with pytest.raises(UserError, match=expected.replace(".", r"\.")):
        load_profile(str(profile))


def test_plan_prints_what_is_sent(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(home / "r.yaml", resources={"processes": 2, "device": "cpu"})
    assert main(["plan", str(path), "--on", "kubernetes-gpu", "--run", "/runs/mine"]) == 0
    printed = capsys.readouterr().out
    made = make_plan(str(path), "kubernetes-gpu", run=Path("/runs/mine"))
    for command in made.commands:
        assert "\n".join(f"    | {line}".rstrip() for line in command.script.splitlines()) in printed
        check(yaml.safe_load(command.script))
    assert [yaml.safe_load(command.script)["metadata"]["labels"]["vqscale/stage"] for command in made.commands] == list(
        made.job.recipe.stages
    )
