"""What is installed is what stands in the tree, and its light part imports with the core alone."""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from forcing_kv.runtime_trt.errors import EXTRA_OF_MODULE
from forcing_kv.tools.cli import COMMANDS

FOLDERS = ("calibration", "export", "plugins", "runtime_trt", "tools")

NEEDS_DEVICE_PACKAGES = ("chain_kernel", "kernel", "split", "tile")
"""Last names of the modules that may need Triton to import: those that define kernels."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def source_files(repository: Path) -> list[Path]:
    """Files of the five folders that git does not ignore, relative to the repository."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS]
    done = subprocess.run(listing, cwd=repository, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("needs a git checkout")
    files = (Path(line) for line in done.stdout.splitlines())
    return [file for file in files if (repository / file).is_file()]


@pytest.fixture(scope="module")
def modules(source_files: list[Path]) -> list[str]:
    """Dotted names of every Python module of the project."""
    files = (file.with_suffix("") for file in source_files if file.suffix == ".py")
    return [".".join(("forcing_kv", *f.parts)).removesuffix(".__init__") for f in files]


def is_light(module: str) -> bool:
    """Tells whether a module must import with the core install alone.

    These are the runtime, whatever the command line is made of, and the specifications of the
    operators. Every other module may import torch, onnx and so on at its top.
    """
    specification = module.rpartition(".")[2] in ("spec", "op_spec", "registry")
    return (
        module.startswith("forcing_kv.runtime_trt")
        or (module.startswith("forcing_kv.plugins") and specification)
        or module.endswith(".cli")
        or module in {command.function.partition(":")[0] for command in COMMANDS}
    )


def failed_imports(run_blocked: Run, modules: Sequence[str], **blocked: Sequence[str]) -> Any:
    """Imports the modules one by one in a fresh process; returns {module: error}."""
    done = run_blocked(
        f"""
import importlib, json
failed = {{}}
for name in {list(modules)!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
print(json.dumps(failed))
""",
        **blocked,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_package_list_equals_tree(project, source_files):
    folders = {file.parent for file in source_files if file.suffix == ".py"}
    in_tree = {".".join(("forcing_kv", *folder.parts)) for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == in_tree
    assert {folder / "__init__.py" for folder in folders} <= set(source_files)


def test_typing_links_lead_to_the_folders(repository):
    for folder in FOLDERS:
        link = repository / ".typing" / "forcing_kv" / folder
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == repository / folder


def test_core_is_numpy_pydantic_and_the_command_line(project):
    names = {requirement.split(">")[0] for requirement in project["project"]["dependencies"]}
    assert names == {"cyclopts", "docstring-parser", "numpy", "pydantic", "rich"}


def test_tensorrt_is_in_its_own_extra_alone(project):
    extras = project["project"]["optional-dependencies"]
    holders = {
        extra
        for extra, requirements in extras.items()
        if any(r.startswith("tensorrt>") or "trt" in r.partition("[")[2] for r in requirements)
    }
    assert holders == {"trt"}


def test_errors_name_extras_that_exist(project):
    assert set(EXTRA_OF_MODULE.values()) <= set(project["project"]["optional-dependencies"])


def test_light_modules_import_with_heavy_packages_blocked(run_blocked, modules):
    assert failed_imports(run_blocked, [m for m in modules if is_light(m)]) == {}


def test_every_module_imports_without_device_packages(run_blocked, modules):
    wanted = [m for m in modules if m.rpartition(".")[2] not in NEEDS_DEVICE_PACKAGES]
    device = ("cuda", "polygraphy", "tensorrt", "tensorrt_rtx", "triton")
    assert failed_imports(run_blocked, wanted, blocked=device) == {}


def test_wheel_holds_the_five_folders_and_nothing_else(repository, source_files, tmp_path):
    source = tmp_path / "source"
    for file in (*source_files, Path("pyproject.toml"), Path("README.md"), Path("LICENSE")):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / file, source / file)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    done = subprocess.run([*build, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    information = {name for name in names if name.parts[0].endswith(".dist-info")}
    assert names - information == {Path("forcing_kv", file) for file in source_files}
    assert "LICENSE" in {name.name for name in information}
