"""Sweeps: one chapter over a grid of parameters, in parallel processes that fit into memory, resumable.

A point of the grid is an ordinary run of the chapter in `runs/sweeps/<chapter>/<digest>/`, with the results of the
profile's earlier chapters as its `in_dir`. Points whose key is unchanged are skipped; one that fails or is interrupted
loses only itself. At the end every result table that all finished points have becomes one table, with the values of
the grid as columns, in `runs/sweeps/<chapter>/tables/`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd
import psutil

from emosae_utils import runner
from emosae_utils.files import (
    EmosaeError,
    atomic_folder,
    pick,
    read_json,
    read_table,
    sha256_text,
    write_json,
    write_table,
)
from emosae_utils.models import free_memory, model_profile
from emosae_utils.runner import PLACES, Chapter, Say

# What a process is taken to need where no earlier run of the chapter says better.
DEFAULT_BYTES = 4 * 10**9
# Seconds between two looks at the running processes.
PAUSE = 0.2


@dataclass(frozen=True)
class Point:
    """One point of a grid.

    Attributes:
        chapter: the notebook.
        profile: whose parameters and earlier chapters the point builds on.
        values: what the grid gives this point.
        parameters: all of the notebook's, checked; the places are the runner's.
        earlier: keys of the profile's earlier chapters.
    """

    chapter: Chapter
    profile: str
    values: Mapping[str, Any]
    parameters: Mapping[str, Any]
    earlier: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Names the point: the same parameters of the same profile lie in the same folder."""
        return sha256_text(self.profile, repr(sorted(self.parameters.items())))[:12]

    @property
    def folder(self) -> Path:
        """Where its run lies."""
        return sweep_dir(self.chapter.notebook) / self.digest

    @property
    def label(self) -> str:
        """The point in words."""
        return ", ".join(f"{name}={_plain(value)}" for name, value in self.values.items())

    def is_current(self) -> bool:
        """Whether its run is there and nothing it depends on has changed."""
        return runner.is_current(self.folder, runner.run_key(self.chapter, self.parameters, self.earlier))


@dataclass(frozen=True)
class Outcome:
    """How a point ended: seconds it took (None if it was up to date), and what went wrong, empty if nothing did."""

    point: Point
    seconds: float | None
    error: str = ""


def sweep_dir(chapter: str) -> Path:
    """Where the sweeps of a chapter lie: `runs/sweeps/<chapter>`."""
    return runner.runs_dir("sweeps") / chapter


def _plain(value: Any) -> Any:
    """A value as a cell of a table: of a list its items, joined."""
    return " + ".join(str(item) for item in value) if isinstance(value, list) else value


def grid_points(
    notebook: str, grid: Mapping[str, Any], *, profile: str = "default", fixed: Mapping[str, Any] | None = None
) -> list[Point]:
    """The product of the grid's lists as points, each checked against the notebook's parameters.

    A sweep over `model` compares the models itself, so `compare_with` is empty unless it is given.

    Args:
        notebook: name of the chapter, in `profile`.
        grid: a list of values for each parameter; of a parameter that is a list, a list of lists.
        profile: run profile that gives the other parameters and the earlier chapters.
        fixed: parameters that are the same at every point.

    Raises:
        EmosaeError: for an unknown profile, chapter, parameter or model, a value of the wrong type, or an empty grid.
    """
    known = runner.profiles()
    chapters = known[pick("profile", profile, known)]
    names = [c.notebook for c in chapters]
    chapter = chapters[names.index(pick(f"chapter of profile {profile}", notebook, names))]
    defaults = runner.default_parameters(chapter.source)
    for name, values in grid.items():
        default = defaults[pick(f"parameter of {notebook}", name, set(defaults) - set(PLACES))]
        if not isinstance(values, list) or not values:
            raise EmosaeError(f"a sweep takes a list of values for each parameter, as in -y '{name}: [...]'")
        if isinstance(default, list) and not all(isinstance(v, list) for v in values):
            raise EmosaeError(f"{name} is a list, so a sweep takes a list of lists, as in -y '{name}: [[a], [b, c]]'")
    if not grid:
        raise EmosaeError("a sweep needs values to go over, as in -y 'seed: [0, 1, 2]'")
    same = {name: runner.absolute(value) for name, value in (fixed or {}).items()}
    if "model" in grid and "compare_with" in set(defaults) - set(grid) - set(same):
        same["compare_with"] = []
    before = chapters[: chapters.index(chapter)]
    earlier = tuple(runner.recorded_key(runner.runs_dir(profile) / c.notebook) for c in before)
    points = {}
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, (runner.absolute(v) for v in combination), strict=True))
        resolved = runner.resolve_parameters(chapter.source, {**chapter.parameters, **same, **values})
        parameters = {k: v for k, v in resolved.items() if k not in PLACES}
        for model in runner.model_names(parameters):
            model_profile(model)
        point = Point(chapter, profile, values, parameters, earlier)
        points[point.digest] = point
    return list(points.values())


def expected_bytes(points: Sequence[Point]) -> int:
    """Memory that one process of a sweep is taken to need: the largest peak of the chapter's earlier runs."""
    first = points[0]
    folders = [runner.runs_dir(first.profile) / first.chapter.notebook, *(p.folder for p in points)]
    records = [folder / "run.json" for folder in folders]
    return max((int(read_json(r)["peak_memory_bytes"]) for r in records if r.is_file()), default=0) or DEFAULT_BYTES


def default_jobs(n_points: int, bound: int) -> int:
    """How many processes memory and cores have room for; at least one."""
    return max(1, min(n_points, os.cpu_count() or 1, free_memory("cpu") // bound))


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; the notebook's kernel is one of them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    return []


def resident_bytes(pid: int) -> int:
    """Memory that a process and all below it hold now."""
    total = 0
    for process in _tree(pid):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


@dataclass
class _Running:
    point: Point
    process: subprocess.Popen[bytes]
    said: IO[bytes]
    since: float

    def stop(self) -> None:
        """End the process, its kernel with it, and clear its half-made run away."""
        for process in _tree(self.process.pid):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self.said.close()
        for leftover in self.point.folder.parent.glob(f".{self.point.digest}-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def outcome(self) -> Outcome:
        """How it ended, once it has."""
        code = self.process.returncode
        self.said.seek(0)
        lines = self.said.read().decode("utf-8", errors="replace").strip().splitlines()
        self.said.close()
        error = ""
        if code:
            killed = f"its process was ended by signal {-code}, most likely for want of memory" if code < 0 else ""
            error = killed or (lines[-1] if lines else f"its process ended with {code}").removeprefix("error: ")
        return Outcome(self.point, time.perf_counter() - self.since, error)


def _start(point: Point, threads: int) -> _Running:
    job = {
        "notebook": point.chapter.notebook,
        "book": point.chapter.book,
        "profile": point.profile,
        "parameters": dict(point.parameters),
        "earlier": list(point.earlier),
        "folder": str(point.folder.absolute()),
        "in_dir": str(runner.runs_dir(point.profile).absolute()),
        "parent": os.getpid(),
    }
    said = tempfile.TemporaryFile()  # noqa: SIM115
    with runner.environment():
        process = subprocess.Popen(
            [sys.executable, "-m", "emosae_utils.sweep", json.dumps(job)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            # Ctrl-C is for the sweep, which then ends its points one by one.
            start_new_session=True,
        )
    return _Running(point, process, said, time.perf_counter())


def _has_room(running: Sequence[_Running], bound: int) -> bool:
    """Whether free memory covers one process more, and what the running ones may still grow by."""
    still = sum(max(0, bound - resident_bytes(r.process.pid)) for r in running)
    return not running or free_memory("cpu") >= bound + still


def run_sweep(
    points: Sequence[Point], *, jobs: int = 0, bound: int = 0, force: bool = False, say: Say = lambda line: None
) -> list[Outcome]:
    """Run the points that are not up to date, several at a time.

    A process starts only while fewer than `jobs` run, and while free memory covers its bound on top of what the
    running ones may still grow to; the first always starts. The cores are shared out between them.

    Args:
        points: from `grid_points`.
        jobs: most processes at a time; as many as memory and cores have room for if 0.
        bound: memory that one process is taken to need, bytes; the chapter's own measured peak if 0.
        force: run what is up to date too.
        say: receives one line per point.

    Returns:
        How each point ended, in the order of `points`. Ctrl-C ends the running points and is passed on.
    """
    current = [p for p in points if not force and p.is_current()]
    outcomes = {p.digest: Outcome(p, None) for p in current}
    waiting = [p for p in points if p.digest not in outcomes]
    bound = bound or expected_bytes(points)
    jobs = jobs or default_jobs(len(waiting), bound)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    say(
        f"{len(points)} points, {len(current)} up to date; up to {jobs} at a time, {bound / 1e9:.1f} GB each, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs and _has_room(running, bound):
                running.append(_start(waiting.pop(0), threads))
            time.sleep(PAUSE)
            for done in [r for r in running if r.process.poll() is not None]:
                running.remove(done)
                outcome = outcomes[done.point.digest] = done.outcome()
                how = f"failed: {outcome.error}" if outcome.error else f"done in {outcome.seconds:.0f} s"
                say(f"{len(outcomes)}/{len(points)} {done.point.digest} ({done.point.label}): {how}")
    finally:
        for left in running:
            left.stop()
    return [outcomes[p.digest] for p in points]


def gather(outcomes: Sequence[Outcome]) -> Path:
    """Put the tables of the finished points together, and write `points.json` beside them.

    A table is gathered if every finished point has it. Columns are added in front: point, and `sweep_<parameter>` for
    each parameter of the grid (of a list, its items joined by " + ").

    Returns:
        The folder of the tables.
    """
    points = [o.point for o in outcomes]
    finished = [o.point for o in outcomes if not o.error]
    names = [{path.name for path in p.folder.glob("*.parquet")} for p in finished]
    target = sweep_dir(points[0].chapter.notebook) / "tables"
    with atomic_folder(target) as folder:
        for name in sorted(set.intersection(*names)) if names else []:
            parts = []
            for point in finished:
                keys = {"point": point.digest} | {f"sweep_{k}": _plain(v) for k, v in point.values.items()}
                table = read_table(point.folder / name)
                front = pd.DataFrame({k: [v] * len(table) for k, v in keys.items()}, index=table.index)
                parts.append(pd.concat([front, table], axis=1))
            write_table(folder / name, pd.concat(parts, ignore_index=True))
        write_json(folder / "points.json", [_record(outcome) for outcome in outcomes])
    return target


def _record(outcome: Outcome) -> dict[str, Any]:
    """A point and what its run cost, for `points.json`."""
    point = outcome.point
    run = {} if outcome.error else read_json(point.folder / "run.json")
    return {
        "point": point.digest,
        "values": dict(point.values),
        "profile": point.profile,
        "state": "failed" if outcome.error else "finished",
        "error": outcome.error,
        "seconds": run.get("seconds"),
        "peak_memory_bytes": run.get("peak_memory_bytes"),
        "key": run.get("key"),
    }


def _end_with(parent: int) -> None:
    """End this process, and so its kernel, when the sweep that started it is gone without having said so."""
    while os.getppid() == parent:
        time.sleep(1)
    for process in _tree(os.getpid())[:-1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(1)


def _run_point(job: Mapping[str, Any]) -> None:
    """What each process of a sweep does."""
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    runner.run_chapter(
        Chapter(job["notebook"], book=job["book"]),
        job["profile"],
        job["parameters"],
        job["earlier"],
        folder=Path(job["folder"]),
        in_dir=job["in_dir"],
        force=True,
    )


if __name__ == "__main__":
    try:
        _run_point(json.loads(sys.argv[1]))
    except EmosaeError as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)
