"""The comparison of a family: figures from planted reports, dashes for what is not known, and two runs to the page."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launcher.backends.base import STAGE_MODULES
from launcher.cli import main
from launcher.family import write_comparison
from launcher.handover import check_handover
from launcher.state import RunState
from pipelines.outcome import leave_marker
from tests.test_family import end, words, write_list
from tests.training_helpers import one_process, stage_of
from vqscale.config.layout import RunLayout
from vqscale.evaluation.comparison import Outcome, comparison, estimate
from vqscale.evaluation.comparison_page import DASH, markdown, page, tables
from vqscale.files import read_json

__all__ = ["words"]

REPORT: dict[str, Any] = {
    "bits_per_dim": 4.5,
    "bits_per_dim_error": 0.02,
    "bits_per_dim_is": "VQ bound",
    "bits_per_dim_pixels": 4.3,
    "bits_per_dim_codes": 0.2,
    "bits_per_dim_uniform": 4.6,
    "bits_per_dim_codes_uniform": 0.3,
    "pixel_likelihood": "logistic",
    "codes_likelihood": "exact",
    "mse": 0.003,
    "psnr": 25.25,
    "sharpness_images": 64,
    "sharpness_gradient_energy_reconstructions": 0.75,
    "usage_top": 0.5,
    "usage_bottom": 1.0,
    "seconds": {"tokenizer": 60.5, "prior": 30.0},
}
RECORD: dict[str, Any] = {
    "family": "kin",
    "about": "Some <models>.",
    "budget": {"tokenizer": 12_800, "prior": 6_400},
    "published": [{"model": "VQ-VAE", "bits_per_dim": 4.67, "source": "2017"}],
    "note": "Mind the budget.",
}
MEMBERS = (
    Outcome(
        "one",
        "a|b",
        "kin.one",
        "done",
        report=REPORT,
        stages={
            "tokenizer": {"steps": 400, "parameters": 1_234_567, "seconds": 60.5},
            "prior": {"steps": 0, "parameters": 0},
        },
        batches={"tokenizer": 32, "prior": 64},
    ),
    Outcome("two", "", "kin.two", "failed", "prior: <out of luck>", batches={"tokenizer": 32, "prior": 64}),
)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return comparison(RECORD, MEMBERS)


def test_figures_come_from_reports_and_markers(facts: dict[str, Any]) -> None:
    one, two = facts["members"]
    assert one["images_seen"] == {"tokenizer": 12_800, "prior": 0}
    assert one["parameters"] == {"tokenizer": 1_234_567, "prior": 0}
    assert one["sharpness"] == {"gradient_energy_reconstructions": 0.75}, "how many images is not a figure"
    assert one["bits_per_dim_latents"] == 0.2
    assert one["estimates"] == {}, "parts and baselines of the bound are not other estimates"
    assert json.loads(json.dumps(facts)) == facts
    assert two["bits_per_dim"] is two["estimate"] is two["mse"] is two["sampling_images_per_s"] is None
    assert two["images_seen"] == {"tokenizer": None, "prior": None}
    other = comparison(RECORD, [Outcome("x", "", "r", "done", report={**REPORT, "bits_per_dim_iwae_64": 4.4})])
    assert other["members"][0]["estimates"] == {"iwae_64": 4.4}
    assert "iwae 64" in markdown(other)
    found = {
        "estimate_elbo": 4.6,
        "estimate_elbo_error": 0.1,
        "estimate_iwae_gain": 0.2,
        "estimate_elbo_effective": 9.0,
    }
    best = {"bits_per_dim_best": 4.4, "bits_per_dim_best_error": 0.03, "bits_per_dim_best_is": "IWAE-64 bound"}
    (vae,) = comparison(RECORD, [Outcome("x", "", "r", "done", report={**REPORT, **found, **best})])["members"]
    assert vae["estimates"] == {"elbo": 4.6}
    assert (vae["bits_per_dim_best"], vae["bits_per_dim_best_error"], vae["bits_per_dim"]) == (4.4, 0.03, 4.5)
    assert vae["estimate"] == "IWAE-64 bound, pixels: logistic"


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({}, None),
        (REPORT, "VQ bound, pixels: logistic"),
        ({**REPORT, "bits_per_dim_best_is": "IWAE-64 bound"}, "IWAE-64 bound, pixels: logistic"),
        ({**REPORT, "pixel_likelihood": "exact", "bits_per_dim_is": "exact"}, "exact"),
    ],
)
def test_what_the_likelihood_is(report: dict[str, Any], words: str | None) -> None:
    assert estimate(report) == words


def test_what_is_not_known_is_a_dash(facts: dict[str, Any]) -> None:
    made = {table.title: table for table in tables(facts)}
    assert list(made) == ["Likelihood", "Reconstructions and samples", "Latents", "Cost"]
    for table in made.values():
        one, two = table.rows
        assert len(one) == len(two) == len(table.head)
        assert set(two[1:]) == {DASH}, "of what failed nothing is known"
    likelihood = made["Likelihood"]
    assert likelihood.rows[0][2:7] == ("4.500", "±0.020", "4.500", "0.2000", "4.300")
    assert likelihood.aside == (("VQ-VAE", "published", "4.67", "", "", "", "", "2017"),)
    assert "hours" not in " ".join(made["Reconstructions and samples"].head), "these are no clocks"
    assert made["Latents"].rows[0][2] == "top 50%, bottom 100%"
    cost = dict(zip(made["Cost"].head, made["Cost"].rows[0], strict=False))
    assert cost["parameters: tokenizer"] == "1,234,567"
    assert cost["samples, images/s"] == DASH


def test_the_page_and_its_markdown_say_the_same(facts: dict[str, Any]) -> None:
    html, text = page(facts, [], {}), markdown(facts)
    assert "<models>" not in html
    assert "Some &lt;models&gt;." in html
    assert html.index("failed: prior: &lt;out of luck&gt;") < html.index("<h2>Likelihood</h2>")
    assert "- **two** failed: prior: <out of luck>" in text
    for shown in (html, text):
        assert "12,800 images" in shown
        assert "Mind the budget." in shown
        assert "4.67" in shown
    assert html.count("<tr>") + html.count("<tr ") == 1 + 4 * 3 + 1, "one that is not finished, four tables, one aside"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) >= 4 for line in lines), "the | of a name is no border"


def test_members_that_failed_have_a_place(words: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--prepare-only"]) == 0
    end(RunLayout(home / "kin/kin.learned"), "failed", "out of luck")
    capsys.readouterr()
    assert main(["family", "kin", "--page", "--json"]) == 0
    learned, uniform, _ = json.loads(capsys.readouterr().out)["members"]
    assert (learned["state"], learned["message"]) == ("failed", "generate: out of luck")
    assert (uniform["state"], uniform["shares"]["run"]) == ("waiting", "kin.learned")
    assert not (home / "kin/samples.png").exists()


def test_from_the_list_to_the_page(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages of a member, and those that another has left over: prior, samples and report from its codes."""
    argv = ["family", write_list(home), "--out", str(home / "kin"), "--members", "learned,uniform", "--prepare-only"]
    assert main(argv) == 0
    with one_process(monkeypatch) as ranks:
        for name in ("learned", "uniform"):
            _run(RunLayout(home / "kin" / f"kin.{name}"), ranks)
    write_comparison(home / "kin")
    learned, uniform = read_json(home / "kin/comparison.json")["members"]
    assert learned["mse"] == uniform["mse"]
    assert learned["bits_per_dim_pixels"] == uniform["bits_per_dim_pixels"]
    assert learned["images_seen"] == {"tokenizer": 32, "prior": 64}
    assert uniform["images_seen"] == {"tokenizer": 32, "prior": 0}
    assert min(learned["sampling_images_per_s"], uniform["sampling_images_per_s"]) > 0
    assert set(uniform["seconds"]) == set(learned["seconds"]) == set(STAGE_MODULES)
    assert uniform["state"] == "done"
    sheet = np.asarray(Image.open(home / "kin/samples.png"))
    assert sheet.shape[1] > 12 * 64, "a column for each hour"
    html = (home / "kin/comparison.html").read_text()
    assert html.count("<img ") == 1 + 2 * 2, "the sheet, and two of each member"
    assert 'href="kin.uniform/report.html"' in html


def _run(layout: RunLayout, ranks: Any) -> None:
    """What a supervisor makes processes do, in this one."""
    state = RunState.read(layout)
    for name in state.stages:
        check_handover(layout, name)
        module = importlib.import_module(STAGE_MODULES[name])
        stage = stage_of(name, layout.root, ranks)
        facts = {"stage": name, "attempt": 1, "seconds": 1.0, **module.main(stage)}
        finish = module.finish if name in ("extract", "sample") else None
        leave_marker(layout, name, 1, (lambda parts: finish(stage, parts)) if finish else None, facts)  # noqa: B023
        state.begin(name, 1)
        state.end(name, "done")
    state.write(layout)
