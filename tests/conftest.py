"""Fixtures that several files share: the built-in model's file, a tiny random model in a folder, the mark for Metal."""

import os
import sys

import pytest


def pytest_collection_modifyitems(items):
    """Skip what needs an Apple GPU, with the reason; where MLXEFF_REQUIRE_METAL is set, let it run and fail instead."""
    marked = [item for item in items if item.get_closest_marker("metal")]
    if not marked or os.environ.get("MLXEFF_REQUIRE_METAL"):
        return
    import mlx.core as mx

    if not mx.metal.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs an Apple GPU, this is {sys.platform}"))


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
