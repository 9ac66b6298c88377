"""A file that is written, replaced, linked, deleted: when that is a change."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.small_files import MAX_BYTES
from gateway.watch import FileWatch


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("before")
    return path


def rewrite(path: Path) -> None:
    path.write_text("after!")


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_text("after!")
    new.replace(path)


def delete(path: Path) -> None:
    path.unlink()


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_huge(path: Path) -> None:
    os.truncate(path, MAX_BYTES + 1)


CHANGES = {
    "rewritten": rewrite,
    "replaced": replace,
    "deleted": delete,
    "a folder": become_a_folder,
    "a pipe": become_a_pipe,
    "huge": become_huge,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_one_until_it_is_taken(file: Path, change: Callable[[Path], None]) -> None:
    watch = FileWatch(file)
    assert [watch.has_changed(), watch.has_changed()] == [False, False]
    change(file)
    assert [watch.has_changed() for _ in range(4)] == [False, True, True, True]
    watch.take()
    assert [watch.has_changed(), watch.has_changed()] == [False, False]


def test_while_it_is_written_it_has_not_changed(file: Path) -> None:
    watch, seen = FileWatch(file), []
    for size in range(5):
        file.write_text("part" * size)
        seen.append(watch.has_changed())
    assert seen == [False] * 5
    assert watch.has_changed()


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def same_again(path: Path) -> None:
    replace(path)
    path.write_text("before")


def gone_and_back(path: Path) -> None:
    path.rename(path.with_name("away"))
    path.with_name("away").rename(path)


@pytest.mark.parametrize("change", [touch, same_again, gone_and_back])
def test_the_same_content_is_no_change(file: Path, change: Callable[[Path], None]) -> None:
    watch = FileWatch(file)
    change(file)
    assert [watch.has_changed() for _ in range(4)] == [False] * 4


def test_gone_for_a_moment(file: Path) -> None:
    """As by an editor that deletes and writes: one look may fall in between."""
    watch = FileWatch(file)
    file.unlink()
    assert not watch.has_changed()
    file.write_text("before")
    assert [watch.has_changed() for _ in range(3)] == [False] * 3


def test_it_comes_later(tmp_path: Path) -> None:
    watch = FileWatch(tmp_path / "config.yaml")
    assert not watch.has_changed()
    watch.path.write_text("now")
    assert [watch.has_changed(), watch.has_changed()] == [False, True]


def test_a_link_in_its_way_is_turned(tmp_path: Path) -> None:
    """As Kubernetes changes a ConfigMap: `..data` leads to another folder, and the file is a link through it."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"in {name}")
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "config.yaml").symlink_to("..data/config.yaml")
    watch = FileWatch(tmp_path / "config.yaml")
    (tmp_path / "turned").symlink_to("two")
    (tmp_path / "turned").replace(tmp_path / "..data")
    assert [watch.has_changed(), watch.has_changed()] == [False, True]
