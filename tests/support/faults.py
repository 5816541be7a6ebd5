"""A storage that fails by a script: in memory, at `faulty://`, only in tests."""

import base64
import errno
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nanodlm.store import files


@dataclass
class Fault:
    """What becomes of requests."""

    request: str  # name of fsspec's method, such as `pipe_file`
    error: Callable[[], BaseException]  # what it raises
    path: str = ""  # only for paths that hold this
    times: float = 1  # for so many requests
    after: bool = False  # whether it has its effect first, so that only its acknowledgement is lost
    until: Callable[[], bool] = lambda: False  # the fault is over when this says so

    def strikes(self, request: str, path: str) -> bool:
        """Whether this request fails; counts it."""
        if request != self.request or self.path not in path or self.times < 1 or self.until():
            return False
        self.times -= 1
        return True


class Faulty(MemoryFileSystem):
    """Files in memory, and requests that go wrong as `script` says."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    script: ClassVar[list[Fault]] = []
    asked: ClassVar[list[tuple[str, str]]] = []
    ignores_conditions: ClassVar[bool] = False
    counting: ClassVar[Any] = threading.RLock()  # what a fault does may be a request of its own

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("faulty://"))

    def _do(self, request: str, path: str, call: Callable[[], Any]) -> Any:
        with self.counting:
            self.asked.append((request, path))
            fault = next((fault for fault in self.script if fault.strikes(request, path)), None)
        if fault is None:
            return call()
        if fault.after:
            call()
        raise fault.error()

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self._do("cat_file", path, lambda: MemoryFileSystem.cat_file(self, path, *args, **kwargs))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> Any:
        mode = "overwrite" if self.ignores_conditions else mode
        return self._do("pipe_file", path, lambda: MemoryFileSystem.pipe_file(self, path, value, mode=mode, **kwargs))

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> Any:
        return self._do("put_file", rpath, lambda: MemoryFileSystem.put_file(self, lpath, rpath, *args, **kwargs))

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        found = self._do("find", path, lambda: MemoryFileSystem.find(self, path, *args, **kwargs))
        for name, info in found.items() if kwargs.get("detail") else ():  # as Google's storage does
            content = hashlib.md5(self.store[name].getvalue()).digest()
            info["md5Hash"] = base64.b64encode(content).decode()
        return found

    def rm_file(self, path: str, **kwargs: Any) -> Any:
        return self._do("rm_file", path, lambda: MemoryFileSystem.rm_file(self, path))


@contextmanager
def scripted(*faults: Fault) -> Iterator[type[Faulty]]:
    """Make `faulty://` a storage that stores may be at; it begins empty and follows this script."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(files, "CREATE_ONLY", files.CREATE_ONLY | {"faulty"})
        fsspec.register_implementation("faulty", Faulty, clobber=True)
        Faulty.script[:] = faults
        try:
            yield Faulty
        finally:
            Faulty.script.clear()
            Faulty.asked.clear()
            Faulty.store.clear()
            Faulty.pseudo_dirs[:] = [""]
            Faulty.ignores_conditions = False


def no_space() -> OSError:
    """What a full disk says; the digits of the path are no answer of a server."""
    return OSError(errno.ENOSPC, "No space left on device", "/cache/shard-15036af502c504/x")


def answer(status: int) -> Exception:
    """What gcsfs makes of an answer that is no success."""
    from gcsfs.retry import HttpError

    return HttpError({"code": status, "message": f"told {status}"})


def busy() -> Exception:
    """A server that asks to be left alone for a while."""
    return answer(503)
