"""The commands and snippets of README.md run as they stand there.

Every ```bash and ```python block has an HTML comment on the line above its fence:

- `<!-- test: NAME -->`: the block is run. All of them run in one empty folder, top to bottom, so a
  block may use what an earlier one made. `<!-- test: NAME, slow -->` leaves it to `pytest -m slow`.
  A leading `pip install ... &&` is left out: the environment of the tests has it all.
- `<!-- not tested: REASON -->`: the block is not run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.long

README = Path(__file__).resolve().parents[1] / "README.md"

BLOCK = re.compile(
    r"^(?:<!-- (?P<comment>[^\n]*) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block of the README."""

    line: int
    language: str
    code: str
    comment: str

    @property
    def tested(self) -> bool:
        return self.comment.startswith("test: ")


def read_blocks(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, m.start()) + 1, m["language"], m["code"], m["comment"] or "")
        for m in BLOCK.finditer(text)
    ]


BLOCKS = read_blocks(README.read_text())


def parameters() -> list:
    """Returns the blocks to run, named and marked as their comments say."""
    found = []
    for block in BLOCKS:
        if block.tested:
            name, *marks = block.comment.removeprefix("test: ").split(", ")
            marks = [getattr(pytest.mark, mark) for mark in marks]
            found.append(pytest.param(block, id=name, marks=marks))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all blocks run."""
    return tmp_path_factory.mktemp("readme")


def test_every_block_says_whether_it_is_tested():
    silent = [b.line for b in BLOCKS if not re.match(r"(test|not tested): \S", b.comment)]
    assert silent == [], "README.md: blocks without a comment (see the top of this file) at lines"


def test_some_block_is_tested():
    assert any(block.tested for block in BLOCKS)


def test_readme_tells_how_the_tests_are_run(repository):
    """`.ci/run` runs the same commands, so they are the tested ones."""
    script = (repository / ".ci" / "run").read_text()
    for command in ("-e '.[test]'", "python -m pytest"):
        assert command in script
        assert any(command in block.code for block in BLOCKS if block.language == "bash")


@pytest.mark.parametrize("block", parameters())
def test_block_runs(block: Block, folder: Path):
    script = re.sub(r"^pip install .* && ", "", block.code)
    commands = {
        "bash": ["bash", "-euo", "pipefail", "-c", script],
        "python": [sys.executable, "-c", block.code],
    }
    here = Path(sys.executable).parent
    done = subprocess.run(
        commands[block.language],
        cwd=folder,
        env={**os.environ, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"README.md:{block.line}\n{done.stdout}{done.stderr}"
