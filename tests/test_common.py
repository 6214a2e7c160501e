"""Files that appear whole, and what killed writers leave."""

import os
import time
from pathlib import Path

from nanochat.common import DAY, delete_leftovers, free_name, write_json


def test_the_next_writer_deletes_what_killed_ones_left_a_day_ago(tmp_path: Path) -> None:
    """A younger one may be of a living process; one of another name is of another writer."""
    for name, age in ((".a[1].json.0.tmp", 1.1), (".a[1].json.1.tmp", 0.9), (".b.json.2.tmp", 9)):
        (tmp_path / name).write_text("{")
        os.utime(tmp_path / name, (time.time() - age * DAY,) * 2)
    write_json(tmp_path / "a[1].json", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json", ".a[1].json.1.tmp", ".b.json.2.tmp"}


def test_leftovers_may_be_folders_or_gone(tmp_path: Path) -> None:
    (tmp_path / ".x.0.tmp").mkdir()
    (tmp_path / ".x.0.tmp" / "file").touch()
    delete_leftovers([tmp_path / ".gone.tmp", *tmp_path.glob(".*.tmp")])
    assert not list(tmp_path.iterdir())


def test_free_name(tmp_path: Path) -> None:
    for number in (1, 2):
        assert free_name(tmp_path / "d4", "old") == tmp_path / f"d4.old{number}"
        (tmp_path / f"d4.old{number}").mkdir()
