"""Run chapters with papermill, skip what has not changed, record what ran, and build the HTML.

A run lies in `runs/<profile>/<chapter>/`: the executed notebook, its result files (parquet and JSON) beside it, and
`run.json`, which says with which parameters, seed, versions, model and data it ran, how long and with how much memory.
Later chapters read the result files of earlier ones; nothing is passed in memory. A run folder appears whole or not at
all, so an interrupted run loses only the chapter it was in.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil
import yaml

from emosae_utils.data import cards, is_present
from emosae_utils.files import (
    EmosaeError,
    atomic_folder,
    check_manifest,
    pick,
    read_json,
    repo_dir,
    sha256_file,
    sha256_text,
    write_json,
    write_manifest,
)
from emosae_utils.models import is_prepared, model_profile

Say = Callable[[str], None]

# Versions recorded with every run, and part of the key that decides whether a run is still valid.
RECORDED = (
    "torch",
    "transformers",
    "nnsight",
    "sae-lens",
    "scikit-learn",
    "numpy",
    "pandas",
    "papermill",
    "emosae-utils",
)
# Set by the runner: where a chapter writes and where it finds the chapters before it, seen from its own run folder.
PLACES = {"out_dir": ".", "in_dir": ".."}


@dataclass(frozen=True)
class Chapter:
    """A notebook of `book/`, or of another folder, with the parameters that a profile gives it."""

    notebook: str
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    book: str = ""

    @property
    def source(self) -> Path:
        """The pristine notebook."""
        return Path(self.book or repo_dir() / "book") / f"{self.notebook}.ipynb"


def profiles() -> dict[str, tuple[Chapter, ...]]:
    """The run profiles of the registry."""
    text = Path(__file__).with_name("registry.yaml").read_text(encoding="utf-8")
    loaded = yaml.safe_load(text)["profiles"]
    return {name: tuple(Chapter(**entry) for entry in profile["chapters"]) for name, profile in loaded.items()}


def runs_dir(profile: str) -> Path:
    """Where the runs of a profile lie: `runs/<profile>` in the checkout, or under `EMOSAE_RUNS_DIR`."""
    return Path(os.environ.get("EMOSAE_RUNS_DIR") or repo_dir() / "runs") / profile


def default_parameters(notebook: Path) -> dict[str, Any]:
    """The parameters cell of a notebook as values.

    Raises:
        EmosaeError: if the cell holds anything but literals.
    """
    import papermill

    found = papermill.inspect_notebook(str(notebook))
    values = {}
    for name, entry in found.items():
        try:
            values[name] = ast.literal_eval(entry["default"])
        except (ValueError, SyntaxError) as error:
            raise EmosaeError(f"{notebook.name}: parameter {name} must be a literal, not {entry['default']}") from error
    return values


def resolve_parameters(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The notebook's defaults overlaid with `given`.

    Raises:
        EmosaeError: for a name the notebook does not have, or a value of another type than the default's.
    """
    values = default_parameters(notebook)
    for name, value in given.items():
        pick(f"parameter of {notebook.stem}", name, values)
        wanted = type(values[name])
        if isinstance(value, int) and not isinstance(value, bool) and wanted is float:
            value = float(value)
        if values[name] is not None and (type(value) is not wanted):
            hint = " (lists are passed with -y, as in -y 'models: [a, b]')" if wanted is list else ""
            got = f"{type(value).__name__} {value!r}"
            raise EmosaeError(f"parameter {name} of {notebook.stem} takes {wanted.__name__}, got {got}{hint}")
        values[name] = value
    return values


def model_names(parameters: Mapping[str, Any]) -> list[str]:
    """The models that parameters ask for."""
    names = [parameters["model"]] if parameters.get("model") else []
    return list(dict.fromkeys([*names, *parameters.get("compare_with", [])]))


def absolute(value: Any) -> Any:
    """A user's own file, model or folder of dictionaries by its full path: a chapter runs in a folder of its own."""
    if isinstance(value, list):
        return [absolute(item) for item in value]
    if isinstance(value, str) and value:
        path = Path(value).expanduser()
        own_folder = (path / "config.json").is_file() or any(path.glob("layer_*/cfg.json"))
        if (path.suffix and path.is_file()) or own_folder:
            return str(path.resolve())
    return value


def _data_state() -> dict[str, str]:
    """What data a chapter could see: checksums of the embedded sets, and which public sets are there.

    The loader refuses a public file whose checksum differs from its card, so presence says all.
    """
    data = repo_dir() / "data"
    # Of a dictionary the manifest stands for its files; loading checks them against it.
    files = sorted([*data.rglob("*.jsonl"), *data.rglob("manifest.json")])
    embedded = {str(p.relative_to(data)): sha256_file(p) for p in files}
    public = {card.name: "present" if is_present(card.name) else "absent" for card in cards() if card.is_public}
    return embedded | public


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in RECORDED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _package_digest() -> str:
    package = Path(__file__).parent
    files = sorted(p for p in package.iterdir() if p.suffix in {".py", ".yaml"})
    return sha256_text(*(f"{p.name} {sha256_file(p)}" for p in files))


def _own_files(parameters: Mapping[str, Any]) -> list[str]:
    """The state of a user's own files and model folders among the parameters, so that an edited one is run anew."""
    state = []
    for value in parameters.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and item and Path(item).is_absolute():
                path = Path(item)
                if path.is_file():
                    state.append(f"{item} {sha256_file(path)}")
                elif path.is_dir():
                    inside = sorted(p for p in path.rglob("*") if p.is_file())
                    state += [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in inside]
    return state


def run_key(chapter: Chapter, parameters: Mapping[str, Any], earlier: Sequence[str]) -> str:
    """A digest of everything a chapter's result depends on; `earlier` are the keys of the chapters before it."""
    parameters = {k: v for k, v in parameters.items() if k not in PLACES}
    models = [model_profile(name) for name in model_names(parameters)]
    return sha256_text(
        chapter.source.read_text(encoding="utf-8"),
        repr(sorted(parameters.items())),
        _package_digest(),
        repr(sorted(_versions().items())),
        repr(sorted(_data_state().items())),
        repr(_own_files(parameters)),
        repr([(p.name, p.gguf_sha256, p.base) for p in models]),
        *earlier,
    )


def recorded_key(folder: Path) -> str:
    """The key of the run in a folder; empty if there is none."""
    record = folder / "run.json"
    return str(read_json(record)["key"]) if record.is_file() else ""


def is_current(folder: Path, key: str) -> bool:
    """Whether a run folder holds a finished run with this key and none of its files was altered."""
    record = folder / "run.json"
    return record.is_file() and check_manifest(folder) is None and read_json(record).get("key") == key


class _PeakMemory(threading.Thread):
    """Samples the memory of this process's children, where the kernel lives; `peak` is in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._done = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.25):
            total = 0
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += child.memory_info().rss
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.peak


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """The kernel imports this checkout's package, wherever it runs, and reads no hub unless asked."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repo_dir()), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _execute(chapter: Chapter, parameters: Mapping[str, Any], folder: Path, kept: Path) -> None:
    """Run the notebook inside `folder`; on failure copy it to `kept` and raise an error of one line."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target = folder / f"{chapter.notebook}.ipynb"
    quiet = bool(os.environ.get("CI")) or not sys.stderr.isatty()
    try:
        with environment():
            papermill.execute_notebook(
                str(chapter.source),
                str(target),
                parameters=dict(parameters),
                cwd=str(folder),
                kernel_name="python3",
                progress_bar=not quiet,
                log_output=False,
                # What goes wrong in a cell comes back with the notebook; the kernel's own log would only repeat it.
                extra_arguments=["--log-level=CRITICAL"],
            )
    except (PapermillExecutionError, DeadKernelError) as error:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, kept)
        if isinstance(error, DeadKernelError):
            free = psutil.virtual_memory().available / 1e9
            reason = f"its kernel died, most likely for want of memory ({free:.1f} GB are free now)"
        else:
            # An EmosaeError speaks for itself; of another error the type belongs to the message.
            reason = error.evalue if error.ename == "EmosaeError" else f"{error.ename}: {error.evalue}"
        line = reason.strip().splitlines()[0] if reason.strip() else "no message"
        raise EmosaeError(f"{chapter.notebook} stopped: {line} (its notebook so far: {kept})") from error


def run_chapter(
    chapter: Chapter,
    profile: str,
    given: Mapping[str, Any],
    earlier: Sequence[str],
    *,
    folder: Path | None = None,
    in_dir: str = PLACES["in_dir"],
    force: bool = False,
    say: Say = lambda line: None,
) -> tuple[str, float | None]:
    """Run one chapter with the parameters `given` unless a current run of it is there.

    Args:
        chapter: what to run.
        profile: name of the run profile.
        given: parameters that differ from the notebook's own.
        earlier: keys of the chapters before it.
        folder: where the run goes; its place in the profile's runs if None.
        in_dir: where the run finds the chapters before it, seen from `folder`.
        force: run even what is current.
        say: receives a line when the run begins.

    Returns:
        The run's key, and the seconds it took; None if it was current.

    Raises:
        EmosaeError: for bad parameters, an unknown model, or a notebook that stops; earlier runs are left as they were.
    """
    parameters = resolve_parameters(chapter.source, given)
    key = run_key(chapter, parameters, earlier)
    folder = folder or runs_dir(profile) / chapter.notebook
    places = PLACES | {"in_dir": in_dir}
    if not force and is_current(folder, key):
        return key, None
    say(f"{chapter.notebook}: running")
    started, memory = datetime.datetime.now(datetime.UTC), _PeakMemory()
    clock = time.perf_counter()
    with atomic_folder(folder) as temporary:
        memory.start()
        try:
            kept = folder.parent / "failed" / f"{folder.name}.ipynb"
            _execute(chapter, parameters | places, temporary, kept)
        finally:
            peak = memory.stop()
        seconds = time.perf_counter() - clock
        record = {
            "chapter": chapter.notebook,
            "profile": profile,
            "parameters": {k: v for k, v in parameters.items() if k not in PLACES},
            "seed": parameters.get("seed"),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "peak_memory_bytes": peak,
            "versions": _versions(),
            "models": {name: model_profile(name).gguf_sha256 or name for name in model_names(parameters)},
            "data": _data_state(),
            "machine": {"arch": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
            "key": key,
        }
        write_json(temporary / "run.json", record)
        write_manifest(temporary)
    return key, seconds


def run_profile(
    profile: str,
    *,
    only: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    force: bool = False,
    say: Say = lambda line: None,
) -> None:
    """Run a profile's chapters in order; what is current is skipped, so an interrupted run resumes.

    Args:
        profile: name of a run profile.
        only: chapters to run; all if empty.
        given: parameters; each goes to those of the chosen chapters that have it, and at least one must.
        force: run even what is current.
        say: receives one line per chapter.

    Raises:
        EmosaeError: for an unknown profile, chapter or parameter (before anything runs), or a chapter that stops.
    """
    known = profiles()
    chapters = known[pick("profile", profile, known)]
    names = [c.notebook for c in chapters]
    for name in only:
        pick(f"chapter of profile {profile}", name, names)
    chosen = [c for c in chapters if not only or c.notebook in only]
    given = {name: absolute(value) for name, value in (given or {}).items()}
    own = {chapter: set(default_parameters(chapter.source)) for chapter in chosen}
    for name in given:
        pick(f"parameter of {', '.join(c.notebook for c in chosen)}", name, set().union(*own.values()))
    asked = {c: {**c.parameters, **{k: v for k, v in given.items() if k in own[c]}} for c in chosen}
    for chapter, parameters in asked.items():
        for name in model_names(resolve_parameters(chapter.source, parameters)):
            model_profile(name)
    keys: list[str] = []
    for chapter in chapters:
        if chapter not in chosen:
            keys.append(recorded_key(runs_dir(profile) / chapter.notebook))
            continue
        key, seconds = run_chapter(chapter, profile, asked[chapter], keys, force=force, say=say)
        keys.append(key)
        say(f"{chapter.notebook}: up to date" if seconds is None else f"{chapter.notebook}: done in {seconds:.0f} s")


def unprepared_models(profile: str) -> list[str]:
    """Packaged models that a profile's chapters use and that are not in the cache yet."""
    known = profiles()
    names: dict[str, None] = {}
    for chapter in known[pick("profile", profile, known)]:
        for name in model_names(resolve_parameters(chapter.source, chapter.parameters)):
            names[name] = None
    return [name for name in names if not is_prepared(model_profile(name))]


def _stage(executed: Path, target: Path) -> None:
    """Copy an executed notebook for the book, the cell of parameters that papermill added hidden like the first one."""
    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = [*cell.metadata["tags"], "remove-cell"]
    nbformat.write(notebook, target)


def build_book(profile: str) -> Path:
    """Build the HTML of a profile's runs with Jupyter Book, warnings as errors.

    Returns:
        The path of the first page.

    Raises:
        EmosaeError: if a chapter has not run, or Jupyter Book reports a warning; its output is shown before.
    """
    root, book = repo_dir(), repo_dir() / "book"
    known = profiles()
    chapters = known[pick("profile", profile, known)]
    build = root / "_build" / profile
    stage = build / "source"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(book, stage, ignore=shutil.ignore_patterns("*.ipynb", ".ipynb_checkpoints", "__pycache__"))
    for chapter in chapters:
        done = runs_dir(profile) / chapter.notebook / f"{chapter.notebook}.ipynb"
        if not done.is_file():
            raise EmosaeError(f"chapter {chapter.notebook} has not run; run `emosae run --profile {profile}` first")
        _stage(done, stage / f"{chapter.notebook}.ipynb")
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(stage)]
    command += ["--path-output", str(build)]
    command += ["--config", str(root / "_config.yml"), "--toc", str(stage / "_toc.yml"), "--all"]
    log = build / "build.log"
    with log.open("w", encoding="utf-8") as stream:
        done_build = subprocess.run(
            [*command, "-W", "-n", "--keep-going"], stdout=stream, stderr=subprocess.STDOUT, cwd=root
        )
    if done_build.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        wrong = [line for line in lines if "WARNING" in line or "ERROR" in line or "Error" in line]
        raise EmosaeError(f"the book did not build: {(wrong or lines or ['no output'])[0]} (whole log: {log})")
    page = build / "_build" / "html" / "index.html"
    if not page.is_file():
        raise EmosaeError(f"the book did not build: there is no {page} (whole log: {log})")
    return page
