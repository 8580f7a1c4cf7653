"""Small JSON files in the user's cache folder: what tuning found, which protocols a GPU has proved."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .layout import log_once


def folder() -> Path:
    """ANL_KERNELS_CACHE, or the platform's cache folder."""
    named = os.environ.get("ANL_KERNELS_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "anl_kernels"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "anl_kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anl_kernels"


class File(NamedTuple):
    """A JSON object in the cache folder. A file that cannot be read or written is logged, and never an error."""

    name: str
    without: str  # what happens where it cannot be read: "kernels are tuned anew"
    unwritten: str  # and where it cannot be written

    @property
    def path(self) -> Path:
        return folder() / self.name

    def read(self) -> dict:
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except OSError as error:
            log_once(f"anl_kernels: {self.path} cannot be read, {self.without}: {error}")
            return {}
        except ValueError as error:
            self.is_not_ours(error)
            return {}
        if not isinstance(found, dict):
            self.is_not_ours("no JSON object")
            return {}
        return found

    def is_not_ours(self, why) -> None:
        log_once(f"anl_kernels: {self.path} is not what was written there, {self.without}: {why}")

    def update(self, changes: dict) -> bool:
        """Adds `changes` (None: takes that key out), whole or not at all, beside what other processes have written
        there; whether it could."""
        path = self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = {key: value for key, value in {**self.read(), **changes}.items() if value is not None}
            handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                json.dump(found, file, indent=0, sort_keys=True)
            os.replace(partial, path)
            return True
        except OSError as error:
            log_once(f"anl_kernels: {path}: {self.unwritten}: {error}")
            return False
