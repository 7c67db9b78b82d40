"""Reading files that somebody else made."""

import os

import pytest

from nanonormuon.storage.files import read_file


def test_a_file_is_read_whole(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", limit=5) == b"12345"
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "other")


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "too long"])
def test_nothing_is_read_that_has_no_end(tmp_path, kind):
    path = tmp_path / "file"
    match kind:
        case "pipe":
            os.mkfifo(path)  # nobody writes to it
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case _:
            path.write_bytes(b"123456")
    with pytest.raises((ValueError, OSError), match=str(path)):
        read_file(path, limit=5)
