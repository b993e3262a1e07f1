"""The rules of the house, kept over the source itself. CONTRIBUTING.md lists them with the test that keeps each."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.processor import seconds

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("launcher", "vqscale", "pipelines", "cluster", "benchmarks")

TOP_LEVEL = {
    # The fixed set, then what lies at the root of most repositories.
    *("pyproject.toml", "launcher", "vqscale", "pipelines", "cluster", "tests", "benchmarks"),
    *("README.md", "docs", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt"),
    *(".ci", ".gitignore", ".pre-commit-config.yaml"),
}

LIGHT = (
    *("arguments", "docstrings", "errors", "faults", "files", "events", "masking", "numbers", "processor"),
    *("quarantine", "seeds", "sources", "stages", "stamps", "version"),
)
"""Modules at the root of `vqscale` that every room may use; they import the standard library and each other."""

MAY_IMPORT = {
    "vqscale": {"vqscale.loading"},  # the package itself: the names that users import, loaded on first use
    **{f"vqscale.{name}": set() for name in LIGHT},
    # The three at the bottom. The recipe's checker reads manifests, which import neither numpy nor torch.
    "vqscale.config": {"vqscale.data"},
    "vqscale.storage": set(),
    "vqscale.checkpoint": {"vqscale.storage"},
    "vqscale.data": {"vqscale.storage"},
    "vqscale.models": set(),
    "vqscale.training": {"vqscale.config", "vqscale.data", "vqscale.models", "vqscale.storage", "vqscale.checkpoint"},
    "vqscale.evaluation": {"vqscale.config", "vqscale.data", "vqscale.models", "vqscale.storage"},
    "vqscale.sampling": {"vqscale.config", "vqscale.data", "vqscale.models", "vqscale.loading"},
    "vqscale.extraction": {"vqscale.data", "vqscale.storage", "vqscale.loading"},
    "vqscale.loading": {
        *("vqscale.config", "vqscale.data", "vqscale.models", "vqscale.training", "vqscale.model_files"),
    },
    "vqscale.model_files": {"vqscale.config", "vqscale.storage"},
    "vqscale.card": {"vqscale.config"},
    "vqscale.exporting": {
        *("vqscale.config", "vqscale.checkpoint", "vqscale.storage", "vqscale.training"),
        *("vqscale.card", "vqscale.loading", "vqscale.model_files"),
    },
    "launcher": {"cluster", "vqscale.config", "vqscale.checkpoint"},
    "cluster": set(),
    "cluster.preflight": {"cluster", "vqscale.storage"},
    "pipelines": {"vqscale"},
    "benchmarks": {"vqscale", "cluster"},  # the network of a profile
}
"""Room → the rooms whose modules it may import, besides its own and the light ones. An arrow never runs upward."""

MAY_IMPORT_FROM_OUTSIDE = {
    "launcher": {"yaml", "rich", "pydantic", "kubernetes", "kubeflow_trainer_api", "urllib3"},
    "cluster": {"pydantic"},
    "cluster.preflight": {"torch"},  # in what runs on a node, and there inside functions
    "vqscale.config": {"yaml", "pydantic"},
    **{f"vqscale.{name}": set() for name in LIGHT},
}
"""Room → third-party packages; rooms that are not named may import any that the project depends on."""

_HEAVY = {"torch", "accelerate", "safetensors", "tensorboard"}
NEVER = {"vqscale.data": _HEAVY, "vqscale.storage": _HEAVY, "vqscale.checkpoint": _HEAVY}
BUT = {("vqscale.data.resize", "torch")}
"""Its kernel for resizing uint8 images; imported when an image of another size is met."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the rooms: dotted name → file."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports, wherever it stands in it (in functions and under TYPE_CHECKING too)."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                found.add(below if below in modules() else node.module)
    return frozenset(found)


def room_of(module: str) -> str:
    """The room of a module of ours: the longest name in the table that it lies under."""
    fitting = [room for room in MAY_IMPORT if module == room or module.startswith(f"{room}.")]
    room = max(fitting, key=len)
    assert room != "vqscale" or module == "vqscale", f"{module} lies in no room: put it into MAY_IMPORT"
    return room


def ours(name: str) -> bool:
    return name.partition(".")[0] in ROOMS


def arrows() -> Iterator[tuple[str, str]]:
    """All (module, imported module) between modules of ours."""
    for module in modules():
        for name in imports(module):
            if ours(name):
                assert name in modules(), f"{module} imports {name}, which there is not"
                yield module, name


def allowed(module: str, name: str) -> bool:
    here, there = room_of(module), room_of(name)
    if here == there or there in {f"vqscale.{light}" for light in LIGHT}:
        return True
    return any(there == room or there.startswith(f"{room}.") for room in MAY_IMPORT[here])


def test_arrows_never_run_upward() -> None:
    upward = {arrow for arrow in arrows() if not allowed(*arrow)}
    assert upward == set()


def test_vqscale_knows_nothing_of_those_above_it() -> None:
    for module, name in arrows():
        if module.partition(".")[0] == "vqscale":
            assert name.partition(".")[0] == "vqscale", f"{module} imports {name}"


def test_third_party_packages_by_room() -> None:
    for module in modules():
        room = room_of(module)
        outside = {name.partition(".")[0] for name in imports(module) if not ours(name)} - sys.stdlib_module_names
        if room in MAY_IMPORT_FROM_OUTSIDE:
            assert outside <= MAY_IMPORT_FROM_OUTSIDE[room], module
        excused = {package for name, package in BUT if name == module}
        assert not outside & NEVER.get(room, set()) - excused, module


def test_no_import_circles() -> None:
    """Over every import, those inside functions and under TYPE_CHECKING included."""
    following: dict[str, set[str]] = {module: set() for module in modules()}
    for module, name in arrows():
        following[module].add(name)
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in finished:
            for name in sorted(following[module]):
                visit(name, (*path, module))
            finished.add(module)

    for module in following:
        visit(module, ())


def loaded_after(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter that has run the code."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_users_side_starts_without_torch() -> None:
    rooms = ("launcher", "cluster", "cluster.preflight", "vqscale.config", "vqscale.checkpoint")
    light = [name for name in modules() if room_of(name) in rooms]
    names = [name for name in light if not name.endswith("__main__")]
    loaded = loaded_after("".join(f"import {name}\n" for name in names))
    assert not {"torch", "numpy", "accelerate", "webdataset", "fsspec", "PIL"} & loaded


def test_data_never_loads_torch() -> None:
    names = [name for name in modules() if room_of(name) == "vqscale.data"]
    loaded = loaded_after("".join(f"import {name}\n" for name in names))
    assert not {"torch", "accelerate", "webdataset"} & loaded


def test_help_is_light_and_quick() -> None:
    loaded = loaded_after("import launcher.cli\ntry: launcher.cli.main(['--help'])\nexcept SystemExit: pass")
    assert not {"torch", "pydantic", "yaml", "rich", "numpy"} & loaded
    script = Path(sys.executable).with_name("vqscale")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "launcher"]
    assert min(seconds([*command, "--help"]) for _ in range(3)) < 0.3


def test_modules_stay_small() -> None:
    for path in [*modules().values(), *(ROOT / "tests").rglob("*.py")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 600, f"{path.relative_to(ROOT)} has {lines} lines; split it"


def test_public_modules_say_what_they_are() -> None:
    for module in modules():
        private = any(part.startswith("_") for part in module.split("."))
        empty = not tree(module).body  # a package that only holds others
        assert private or empty or ast.get_docstring(tree(module)), f"{module} has no docstring"


def test_every_stage_has_a_main_and_a_place() -> None:
    """What CONTRIBUTING.md says of a new stage: recipe, launcher and pipelines know the same names."""
    from launcher.backends.base import STAGE_MODULES
    from launcher.handover import NEEDS
    from vqscale.stages import STAGES

    assert tuple(STAGE_MODULES) == STAGES
    assert set(NEEDS) <= set(STAGES)
    for stage, module in STAGE_MODULES.items():
        assert f'run_stage("{stage}", main' in modules()[module].read_text(encoding="utf-8")


@cache
def house_files() -> tuple[str, ...]:
    """Files that git knows, or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git work tree")
    return tuple(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def test_top_level_is_fixed() -> None:
    assert {name.partition("/")[0] for name in house_files()} <= TOP_LEVEL


# Put together here, so that this file does not hold what it looks for.
_SLASH = "/"
_MACHINE_PATH = re.compile(rf"(?<![\w.~$}}]){_SLASH}(?:home|root|work|Users|scratch|mnt|media)/\w")
_REGISTRY = re.compile(r"(?:index|trusted|find)-(?:url|host|links)|python" r"hosted\.|\bpypi\.", re.I)


def test_no_machine_paths_and_registries() -> None:
    """What one machine is like does not belong into the house: neither its folders nor where it gets packages."""
    for name in house_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), 1):
            assert not _MACHINE_PATH.search(line), f"{name}, line {number}: a path of one machine"
            assert not _REGISTRY.search(line), f"{name}, line {number}: a package registry"


def test_names_of_tests_are_the_same_in_every_process(request: pytest.FixtureRequest) -> None:
    """Two processes that share the tests out compare names first; an address of a function differs between them."""
    assert not [item.nodeid for item in request.session.items if re.search(r" at (0x|$|-)|object at", item.nodeid)]
