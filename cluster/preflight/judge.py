"""What is to be thought of the nodes' reports, and of their differences; pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.preflight.disk import judge_folder
from cluster.preflight.gpus import judge_gpus
from cluster.preflight.host import Host, judge_host, judge_interfaces
from cluster.preflight.report import Report
from cluster.preflight.verdict import Verdict, Word, at_least, expect
from cluster.profile import Profile

ASKER = "this machine"
"""Name under which the machine that asks leaves its own token."""

ALL = "all nodes"
"""Where a verdict over all nodes stands."""
_CODE = "vqscale's code"
_FIRST = ("Python", "torch", _CODE)
_ONE_ENVIRONMENT = "use one environment and one copy of the code on a shared file system, or renew those of the nodes"
_SILENT = {
    "local": "run python -m cluster.preflight.node --help to see whether it starts",
    "slurm": "see squeue --me and the scheduler's logs; a longer --wait helps when the nodes are busy",
    "ssh": "try ssh by hand with BatchMode=yes; Python and the code have to be there under the same paths",
    "kubernetes": "see kubectl describe jobsets, and the events of its pods; a longer --wait helps when nodes are busy",
}
"""What to do where nodes do not answer."""
_CLOCK_WARN_S, _CLOCK_FAIL_S = 1.0, 60.0


def judge_nodes(
    reports: Sequence[Report],
    wanted: int,
    here: Host,
    profile: Profile,
    *,
    sees: Sequence[str],
    hellos: Mapping[str, float],
    said: str = "",
) -> list[Verdict]:
    """Verdicts over all nodes.

    Args:
        reports: of the nodes that answered.
        wanted: how many were asked for.
        here: the machine that asks.
        profile: its floors and variables are what the nodes are held to.
        sees: machines whose tokens the asking machine sees in the shared folder.
        hellos: node → seconds that its clock was ahead of ours when its first line came.
        said: the last words of a backend that could not start the nodes.
    """
    missing = wanted - len(reports)
    answered = f"{len(reports)} of {wanted} answered" + (f": {said}" if missing and said else "")
    found = [expect("nodes", ALL, not missing, answered, mend=_SILENT[profile.backend])]
    if not reports:
        return found
    found += [
        judge_equal(reports, here, inside=profile.container is not None),
        judge_shared(reports, sees),
        judge_meeting(reports, profile),
    ]
    found.append(judge_bandwidth(reports, profile))
    for report in reports:
        found += _judge_node(report, profile, hellos.get(report.node))
    return found


def judge_equal(reports: Sequence[Report], here: Host, inside: bool = False) -> Verdict:
    """Python, packages and vqscale's own code, the same on all nodes as here.

    Args:
        reports: of the nodes.
        here: the machine that asks.
        inside: the nodes were asked inside a container. Python and packages are then those of the image, and the same
            on all nodes; the code has to be the one that has checked the recipe.
    """
    mine, other = _versions(here), dict[str, str]()
    place = "here"
    if inside:
        mine, place = {**_versions(reports[0].host), _CODE: mine[_CODE]}, f"on {reports[0].node}"
    for report in reports:
        there = _versions(report.host)
        for name in there.keys() | mine.keys():
            if there.get(name) != mine.get(name):
                where = "here" if name == _CODE else place
                lacks = f"{name} {there.get(name, 'is missing')} on {report.node}, {mine.get(name, 'missing')} {where}"
                other.setdefault(name, lacks)
    # Those first of which the rest follows.
    order = sorted(other, key=lambda name: (name not in _FIRST, name))
    value = "; ".join(other[name] for name in order[:3]) + (f"; {len(order) - 3} more" if len(order) > 3 else "")
    return expect(
        "equal versions",
        ALL,
        not other,
        value or f"{len(mine) - 2} packages{' on all nodes,' if inside else ' and'} the code as here",
        mend="make the image anew from this code" if inside else _ONE_ENVIRONMENT,
    )


def _versions(host: Host) -> dict[str, str]:
    return {"Python": host.python, _CODE: host.code[:8], **host.packages}


def judge_shared(reports: Sequence[Report], sees: Sequence[str]) -> Verdict:
    """The folder of runs: every machine has to see what every other one wrote."""
    names = [report.node for report in reports]
    faults = [f"{report.node} cannot write: {report.token_fault}" for report in reports if report.token_fault]
    faults += [f"{ASKER} does not see what {name} wrote" for name in names if name not in sees]
    for report in reports:
        unseen = [name for name in (ASKER, *names) if name not in report.sees]
        faults += [f"{report.node} does not see what {', '.join(unseen)} wrote"] if unseen else []
    folder = reports[0].folder.path
    return expect(
        "shared folder",
        ALL,
        not faults,
        "; ".join(faults[:3]) or f"{folder}: each sees the others' files",
        mend="put runs on a file system that all nodes mount at the same path: $VQSCALE_RUNS",
    )


def judge_meeting(reports: Sequence[Report], profile: Profile) -> Verdict:
    """Whether torch's agents and the ranks found each other, over the profile's network."""
    faults = [f"{r.node}: port {r.port_fault}" for r in reports if r.port_fault]
    faults += [f"{r.node}: {r.torch.fault}" for r in reports if r.torch.fault]
    faults += [f"{r.node}: {r.meeting_fault}" for r in reports if r.meeting_fault]
    faults += [f"{r.node}: the sum is wrong" for r in reports if r.meeting and not r.meeting.right]
    met = [report.meeting for report in reports if report.meeting]
    value = f"{met[0].world} ranks over {met[0].backend} after {max(m.joined_s for m in met):.1f} s" if met else ""
    return expect(
        "rendezvous",
        ALL,
        not faults,
        "; ".join(faults[:2]) or value,
        mend="open the nodes' ports 20000 to 29999 and those above 32768 to each other, and set GLOO_SOCKET_IFNAME and "
        f"NCCL_SOCKET_IFNAME in profile {profile.name}",
    )


def judge_bandwidth(reports: Sequence[Report], profile: Profile) -> Verdict:
    """All-reduce against the profile's floor."""
    met = [report.meeting for report in reports if report.meeting]
    if not met:
        return Verdict("all-reduce", ALL, "n/a", "the ranks did not meet")
    slowest = min(meeting.gb_s for meeting in met)
    mend = "see NCCL_DEBUG=INFO for the network that was taken; leave slow nodes out (slurm.exclude)"
    return at_least("all-reduce", ALL, slowest, profile.floors.all_reduce_gb_s, "GB/s", mend)


def judge_clock(where: str, ahead: float) -> Verdict:
    """A node's clock against the one of the machine that asks."""
    word: Word = "ok" if abs(ahead) < _CLOCK_WARN_S else "warn" if abs(ahead) < _CLOCK_FAIL_S else "FAIL"
    value = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine"
    mend = "" if word == "ok" else "start chronyd or systemd-timesyncd there: logs are merged by time, S3 checks it"
    return Verdict("clock offset", where, word, value, f"less than {_CLOCK_WARN_S:g} s", mend)


def _judge_node(report: Report, profile: Profile, ahead: float | None) -> list[Verdict]:
    where, floors = report.node, profile.floors
    section = profile.slurm or profile.kubernetes
    wanted = section.gpus_per_node if section else 0
    found = [
        *judge_gpus(where, report.gpus, report.torch.gpus, wanted, built=bool(report.torch.cuda)),
        *judge_host(where, report.host),
        *judge_interfaces(where, report.host, profile.environment),
        *judge_folder(where, report.folder, floors.write_mb_s),
    ]
    if profile.kubernetes:
        found.append(Verdict("clock offset", where, "n/a", "what pods say comes when they have ended"))
    elif ahead is not None:
        found.append(judge_clock(where, ahead))
    if report.reading is not None:
        found.append(_judge_reading(report, profile))
    return found


def _judge_reading(report: Report, profile: Profile) -> Verdict:
    reading = report.reading
    assert reading is not None
    if reading.fault:
        return Verdict("read shards", report.node, "FAIL", reading.fault, mend="check --shards and its credentials")
    mend = f"copy the shards nearer, or set data.remote.cache ({reading.url})"
    return at_least("read shards", report.node, reading.mb_s, profile.floors.read_mb_s, "MB/s", mend)
