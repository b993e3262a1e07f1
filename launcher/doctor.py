"""Checks the machines of a profile before hours are spent: this one, and by a short job the nodes."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.preflight import sharing
from cluster.preflight.disk import judge_folder, look_at_folder
from cluster.preflight.host import Host, judge_host, look_at_host
from cluster.preflight.judge import ALL, ASKER, judge_nodes
from cluster.preflight.packages import judge_packages, read_constraints, required
from cluster.preflight.report import Report, from_lines
from cluster.preflight.verdict import Verdict, expect
from cluster.profile import Profile
from cluster.slurm import SlurmSettings
from launcher import registry
from launcher.backends import slurm_queue
from launcher.backends.base import SOURCE
from launcher.backends.everywhere import Errand, run_everywhere
from launcher.backends.kubernetes import cluster_of, refuse_unseen
from launcher.backends.kubernetes_manifest import settings_of
from launcher.kube_api import UnreachableError
from vqscale.errors import UserError

_HERE = "here"
TOGETHER = (_HERE, ALL)
"""Where a verdict is not of a single node."""
_LIMIT_S = 300
_PROGRAMS = {"ssh": ("ssh",), "slurm": ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")}
"""What a backend calls on this machine."""


@dataclass(frozen=True)
class Examination:
    """What is to be checked.

    Args:
        profile: of the machines.
        nodes: how many of its nodes.
        shards: URL of shards that the nodes read; empty for none.
        wait_s: seconds that nodes which are busy are waited for.
    """

    profile: Profile
    nodes: int
    shards: str = ""
    wait_s: int = 600

    def verdicts(self) -> Iterator[Verdict]:
        """All verdicts, those of this machine first, as they are known.

        Raises:
            UserError: the folder of runs cannot be made, or lies where pods do not see it.
        """
        if self.profile.kubernetes:
            refuse_unseen(self.profile, registry.runs_root().resolve())
        host = look_at_host()
        with _folder_of_runs() as folder:
            yield from judge_packages(_HERE, host.packages, required(), read_constraints(SOURCE / "constraints.txt"))
            if self.profile.backend != "local":  # else this machine is the node
                yield from judge_host(_HERE, host)
                yield from judge_folder(_HERE, look_at_folder(folder, "here.bytes"), self.profile.floors.write_mb_s)
            programs = _judge_programs(self.profile, self.nodes)
            yield from programs
            if all(verdict.word != "FAIL" for verdict in programs):
                yield from self._judge_nodes(host, folder)

    def _judge_nodes(self, host: Host, folder: Path) -> list[Verdict]:
        token = secrets.token_hex(8)
        sharing.leave(folder, ASKER, token)
        arguments = ("--folder", str(folder), "--token", token, "--nodes", str(self.nodes), "--shards", self.shards)
        errand = Errand(
            self.profile, "cluster.preflight.node", arguments, folder, self.nodes, self.wait_s, limit_s=_LIMIT_S
        )
        answers = _Answers(late=self.profile.backend == "kubernetes")
        answers.read(run_everywhere(errand))
        return judge_nodes(
            answers.reports,
            self.nodes,
            host,
            self.profile,
            sees=sharing.seen(folder, token),
            hellos=answers.ahead,
            said=answers.last_words,
        )


class _Answers:
    """What the nodes say, sorted as it comes.

    Args:
        late: it comes when the nodes have ended, as pods' logs do; their clocks cannot be compared then.
    """

    def __init__(self, late: bool) -> None:
        self._late = late
        self.reports: list[Report] = []
        self.ahead: dict[str, float] = {}
        """Node → seconds that its clock was ahead of ours when its first line came."""
        self.last_words = ""

    def read(self, texts: Iterator[str]) -> None:
        """Read until the nodes have ended."""
        for tree in from_lines(self._kept(texts)):
            if "hello" in tree:
                if self._late:
                    continue
                self.ahead[tree["node"]] = tree["hello"] - time.time()
            else:
                self.reports.append(Report.parse(tree["report"]))
        self.reports.sort(key=lambda report: report.node)

    def _kept(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            # What is said of an error tells more than how a command ended because of it.
            if "error" in text or "error" not in self.last_words:
                self.last_words = text.strip() or self.last_words
            yield text


@contextmanager
def _folder_of_runs() -> Iterator[Path]:
    """A folder of the trial's own where runs would be; nothing is left of it."""
    root = registry.runs_root()
    there = root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=root, ignore_cleanup_errors=True) as name:
            yield Path(name)
    except OSError as error:
        raise UserError(f"cannot be used ({error.strerror})", where=str(root), mend="set $VQSCALE_RUNS") from None
    finally:
        if not there:
            with suppress(OSError):
                root.rmdir()


def _judge_programs(profile: Profile, nodes: int) -> list[Verdict]:
    """The programs that the backend calls, and whether Slurm or Kubernetes answers."""
    if profile.kubernetes:
        return [_judge_kubernetes(profile)]
    names = _PROGRAMS.get(profile.backend, ())
    if not names:
        return []
    lost = [name for name in names if shutil.which(name) is None]
    value = f"lacks {', '.join(lost)}" if lost else ", ".join(names)
    found = expect("programs", _HERE, not lost, value, mend="go to a login node, or install them")
    return [found] if lost or profile.slurm is None else [found, _judge_slurm(profile.slurm, nodes)]


def _judge_kubernetes(profile: Profile) -> Verdict:
    """Whether the cluster answers, knows the kind of object, and lets us ask for it."""
    kubernetes, _ = settings_of(profile)
    kind, namespace = kubernetes.kind, kubernetes.namespace
    try:
        cluster_of(profile).named("none")
    except UserError as error:
        mend = error.mend or f"install {kind} in the cluster, or see kubectl auth can-i create {kind} -n {namespace}"
        return Verdict("Kubernetes", _HERE, "FAIL", error.what, mend=mend)
    except UnreachableError as error:
        return Verdict("Kubernetes", _HERE, "FAIL", f"does not answer ({error})", mend="see kubectl cluster-info")
    return Verdict("Kubernetes", _HERE, "ok", f"answers, and knows {kind} in namespace {namespace}")


def _judge_slurm(slurm: SlurmSettings, nodes: int) -> Verdict:
    """Whether the controller answers, and whether enough nodes of the partition take jobs."""
    partition = slurm.partition or ""
    try:
        states = slurm_queue.node_states(partition)
    except UserError as error:
        return Verdict("Slurm", _HERE, "FAIL", str(error), mend="see scontrol ping; SLURM_CONF may be wrong")
    out = [f"{node} is {state}" for node, state in states.items() if slurm_queue.is_out(state)]
    told = f"{len(states) - len(out)} of {len(states)} nodes take jobs" + (f"; {', '.join(out[:3])}" if out else "")
    return expect(
        f"partition {partition}" if partition else "Slurm",
        _HERE,
        len(states) - len(out) >= nodes,
        told,
        limit=f"at least {nodes}",
        mend="sinfo -R says why nodes are out; or correct slurm.partition in the profile",
    )
