"""Which files in the cache are trusted: none that another user could have changed."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusedloss import jit


@pytest.fixture
def finished(tmp_path, monkeypatch) -> SimpleNamespace:
    """A finished build in the cache. `get` returns how it was loaded or compiled."""
    folder = tmp_path / "above" / "cache" / "cpu-0"
    attempt = folder / "attempt-0"
    attempt.mkdir(parents=True)
    (attempt / "a.so").touch(mode=0o755)
    (folder / "done.json").write_text('{"file": "attempt-0/a.so", "size": 0}')
    for path in (tmp_path / "above", tmp_path / "above" / "cache", folder, attempt):
        path.chmod(0o755)
    monkeypatch.setattr(jit, "_compile_once", lambda *_: "compiled")
    monkeypatch.setattr(jit, "_compile_apart", lambda *_: "compiled for this process")
    build = jit.Build(None, "a", folder, says="", seconds=0, opens=lambda library: f"loaded {library.name}")
    places = {"folder": folder, "attempt": attempt, "library": attempt / "a.so", "note": folder / "done.json"}
    return SimpleNamespace(
        get=lambda folder=folder: jit.compiled(replace(build, folder=folder)),
        above=tmp_path / "above",
        **places,
    )


@pytest.mark.parametrize("place", ["folder", "attempt", "library", "note"])
def test_files_that_others_can_change(finished, place, capsys, monkeypatch):
    path = getattr(finished, place)
    assert finished.get() == "loaded a.so"
    for bit in (0o020, 0o002):
        path.chmod(0o755 | bit)
        assert finished.get() == "compiled for this process"
        assert f"other users can write to {path} (mode " in capsys.readouterr().err
    path.chmod(0o755)
    assert finished.get() == "loaded a.so" and capsys.readouterr().err == ""
    lstat = os.lstat

    def belongs_to(owner):
        def changed(name, **options):
            status = lstat(name, **options)
            return os.stat_result([*status[:4], owner if Path(name) == path else os.geteuid(), *status[5:]])

        monkeypatch.setattr(jit.os, "lstat", changed)

    monkeypatch.setattr(jit.os, "geteuid", lambda: 12345)
    belongs_to(0)  # installed by an administrator
    assert finished.get() == "loaded a.so"
    belongs_to(54321)
    assert finished.get() == "compiled for this process"
    assert f"{path} belongs to another user (id 54321)" in capsys.readouterr().err


def test_folders_above_that_others_can_change(finished, monkeypatch):
    monkeypatch.setattr(jit, "_is_own_group", lambda group: False)
    results = {}
    for mode in (0o755, 0o775, 0o757, 0o777, 0o1777):
        finished.above.chmod(mode)
        results[mode] = finished.get()
    assert [mode for mode, result in results.items() if result == "loaded a.so"] == [0o755, 0o1777]
    monkeypatch.setattr(jit, "_is_own_group", lambda group: True)
    finished.above.chmod(0o775)
    assert finished.get() == "loaded a.so"


def test_links_in_the_cache(finished, tmp_path):
    """The cache may be a symbolic link, but its files may not be links to files outside of it."""
    (tmp_path / "link").symlink_to(finished.above)
    assert finished.get(tmp_path / "link" / "cache" / "cpu-0") == "loaded a.so"
    outside = finished.library.rename(tmp_path / "a.so")
    finished.library.symlink_to(outside)
    assert finished.get() == "compiled"
