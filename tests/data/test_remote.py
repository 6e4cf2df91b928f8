"""Remote shards say what local ones say, through a bounded cache; what fails is tried again, then one line.

Nothing here leaves the machine: servers are a thread of the test, or fsspec's memory.
"""

import io
import os
import re
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import pytest

from tests.data.test_loader import assert_same, first, reader  # noqa: F401
from tests.data.test_sources import COLOURS, error_of, everything, png, write_tar
from tinyclip import progress
from tinyclip.data import remote
from tinyclip.data.cache import Cache
from tinyclip.data.loader import PairLoader
from tinyclip.data.sources import open_source

SHARDS = 6  # of three samples


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """SHARDS tars, each with a sample of every colour."""
    path = tmp_path / "served"
    path.mkdir()
    for shard in range(SHARDS):
        files = {}
        for colour in COLOURS:
            files |= {f"{shard}-{colour}.png": png(colour), f"{shard}-{colour}.txt": f"{colour} {shard}".encode()}
        write_tar(path / f"{shard}.tar", files)
    return path


def forget(cache):
    """Empty the cache; indexes stay."""
    for path in (cache / "shards").iterdir():
        if path.is_file():
            path.unlink()


@contextmanager
def server(folder, *, fail=0, cut=0, hang_s=0.0):
    """Serves a folder; the first `fail` GETs are refused, the next `cut` end early, all hang for a while."""
    web = SimpleNamespace(asked=[], hang_s=hang_s)

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            web.asked.append(self.path)
            time.sleep(web.hang_s)
            path = folder / self.path.lstrip("/")
            if len(web.asked) <= fail or not path.exists():
                return self.send_error(404 if len(web.asked) > fail else 503)
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:99] if len(web.asked) <= fail + cut else data)

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    web.url = f"http://127.0.0.1:{served.server_port}"
    try:
        yield web
    finally:
        served.shutdown()
        thread.join()
        served.server_close()


@pytest.fixture
def memory(folder):
    """The same shards in fsspec's memory, whose URL is returned."""
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe(f"/set/{path.name}", path.read_bytes())
    yield "memory://set"
    system.rm("/set", recursive=True)


ALL = "{0..5}.tar"


def test_http_memory_and_a_command_say_what_the_disk_says(folder, memory):
    expected = everything(open_source(f"{folder}/{ALL}"))
    assert len(expected) == 3 * SHARDS
    assert everything(open_source(f"{memory}/{ALL}")) == expected
    assert everything(open_source(f"pipe:cat {folder}/{ALL}")) == expected
    with server(folder) as web:
        source = open_source(f"{web.url}/{ALL}")
        assert everything(source) == expected and source.key(4) == "1.tar/1-green"


def test_a_second_opening_reads_no_shard(folder, cache):
    with server(folder) as web:
        open_source(f"{web.url}/{ALL}")
        assert len(web.asked) == SHARDS
        assert len(everything(open_source(f"{web.url}/{ALL}"))) == 3 * SHARDS and len(web.asked) == SHARDS
        forget(cache)
        source = open_source(f"{web.url}/{ALL}")
        assert len(web.asked) == SHARDS + 1  # the first sample's texts say which columns there are
        source.image(10)
        assert len(web.asked) == SHARDS + 2


def test_a_shard_that_changed_is_fetched_and_indexed_again(memory):
    assert open_source(f"{memory}/0.tar").captions(0) == ("red 0",)
    fsspec.filesystem("memory").pipe("/set/0.tar", fsspec.filesystem("memory").cat("/set/1.tar"))
    assert open_source(f"{memory}/0.tar").captions(0) == ("red 1",)


def test_limit_fetches_no_more_than_it_needs(folder):
    with server(folder) as web:
        assert len(open_source(f"{web.url}/{{0..5}}.tar?limit=2")) == 2
        assert 1 <= len(web.asked) <= remote.NUM_THREADS


@pytest.mark.parametrize("trouble", [{"fail": 2}, {"cut": 2}])
def test_what_fails_twice_is_read_at_the_third_try(folder, trouble):
    with server(folder, **trouble) as web:
        assert everything(open_source(f"{web.url}/0.tar?retries=2")) == everything(open_source(f"{folder}/0.tar"))
        assert len(web.asked) == 3


@pytest.mark.parametrize(
    "trouble, expected", [({"fail": 9}, "503"), ({"cut": 9}, "tried 2 times"), ({"hang_s": 0.6}, "tried 2 times")]
)
def test_what_keeps_failing_is_one_line_with_the_url(folder, cache, trouble, expected):
    with server(folder, **trouble) as web:
        message = error_of(f"{web.url}/0.tar?retries=1&timeout_s=0.2")
    assert message.startswith(f"{web.url}/0.tar: ") and expected in message
    assert [path for path in (cache / "shards").glob("*") if path.is_file()] == []


def test_a_server_that_does_not_answer_is_tried_again(folder):
    with server(folder) as web:
        pass
    message = error_of(f"{web.url}/0.tar?retries=1")
    assert message.startswith(f"{web.url}/0.tar: ") and "tried 2 times" in message


def test_what_is_not_there_is_said_at_once(folder, memory):
    with server(folder) as web:
        assert error_of(f"{web.url}/9.tar").startswith(f"{web.url}/9.tar: FileNotFoundError")
        assert web.asked == ["/9.tar"]  # fsspec asks by GET where HEAD fails
    assert error_of(f"{memory}/9.tar").startswith(f"{memory}/9.tar: FileNotFoundError")
    assert "Protocol not known: nowhere" in error_of("nowhere://a/0.tar")


def test_a_missing_library_names_what_to_install(monkeypatch):
    def absent(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    assert "s3://bucket/0.tar: needs pip install 'tinyclip[s3]'" in error_of("s3://bucket/0.tar")
    assert "gs://bucket/0.tar: needs pip install 'tinyclip[gcs]'" in error_of("gs://bucket/0.tar")


def test_a_truncated_remote_shard_is_one_line(memory):
    system = fsspec.filesystem("memory")
    system.pipe("/set/0.tar", system.cat("/set/0.tar")[:1500])
    assert error_of(f"{memory}/0.tar").startswith(f"{memory}/0.tar: ")
    system.pipe("/set/0.tar", b"")
    error_of(f"{memory}/0.tar")


# Commands


def test_a_command_is_run_without_a_shell(tmp_path, folder):
    source = open_source(f"pipe:cat '{folder}/0.tar'")
    assert len(source) == 3
    message = error_of(f"pipe:cat {folder}/0.tar > {tmp_path}/stolen?retries=0")
    assert "exit status 1" in message and not (tmp_path / "stolen").exists()


def test_a_command_that_fails_or_hangs_is_one_line(folder):
    assert error_of("pipe:cat /nowhere.tar?retries=0").startswith(
        "pipe:... 0: OSError: exit status 1: cat: ...: No such"
    )
    assert "no-such-program" in error_of("pipe:no-such-program 0.tar")
    started = time.perf_counter()
    message = error_of("pipe:sh -c 'sleep 20; echo'?retries=0&timeout_s=0.2")
    assert "no answer in 0.2 s; tried 1 times" in message and time.perf_counter() - started < 5


def test_a_command_whose_output_changes_is_noticed(tmp_path, folder, cache):
    source = open_source(f"pipe:cat {folder}/0.tar")
    write_tar(folder / "0.tar", {"1.png": png("red"), "1.txt": b"other" * 3000})
    forget(cache)
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        source.image(0)


def test_a_file_that_changes_on_its_server_is_noticed(memory, cache):
    source = open_source(f"{memory}/0.tar")
    forget(cache)
    fsspec.filesystem("memory").pipe("/set/0.tar", fsspec.filesystem("memory").cat("/set/1.tar"))
    with pytest.raises(ValueError, match=f"^{memory}/0.tar: has changed since it was opened"):
        source.image(0)


# The cache


def total(cache):
    return sum(path.stat().st_size for path in (cache / "shards").glob("*") if path.is_file())


def test_the_cache_stays_within_its_limit(folder, cache):
    size = (folder / "0.tar").stat().st_size
    source = open_source({"path": f"pipe:cat {folder}/{ALL}", "cache_gb": 2.5 * size / 1e9, "window": 1})
    largest = 0
    for index in [*range(len(source)), *reversed(range(len(source)))]:
        source.image(index)
        largest = max(largest, total(cache))
    assert size <= largest <= 2.5 * size


def test_a_cache_that_cannot_hold_two_windows_is_refused(memory, folder):
    size = (folder / "0.tar").stat().st_size
    message = error_of({"path": f"{memory}/{ALL}", "cache_gb": 3.5 * size / 1e9, "window": 2})
    assert f"expected cache_gb of at least {4 * size / 1e9:.3g}, or a smaller window" in message
    assert "no room for a file" in error_of({"path": f"pipe:cat {folder}/0.tar", "cache_gb": 0.5 * size / 1e9})


def test_the_least_recently_used_goes_first_and_parts_in_progress_stay(tmp_path):
    cache = Cache(tmp_path, 1000)
    for name in "abc":
        cache.path(name, lambda part: part.write(b"x" * 300))
        time.sleep(0.01)
    cache.path("a", lambda part: pytest.fail("it is there"))
    (tmp_path / "other.part").write_bytes(b"x" * 90)
    cache.path("d", lambda part: part.write(b"x" * 300))
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"a", "c", "d", "other.part"}


def test_the_part_of_a_process_that_was_killed_is_cleared_away(tmp_path):
    (tmp_path / "other.part").write_bytes(b"x" * 900)
    os.utime(tmp_path / "other.part", (0, 0))
    Cache(tmp_path, 1000).path("a", lambda part: part.write(b"x" * 300))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a"]


def test_sets_take_turns_in_being_fetched_ahead():
    begun, go = [], threading.Event()

    def fetch(name):
        begun.append(name)
        go.wait(5)

    ahead = remote.Ahead()
    names = {owner: [f"{owner}{number}" for number in range(4)] for owner in "ab"}
    with ahead.changed:  # nothing begins before both have asked
        for owner, own in names.items():
            ahead.want(owner, [(name, partial(fetch, name)) for name in own])
    while len(begun) < remote.NUM_THREADS:
        time.sleep(0.001)
    assert sorted(begun) == ["a0", "a1", "b0", "b1"]
    ahead.want("a", [("a0", partial(fetch, "a0")), ("a9", partial(fetch, "a9"))])  # a0 is under way
    go.set()
    while len(begun) < 7:
        time.sleep(0.001)
    time.sleep(0.02)
    assert sorted(begun[4:]) == ["a9", "b2", "b3"]


def test_many_at_once_make_a_file_once(tmp_path):
    cache, made = Cache(tmp_path, 10_000), []

    def make(part):
        made.append(1)
        time.sleep(0.05)
        part.write(b"x" * 100)

    threads = [threading.Thread(target=cache.path, args=("one", make)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and (tmp_path / "one").stat().st_size == 100


def test_a_file_that_could_not_be_made_leaves_nothing(tmp_path):
    def fail(part):
        part.write(b"half")
        raise ValueError("cut")

    with pytest.raises(ValueError, match="cut"):
        Cache(tmp_path, 1000).path("one", fail)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


# Training


def test_batches_are_a_function_of_seed_and_step(folder, reader):  # noqa: F811
    with server(folder) as web:
        source = open_source(f"{web.url}/{ALL}?window=2")
        settings = dict(source=source, readers=[reader], batch_size=4, seed=5)
        batches = first(PairLoader(**settings), 9)
        assert len({key for batch in batches[:4] for key in batch.keys}) == 16
        assert_same(first(PairLoader(**settings, workers=2), 9), batches)
        assert_same(first(PairLoader(**settings, start_step=6), 3), batches[6:])


def test_a_resumed_run_fetches_only_the_windows_that_it_needs(folder, cache, reader):  # noqa: F811
    with server(folder) as web:
        source = open_source(f"{web.url}/{ALL}?window=1")
        forget(cache)
        web.asked.clear()
        loader = PairLoader(source, [reader], batch_size=3, seed=0, start_step=3)
        batch = loader.batch(3)  # shard number 3 of the epoch's order, all of it
        own = {key.rpartition("/")[0] for key in batch.keys}
        time.sleep(0.1)
        assert len(own) == 1 and len(web.asked) == 2  # and the next window's


def test_the_next_window_is_fetched_while_this_one_is_read(folder, cache, reader):  # noqa: F811
    with server(folder) as web:
        source = open_source(f"{web.url}/{ALL}?window=1")
        forget(cache)
        web.hang_s, waits_s = 0.2, []
        loader = PairLoader(source, [reader], batch_size=3, seed=0)
        for step in range(SHARDS):
            started = time.perf_counter()
            loader.batch(step)
            waits_s.append(time.perf_counter() - started)
            time.sleep(0.25)  # the model trains
    assert waits_s[0] >= 0.2 and sum(waits_s[1:]) < 0.4  # one at a time, they would take 1 s


def test_a_shard_that_is_lost_stops_a_run_and_is_no_bad_item(folder, cache, reader):  # noqa: F811
    with server(folder) as web:
        source = open_source(f"{web.url}/{ALL}?retries=0&window=1")
        forget(cache)
        (folder / "3.tar").unlink()
        with pytest.raises(ValueError, match=f"^{web.url}/3.tar: "):
            first(PairLoader(source, [reader], batch_size=3, seed=0), SHARDS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def many(folder):
    """A pattern of twelve small shards, which are remembered, in three samples each."""
    for shard in range(SHARDS, 12):
        (folder / f"{shard}.tar").write_bytes((folder / f"{shard % SHARDS}.tar").read_bytes())
    return f"pipe:cat {folder}/{{0..11}}.tar"


def test_a_terminal_shows_how_many_shards_are_indexed_at_the_first_opening_alone(many, monkeypatch):
    shown = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert len(open_source(many)) == 36
        shown.append(sys.stderr.getvalue())
    assert "indexing shards" in shown[0] and "12/12" in shown[0] and "shards/s" in shown[0]
    assert shown[1] == ""


def test_a_pipe_gets_a_line_a_minute_and_few_shards_none(many, folder, capsys, monkeypatch):
    open_source(many)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0)
    monkeypatch.setenv("TINYCLIP_CACHE", str(folder.parent / "another"))
    open_source(f"pipe:cat {folder}/{{0..7}}.tar")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TINYCLIP_CACHE", str(folder.parent / "a-third"))
    open_source(many)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12 and re.fullmatch(r"indexing shards  3/12  [\d.,e+]+ shards/s  0 min left", lines[2])


def test_one_process_of_several_shows_it(many, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0)
    monkeypatch.setenv("RANK", "1")
    open_source(many)
    assert capsys.readouterr().err == ""


def test_with_a_limit_the_shards_to_come_are_foreseen(many, capsys, monkeypatch):
    """Four shards are opened at a time; the first four hold 12 samples, so 30 need ten."""
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0)
    assert len(open_source(f"{many}?limit=30")) == 30
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == [
        *("5/10", "6/10", "7/10", "8/10"),
        *("9/12", "10/12", "11/12", "12/12"),
    ]
    assert len(open_source(f"{many}?limit=30")) == 30 and capsys.readouterr().err == ""
