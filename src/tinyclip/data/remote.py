"""Files behind a URL (s3://, gs://, https:// ... through fsspec) or a command (pipe:), brought to a bounded cache.

A transfer that fails, or in which the next 4 MiB take longer than `timeout_s`, is begun again after a pause, `retries`
times; then one ValueError names the URL. What is needed next is fetched in background threads (`Ahead`).
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, TypeVar

from tinyclip.data import guard
from tinyclip.data.cache import Cache, Part, cache_directory, digest
from tinyclip.data.decode import one_line
from tinyclip.data.files import without_folder
from tinyclip.data.spec import PIPE, DataSpec, is_remote
from tinyclip.redact import LEFT_OUT, redacted

CHUNK_BYTES = 2**22
BACKOFF_S, LONGEST_PAUSE_S = 1.0, 30.0
NUM_THREADS = 4  # transfers at a time in one process
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> tinyclip[EXTRA]; the rest: tinyclip[data]
VERSION_FIELDS = ("ETag", "etag", "blob_id", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")
T = TypeVar("T")
Fetch = tuple[str, Callable[[], object]]  # the name of what is fetched, and what fetches it


class Transfer(NamedTuple):
    """How files are fetched, and where to."""

    cache: Cache
    timeout_s: float = 60.0
    retries: int = 4


def transfer_of(spec: DataSpec) -> Transfer:
    cache = Cache(cache_directory() / "shards", int((spec.cache_gb or 50) * 1e9))
    return Transfer(cache, spec.timeout_s or 60.0, 4 if spec.retries is None else spec.retries)


class Remote(NamedTuple):
    """A file elsewhere, as it was when the set was opened."""

    url: str
    size: int | None  # bytes; a command does not say
    version: str  # what the server says changes with the content
    number: int | None = None  # of a command, whose text is not shown, among those of its set

    @property
    def where(self) -> str:
        """For people."""
        return _shown(self.url, self.number)

    @property
    def name(self) -> str:
        """In the cache."""
        return digest(self.url, self.size, self.version)

    def opened(self, transfer: Transfer) -> Any:
        """A context with the file. Raises ValueError."""
        return transfer.cache.opened(self.name, lambda part: download(self, part, transfer))

    def fetch(self, transfer: Transfer) -> None:
        transfer.cache.path(self.name, lambda part: download(self, part, transfer))


def item_names(paths: Sequence[str]) -> list[str]:
    """What items of these files are named after: without shared folders and without secrets.

    Files that are then called the same, such as the outputs of commands, are numbered.
    """
    names = without_folder([redacted(path) if is_remote(path) else path for path in paths])
    if len(set(names)) < len(set(paths)):
        return [f"{name} {number}" for number, name in enumerate(names)]
    return names


def _shown(url: str, number: int | None) -> str:
    return redacted(url) if number is None or not url.startswith(PIPE) else f"{redacted(url)} {number}"


def describe(url: str, transfer: Transfer, number: int | None = None) -> Remote:
    """Raises ValueError where the URL does not answer."""
    if url.startswith(PIPE):
        return Remote(url, None, "", number)

    def ask() -> Remote:
        system, path = filesystem(url, transfer)
        info = system.info(path)
        versions = [str(info[field]) for field in VERSION_FIELDS if info.get(field)]
        return Remote(url, info.get("size"), versions[0] if versions else "", number)

    return tried(url, transfer, lambda: within(transfer.timeout_s, ask))


def filesystem(url: str, transfer: Transfer) -> tuple[Any, str]:
    """fsspec's, and the path in it. Made anew in every process: its connections do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # aiohttp's default is 300 s for a whole file
        limit = aiohttp.ClientTimeout(total=None, sock_connect=transfer.timeout_s, sock_read=transfer.timeout_s)
        options = {"client_kwargs": {"timeout": limit}}
    return fsspec.core.url_to_fs(url, **options)


def download(remote: Remote, part: Part, transfer: Transfer) -> None:
    """Raises ValueError after the last try."""

    def attempt() -> None:
        part.restart()
        part.reserve(remote.size or 0)
        if describe(remote.url, transfer, remote.number) != remote:
            raise ValueError("has changed since it was opened")
        with _reader(remote, transfer) as read:
            while chunk := within(transfer.timeout_s, lambda: read(CHUNK_BYTES)):
                part.write(chunk)
        if remote.size is not None and part.size != remote.size:
            raise OSError(f"ended after {part.size} of {remote.size} bytes")

    tried(remote.url, transfer, attempt, remote.where)


@contextmanager
def _reader(remote: Remote, transfer: Transfer) -> Iterator[Callable[[int], bytes]]:
    url = remote.url
    if url.startswith(PIPE):
        with _output(url, transfer.timeout_s) as read:
            yield read
        return

    def start() -> BinaryIO:
        system, path = filesystem(url, transfer)
        if url.startswith(("http://", "https://")):
            return system.open(path, "rb", block_size=0, size=remote.size)  # one request for the whole file
        return system.open(path, "rb", block_size=CHUNK_BYTES)

    file = within(transfer.timeout_s, start)
    try:
        yield file.read
    finally:
        within(transfer.timeout_s, file.close)


@contextmanager
def _output(url: str, timeout_s: float) -> Iterator[Callable[[int], bytes]]:
    """What a command writes. No shell reads it: quotes and spaces are as in one, and nothing else is.

    It ends with this process, even where that is killed: guard.py.
    """
    with tempfile.TemporaryFile() as complaints:
        command = shlex.split(url.removeprefix(PIPE))
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(errno.ENOENT, "no such program", command[0])
        guarded = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *command]
        process = subprocess.Popen(
            guarded, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True
        )
        assert process.stdout is not None, "it is a pipe"
        try:
            yield process.stdout.read
            status = process.wait(timeout_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
            process.stdout.close()
        if status:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise OSError(": ".join([f"exit status {status}", *(_without_words_of(command, line) for line in last)]))


def _without_words_of(command: Sequence[str], complaint: str) -> str:
    """What a command complains of, without what it was told, which may be secret; it may name itself."""
    told = [*command[1:], *re.findall(r"[\w.+~%-]{4,}", " ".join(command[1:]))]
    for word in sorted(filter(str.strip, told), key=len, reverse=True):
        complaint = complaint.replace(word, LEFT_OUT) if len(word) > len(LEFT_OUT) else complaint
    return complaint


def within(seconds: float, function: Callable[[], T]) -> T:
    """function(), or TimeoutError; the thread that it hangs in is left behind."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except FutureTimeout:
        if future.done():  # the function's own
            raise
        raise TimeoutError(f"no answer in {seconds:g} s") from None


def tried(url: str, transfer: Transfer, action: Callable[[], T], name: str | None = None) -> T:
    """What `action` returns, tried again where that can help.

    Raises ValueError, one line that names the URL without its secrets: at once for what another try cannot mend, else
    after the last.
    """
    name = name or redacted(url)
    for attempt in range(transfer.retries + 1):
        if attempt:
            time.sleep(min(BACKOFF_S * 2 ** (attempt - 1), LONGEST_PAUSE_S))
        try:
            return action()
        except ImportError as error:
            extra = EXTRAS.get(url.partition("://")[0], "data")
            raise ValueError(f"{name}: needs pip install 'tinyclip[{extra}]': {one_line(error)}") from None
        except ValueError as error:  # ours, or a URL that makes no sense
            raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
        except Exception as error:  # each protocol has its own
            last = one_line(error)
            if _is_final(error):
                raise ValueError(f"{name}: {last}") from None
    raise ValueError(f"{name}: {last}; tried {transfer.retries + 1} times")


def _is_final(error: Exception) -> bool:
    """Whether another try would fail alike. fsspec says FileNotFoundError of any HTTP request that fails."""
    cause = error.__cause__ or error
    status = getattr(cause, "status", None)  # aiohttp's
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)  # timeout, too many requests
    unanswered = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return isinstance(error, FileNotFoundError | PermissionError) and not unanswered


def check_room(name: str, sizes: Sequence[int], window: int, transfer: Transfer) -> None:
    """Refuse a cache that cannot hold the shards of two windows: the one that is read, and the next."""
    needed = sum(sorted(sizes, reverse=True)[: 2 * window])
    if needed > transfer.cache.limit_bytes:
        raise ValueError(
            f"{name}: {transfer.cache} is too small for two windows of {window} shards: "
            f"expected cache_gb of at least {needed / 1e9:.3g}, or a smaller window"
        )


class Ahead:
    """Fetches what is needed next in daemon threads, NUM_THREADS of them, in the order in which it was asked for.

    A new request replaces what the same set had asked for and was not begun yet; sets take turns. Errors are left to
    whoever needs the file and fetches it again.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: dict[str, list[Fetch]] = {}
        self.begun: set[str] = set()
        for _ in range(NUM_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def want(self, owner: str, fetches: Sequence[Fetch]) -> None:
        with self.changed:
            self.waiting.pop(owner, None)
            if new := [(name, fetch) for name, fetch in fetches if name not in self.begun]:
                self.waiting[owner] = new
            self.changed.notify_all()

    def _next(self) -> Fetch:
        """Of the set that waits longest."""
        owner = next(iter(self.waiting))
        fetches = self.waiting.pop(owner)
        if len(fetches) > 1:
            self.waiting[owner] = fetches[1:]
        return fetches[0]

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self.waiting:
                    self.changed.wait()
                name, fetch = self._next()
                self.begun.add(name)
            with suppress(Exception):
                fetch()
            with self.changed:
                self.begun.discard(name)


@lru_cache(maxsize=1)
def _ahead_of(process: int) -> Ahead:
    return Ahead()


def ahead() -> Ahead:
    """This process's own: threads do not survive a fork."""
    return _ahead_of(os.getpid())
