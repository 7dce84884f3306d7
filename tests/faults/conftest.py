"""Disks that can be filled and made read-only, for those who may mount one; others skip what needs them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


class Disk:
    """A small file system in memory."""

    def __init__(self, folder):
        self.folder = folder

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def fill(self):
        """Leave no room at all."""
        with (self.folder / "filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def free(self):
        (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"there is no `mount` here: {error}")
    if made.returncode:
        pytest.skip(f"a disk of one's own cannot be mounted here: {made.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def refused():
    """A folder that the process may read and not write: an administrator's test goes on as nobody."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "theirs"
        folder.mkdir()
        (folder / "out").write_bytes(b"old")
        Path(made).chmod(0o755)
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 0)
        try:
            yield folder
        finally:
            if os.getresuid()[2] == 0:
                os.setresuid(0, 0, 0)
            folder.chmod(0o755)
