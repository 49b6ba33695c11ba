"""The runner: parameters are checked, runs are whole or absent, what is current is skipped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from typer.testing import CliRunner

from emosae_utils import __main__ as cli
from emosae_utils import files, runner
from emosae_utils.files import EmosaeError
from emosae_utils.runner import Chapter

BOOK = files.repo_dir() / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))


def notebook(folder: Path, body: str, parameters: str = 'n = 1\nname = "a"\nshare = 0.5\nmany = ["x"]') -> Path:
    cell = nbformat.v4.new_code_cell(parameters + '\nout_dir = "results"\nin_dir = "results"')
    cell.metadata["tags"] = ["parameters"]
    book = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell(body)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "book" / "tiny.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(book, path)
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMOSAE_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(Chapter, "source", property(lambda self: tmp_path / "book" / f"{self.notebook}.ipynb"))
    monkeypatch.setattr(runner, "profiles", lambda: {"default": (Chapter("tiny"),)})
    return tmp_path


WRITES = "from pathlib import Path\nPath(out_dir, 'result.txt').write_text(f'{n} {name} {share} {many}')"


def test_parameters_are_checked_by_name_and_type(project: Path) -> None:
    path = notebook(project, WRITES)
    assert runner.resolve_parameters(path, {"n": 2, "share": 1})["share"] == 1.0
    with pytest.raises(EmosaeError, match="unknown parameter of tiny 'nam'; did you mean 'name'"):
        runner.resolve_parameters(path, {"nam": "b"})
    with pytest.raises(EmosaeError, match=r"many of tiny takes list, got str .* passed with -y"):
        runner.resolve_parameters(path, {"many": "[0, 1]"})
    with pytest.raises(EmosaeError, match="n of tiny takes int, got bool"):
        runner.resolve_parameters(path, {"n": True})


def test_a_parameters_cell_holds_literals_only(project: Path) -> None:
    path = notebook(project, WRITES, parameters="n = 1 + len('a')")
    with pytest.raises(EmosaeError, match="must be a literal"):
        runner.default_parameters(path)


def test_a_run_is_recorded_skipped_and_redone_when_something_changed(project: Path) -> None:
    notebook(project, WRITES)
    said: list[str] = []
    runner.run_profile("default", given={"n": 7}, say=said.append)
    folder = project / "runs" / "default" / "tiny"
    assert (folder / "result.txt").read_text() == "7 a 0.5 ['x']"
    record = files.read_json(folder / "run.json")
    assert record["parameters"] == {"n": 7, "name": "a", "share": 0.5, "many": ["x"]}
    assert record["versions"]["torch"] and record["seconds"] > 0 and record["peak_memory_bytes"] > 10**6
    assert record["data"]["emoscenes/emoscenes.jsonl"]
    assert "1 a" not in nbformat.read(folder / "tiny.ipynb", 4).cells[1].source
    runner.run_profile("default", given={"n": 7}, say=said.append)
    assert said[-1] == "tiny: up to date"
    runner.run_profile("default", given={"n": 8}, say=said.append)
    assert (folder / "result.txt").read_text().startswith("8 ")
    (folder / "result.txt").write_text("altered")
    runner.run_profile("default", given={"n": 8}, say=said.append)
    assert (folder / "result.txt").read_text().startswith("8 ")


def test_a_notebook_that_stops_leaves_the_earlier_run(project: Path) -> None:
    notebook(project, WRITES)
    runner.run_profile("default")
    notebook(project, "from emosae_utils.files import EmosaeError\nraise EmosaeError('the jar is empty; fill it')")
    with pytest.raises(EmosaeError, match=r"^tiny stopped: the jar is empty; fill it \(its notebook so far: "):
        runner.run_profile("default")
    folder = project / "runs" / "default"
    assert (folder / "tiny" / "result.txt").read_text() == "1 a 0.5 ['x']"
    assert (folder / "failed" / "tiny.ipynb").is_file()


def test_a_dead_kernel_is_explained(project: Path) -> None:
    notebook(project, "import os\nos._exit(9)")
    with pytest.raises(EmosaeError, match="its kernel died, most likely for want of memory"):
        runner.run_profile("default")
    assert not (project / "runs" / "default" / "tiny").exists()


def test_ctrl_c_keeps_finished_chapters(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook(project, WRITES)
    (project / "book" / "second.ipynb").write_bytes((project / "book" / "tiny.ipynb").read_bytes())
    monkeypatch.setattr(runner, "profiles", lambda: {"default": (Chapter("tiny"), Chapter("second"))})
    real = runner._execute

    def interrupted(chapter: Chapter, *args: Any) -> None:
        if chapter.notebook == "second":
            raise KeyboardInterrupt
        real(chapter, *args)

    monkeypatch.setattr(runner, "_execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_profile("default")
    folder = project / "runs" / "default"
    assert [p.name for p in folder.iterdir()] == ["tiny"]
    monkeypatch.setattr(runner, "_execute", real)
    said: list[str] = []
    runner.run_profile("default", say=said.append)
    assert "tiny: up to date" in said and (folder / "second" / "result.txt").is_file()


def test_everything_is_checked_before_anything_runs(project: Path) -> None:
    notebook(project, WRITES)
    with pytest.raises(EmosaeError, match="unknown profile 'defualt'; did you mean 'default'"):
        runner.run_profile("defualt")
    with pytest.raises(EmosaeError, match="unknown chapter of profile default 'tinny'; did you mean 'tiny'"):
        runner.run_profile("default", only=["tinny"])
    with pytest.raises(EmosaeError, match="unknown parameter of tiny 'shar'; did you mean 'share'"):
        runner.run_profile("default", given={"shar": 1})
    with pytest.raises(EmosaeError, match="share of tiny takes float, got str"):
        runner.run_profile("default", given={"share": "much"})
    assert not (project / "runs").exists()


def test_a_parameter_goes_to_the_chapters_that_have_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook(project, WRITES)
    (project / "book" / "tiny.ipynb").rename(project / "book" / "second.ipynb")
    notebook(project, "from pathlib import Path\nPath(out_dir, 'result.txt').write_text(f'{n}')", parameters="n = 1")
    monkeypatch.setattr(runner, "profiles", lambda: {"default": (Chapter("tiny"), Chapter("second", {"n": 4}))})
    runner.run_profile("default", given={"name": "b"})
    folder = project / "runs" / "default"
    assert (folder / "tiny" / "result.txt").read_text() == "1"
    assert (folder / "second" / "result.txt").read_text() == "4 b 0.5 ['x']"


def test_own_files_are_found_from_the_folder_of_a_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook(project, WRITES, parameters='n = 1\nname = "a"\nshare = 0.5\nmany = ["x"]')
    (project / "mine.csv").write_text("text,emotion\n")
    monkeypatch.chdir(project)
    runner.run_profile("default", given={"many": ["mine.csv", "emoscenes", "none.csv"]})
    written = (project / "runs" / "default" / "tiny" / "result.txt").read_text()
    assert written == f"1 a 0.5 {[str(project / 'mine.csv'), 'emoscenes', 'none.csv']}"
    said: list[str] = []
    for content, expected in (("text,emotion\n", "up to date"), ("text,emotion\na b c,joy\n", "done in")):
        (project / "mine.csv").write_text(content)
        runner.run_profile("default", given={"many": ["mine.csv", "emoscenes", "none.csv"]}, say=said.append)
        assert expected in said[-1]


def test_profiles_name_notebooks_and_parameters_that_exist() -> None:
    for chapters in runner.profiles().values():
        for chapter in chapters:
            runner.resolve_parameters(chapter.source, chapter.parameters)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_pristine_and_short(path: Path) -> None:
    book = nbformat.read(path, 4)
    assert "parameters" in book.cells[1].metadata.get("tags", [])
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            # A chapter may have many parameters; what it does with them stays short.
            assert "parameters" in cell.metadata.get("tags", []) or len(cell.source.splitlines()) <= 20
            figure = cell.metadata.get("mystnb", {})
            if "figure" in figure:
                assert figure["figure"]["caption"] and figure["image"]["alt"]


def test_the_command_prints_one_line_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["emosae", "run", "--profile", "smok"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unknown profile 'smok'; did you mean 'smoke'? known: default, smoke\n"


def test_list_and_doctor_run() -> None:
    listed = CliRunner().invoke(cli.app, ["list"])
    assert listed.exit_code == 0
    for name in ("default/difficulty", "gemma-3-270m", "crowd-envent", "emoscenes"):
        assert name in listed.stdout
    checked = CliRunner().invoke(cli.app, ["doctor"])
    assert "ok    python" in checked.stdout and "packages: as in requirements.txt" in checked.stdout


def test_parameters_of_the_command_are_yaml() -> None:
    assert cli._parameters(["n=3", "name=a b"], ["many: [a, b]"]) == {"n": 3, "name": "a b", "many": ["a", "b"]}
    with pytest.raises(EmosaeError, match="name=value"):
        cli._parameters(["n"], [])
    with pytest.raises(EmosaeError, match="-y takes YAML"):
        cli._parameters([], ["just words"])


@pytest.mark.parametrize("name", ["data", "runs"])
def test_notebooks_run_by_plain_papermill(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "papermill", str(BOOK / f"{name}.ipynb"), str(tmp_path / "out.ipynb")]
    parameters = ["-p", "bootstraps", "20"] if name == "data" else []
    done = subprocess.run([*command, *parameters, "--cwd", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert nbformat.read(tmp_path / "out.ipynb", 4).metadata["papermill"]["exception"] is None
    if name == "data":
        assert files.read_json(tmp_path / "results" / "data" / "checks.json")["texts_naming_an_emotion"] == 0


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "emosae_utils", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "run" in done.stdout and "doctor" in done.stdout
