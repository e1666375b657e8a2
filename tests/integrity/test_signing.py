"""The commands of docs/signing.md run as they stand there, and a signature is worth something."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("model_signing", reason="needs the packages model-signing and pyopenssl")
if shutil.which("openssl") is None:
    pytest.skip("needs openssl", allow_module_level=True)


@pytest.fixture(scope="module")
def run(tiny_bundle, repository, tmp_path_factory):
    """Runs commands of the page, by their names, in a folder with a bundle."""
    folder = tmp_path_factory.mktemp("signing")
    shutil.copytree(tiny_bundle, folder / "bundle")
    page = (repository / "docs/signing.md").read_text()
    blocks = dict(re.findall(r"<!-- test: (\w+) -->\n```bash\n(.*?)```", page, re.DOTALL))
    assert page.count("```bash") == len(blocks)

    def run(name):
        script = blocks[name].replace("model_signing ", f"{sys.executable} -m model_signing ")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(
            command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )

    run.folder = folder
    return run


def test_the_page_signs_and_verifies_and_tampering_shows(run):
    for name in ("keys", "sign", "verify"):
        done = run(name)
        assert done.returncode == 0, f"{name}\n{done.stdout}{done.stderr}"
    assert "digest: sha256:" in done.stdout
    (run.folder / "bundle" / "added.pt2").write_bytes(b"code")
    assert "Verification failed" in run("verify").stderr
