"""The recipe: every fault is one line that names the key and the mend."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from cluster.profile import Profile
from launcher.cli import main
from launcher.recipes import recipe_names
from tests.recipes import tiny_recipe, tiny_tree, write_recipe
from vqscale.config.load import dump_yaml, load_recipe, parse
from vqscale.config.plain import load_yaml
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError

DELETE = object()


def tree_with(key: str, value: Any) -> dict[str, Any]:
    """The tiny recipe's tree with one dotted key set, added or deleted."""
    tree: dict[str, Any] = tiny_tree()
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    if value is DELETE:
        del node[last]
    else:
        node[last] = value
    return tree


def fault(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse(Recipe, tree, "r.yaml")
    return one_line(caught.value)


def one_line(error: UserError) -> str:
    line = str(error)
    assert len(line.splitlines()) == 1
    assert line == line.strip()
    return line


def override_fault(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return one_line(caught.value)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "r.yaml")


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    shards = {"data__clocks": None, "data__train": "s3://b/train", "data__validation": "ünï/val"}
    for number, recipe in enumerate((tiny_recipe(), tiny_recipe(**shards))):
        path = tmp_path / f"{number}.yaml"
        path.write_text(dump_yaml(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe
        assert dump_yaml(load_recipe(path)) == dump_yaml(recipe)


def test_packaged_recipes_are_valid() -> None:
    from launcher.recipes import find_recipe

    shards = ("data.train=a", "data.validation=b")
    for name in recipe_names():
        drawn = "clocks" in yaml.safe_load(find_recipe(name).read_text())["data"]
        recipe = load_recipe(find_recipe(name), () if drawn else shards)
        assert recipe.name == name
        assert "quickstart" in recipe_names()


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny_recipe().tokenizer.hidden = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sed", 1, "r.yaml: unknown key 'sed'; did you mean 'seed'? valid keys: name, seed, data"),
        ("tokenizer.hiden", 1, "unknown key 'tokenizer.hiden'; did you mean 'tokenizer.hidden'?"),
        ("tokenizer.training.lerning_rate", 1, "did you mean 'tokenizer.training.learning_rate'?"),
        ("tokenizer.levels.1.code", 1, "did you mean 'tokenizer.levels.1.codes'?"),
        ("data.clocks.shard", 1, "did you mean 'data.clocks.shards'?"),
        ("tokenizer.quantizer", {"zzzzzz": 1}, "unknown key 'tokenizer.quantizer.zzzzzz'; valid keys: decay"),
        ("tokenizer.training.steps", "many", "'tokenizer.training.steps' is 'many' (a str); input should be a valid"),
        ("tokenizer.training.steps", 1.5, "'tokenizer.training.steps' is 1.5"),
        ("tokenizer.training.steps", None, "'tokenizer.training.steps' is None"),
        ("tokenizer.training.steps", 0, "'tokenizer.training.steps' is 0 (a int); input should be greater than or eq"),
        ("tokenizer.training.precision", "fp16", "'fp32', 'bf16' or 'auto'"),
        ("tokenizer.levels", [], "'tokenizer.levels' is []"),
        ("tokenizer.levels", 3, "'tokenizer.levels' is 3"),
        ("tokenizer.levels.0.downsample", 3, "2, 4, 8 or 16"),
        ("tokenizer.levels.0.codes", 65_537, "less than or equal to 65536"),
        ("tokenizer", 3, "'tokenizer' is 3"),
        ("data.error_budget", 2, "'data.error_budget' is 2"),
        ("name", "a/b", "'name' is 'a/b'"),
        ("prior.training.steps", DELETE, "key 'prior.training.steps' is missing; set prior.training.steps"),
        ("prior", DELETE, "key 'prior' is missing"),
        ("data.image_size", 18, "18 is not divisible by 8, the product of tokenizer.levels.*.downsample"),
        ("data.image_size", 18, "use 16 or 24"),
        ("data.image_size", 5, "use 8"),
        ("prior.networks.0.heads", 3, "prior.networks.0 width 16 is not divisible by heads 3"),
        ("prior.networks.0.width", "w", "'prior.networks.0.width' is 'w' (a str); input should be a valid integer"),
        ("prior.networks.0.kind", "rnn", "'prior.networks.0.kind' is 'rnn'; use 'transformer', 'pixelcnn'"),
        ("prior.networks", [3], "'prior.networks.0.kind' is '3'; use 'transformer'"),
        ("prior.networks.0.with", 3, "'prior.networks.0.with'; did you mean 'prior.networks.0.width'? valid"),
        ("prior.networks", [], "'prior.networks' is []"),
        ("prior.networks", [{}, {}, {}], "prior.networks model 3 levels, the tokenizer has 2; change"),
        ("prior.networks.0.levels", 1, "prior.networks model 1 levels, the tokenizer has 2"),
        ("prior.networks", [{"kind": "uniform"}, {}], None),
        ("prior.layers", 6, "unknown key 'prior.layers'; did you mean 'prior.networks.0.layers'?"),
        ("tokenizer.codes", 6, "did you mean 'tokenizer.levels.0.codes'?"),
        ("prior.label_smoothing", 1, "'prior.label_smoothing' is 1"),
        ("tokenizer.training.global_batch", 3, "tokenizer.training.global_batch 3 is not divisible by"),
        ("prior.training.global_batch", 7, "resources.processes 1 × data.packet 2; use a multiple of 2"),
        ("resources.processes", 3, "data.streams 2 is not divisible by resources.processes 3"),
        ("resources.processes", 2, None),
        ("tokenizer.losses", {"adversarial": {"start": 0, "layers": 2}}, None),
        ("tokenizer.losses", {"adversarial": {"start": 0, "layers": 3}}, "adversarial needs images of 24 pixels, data"),
        ("tokenizer.losses", {"perceptual": {"weights": "w"}}, None),
        ("tokenizer.losses", {"perceptual": {"weights": []}}, "tokenizer.losses.perceptual.weights"),
        ("data.train", "x", "data has both `clocks` and shards; remove"),
        ("data.clocks", None, "data names no data: set `train` and `validation`, or `clocks`, or `codes`"),
        ("tokenizer.levels.1.name", "bottom", "levels carry the same name twice (bottom, bottom)"),
        ("tokenizer.levels.1.name", "Top!", "'tokenizer.levels.1.name' is 'Top!'"),
    ],
)  # fmt: skip
def test_faults_name_key_and_mend(key: str, value: Any, expected: str | None) -> None:
    tree = tree_with(key, value)
    if expected is None:
        parse(Recipe, tree, "r.yaml")
    else:
        assert expected in fault(tree)


def test_a_size_that_is_named_divides() -> None:
    for size in (9, 18, 30, 33):
        words = fault(tree_with("data.image_size", size)).partition("; use ")[2]
        for near in words.split(" or "):
            assert parse(Recipe, tree_with("data.image_size", int(near)), "r.yaml").levels[-1].grid == int(near) // 8


def test_several_faults_are_counted_and_unknown_keys_come_first() -> None:
    tree = tree_with("prior.training.steps", DELETE)
    tree["prior"]["training"]["step"] = 8
    tree["prior"]["networks"][0]["width"] = "wide"
    line = fault(tree)
    assert "unknown key 'prior.training.step' (2 more below it); did you mean 'prior.training.steps'?" in line


def test_long_values_are_not_quoted() -> None:
    assert "'tokenizer.hidden' is a list;" in fault(tree_with("tokenizer.hidden", list(range(1000))))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\ndata: {image_size: 16\nseed: 1\n", "r.yaml, line 3: is not YAML"),
        ("name: [a\n", "is not YAML"),
        ("\tname: a\n", "line 1: is not YAML"),
        ("when: 2024-13-45\n", "is not YAML (month must be in 1..12"),
        ("name: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("seed: 1\nname: a\nseed: 2\n", "r.yaml, line 3: is not YAML ('seed' stands there twice)"),
        ("data: {streams: 1, packet: 2, streams: 3}\n", "line 1: is not YAML ('streams' stands there twice)"),
        ("- a\n- b\n", "holds no settings"),
        ("", "holds no settings"),
        ("just words", "holds no settings"),
        ("1: 2\n", "r.yaml: "),
    ],
)
def test_files_that_are_no_recipe(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert expected in override_fault(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in override_fault(tmp_path / "none.yaml")
    assert "cannot be read" in override_fault(tmp_path)
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in override_fault(tmp_path / "r.yaml")


def test_overrides_act(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "seed=7",
            "name=other",
            "tokenizer.levels.0.codes=256",
            "tokenizer.quantizer.restarts=off",
            "extract.batch=3",
            "prior.training.betas=[0.8, 0.9]",
            "prior.networks.0.layers=6",
            "sample.temperature=1e-1",
        ],
    )
    assert recipe.seed == 7
    assert [level.codes for level in recipe.tokenizer.levels] == [256, 16]
    assert (recipe.extract.batch, recipe.extract.block) == (3, 8)
    assert recipe.prior.training.betas == (0.8, 0.9)
    assert recipe.prior.networks[0].sizes.items() >= {"layers": 6, "width": 16, "heads": 2, "dropout": 0.0}.items()
    assert recipe.sample.temperature == 0.1
    assert recipe.tokenizer.quantizer.restarts is False
    assert recipe.name == "other"


def test_texts_that_look_like_numbers_of_yaml_1_1_stay_texts(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["name=010"]).name == "010"
    path = recipe_file.with_name("again.yaml")
    path.write_text(dump_yaml(load_recipe(recipe_file, ["name=010"])))
    assert load_recipe(path).name == "010"
    plain = "a: [0, -3, +4, 1_000, 0x1f, 0b11, 1.5, .5, 1.5e+3, -.inf, 010, 1:30, 1:30.5]\nb: [1]"
    assert load_yaml(plain)["a"] == [0, -3, 4, 1000, 31, 3, 1.5, 0.5, 1500.0, -math.inf, "010", "1:30", "1:30.5"]
    assert load_yaml("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}")["d"] == {"b": 3, "c": 2}, "a merged key is no second one"


def test_the_last_override_wins(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


def test_a_section_can_be_replaced(recipe_file: Path) -> None:
    shards = ["data.clocks=null", "data.train=a=b", "data.validation=c"]
    assert load_recipe(recipe_file, shards).data.train == "a=b"
    assert load_recipe(recipe_file, ["evaluate={batch: 3}"]).evaluate.batch == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "'seed' is no override; write dotted.key=value"),
        ("=3", "is no override"),
        ("sed=3", "did you mean 'seed'?"),
        ("tokenizer.levels.2.codes=3", "'2' is no item of a list of 2; use 0 to 1"),
        ("tokenizer.levels.-1.codes=3", "'-1' is no item of a list"),
        ("tokenizer.levels.².codes=3", "'²' is no item of a list"),
        ("tokenizer.levels.bottom.codes=3", "'bottom' is no item of a list"),
        ("tokenizer.levels.7=3", "'7' is no item of a list"),
        ("name.x=3", "'name' is a single value and has no settings below it"),
        ("seed.x=3", "'seed' is {"),
        ("seed=[1", "the value '[1' is not YAML; quote it"),
        ("seed=010", "seed is 010; write a number without zeros before it"),
        ("seed='010'", "seed is 010; write"),
        ("seed=1:30", "'seed' is '1:30' (a str); input should be a valid integer"),
        ("seed=-1", "'seed' is -1 (a int); input should be greater than or equal to 0"),
        ("tokenizer.training.micro_batch=true", "tokenizer.training.micro_batch is true; write a number"),
        ("evaluate={batch: 3, batch: 4}", "is not YAML"),
        ("seed=2024-13-45", "is not YAML"),
        ("seed={", "is not YAML"),
        ("seed=" + "[" * 5000, "is not YAML"),
        ("seed=one\ntwo", "'seed' is 'one two'"),
        ("data..x=1", "unknown key 'data.'"),
        (".=1", "unknown key ''"),
        ("evaluate.batch.deep=1", "evaluate.batch.deep: 'batch' is a single value"),
        ("prior.training.steps=!!python/name:os.system", "is not YAML"),
    ],
)
def test_faulty_overrides(override: str, expected: str, recipe_file: Path) -> None:
    assert expected in override_fault(recipe_file, override)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["seed=3", "resources.processes=0"], "resources.processes=0"),
        (["resources={processes: 0}", "seed=3"], "resources={processes: 0}"),
        (["seed=1", "seed=x"], "seed=x"),
        (["sed=3"], "sed=3"),
        (["prior.networks.0.kind=rnn"], "prior.networks.0.kind=rnn"),
        (["prior.training={global_batch: 8}"], "prior.training={global_batch: 8}"),
        (["resources.processes=5"], "resources.processes=5"),
        (["tokenizer.quantizer.continuous_steps=9", "seed=1"], "tokenizer.quantizer.continuous_steps=9"),
        (["tokenizer.training.steps=3", "tokenizer.quantizer.continuous_steps=2", "seed=-1"], "seed=-1"),
        (["tokenizer.levels.1.name=bottom"], None),
        (["data.image_size=18"], "data.image_size=18"),
    ],
)
def test_the_place_of_a_fault_is_the_override_that_made_it(
    overrides: list[str], where: str | None, recipe_file: Path
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, overrides)
    assert caught.value.where == (where or str(recipe_file))


def test_the_place_of_a_fault_in_the_file_stays_the_file(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", tokenizer__hidden="wide")
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["seed=3", "tokenizer.training.steps=9"])
    assert caught.value.where == str(path)
    assert len(override_fault(write_recipe(path), "name=" + "x" * 5000)) < 300


def test_newlines_never_give_two_lines(recipe_file: Path) -> None:
    for text in ("seed=a\nb", "se\ned=1", "se\u2028ed=1", 'name="a\\nb"', 'data={"a\\nb": 1}', "a\r\nb"):
        override_fault(recipe_file, text)
    assert len(str(UserError("a\nb", where="c\rd", mend="e\u2029f")).splitlines()) == 1


def keys_of(model: Any) -> Iterator[str]:
    if isinstance(model, dict):
        for key, value in model.items():
            yield key
            yield from (f"{key}.{rest}" for rest in keys_of(value))
    elif isinstance(model, list):
        for number, value in enumerate(model):
            yield str(number)
            yield from (f"{number}.{rest}" for rest in keys_of(value))


def test_any_wrong_override_is_a_user_error(recipe_file: Path) -> None:
    """Keys cut, doubled, joined and spiked, with all kinds of values: a recipe or one line, never a traceback."""
    rng, refused = random.Random(0), 0
    keys = list(keys_of(tiny_recipe().model_dump(mode="json")))
    values = [
        "1",
        "-1",
        "x",
        "",
        "null",
        "[]",
        "{}",
        "[[1]]",
        "{a: 1}",
        "1e400",
        ".nan",
        "~",
        "'",
        "*a",
        "&a [*a]",
        "?",
        "\x00",
    ]
    for _ in range(600):
        key = rng.choice(keys)
        place = rng.randrange(len(key) + 1)
        spiked = key[:place] + rng.choice([".", "..", "x", "0", "²", " ", "\n", "é", "_", "[", "-1."]) + key[place:]
        try:
            load_recipe(recipe_file, [f"{rng.choice([key, spiked, key[place:]])}={rng.choice(values)}"])
        except UserError as error:
            one_line(error)
            refused += 1
    assert refused > 300


def test_faults_leave_exit_code_2(recipe_file: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override in ("tokenizer.hiden=3", "tokenizer.hidden=wide", "data.image_size=18", "seed=[", "nonsense"):
        assert main(["plan", str(recipe_file), override]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert printed.err.startswith("error: ")
    recipe_file.write_text(yaml.safe_dump({"name": "a"}))
    assert main(["plan", str(recipe_file)]) == 2


@pytest.mark.parametrize("root", [Recipe, Profile])
def test_every_setting_is_described(root: type[BaseModel]) -> None:
    schema = root.model_json_schema()
    sections = {root.__name__: schema, **schema["$defs"]}
    for name, section in sections.items():
        assert section["description"], name
        assert section["additionalProperties"] is False
        for key, entry in section["properties"].items():
            assert entry.get("description", "").strip().endswith((".", ")", "`")), f"{name}.{key}"
