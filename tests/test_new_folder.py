"""The folder of an export: whole or not there, by one program, and nothing else is touched."""

import threading
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.formats.portable import check_new, new_folder


def write(out: Path, text: str = "whole") -> None:
    with new_folder(out) as folder:
        (folder / "file").write_text(text)


def test_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert [*(tmp_path / "deep").iterdir()] == []
    (tmp_path / "deep" / "out").mkdir()  # an empty one is filled
    write(tmp_path / "deep" / "out")
    assert [path.name for path in (tmp_path / "deep").rglob("*")] == ["out", "file"]
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "deep" / "out")


def test_the_remains_of_a_killed_export_are_replaced(tmp_path: Path) -> None:
    (tmp_path / ".out.export").mkdir()
    (tmp_path / ".out.export" / "half").write_text("")
    (tmp_path / ".out.export.lock").write_text("")
    write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "out"]


def test_two_at_once(tmp_path: Path) -> None:
    """The second would delete what the first has written so far."""
    begun, errors = threading.Event(), []

    def second() -> None:
        begun.wait()
        try:
            write(tmp_path / "out", "second")
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        begun.set()
        thread.join()
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert len(errors) == 1 and "another export" in errors[0]


def test_odd_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "link").symlink_to(empty)
    (tmp_path / ".taken.export").write_text("kept")
    for out in (Path("."), Path(""), Path("/"), Path(".."), *map(tmp_path.joinpath, ("file", "file/out", "nowhere"))):
        with pytest.raises(UserError):
            write(out)
    for name in ("file/model.gguf", "file/sub/model.gguf"):  # before a model is loaded
        with pytest.raises(UserError):
            check_new(tmp_path / name, is_file=True)
    for name in ("link", "taken"):
        with pytest.raises(UserError):
            write(tmp_path / name)
    assert empty.is_dir() and {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"kept"}


def test_something_that_came_in_between_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="meanwhile"), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
