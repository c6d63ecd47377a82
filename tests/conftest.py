"""Fixtures that several files share: the built-in model's file, a tiny random model in a folder, marks that skip."""

import os
import sys

import pytest


def metal_missing():
    """Why tests marked `metal` cannot run here, or ""."""
    import mlx.core as mx

    return "" if mx.metal.is_available() else f"needs an Apple GPU, this is {sys.platform}"


def clang_missing():
    """Why tests marked `clang` cannot run here, or ""."""
    from metal_on_cpu import address_spaces

    return address_spaces.missing()


NEEDS = {"metal": ("MLXEFF_REQUIRE_METAL", metal_missing), "clang": ("MLXEFF_REQUIRE_CLANG", clang_missing)}


def pytest_collection_modifyitems(items):
    """Skip what this machine cannot run, with the reason; where a mark's variable is set, it runs and fails."""
    for mark, (variable, missing) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        reason = missing() if marked and not os.environ.get(variable) else ""
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
