"""Files that commands are told to write."""

import os
import stat
from pathlib import Path

import pytest

from nanodlm.cli.files import check_file, writing
from nanodlm.errors import UsageError


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a")
    (tmp_path / "folder").mkdir()
    for file in ("", "file", "new", "/dev/stdout"):
        check_file(file)
    for folder in ("", "folder", "new/and/newer", "folder/new"):
        check_file(folder, is_folder=True)
    with pytest.raises(UsageError, match="cannot write folder: it is a folder"):
        check_file("folder")
    for parent in ("none", "file"):
        with pytest.raises(UsageError, match=f"cannot write {parent}/new: there is no folder {parent}"):
            check_file(f"{parent}/new")
    with pytest.raises(UsageError, match=r"cannot write file/new: .*file is no folder"):
        check_file("file/new", is_folder=True)
    if os.geteuid():  # root may write anywhere
        (tmp_path / "folder").chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(UsageError, match="cannot write folder/new: folder is not writable"):
            check_file("folder/new")
        with pytest.raises(UsageError, match="cannot write folder: folder is not writable"):
            check_file("folder", is_folder=True)


def test_what_fails_while_writing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write here: Is a directory"), writing("here"):
        tmp_path.write_text("a")
