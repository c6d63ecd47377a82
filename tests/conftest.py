"""Fixtures that several files share: the built-in model's file, a tiny random model in a folder, marks that skip."""

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import threading

import pytest

HANGING = 300  # seconds after which a test counts as hanging; the longest one takes 20
STDERR = pytest.StashKey[int]()  # a file descriptor of the standard error that pytest does not capture

# A shell starts jobs in its background with SIGINT ignored, and what they start ignores it too; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def clang_missing():
    """Why tests marked `clang` cannot run here, or ""."""
    from metal_on_cpu import address_spaces

    return address_spaces.missing()


def pytest_configure(config):
    config.stash[STDERR] = os.dup(2)


def end_hanging(item):
    """Print where every thread of a hanging test is, in Python and, where gdb is installed, in native code, and end the
    run."""
    out = os.fdopen(item.config.stash[STDERR], "w")
    print(f"\n{item.nodeid}: hangs for {HANGING} s, the run ends here", file=out, flush=True)
    faulthandler.dump_traceback(out)
    if gdb := shutil.which("gdb"):
        command = [gdb, "-p", str(os.getpid()), "-batch", "-ex", "thread apply all backtrace 25"]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, timeout=120)
    os._exit(70)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that hangs ends the run, and tells where, long before somebody else's time limit ends it."""
    watch = threading.Timer(HANGING, end_hanging, [item])
    watch.daemon = True
    watch.start()
    try:
        return (yield)
    finally:
        watch.cancel()


def pytest_collection_modifyitems(items):
    """Skip what needs clang where there is none, with the reason; with MLXEFF_REQUIRE_CLANG it runs and fails. Tests of
    Metal kernels need no mark: `metal_on_cpu.run` emulates them where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("clang")]
    reason = clang_missing() if marked and not os.environ.get("MLXEFF_REQUIRE_CLANG") else ""
    for item in marked if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_generate_tests(metafunc):
    """The fixture `level` runs a test of the native kernels at each instruction-set level of this machine."""
    own = any(mark.args[0] == "level" for mark in metafunc.definition.iter_markers("parametrize"))
    if "level" in metafunc.fixturenames and not own:
        from cpu_library import LEVELS

        metafunc.parametrize("level", LEVELS, indirect=True)


@pytest.fixture
def level(request):
    from cpu_library import set_isa, set_threads

    set_isa(request.param)
    yield request.param
    set_isa(None)
    set_threads(0)


@pytest.fixture
def mlx_only():
    """MLX's own operations in place of the native kernels, for results that are compared with MLX's or mlx-lm's."""
    from mlxeff import ops

    with ops.mlx_only():
        yield


@pytest.fixture
def ending(monkeypatch):
    """A function that ends the memory of an array after so many bytes where Metal kernels are emulated: what a kernel
    reads after them, the address sanitizer finds."""
    from metal_on_cpu import host

    ends, real = [], host.input_buffers

    def input_buffers(array, info, launch):
        (data, origin), *rest = real(array, info, launch)
        kept = next((kept for each, kept in ends if each is array), len(data))
        return [(data[:kept], origin), *rest]

    monkeypatch.setattr(host, "input_buffers", input_buffers)
    return lambda array, kept: ends.append((array, kept))


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The built-in model's GGUF file, fetched into the user's cache the first time."""
    from mlxeff import hub

    return hub.resolve(hub.DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A two-layer random Llama with a byte tokenizer and a chat template, as a Hugging Face folder."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def prose():
    """Some thousand lines of English and Python code that every Python has."""
    topics = pytest.importorskip("pydoc_data.topics").topics
    return [line for topic in sorted(topics) for line in topics[topic].splitlines() if line.strip()]


@pytest.fixture(scope="session")
def metadata():
    """Tokenizer metadata of the built-in GGUF file."""
    from mlxeff import hub
    from mlxeff.checkpoint import open_source

    return dict(open_source(hub.resolve(hub.DEFAULT_MODEL)).metadata)


@pytest.fixture(scope="session")
def smollm2(metadata):
    from mlxeff.tokenizer import from_gguf

    return from_gguf(metadata, "smollm2.gguf")


@pytest.fixture(scope="session")
def proto(prose):
    """A SentencePiece model of 1000 tokens."""
    from tokenizer_files import train_sentencepiece

    return train_sentencepiece(prose[:3000])


@pytest.fixture(scope="session")
def reference(proto):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=proto)


@pytest.fixture
def llama2_folder(tmp_path, proto):
    (tmp_path / "tokenizer.model").write_bytes(proto)
    return tmp_path


@pytest.fixture
def spm_metadata(reference):
    """The same vocabulary in GGUF's form."""
    from tokenizer_files import piece_type

    ids = range(reference.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [reference.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [piece_type(reference, i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture
def small_metadata():
    """A byte-level BPE of 280 tokens in GGUF's form."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "<|im_end|>"], initial_alphabet=alphabet)
    library.train_from_iterator(["the cat sat on the mat", "the dog and the log", "été 🤖"] * 20, trainer)
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.fixture
def json_folder(tmp_path, small_metadata):
    from mlxeff.tokenizer import from_gguf

    from_gguf(small_metadata, "x").save(tmp_path)
    return tmp_path


@pytest.fixture
def measure(capsys):
    """Runs `mlxeff eval`; gives the document and the exit code."""
    from mlxeff import cli

    def run(*arguments):
        code = cli.main(["eval", *map(str, arguments), "--json", "--device", "cpu"])
        return json.loads(capsys.readouterr().out), code

    return run
