"""When a stage goes back into the queue, by the class of its failure and what happened before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from launcher.retry import Limits, Try, classify, in_a_row, left_out, pause, progress, refusal
from pipelines.outcome import kind_of
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.events import EventLog
from vqscale.training.guards import DivergedError

LIMITS = Limits(requeues=6, retries=3, pause_s=30)
KINDS = ("user", "diverged", "preempted", "node", "network", "hang", "unknown")


def tries(*steps: int | None, kind: str = "hang") -> list[Try]:
    return [Try(number, kind, step, "") for number, step in enumerate(steps, 1)]


@pytest.mark.parametrize(
    ("kind", "step", "earlier", "expected"),
    [
        ("user", 9, [], "it would fail again"),
        ("diverged", 9, [], "it would fail again"),
        ("preempted", None, [], ""),
        ("preempted", 0, tries(None, kind="preempted"), ""),
        ("preempted", None, tries(None, kind="preempted"), "no progress"),
        ("preempted", None, tries(4, kind="preempted"), "no progress"),
        ("preempted", 4, tries(4, kind="preempted"), "no progress"),
        ("preempted", 5, tries(4, kind="preempted"), ""),
        ("preempted", 9, tries(1, 2, 3, 4, 5, 6, kind="preempted"), "limit of 6"),
        ("preempted", 4, tries(4), ""),  # a failure before says nothing about its pace
        ("hang", None, tries(None, None), ""),
        ("hang", None, tries(None, None, None), "failed 4 times in a row without progress"),
        ("node", 8, tries(4, 4, 4), ""),  # a checkpoint came between
        ("network", 8, tries(4, 8, 8, 8), "failed 4 times in a row"),
        ("hang", 9, tries(1, 2, 3, 4, 5, 6), "limit of 6"),
        ("unknown", 4, [], ""),
        ("unknown", 4, tries(4, kind="unknown"), "failed 2 times in a row"),
        ("unknown", 4, tries(4, kind="preempted"), ""),
        ("unknown", 8, tries(4, kind="unknown"), ""),
    ],
)
def test_when_a_stage_goes_on(kind: str, step: int | None, earlier: Sequence[Try], expected: str) -> None:
    told = refusal(kind, step, earlier, LIMITS)
    assert expected in told
    assert bool(told) == bool(expected)


@given(st.lists(st.tuples(st.sampled_from(KINDS[2:]), st.none() | st.integers(0, 3)), min_size=9, max_size=9))
def test_nothing_goes_on_for_ever(ends: list[tuple[str, int | None]]) -> None:
    """Whatever kinds of failures come: a job that gets nowhere stops after retries + preemptions, at most requeues."""
    earlier: list[Try] = []
    for kind, step in ends:
        if refusal(kind, step, earlier, LIMITS):
            break
        earlier.append(Try(len(earlier) + 1, kind, step, ""))
    assert len(earlier) <= LIMITS.requeues
    stuck = [Try(number, kind, None, "") for number, (kind, _) in enumerate(ends)]
    assert any(refusal(kind, None, stuck[:n], LIMITS) for n, (kind, _) in enumerate(ends))


def test_pauses_double_up_to_a_quarter_of_an_hour() -> None:
    assert [pause("hang", failed, LIMITS) for failed in (0, 1, 2, 9)] == [30, 60, 120, 900]
    assert pause("preempted", 0, LIMITS) == 0
    assert in_a_row(4, [*tries(4, 4), *tries(4, kind="preempted"), *tries(4)]) == 1


def test_progress_is_what_need_not_be_done_again(tmp_path: Path) -> None:
    """Of a training its newest checkpoint, which the log of the steps behind it says nothing about."""
    layout = RunLayout(tmp_path)
    assert progress(layout, "tokenizer") is None
    for stage in ("tokenizer", "extract"):
        log = EventLog(layout.events(stage), stage, 1, "images/s", 9)
        log.log(3)
        assert progress(layout, stage) == (None if stage == "tokenizer" else 3)
        log.note("checkpoint", 4)
        log.log(7)
        log.close()
    assert (progress(layout, "tokenizer"), progress(layout, "extract")) == (4, 7)


@pytest.mark.parametrize(
    ("failure", "down", "kind", "suspects"),
    [
        ({"kind": "user"}, ["a"], "user", ()),
        ({"kind": "diverged"}, ["a"], "diverged", ()),
        ({"kind": "hang", "suspects": ["b"]}, [], "hang", ("b",)),
        ({"kind": "device", "suspects": ["b"]}, [], "node", ("b",)),
        ({"kind": "network"}, ["a"], "node", ("a",)),
        ({"kind": "network"}, [], "network", ()),
        ({"kind": "error"}, [], "unknown", ()),
        (None, [], "unknown", ()),
        (None, ["a"], "node", ("a",)),
    ],
)
def test_classes(failure: dict[str, object] | None, down: list[str], kind: str, suspects: tuple[str, ...]) -> None:
    found = classify(failure, "why", down)
    assert (found.kind, found.suspects) == (kind, suspects)
    assert found.message.endswith("why")


def test_a_suspect_is_left_out_while_enough_nodes_remain() -> None:
    nodes = ["a", "b", "c"]
    assert left_out(["b"], nodes, [], 2) == ["b"]
    assert left_out(["b"], nodes, [], 3) == []
    assert left_out(["b"], nodes, ["a"], 2) == []
    assert left_out(["b"], nodes, ["b"], 1) == [], "it is already"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("x"), "user"),
        (DivergedError("x"), "diverged"),
        (dist.DistNetworkError("x"), "network"),
        (dist.DistStoreError("x"), "network"),
        (ConnectionResetError("x"), "network"),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "network"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "device"),
        (RuntimeError("shapes do not fit"), "error"),
        (OSError("disk"), "error"),
    ],
)
def test_errors_are_told_apart(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def test_a_lost_rank_is_a_matter_of_the_network(tmp_path: Path) -> None:
    """Gloo's own words, from real ranks: one dies, the other says what `kind_of` calls network."""
    from tests.ranks import RanksFailedError, run_ranks

    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, lose_a_rank)
    assert "kind: network" in caught.value.tracebacks[0]


def lose_a_rank() -> None:
    import os

    from vqscale.training.distributed import process_group

    with process_group("cpu", 30) as ranks:
        ranks.barrier()
        if not ranks.first:
            os._exit(9)
        try:
            ranks.barrier()
        except Exception as error:
            raise AssertionError(f"kind: {kind_of(error)}, {type(error)}: {error}") from error
