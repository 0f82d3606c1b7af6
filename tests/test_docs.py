"""The documents name files that exist, and the package has one version."""

import importlib.metadata
import re
from pathlib import Path

import pytest

import wush_compile

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "wush_compile"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
# In backticks, with a folder. Paths of the package may leave out its name.
FILE = re.compile(r"`(?:python |pytest -m gpu )?([\w]+/[\w/]+\.(?:py|md|json|cu|cuh|h|cpp|toml))(?=[`: ])")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [name for name in FILE.findall(text) if not any((at / name).exists() for at in (ROOT, PACKAGE))]
    assert not missing


def test_every_page_is_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [p for p in ROOT.glob("docs/**/*.md") if f"{p.relative_to(ROOT / 'docs')}\n" not in site] == []


def test_version_is_that_of_the_metadata():
    assert importlib.metadata.version("wush-compile") == wush_compile.__version__


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
