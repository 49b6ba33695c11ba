"""The repository as a whole: pins, pages, sizes, licences."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from emosae_utils.files import repo_dir

ROOT = repo_dir()


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = (line.partition("==") for line in lines if re.match(r"[A-Za-z0-9]", line))
    return {name.lower().replace("_", "-"): version for name, equals, version in pinned if equals}


def test_every_dependency_is_pinned_and_the_lock_agrees() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    locked = lock()
    assert len(locked) > 100
    for requirement in direct:
        name, equals, version = requirement.partition("==")
        assert equals, f"{requirement} is not pinned"
        assert locked[name.lower().replace("_", "-")] == version
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert not line or line.lstrip().startswith("#") or "==" in line or line == "-e .", line
        assert "://" not in line


def test_the_packages_the_project_stands_on_are_there() -> None:
    wanted = {"jupyter-book", "torch", "nnsight", "sae-lens", "seaborn", "pandas", "papermill"}
    assert wanted <= set(lock()) and lock()["jupyter-book"] == "1.0.4.post1"


def test_the_top_level_is_what_a_newcomer_expects() -> None:
    for name in ("book", "emosae_utils", "data", "tests", "requirements.txt", "_config.yml", "README.md", "LICENSE"):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_contents_and_every_entry_is_a_page() -> None:
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    listed = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    pages = {p.stem for p in (ROOT / "book").iterdir() if p.suffix in {".ipynb", ".md"}}
    assert set(listed) == pages and len(listed) == len(pages)


def test_nothing_large_and_no_pickle() -> None:
    skipped = {".git", ".venv", "runs", "_build", "results"}
    for path in ROOT.rglob("*"):
        if path.is_file() and not skipped & set(path.relative_to(ROOT).parts):
            assert path.suffix not in {".pkl", ".pickle", ".pt", ".bin"}, path
            assert path.stat().st_size < 5 * 2**20 or Path("data/saes") in path.relative_to(ROOT).parents, path


def test_remote_code_is_never_trusted() -> None:
    for path in (ROOT / "emosae_utils").glob("*.py"):
        assert not re.search(r"trust_remote_code\s*=\s*True|import pickle|weights_only\s*=\s*False", path.read_text())
