"""Families: lists and their refusals, the sweep that is made of one, what members share, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import family as families
from launcher import sweeper
from launcher.backends import slurm_queue
from launcher.cli import main
from launcher.family import load_family, make_family_plan
from launcher.handover import check_handover
from launcher.recipes import RECIPES, family_names
from launcher.state import RunState
from launcher.status import read_status
from launcher.sweep import Sweep
from tests.recipes import write_recipe
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json
from vqscale.stages import TRAINED

UNIFORM: dict[str, Any] = {"prior.networks": [{"kind": "uniform"}]}
VAE: dict[str, Any] = {
    "tokenizer": {
        "kind": "vae",
        "levels": [{"name": "bottom", "downsample": 4, "channels": 2}],
        "hidden": 8,
        "residual_blocks": 1,
        "residual_hidden": 4,
        "training": {"global_batch": 16, "learning_rate": 1e-3},
    },
    "prior.networks": [{"kind": "normal"}],
}


def tree(**changed: Any) -> dict[str, Any]:
    members = [
        {"name": "learned", "recipe": "tiny.yaml", "about": "a transformer"},
        {"name": "uniform", "recipe": "tiny.yaml", "overrides": UNIFORM},
        {"name": "vae", "recipe": "tiny.yaml", "overrides": VAE},
    ]
    budget = {"tokenizer": 32, "prior": 64}
    return {"family": "tiny", "budget": budget, "overrides": {"seed": 3}, "members": members} | changed


def write_list(folder: Path, **changed: Any) -> str:
    """A list beside the tiny recipe; not checked, so that faults can be planted."""
    write_recipe(folder / "tiny.yaml")
    (folder / "list.yaml").write_text(yaml.safe_dump(tree(**changed), sort_keys=False))
    return str(folder / "list.yaml")


@pytest.fixture
def words(home: Path) -> list[str]:
    return ["family", write_list(home), "--out", str(home / "kin")]


def test_steps_follow_from_the_budget(home: Path) -> None:
    path = write_list(home)
    family, more = load_family(Path(path), ["budget.prior=128", "sample.per_class=3"])
    assert more == ["sample.per_class=3"]
    made = make_family_plan(family, home, home / "kin", overrides=more)
    recipes = [plan.job.recipe for plan in made.plans]
    assert [recipe.tokenizer.training.steps for recipe in recipes] == [4, 4, 2], "batches of 8, 8 and 16"
    assert [recipe.prior.training.steps for recipe in recipes] == [16] * 3
    assert {recipe.seed for recipe in recipes} == {3}
    assert {recipe.sample.per_class for recipe in recipes} == {3}
    for plan in made.plans:
        for stage in TRAINED:
            training = getattr(plan.job.recipe, stage).training
            assert training.steps * training.global_batch == getattr(family.budget, stage)


def test_what_is_equal_is_done_once(home: Path) -> None:
    family, _ = load_family(Path(write_list(home)), [])
    learned, uniform, vae = make_family_plan(family, home, home / "kin").plans
    assert learned.shares is None
    assert uniform.shares
    assert uniform.shares.run.name == "kin.learned"
    assert uniform.job.stages == ("prior", "sample", "evaluate")
    assert vae.shares
    assert vae.shares.stages == ("generate", "pack"), "other latents, the same images"
    family, _ = load_family(Path(write_list(home, overrides={"resources.checkpoints": str(home / "far")})), [])
    _, uniform, _ = make_family_plan(family, home, home / "kin").plans
    assert uniform.shares
    assert uniform.shares.stages == ("generate", "pack"), "checkpoints elsewhere lie in a folder for each run"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"membres": []}, "unknown key 'membres'; did you mean 'members'? valid keys: family, about, budget"),
        ({"budget": {"tokenizer": 32, "priro": 64}}, "did you mean 'budget.prior'? valid keys: tokenizer, prior"),
        ({"budget": {"tokenizer": 32}}, "key 'budget.prior' is missing"),
        ({"budget": {"tokenizer": 30, "prior": 64}}, "30 images are no multiple of tokenizer.training.global_batch 8"),
        ({"members": [{"name": "a", "recipe": "tiny.yaml", "overides": {}}]}, "did you mean 'members.0.overrides'?"),
        ({"members": [{"name": "a", "recipe": "tiny.yaml"}] * 2}, "two are called 'a'"),
        ({"members": [{"name": "A b", "recipe": "tiny.yaml"}]}, "'members.0.name' is 'A b'"),
        ({"members": [{"name": "a", "recipe": "quickstrat"}]}, "member a, quickstrat: no such recipe; did you mean"),
        ({"overrides": {"tokenizer.hiden": 3}}, "did you mean 'tokenizer.hidden'?"),
        ({"overrides": {"prior.training.steps": 3}}, "prior.training.steps follows from the budget; set budget.prior"),
        ({"members": [{"name": "a", "recipe": "tiny.yaml", "overrides": {"prior": {"training": {"steps": 1}}}}]},
         "members.0.overrides: prior.training.steps follows"),
        ({"members": [*tree()["members"], {"name": "b", "recipe": "tiny.yaml", "overrides": {"data.image_size": 32}}]},
         "member b, data.image_size: is 32, but 16 in the first member"),
    ],
)  # fmt: skip
def test_faults_are_one_line(
    home: Path, changed: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["family", write_list(home, **changed), "--out", str(home / "kin")]) == 2
    line = capsys.readouterr().err
    assert expected in line
    assert line.count("\n") == 1
    assert not (home / "kin").exists(), "nothing is made"


def test_words_that_do_not_go_together(words: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in [
        ([*words, "--members", "lerned"], "no member 'lerned'; members: learned, uniform, vae"),
        ([*words, "tokenizer.training.steps=4"], "tokenizer.training.steps: follows from the budget"),
        ([*words, "--at-most", "0"], "use 1 or more"),
        ([*words, "--follow", "--json"], "exclude each other"),
        ([*words, "--plan", "--follow"], "not allowed with"),
        (["family", "clcoks"], "did you mean 'clocks'?"),
        (["family", str(home), "--page"], "is no folder of a family"),
    ]:
        assert main(argv) == 2
        assert expected in capsys.readouterr().err


def test_the_plan_makes_nothing(words: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--plan"]) == 0
    text = capsys.readouterr().out
    assert "32 images for each tokenizer, 64 for each prior" in text
    assert "uniform  prior, sample, evaluate  (generate, pack, tokenizer, extract of kin.learned)\n" in text
    assert main([*words, "--plan", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["members"]] == ["learned", "uniform", "vae"]
    assert not (home / "kin").exists()


def end(layout: RunLayout, word: str, message: str = "") -> None:
    """As if the run had gone through all of its stages, or its first one had failed."""
    state = RunState.read(layout)
    for stage in state.stages if word == "done" else list(state.stages)[:1]:
        state.begin(stage, 1)
        state.end(stage, word, message)  # type: ignore[arg-type]
        if word == "done":
            write_json(layout.done(stage), {"seconds": 1.0})
    state.write(layout)


def test_a_member_reads_what_another_makes(words: list[str], home: Path) -> None:
    assert main([*words, "--prepare-only"]) == 0
    learned, uniform = (RunLayout(home / "kin" / f"kin.{name}") for name in ("learned", "uniform"))
    assert (uniform.root / "codes").readlink() == Path("../kin.learned/codes")
    with pytest.raises(
        UserError, match=r"stage 'generate' of kin\.learned.*has not finished; vqscale requeue kin\.learned"
    ):
        check_handover(uniform, "prior")
    for stage in uniform.read_recipe().stages[:4]:
        write_json(learned.done(stage), {})
    (home / "kin").rename(home / "moved")
    moved = RunLayout(home / "moved" / "kin.uniform")
    assert moved.done("extract").exists(), "links are relative"
    with pytest.raises(UserError, match="codes"):  # now it is the codes themselves that are looked for
        check_handover(moved, "prior")


def test_it_is_a_sweep(words: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--prepare-only", "--members", "learned,vae"]) == 0
    capsys.readouterr()
    sweep = Sweep(**read_json(home / "kin/sweep.json"))
    assert (sweep.runs, sweep.after, sweep.at_most) == (["kin.learned", "kin.vae"], {"kin.vae": "kin.learned"}, 1)
    assert main(["ls", "--name", "kin.*", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert main(["cancel", "kin"]) == 0
    assert capsys.readouterr().out == "kin: 2 runs cancelled\n"


def test_run_again_it_goes_on_with_what_is_missing(
    words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(
        sweeper, "start", lambda folder, sweep, layouts: started.append([layout.root.name for layout in layouts])
    )
    monkeypatch.setattr(families, "write_comparison", lambda folder: None)
    assert main([*words, "--prepare-only", "--members", "learned,uniform"]) == 0
    end(RunLayout(home / "kin/kin.learned"), "done")
    end(RunLayout(home / "kin/kin.uniform"), "failed", "out of luck")
    assert main(words) == 0
    assert started == [["kin.uniform", "kin.vae"]], "one again, and one that is new"
    assert [one["name"] for one in read_json(home / "kin/family.json")["members"]] == ["learned", "uniform", "vae"]
    assert read_status(RunLayout(home / "kin/kin.uniform")).state == "waiting"
    capsys.readouterr()
    assert main([*words, "budget.tokenizer=64"]) == 2
    assert "kin.learned: is there with other settings; choose another --out DIR" in capsys.readouterr().err
    assert main(["family", "kin", "seed=4"]) == 2
    assert "its members and settings are as they were made" in capsys.readouterr().err
    assert main(["family", "kin"]) == 0
    assert started[1] == started[0]


def test_a_queue_waits_for_what_is_shared(
    words: list[str], home: Path, idle_slurm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    def submit(argv: list[str], *rest: Any) -> str:
        sent.extend(word for word in argv if "afterany" in word)
        submit.number += 10  # type: ignore[attr-defined]
        return str(submit.number)  # type: ignore[attr-defined]

    submit.number = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(slurm_queue, "submit", submit)
    assert main([*words, "--on", "devslurm", "--at-most", "2"]) == 0
    assert sent == ["--dependency=afterany:70", "--dependency=afterany:70"], "of seven jobs the last one's, named once"


@pytest.mark.parametrize("name", family_names())
def test_packaged_lists_are_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All members are checked, but for the shards that a user has to pack."""
    monkeypatch.setattr("launcher.plan.check_inputs", lambda recipe: [])
    path = RECIPES / "families" / f"{name}.yaml"
    family, _ = load_family(path, [])
    made = make_family_plan(family, path.parent, tmp_path / "kin")
    kinds = {network.kind for plan in made.plans for network in plan.job.recipe.prior.networks}
    assert {"transformer", "pixelcnn", "recurrent", "uniform", "normal", "realnvp", "maf"} <= kinds
    trained = [plan for plan in made.plans if "tokenizer" in plan.job.stages]
    assert len({str(plan.job.recipe.tokenizer) for plan in made.plans}) == len(trained), "none is trained twice"
