"""Files that survive accidents: where caches lie, checksums, atomic writes, and errors that say what to do.

Every result of the project is a JSON or parquet file written through this module: first to a temporary name in
the same folder, then renamed, so that a reader sees the old file or the new one and never half of one.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import platformdirs


class EmosaeError(Exception):
    """An error a user can act on. Its message is one line: what is wrong, and what to do."""


def pick(kind: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`.

    Raises:
        EmosaeError: with the nearest known name, if there is one, and the list of all.
    """
    names = sorted(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise EmosaeError(f"unknown {kind} {name!r}; {hint}known: {', '.join(names)}")


def repo_dir() -> Path:
    """The checkout: the folder that holds `book/`, `data/` and the package."""
    return Path(__file__).resolve().parent.parent


def cache_dir() -> Path:
    """The folder for converted models and fetched data: `EMOSAE_CACHE_DIR`, else the user's cache folder.

    Raises:
        EmosaeError: if it cannot be made or written to.
    """
    path = Path(os.environ.get("EMOSAE_CACHE_DIR") or platformdirs.user_cache_dir("emosae"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise EmosaeError(
            f"cannot write to the cache folder {path} ({error.strerror}); "
            "set EMOSAE_CACHE_DIR to a folder you may write to"
        ) from error
    return path


def require_space(folder: Path, needed_bytes: int) -> None:
    """Check that `folder`'s file system has room, before a long write begins.

    Raises:
        EmosaeError: if fewer than `needed_bytes` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise EmosaeError(
            f"{folder} has {free / 1e9:.1f} GB free and {needed_bytes / 1e9:.1f} GB are needed; "
            "free some space or set EMOSAE_CACHE_DIR to another disk"
        )


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(*parts: str) -> str:
    """The SHA-256 of several strings, each length-prefixed so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(f"{len(raw)}:".encode() + raw)
    return digest.hexdigest()


def _no_room(path: Path, error: OSError) -> EmosaeError:
    reason = "no space is left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)
    return EmosaeError(f"cannot write {path}: {reason}; nothing was changed, free space or choose another folder")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and vanishes when it does not.

    Raises:
        EmosaeError: if the disk is full or the folder cannot be written; `path` is then as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise _no_room(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as the user's umask says.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise _no_room(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that replaces it when the block ends well and vanishes when it does not.

    Raises:
        EmosaeError: if the disk is full or the parent folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    except OSError as error:
        raise _no_room(path, error) from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except OSError as error:
        raise _no_room(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: JSON has no word for it."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        EmosaeError: if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EmosaeError(f"{path} is missing; run the chapter that writes it first (`emosae list`)") from error
    except ValueError as error:
        raise EmosaeError(f"{path} is not valid JSON; delete it and run the chapter that writes it again") from error


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame as parquet, atomically."""
    with atomic_file(path) as temporary:
        frame.to_parquet(temporary, index=False)


def read_table(path: Path) -> pd.DataFrame:
    """Read a parquet file.

    Raises:
        EmosaeError: if it is missing or damaged.
    """
    try:
        return pd.read_parquet(path)
    except FileNotFoundError as error:
        raise EmosaeError(f"{path} is missing; run the chapter that writes it first (`emosae list`)") from error
    except (OSError, ValueError) as error:
        raise EmosaeError(f"{path} is damaged; delete it and run the chapter that writes it again") from error


def write_manifest(folder: Path) -> dict[str, str]:
    """Write `manifest.json`, the SHA-256 of every other file directly in `folder`, and return it."""
    sums = {p.name: sha256_file(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != "manifest.json"}
    write_json(folder / "manifest.json", sums)
    return sums


def check_manifest(folder: Path) -> str | None:
    """Compare a folder with its manifest: None if every file is there and unaltered, else the first fault found."""
    path = folder / "manifest.json"
    if not path.is_file():
        return "it has no manifest"
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return "its manifest is not JSON"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_file(folder / name) != expected:
            return f"{name} was truncated or altered"
    return None
