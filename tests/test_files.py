from __future__ import annotations

import errno
import os
from pathlib import Path

import pandas as pd
import pytest

from emosae_utils import files
from emosae_utils.files import EmosaeError


def test_pick_names_the_nearest() -> None:
    assert files.pick("model", "a", ["a", "b"]) == "a"
    with pytest.raises(EmosaeError, match="unknown model 'gema'; did you mean 'gemma'"):
        files.pick("model", "gema", ["gemma", "llama-large"])
    with pytest.raises(EmosaeError) as error:
        files.pick("model", "zzz", ["gemma"])
    assert "did you mean" not in str(error.value)


def test_atomic_file_keeps_the_old_content_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})

    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EmosaeError, match="no space is left"):
        files.write_json(path, {"a": 2})
    monkeypatch.undo()
    assert files.read_json(path) == {"a": 1}


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(folder) as temporary:
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(folder) as temporary:
        (temporary / "whole").write_text("x")
    assert (folder / "whole").is_file()


def test_require_space(tmp_path: Path) -> None:
    files.require_space(tmp_path, 1)
    with pytest.raises(EmosaeError, match="GB are needed"):
        files.require_space(tmp_path, 10**18)


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("EMOSAE_CACHE_DIR", str(blocker / "cache"))
    with pytest.raises(EmosaeError, match="set EMOSAE_CACHE_DIR"):
        files.cache_dir()


def test_manifest_finds_what_was_altered(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    assert files.check_manifest(tmp_path) == "it has no manifest"
    files.write_manifest(tmp_path)
    assert files.check_manifest(tmp_path) is None
    (tmp_path / "a.bin").write_bytes(b"ab")
    assert files.check_manifest(tmp_path) == "a.bin was truncated or altered"
    (tmp_path / "a.bin").unlink()
    assert files.check_manifest(tmp_path) == "a.bin is missing"


def test_tables_and_json_say_what_is_wrong(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1, 2]})
    files.write_table(tmp_path / "t.parquet", frame)
    pd.testing.assert_frame_equal(files.read_table(tmp_path / "t.parquet"), frame)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(EmosaeError, match="is damaged"):
        files.read_table(tmp_path / "t.parquet")
    with pytest.raises(EmosaeError, match="is missing"):
        files.read_table(tmp_path / "none.parquet")
    (tmp_path / "j.json").write_text("{")
    with pytest.raises(EmosaeError, match="not valid JSON"):
        files.read_json(tmp_path / "j.json")
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "nan.json", float("nan"))


def test_sha256_text_keeps_parts_apart() -> None:
    assert files.sha256_text("ab", "c") != files.sha256_text("a", "bc")
