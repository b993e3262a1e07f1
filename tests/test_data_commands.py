"""`vqscale data` as it is typed."""

import contextlib
import io
import json
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

from pipelines.data import main
from tests.data_helpers import image_folder
from tests.foreign_shards import image, img2dataset, numbered, shards, write_tar
from vqscale import storage
from vqscale.data.manifest import read_manifest

ROOT = Path(__file__).parents[1]


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As a program of its own, with next to nothing in its environment."""
    command = [sys.executable, "-P", "-m", "pipelines.data", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The same in this process."""
    words, out, err = [*map(str, arguments)], io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as error:  # as `--help` ends
            code = int(error.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    done = start("pack", image_folder(root / "src"), root / "out", "--size", 8, "--holdout", 6, "--workers", 2)
    assert done.returncode == 0, done.stderr
    where = f"data.train={root}/out/train data.validation={root}/out/validation"
    assert f"\n  vqscale submit cifar10 name=src data.image_size=8 {where} data.streams=1 resources.pro" in done.stdout
    assert "packing: 30 of 30 images" in done.stderr
    return root / "out"


def test_show_counts_and_draws(packed: Path, tmp_path: Path):
    shown = start("show", packed / "train", "--sheet", tmp_path / "sheet.png", "--samples", 9)
    assert shown.returncode == 0, shown.stderr
    assert "24 images of 8×8 in 3 classes" in shown.stdout
    assert "labels: number in .cls, or 'label' in .json" in shown.stdout
    width, height = Image.open(tmp_path / "sheet.png").size
    assert height == 3 * 68 + 4  # a row for each class, its images enlarged to 64 pixels
    assert width > 3 * 68
    found = json.loads(run("show", packed / "train", "--json").stdout)
    assert sum(found["class_counts"].values()) == 24
    assert set(found["class_counts"]) == {"class0", "class1", "class2"}
    assert found["images"] == {"jpeg of 8×8": 24 // found["shards"]}


def test_show_without_classes_draws_tiles(tmp_path: Path):
    shards(tmp_path, {"a.tar": 20, "b.tar": 20})
    assert run("index", tmp_path).returncode == 0
    shown = run("show", f"{tmp_path}/*.tar", "--sheet", tmp_path / "sheet.png", "--samples", 9)
    assert "class (none): 40" in shown.stdout
    assert "first keys: 00000000 (.png), 00000001 (.png), 00000002 (.png)" in shown.stdout
    assert Image.open(tmp_path / "sheet.png").size == (26, 26)  # three by three, a pixel apart


def test_show_lists_the_largest_of_many_classes(tmp_path: Path):
    write_tar(tmp_path / "a.tar", numbered(0, 60, cls=lambda n: b"c%02d" % max(0, n - 30)))
    (tmp_path / "names").write_text("".join(f"c{number:02d}\n" for number in range(40)))
    assert run("index", tmp_path, "--classes", tmp_path / "names").returncode == 0
    lines = run("show", tmp_path).stdout.splitlines()
    assert "  class c00: 31" in lines
    assert len([line for line in lines if line.startswith("  class ")]) == 20
    assert lines[-1] == "  and 20 more, 10 of them without samples"


def test_verify_lists_faults(packed: Path):
    assert start("verify", packed / "train").returncode == 0
    shard = next((packed / "validation").glob("*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[:600] + b"!" + content[601:])
    found = run("verify", packed / "validation", "--json")
    shard.write_bytes(content)
    assert found.returncode == 1
    assert "sha256" in json.loads(found.stdout)["faults"][0]


def test_verify_decodes_on_request(tmp_path: Path):
    broken = {7: image("png")[:60], 8: b"no image"}
    samples = [(key, {"png": broken.get(int(key), fields["png"])}) for key, fields in numbered(0, 100)]
    write_tar(tmp_path / "a.tar", samples[:50])
    write_tar(tmp_path / "b.tar", samples[50:])
    assert run("index", tmp_path).returncode == 0
    assert run("verify", tmp_path).returncode == 0
    found = run("verify", tmp_path, "--decode")
    assert found.returncode == 1
    assert found.stdout.splitlines() == [
        "a.tar: 00000007: corrupt",
        "a.tar: 00000008: format",
        f"{tmp_path}: 2 shards are as their manifest says, 2 of 100 samples are bad "
        "(1 corrupt: cannot be decoded; 1 format: no JPEG, PNG or WebP)",
    ]
    assert "verifying: " in found.stderr
    as_json = json.loads(run("verify", tmp_path, "--decode", "--json", "--threads", 1).stdout)
    assert as_json["bad"] == {"corrupt": 1, "format": 1}
    assert as_json["bad_samples"] == [["a.tar", "00000007", "corrupt"], ["a.tar", "00000008", "format"]]
    assert run("verify", tmp_path / "b.tar", "--decode").returncode == 0


def test_index_says_what_it_found(tmp_path: Path):
    shards(tmp_path / "d", {"a.tar": 6, "b.tar": 4}, cls=lambda n: (b"ox", b"ant")[n % 2])
    done = run("index", "d", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        "  images: 10 .png",
        "  labels: .cls (10 of 10 samples have one)",
        "  classes: ant, ox",
    ]
    assert done.stdout.startswith("d/manifest.json: 10 images of 8×8 in 2 classes, 2 shards")
    assert "indexing: " in done.stderr
    assert run("verify", "d/{a,b}.tar", cwd=tmp_path).stdout == "d/{a,b}.tar: 2 shards are as their manifest says\n"
    assert json.loads(run("show", "d/a.tar", "d/b.tar", "--json", cwd=tmp_path).stdout)["shards"] == 2


def test_index_names_what_will_be_bad(tmp_path: Path):
    samples = [
        *(("0", {"png": image("png"), "cls": b"cat"}), ("1", {"png": image("png"), "cls": b"cow"})),
        *(("2", {"png": image("png")}), ("3", {"cls": b"cat"}), ("/4", {"png": b"none", "cls": b"cat"})),
    ]
    write_tar(tmp_path / "a.tar", samples)
    (tmp_path / "names").write_text("cat\ndog\n")
    done = start("index", tmp_path, "--classes", tmp_path / "names", "--no-hash", "--out", tmp_path / "m.json")
    assert done.returncode == 0
    assert done.stdout.splitlines()[4:] == [
        "  1 have no label",
        "  1 have a bad label, such as cow, which are none of the classes",
        "  1 have no image, such as 3 with .cls",
        "  1 have an absolute key, or one that leads to a parent folder",
        "  1 of 4 images looked at have no header",
    ]
    checked = run("verify", tmp_path / "m.json")
    assert checked.stdout.endswith("1 shards are as their manifest says (1 without a sha256 to compare)\n")


def test_index_of_damaged_shards_writes_only_when_told_to(tmp_path: Path):
    img2dataset(tmp_path, [6, 6])
    (tmp_path / "00001.tar").write_bytes((tmp_path / "00001.tar").read_bytes()[:12_000])
    refused = run("index", tmp_path)
    assert refused.returncode == 1
    first, last = refused.stdout.splitlines()
    assert first.startswith("00001.tar: is cut off")
    assert last.endswith(
        "not written, 1 of 2 shards are damaged; copy them again, or give --keep-damaged to use what is whole of them"
    )
    assert not (tmp_path / "manifest.json").exists()
    as_json = json.loads(run("index", tmp_path, "--json").stdout)
    assert (as_json[0]["written"], list(as_json[0]["damaged"])) == (False, ["00001.tar"])
    assert run("index", tmp_path, "--keep-damaged").returncode == 0
    manifest = read_manifest(tmp_path)
    assert manifest.counts[0] == 6
    assert 0 < manifest.counts[1] < 6
    assert list(manifest.source["damaged"]) == ["00001.tar"]
    checked = run("verify", tmp_path)
    assert checked.returncode == 1
    assert checked.stdout.startswith("00001.tar: is cut off")
    assert run("show", tmp_path, "--sheet", tmp_path / "sheet.png").returncode == 0


def test_index_gives_validation_the_classes_of_training(tmp_path: Path):
    shards(tmp_path / "train", {"a.tar": 9}, cls=lambda n: b"c%d" % (n % 3))
    shards(tmp_path / "val", {"a.tar": 1}, cls=lambda n: b"c2")
    assert run("index", tmp_path / "train").returncode == 0
    assert run("index", tmp_path / "val", "--classes-from", tmp_path / "train").returncode == 0
    assert read_manifest(tmp_path / "val").classes == ("c0", "c1", "c2")
    again = run("index", tmp_path / "train", tmp_path / "val", "--force", "--label", "none", "--json")
    assert [found["classes"] for found in json.loads(again.stdout)] == [[], []]


def test_remote_shards_from_index_to_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = f"memory://{tmp_path.name}/d"
    shards(root, {"a.tar": 6, "b.tar": 4}, cls=lambda n: b"%d" % (n % 2))
    assert main(["index", root]) == 0
    assert main(["verify", f"{root}/b.tar", f"{root}/a.tar", "--decode"]) == 0
    assert main(["show", f"{root}/{{a,b}}.tar", "--sheet", f"{root}/sheet.png"]) == 0
    shown = capsys.readouterr()
    assert "  class 0: 5\n  class 1: 5\n" in shown.out
    assert shown.err.split(":")[0] == "indexing"
    assert "counting: " in shown.err
    assert storage.read_bytes(f"{root}/sheet.png")[1:4] == b"PNG"


def test_faults_are_one_line_with_code_2(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    shards(tmp_path / "d", {"a.tar": 1})
    for arguments in (
        ("pack", tmp_path / "empty", tmp_path / "out", "--size", 8),
        ("pack", packed.parent / "src", packed / "train", "--size", 8),
        ("show", tmp_path / "empty"),
        ("show", packed / "train", "--samples", 0),
        ("verify", packed),
        ("verify", tmp_path / "d"),
        ("verify", packed / "train", "--threads", 0),
        ("index", packed / "train"),
        ("index", tmp_path / "empty"),
        ("index", tmp_path / "d", "--label", "cls"),
        ("index", tmp_path / "d", "--label", "clss"),
        ("index", tmp_path / "d", "--classes", tmp_path / "none"),
        ("index", tmp_path / "d", "--classes", "a", "--classes-from", "b"),
        ("index", tmp_path / "d.tar.gz"),
    ):
        assert main([str(argument) for argument in arguments]) == 2, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("indexing: ")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (("train", "val"), True),
        (("Test", "TRAINING", "valid"), True),
        (("train", "bus"), False),
        (("cat", "dog"), False),
    ],
)
def test_pack_warns_where_parts_of_a_data_set_become_classes(names: tuple[str, ...], warned: bool, tmp_path: Path):
    source = tmp_path / "photos"
    image_folder(source, classes=len(names))
    for number, name in enumerate(names):
        (source / f"class{number}").rename(source / name)
    for more in ((), ("--json",)):
        done = run("pack", source, tmp_path / "out", "--size", 8, "--workers", 1, "--force", *more)
        warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert (done.returncode, len(warnings)) == (0, warned)
        if warned:
            assert f"folders {', '.join(sorted(names))} have become the classes" in warnings[0]
            assert f"({source / min(names)})" in warnings[0]
            assert "--no-classes" in warnings[0]
    alone = run("pack", source, tmp_path / "none", "--size", 8, "--workers", 1, "--no-classes")
    assert "warning: " not in alone.stderr
    assert read_manifest(tmp_path / "none").classes == ()


def test_the_commands_in_recipes_take_the_classes_that_are_meant(tmp_path: Path):
    """What the heads of recipes say about packing, on the layouts that the data sets have."""
    picture = tmp_path / "class0" / "000.png"
    image_folder(tmp_path, classes=1, each=1)
    layouts = {
        "imagenet256": [
            f"ILSVRC2012/{part}/n0144{n}/{n}{i}.JPEG" for part in ("train", "val") for n in "012" for i in "ab"
        ],
        "ffhq1024": [
            f"images1024x1024/{folder:05d}/{folder + i:05d}.png" for folder in (0, 1000, 69000) for i in (0, 1)
        ],
    }
    for recipe, files in layouts.items():
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(picture.read_bytes())
        text = (ROOT / "pipelines" / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
        words = shlex.split(text.partition("vqscale data pack ")[2].partition("\n")[0])
        words[words.index("--size") + 1], words[words.index("--holdout") + 1] = "8", "2"
        done = run("pack", *words, "--workers", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
    found = {recipe: read_manifest(tmp_path / "data" / recipe / "train").classes for recipe in layouts}
    assert found == {"imagenet256": ("n01440", "n01441", "n01442"), "ffhq1024": ()}


def test_help_names_the_command():
    for command in ("pack", "index", "verify", "show"):
        assert f"usage: vqscale data {command}" in run(command, "--help").stdout
