"""The user's Drive, as a folder of this machine."""

import os
from pathlib import Path


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    """Make `mountpoint` lead to the stand-in Drive, whose files are in MyDrive, as in Colab."""
    if "STAND_IN_DRIVE" not in os.environ:
        raise ValueError("mount failed")
    drive, place = Path(os.environ["STAND_IN_DRIVE"]), Path(mountpoint)
    (drive / "MyDrive").mkdir(parents=True, exist_ok=True)
    if place.is_symlink() and force_remount:
        place.unlink()
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(drive)
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    """Nothing waits to be written here."""
