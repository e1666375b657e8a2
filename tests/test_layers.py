"""Who may import whom, and that the runtime stands without PyTorch."""

import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp


def test_import_contracts_are_kept(repository):
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [lint, "--no-cache", "--no-logo"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_imports_itself_through_others(repository):
    """Imports inside functions count too; those for type checkers do not."""
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["importlinter"]
    graph = grimp.build_graph(
        *settings["root_packages"], exclude_type_checking_imports=True, cache_dir=None
    )
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert any(imports.values())
    TopologicalSorter(imports).prepare()


def test_runtime_imports_with_torch_blocked(run_blocked):
    done = run_blocked("import forcing_kv.runtime_trt", blocked=["torch"])
    assert done.returncode == 0, done.stderr


def test_runtime_loads_neither_torch_nor_an_engine(run_blocked):
    done = run_blocked("import forcing_kv.runtime_trt; print(*sys.modules)", blocked=[])
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"onnx", "onnxruntime", "rich", "tensorrt", "torch", "cyclopts"})
