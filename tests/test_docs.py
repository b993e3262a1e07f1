"""The documents are true: their commands and code run, their links lead somewhere, what they name is there.

Every block ```console is executed line by line, with `$ ` before each command, and every block ```python as a whole,
in the order of the document, in a folder of its own that holds the inputs a reader would have. Commands that train
are given a tiny model, by settings put behind them. Excerpts that cannot run alone stand in blocks ```py.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.devslurm import missing
from vqscale.data.codes import CodeBlock, read_code_shard, write_code_shard
from vqscale.data.manifest import CodeLevel

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

TINY = (
    "data.streams=2 data.packet=2 data.shuffle=16 tokenizer.hidden=16 tokenizer.residual_blocks=1 "
    "tokenizer.levels.0.codes=16 tokenizer.levels.1.codes=16 tokenizer.training.steps=4 "
    "tokenizer.quantizer.continuous_steps=0 "
    "tokenizer.training.global_batch=8 "
    "prior.training.steps=4 prior.training.global_batch=8 sample.per_class=2 "
    "resources.processes=1 resources.threads=1 resources.device=cpu"
)
TINY_NETWORK = "prior.networks.0.layers=1 prior.networks.0.width=16 prior.networks.0.heads=2"
TINY_CLOCKS = "data.clocks.train=96 data.clocks.validation=24 data.clocks.shards=4"

BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANY_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
STARTS = re.compile(r"^(make quickstart|vqscale (quickstart|submit|requeue)|torchrun)\b", re.MULTILINE)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[tuple[str, list[str]]]:
    """Language and lines of each block that is executed; of console blocks the commands."""
    found = []
    for language, content in BLOCK.findall(text_of(document)):
        lines = content.splitlines()
        if language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            assert lines, f"{document}: a console block without a command"
        found.append((language, lines))
    return found


def commands_of(document: str) -> str:
    """All commands, a line each."""
    return "\n".join(line for _, lines in blocks(document) for line in lines)


def environment(folder: Path) -> dict[str, str]:
    """The shell's, with the tests' Python first, an index of runs in the folder, and no rank variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VQSCALE_", "TORCHELASTIC_", "PET_")) and name not in ("RANK", "WORLD_SIZE")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"PATH": path, "VQSCALE_HOME": str(folder / ".home")}


@dataclass
class Desk:
    """A folder with what a reader has, and a shell in it."""

    folder: Path
    started: list[str] = field(default_factory=list)
    """Runs that would not end by themselves."""
    exports: dict[str, str] = field(default_factory=dict)
    """Variables that the document has exported."""
    cluster: str = ""
    """Folder of the cluster that was started."""

    def shell(self, command: str, seconds: int = 120) -> str:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=environment(self.folder) | self.exports,
            timeout=seconds,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def fill(self, document: str) -> None:
        """Photographs, and an archive that looks like CIFAR-10, where the document reads them."""
        rng, commands = np.random.default_rng(0), commands_of(document)
        if "photos" in commands:
            self._photographs(rng)
        if "cifar-10.tar.gz" in commands:
            self._archive(rng)
        if "cifar-10-python.tar.gz" in commands:
            official_cifar(self.folder / "cifar-10-python.tar.gz", 420)

    def _photographs(self, rng: np.random.Generator) -> None:
        for number in range(300):
            path = self.folder / "photos" / ("cats", "dogs", "owls")[number % 3] / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((96, 72)).save(path)
        (self.folder / "photos" / "notes.txt").write_text("not an image\n")

    def _archive(self, rng: np.random.Generator) -> None:
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(content, "jpeg")
        with tarfile.open(self.folder / "cifar-10.tar.gz", "w:gz", compresslevel=1) as archive:
            for number in range(2_200):
                member = tarfile.TarInfo(f"cifar-10/class{number % 10}/{number:05d}.jpg")
                member.size = len(content.getvalue())
                archive.addfile(member, io.BytesIO(content.getvalue()))

    def close(self) -> None:
        for run in self.started:
            subprocess.run(["vqscale", "cancel", run], capture_output=True, check=False, env=environment(self.folder))
        if self.cluster:
            self.shell("vqscale cluster down")  # which the document has done, unless it failed
            shutil.rmtree(self.cluster)


def official_cifar(place: Path, each: int) -> dict[str, np.ndarray]:
    """An archive in the layout of CIFAR-10's official one; its training images by batch and number."""
    rng, images = np.random.default_rng(0), {}
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    pickled: dict[str, object] = {"batches.meta": {b"label_names": names, b"num_vis": 3072}}
    for batch in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (each, 32, 32, 3), np.uint8)
        planes = pixels.transpose(0, 3, 1, 2).reshape(each, 3072)
        labels = [number % 10 for number in range(each)]
        pickled[batch] = {b"batch_label": batch.encode(), b"labels": labels, b"data": planes, b"filenames": []}
        images |= {f"{batch}/{number}": image for number, image in enumerate(pixels) if batch != "test_batch"}
    with tarfile.open(place, "w:gz", compresslevel=1) as archive:
        for name, content in pickled.items():
            data = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return images


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make quickstart` starts, small: its run directory."""
    desk = Desk(tmp_path_factory.mktemp("quickstart"))
    printed = desk.shell(f"vqscale quickstart {TINY} {TINY_NETWORK} {TINY_CLOCKS}", seconds=240)
    assert "hour_accuracy" in printed
    assert "sheet.png" in printed
    return (desk.folder / "runs" / "latest").resolve()


@pytest.fixture
def desk(tmp_path: Path, document: str) -> Iterator[Desk]:
    made = Desk(tmp_path)
    made.fill(document)
    yield made
    made.close()


def adopt(desk: Desk, run: Path) -> None:
    """Make a run known here as if it had been started here."""
    (desk.folder / "runs").mkdir(exist_ok=True)
    (desk.folder / "runs" / "latest").symlink_to(run)
    (desk.folder / "runs" / run.name).symlink_to(run)
    shutil.copytree(run.parent.parent / ".home", desk.folder / ".home", dirs_exist_ok=True)


def make(desk: Desk, target: str, request: pytest.FixtureRequest) -> None:
    """A target is looked up, not made; what the quickstart would start has run small."""
    planned = subprocess.run(
        ["make", "--no-print-directory", "-n", target], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert planned.returncode == 0, planned.stderr
    if target == "quickstart":
        assert planned.stdout.splitlines()[-1] == ".venv/bin/vqscale quickstart"
        adopt(desk, request.getfixturevalue("quickstart"))


def execute(desk: Desk, command: str, endless: bool, request: pytest.FixtureRequest) -> None:
    program, *words = command.split()
    if program == "make":
        make(desk, words[0], request)
    elif command == ". .venv/bin/activate":
        assert re.search(r"^VENV +:= \.venv$", text_of("Makefile"), re.MULTILINE)
    elif command.startswith("vqscale cluster up"):
        desk.cluster = tempfile.mkdtemp()  # short, as paths of sockets have to be
        desk.shell(f"{command} --dir {desk.cluster}")
    elif program == "export":
        name = words[0].partition("=")[0]
        desk.exports[name] = desk.shell(f'{command} && printf %s "${name}"')
    elif command == "pre-commit install":
        assert "pre-commit" in text_of("pyproject.toml")
        assert (ROOT / ".pre-commit-config.yaml").exists()
    elif program == "tensorboard":
        assert "images" in desk.shell(f"{command} --inspect")
    elif command.startswith(("vqscale quickstart", "vqscale submit")):
        submit(desk, command, endless)
    elif command.startswith("vqscale plan"):
        # A command that names its processes is planned as it stands: what has to divide are its own numbers.
        desk.shell(command if "resources.processes=" in command else f"{command} {TINY} {own_network(command)}")
    else:
        desk.shell(command, seconds=240)
        if command.startswith("vqscale requeue") and not endless:
            desk.shell("vqscale status latest --watch")


def submit(desk: Desk, command: str, endless: bool) -> None:
    """Start a tiny run and wait for its end; or, where the document cancels it, one that does not end."""
    quickstart = "quickstart" in command
    clocks = f" {TINY_CLOCKS}" if quickstart and "data.codes=" not in command else ""
    whole = "--prepare-only" in command
    stages = "" if whole or quickstart else " --stages tokenizer"  # the quickstart has been through all of them
    steps = " tokenizer.training.steps=1000000" if endless else ""
    desk.shell(f"{command}{stages} {TINY} {own_network(command)}{clocks}{steps}")
    if endless:
        desk.started.append(json.loads(desk.shell("vqscale status latest --json"))["id"])
    elif not whole:
        state = desk.shell("vqscale status latest --watch", seconds=240).strip().splitlines()[-1]
        assert ": done; vqscale show " in state, state


def own_network(command: str) -> str:
    """A tiny network for the prior, unless the command names one itself."""
    return "" if "prior.networks=" in command else TINY_NETWORK


def runs() -> list[object]:
    """The documents that hold something to execute."""
    found: list[object] = []
    for document in DOCUMENTS:
        if commands := commands_of(document):
            marks = [pytest.mark.dist] if STARTS.search(commands) else []
            if "vqscale cluster up" in commands:
                lacking = ", ".join(missing())
                marks += [pytest.mark.slurm, pytest.mark.skipif(bool(lacking), reason=f"{lacking} not installed")]
            found.append(pytest.param(document, marks=marks, id=document))
    return found


@pytest.mark.timeout(900)  # the README has some thirty commands, most of which start Python with torch
@pytest.mark.parametrize("document", runs())
def test_commands_run(document: str, desk: Desk, request: pytest.FixtureRequest) -> None:
    for language, lines in blocks(document):
        if language == "python":
            script = desk.folder / "block.py"
            script.write_text("\n".join(lines), encoding="utf-8")
            desk.shell(f"{sys.executable} {script}")
            continue
        endless = any(line.startswith("vqscale cancel") for line in lines)
        for command in lines:
            execute(desk, command, endless, request)


def test_ten_lines_read_a_code_shard(tmp_path: Path) -> None:
    """The reader in docs/code-shards.md gives what ours gives, on several blocks."""
    lines = next(lines for language, lines in blocks("docs/code-shards.md") if language == "python")
    assert len([line for line in lines if line.strip()]) <= 10
    place = tmp_path / "runs/latest/codes/train/shard-00000.tar"
    rng = np.random.default_rng(0)
    sizes = (5, 5, 2)
    written = [
        CodeBlock(
            {"bottom": rng.integers(0, 3_000, (n, 8, 8)), "top": rng.integers(0, 200, (n, 4, 4))},
            rng.integers(0, 10, n),
            [f"{i:08d}" for i in range(n)],
        )
        for n in sizes
    ]
    levels = [CodeLevel(name="bottom", grid=8, codes=3_000), CodeLevel(name="top", grid=4, codes=200)]
    write_code_shard(place, written, levels, "abc")
    names: dict[str, object] = {}
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(compile("\n".join(lines), "docs/code-shards.md", "exec"), names)
    finally:
        os.chdir(before)
    read, ours = names["codes"], read_code_shard(place)
    assert isinstance(read, dict)
    assert set(read) == {"bottom", "top"}
    for name, grids in {**read, "label": names["label"]}.items():
        assert np.array_equal(grids, ours[name])
    assert names["keys"] == [key for block in written for key in block.keys]


def test_the_official_cifar_becomes_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines in docs/your-images.md: every training image once, as it was, in the folder of its class."""
    lines = next(lines for language, lines in blocks("docs/your-images.md") if language == "python")
    expected = official_cifar(tmp_path / "cifar-10-python.tar.gz", 20)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(lines), "docs/your-images.md", "exec"), {})
    found = {path.stem: path for path in (tmp_path / "cifar-10").glob("*/*.png")}
    assert len(found) == len(expected) == 100
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for place, image in expected.items():
        batch, number = place.removeprefix("data_batch_").split("/")
        path = found[f"{batch}-{int(number):05d}"]
        assert path.parent.name == classes[int(number) % 10]
        assert np.array_equal(np.asarray(Image.open(path)), image)


@pytest.mark.parametrize("kind", ["recipes", "profiles"])
def test_settings_are_those_of_the_types(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    module = importlib.import_module(f"make_{kind}")
    assert text_of(f"docs/{kind}.md") == module.page(), "run `make docs`"


def anchors(document: str) -> set[str]:
    """Where headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", ANY_BLOCK.sub("", text_of(document)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def links(document: str) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", ANY_BLOCK.sub("", text_of(document)))
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in links(document):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert target.exists(), f"{document} links to {link}"
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), f"{document} links to {link}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_tests_that_are_named_exist(document: str) -> None:
    text = text_of(document)
    for path in re.findall(r"`((?:launcher|vqscale|pipelines|cluster|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{document} names {path}"
    for file, name in re.findall(r"`(test_\w+\.py)::(test_\w+)`", text):
        assert f"def {name}(" in text_of(f"tests/{file}"), f"{document} names {file}::{name}"


def test_every_known_fault_has_a_test_or_a_reason() -> None:
    """The table of docs/pitfalls.md is whole, and all of its tests are named so that the test above looks them up."""
    page = text_of("docs/pitfalls.md")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert sorted(int(row[0]) for row in rows) == list(range(1, 42))
    for number, fault, here, test in rows:
        assert min(len(fault), len(here)) > 20, number
        assert re.search(r"`test_\w+\.py::test_\w+`", test) or test.startswith("None: "), f"fault {number}: {test}"
    whole = re.findall(r"`test_\w+\.py::test_\w+`", page)
    assert page.count("test_") == 2 * len(whole), "a test is named by its file and its name"


def test_readme_is_short_and_links_every_page() -> None:
    assert len(text_of("README.md").splitlines()) <= 200
    linked = {link.partition("#")[0] for link in links("README.md")}
    assert {document for document in DOCUMENTS if document != "README.md"} <= linked
