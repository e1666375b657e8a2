"""What the pages say about the source is there."""

import re
import sys
from pathlib import Path

import pytest

PACKAGES = ("calibration", "export", "plugins", "runtime_trt", "tools")
PAGES = sorted(
    path.relative_to(Path(__file__).resolve().parents[1])
    for pattern in ("*.md", "docs/**/*.md")
    for path in Path(__file__).resolve().parents[1].glob(pattern)
    if path.name != "CHANGELOG.md"
)
SOURCE = re.compile(rf"(?<![\w/.-])(?:{'|'.join((*PACKAGES, 'tests'))})/[\w./-]*\w/?")


def rooms(repository: Path) -> dict[str, set[str]]:
    """The rooms of every floor: folders of the packages that hold modules."""
    return {
        package: {file.parent.name for file in (repository / package).glob("*/__init__.py")}
        for package in PACKAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_source_files_that_a_page_names_exist(page, repository):
    named = set(SOURCE.findall((repository / page).read_text()))
    assert [path for path in sorted(named) if not (repository / path).exists()] == []


def test_picture_shows_every_room(repository):
    text = (repository / "docs/images/architecture.svg").read_text()
    shown = set(re.findall(r'font-weight="bold"[^>]*>([^<]+)<', text))
    found = rooms(repository)
    assert shown == set(found).union(*found.values())


def test_folders_hold_about_a_dozen_and_modules_shadow_nothing(repository):
    for package in PACKAGES:
        for folder in (repository / package, *(repository / package).rglob("*/")):
            entries = [e for e in folder.iterdir() if not e.name.startswith("__")]
            entries = [entry for entry in entries if entry.name != "py.typed"]
            assert len(entries) <= 13, f"{folder}: make rooms by subject"
            names = {entry.stem for entry in entries if entry.suffix == ".py" or entry.is_dir()}
            assert names.isdisjoint(sys.stdlib_module_names), folder
