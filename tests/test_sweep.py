"""Sweeps: the grid is checked first, points run in processes of their own, and what is finished is not run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from typer.testing import CliRunner

from emosae_utils import __main__ as cli
from emosae_utils import files, runner, sweep
from emosae_utils.files import EmosaeError
from emosae_utils.runner import Chapter
from tests.test_runner import notebook

# Point 3 wants a file of an earlier chapter; the second table is one that not every point has.
BODY = """
import os
from pathlib import Path
import pandas as pd
from emosae_utils.files import EmosaeError
if n == 3 and not Path(in_dir, "first", "ready").is_file():
    raise EmosaeError("the jar is empty; fill it")
frame = pd.DataFrame({"n": [n, n], "threads": os.environ["OMP_NUM_THREADS"], "many": "".join(many)})
frame.to_parquet(Path(out_dir, "result.parquet"))
if n == 1:
    frame.to_parquet(Path(out_dir, "only.parquet"))
"""
GRID = {"n": [1, 3], "many": [["x", "y"]]}
PARAMETERS = 'n = 1\nname = "a"\nshare = 0.5\nmany = ["x"]\nmodel = ""\ncompare_with = ["smollm2-135m"]'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMOSAE_RUNS_DIR", str(tmp_path / "runs"))
    chapters = (Chapter("first", book=str(tmp_path)), Chapter("tiny", {"name": "b"}, book=str(tmp_path / "book")))
    monkeypatch.setattr(runner, "profiles", lambda: {"default": chapters})
    notebook(tmp_path, BODY, PARAMETERS)
    return tmp_path


def test_a_grid_is_a_product_of_lists_and_is_checked(project: Path) -> None:
    points = sweep.grid_points("tiny", {"n": [1, 2, 1], "share": [1, 0.5]}, fixed={"many": []})
    assert [p.values for p in points] == [{"n": n, "share": s} for n in (1, 2) for s in (1, 0.5)]
    assert points[0].parameters["share"] == 1.0 and points[0].parameters["name"] == "b"
    assert points[0].parameters["many"] == [] and points[0].label == "n=1, share=1"
    assert "out_dir" not in points[0].parameters and len({p.folder for p in points}) == 4
    # Two models are compared by the sweep, not by each of its points.
    models = sweep.grid_points("tiny", {"model": ["gemma-3-270m", "smollm2-135m"]})
    assert [p.parameters["compare_with"] for p in models] == [[], []]
    kept = sweep.grid_points("tiny", {"model": ["gemma-3-270m"]}, fixed={"compare_with": ["smollm2-135m"]})
    assert kept[0].parameters["compare_with"] == ["smollm2-135m"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "a sweep needs values"),
        ({"nn": [1]}, "unknown parameter of tiny 'nn'; did you mean 'n'"),
        ({"out_dir": ["x"]}, "unknown parameter of tiny 'out_dir'"),
        ({"n": 1}, "a sweep takes a list of values"),
        ({"n": []}, "a sweep takes a list of values"),
        ({"n": [1, "2"]}, "n of tiny takes int, got str '2'"),
        ({"many": ["x", "y"]}, "a sweep takes a list of lists"),
        ({"model": ["gemma-3-270"]}, "did you mean 'gemma-3-270m'"),
    ],
)
def test_what_a_grid_must_not_be(project: Path, grid: dict[str, Any], message: str) -> None:
    with pytest.raises(EmosaeError, match=message.replace("(", r"\(")):
        sweep.grid_points("tiny", grid)
    with pytest.raises(EmosaeError, match="unknown chapter of profile default 'tinny'; did you mean 'tiny'"):
        sweep.grid_points("tinny", {"n": [1]})


def test_a_failing_point_stops_no_other_and_alone_is_run_again(project: Path) -> None:
    command = ["sweep", "tiny", "-y", "n: [1, 3]", "-y", "many: [[x, y]]", "--jobs", "2", "--memory-gb", "0.2"]
    first = CliRunner().invoke(cli.app, command)
    assert first.exit_code == 1, first.output
    assert "2 points, 0 up to date; up to 2 at a time, 0.2 GB each" in first.stdout
    good, bad = sweep.grid_points("tiny", GRID)
    assert f"failed: {bad.digest} (n=3, many=x + y): tiny stopped: the jar is empty; fill it" in first.output
    assert (project / "runs" / "sweeps" / "tiny" / "failed" / f"{bad.digest}.ipynb").is_file()
    tables = sweep.sweep_dir("tiny") / "tables"
    assert sorted(p.name for p in tables.iterdir()) == ["only.parquet", "points.json", "result.parquet"]
    states = [(p["point"], p["state"]) for p in files.read_json(tables / "points.json")]
    assert states == [(good.digest, "finished"), (bad.digest, "failed")]
    assert good.is_current() and not bad.is_current()
    before = (good.folder / "run.json").stat().st_mtime_ns

    # The earlier chapters of the profile are what a point sees as in_dir.
    (project / "runs" / "default" / "first").mkdir(parents=True)
    (project / "runs" / "default" / "first" / "ready").touch()
    second = CliRunner().invoke(cli.app, command)
    assert second.exit_code == 0, second.output
    assert "2 points, 1 up to date" in second.stdout
    assert (good.folder / "run.json").stat().st_mtime_ns == before
    found = files.read_table(tables / "result.parquet")
    assert found.columns.tolist() == ["point", "sweep_n", "sweep_many", "n", "threads", "many"]
    assert found["sweep_n"].tolist() == found["n"].tolist() == [1, 1, 3, 3]
    assert set(found["sweep_many"]) == {"x + y"} and set(found["many"]) == {"xy"}
    assert set(found["threads"]) == {str(max(1, (os.cpu_count() or 1) // 2))}
    assert not (tables / "only.parquet").exists()
    record = files.read_json(good.folder / "run.json")
    assert record["parameters"]["many"] == ["x", "y"] and record["profile"] == "default"
    # What earlier runs measured is what the next sweep expects.
    assert sweep.expected_bytes([good, bad]) >= record["peak_memory_bytes"] > 10**6


def test_a_change_before_it_makes_a_point_run_again(project: Path) -> None:
    (point,) = sweep.grid_points("tiny", {"n": [1]})
    assert point.earlier == ("",)
    (project / "runs" / "default" / "first").mkdir(parents=True)
    files.write_json(project / "runs" / "default" / "first" / "run.json", {"key": "new"})
    (again,) = sweep.grid_points("tiny", {"n": [1]})
    assert again.earlier == ("new",) and again.folder == point.folder


def test_stopping_ends_the_running_points_and_keeps_the_finished(project: Path) -> None:
    notebook(project, BODY + "import time\nif n > 1:\n    time.sleep(600)", PARAMETERS)
    points = sweep.grid_points("tiny", {"n": [1, 2]})

    def interrupted(line: str) -> None:
        if "done in" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(points, jobs=2, bound=10**8, say=interrupted)
    assert points[0].is_current()
    assert not [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert [p.name for p in sweep.sweep_dir("tiny").iterdir()] == [points[0].digest]


def test_a_point_does_not_outlive_a_sweep_that_was_killed(project: Path) -> None:
    notebook(project, "import time\ntime.sleep(600)", PARAMETERS)
    (point,) = sweep.grid_points("tiny", {"n": [1]})
    # A sweep in a process of its own, which can then be killed without warning.
    script = (
        "import sys; from emosae_utils import runner, sweep; from emosae_utils.runner import Chapter;"
        f"runner.profiles = lambda: {{'default': (Chapter('tiny', book={str(project / 'book')!r}),)}};"
        "sweep.run_sweep(sweep.grid_points('tiny', {'n': [1]}), jobs=1, bound=10**8)"
    )
    with runner.environment():
        process = subprocess.Popen([sys.executable, "-c", script])
    mine: list[psutil.Process] = []
    until = time.monotonic() + 120
    while len(mine) < 2 and time.monotonic() < until:
        mine = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.1)
    assert len(mine) >= 2, "the point and its kernel"
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(mine, timeout=30)
    assert not alive and not point.folder.exists()


def test_a_new_process_waits_for_memory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running ones' growth up to their bound is spoken for; one that is past it has taken what it takes."""
    points = sweep.grid_points("tiny", {"n": [1]})

    class Fake:
        pid = 1

    running: Any = [sweep._Running(points[0], Fake(), None, 0.0)] * 2  # type: ignore[arg-type]
    for resident, free, room in ((0, 2.9, False), (0, 3.1, True), (0.6, 1.9, True), (0.6, 1.7, False), (2, 1.1, True)):
        monkeypatch.setattr(sweep, "free_memory", lambda device, free=free: int(free * 1e9))
        monkeypatch.setattr(sweep, "resident_bytes", lambda pid, resident=resident: int(resident * 1e9))
        assert sweep._has_room(running, 10**9) == room, (resident, free)
    monkeypatch.setattr(sweep, "free_memory", lambda device: 0)
    assert sweep._has_room([], 10**9) and sweep.default_jobs(8, 10**9) == 1
    assert sweep.expected_bytes(points) == sweep.DEFAULT_BYTES


def test_nothing_finished_gathers_nothing(project: Path) -> None:
    points = sweep.grid_points("tiny", {"n": [1]})
    folder = sweep.gather([sweep.Outcome(points[0], 1.0, "it stopped")])
    assert [p.name for p in folder.iterdir()] == ["points.json"]
    assert files.read_json(folder / "points.json")[0]["error"] == "it stopped"


def test_tables_of_points_may_be_empty_or_differ_in_columns(project: Path) -> None:
    points = sweep.grid_points("tiny", {"n": [1, 2]})
    for point, table in zip(points, (pd.DataFrame({"a": [1.0]}), pd.DataFrame({"b": ["x", "y"]})), strict=True):
        files.write_table(point.folder / "t.parquet", table)
        files.write_table(point.folder / "none.parquet", table.head(0))
        files.write_json(point.folder / "run.json", {"seconds": 1.0})
    folder = sweep.gather([sweep.Outcome(p, None) for p in points])
    found = files.read_table(folder / "t.parquet")
    assert found["sweep_n"].tolist() == [1, 2, 2] and found["b"].tolist()[1:] == ["x", "y"]
    assert len(files.read_table(folder / "none.parquet")) == 0
