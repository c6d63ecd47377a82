# Everything a newcomer types. Needs Python 3.10 or newer and nothing else; `make demo PYTHON=/path/to/python` picks one.
# .venv is made once and holds the checkout in editable form: it follows the Python sources, and is renewed when
# pyproject.toml or the native kernels in cpu/ change.

VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -q
CANDIDATES = $(or $(PYTHON),python3 python3.13 python3.12 python3.14 python3.11 python3.10 python)
# Prints the version; fails on one that is too old, and on an Intel (or Rosetta) Python on a Mac, for which MLX is not built.
PROBE = import platform, sys; \
  intel = sys.platform == "darwin" and platform.machine() != "arm64"; \
  print("%d.%d%s" % (sys.version_info[0], sys.version_info[1], " for Intel" if intel else "")); \
  sys.exit(intel or sys.version_info < (3, 10))
BUILT_FROM = pyproject.toml $(wildcard cpu/*.h cpu/*/*.cpp cpu/*/*.h cpu/CMakeLists.txt)
CXX_SOURCES = $(wildcard cpu/*.h cpu/*/*.cpp cpu/*/*.h tests/native_driver/* tests/metal_on_cpu/*.h tests/metal_on_cpu/*.cpp)
PROMPT = Explain in two sentences why the sky is blue.

.NOTPARALLEL:
.PHONY: help demo demo-kvp kvp-pair test fuzz lint format wheel-check native-check arm-check old-cpu-check clean

help:
	@echo "make demo         install into .venv, fetch the built-in model, stream an answer with its timings"
	@echo "make demo-kvp     answer a long prompt without and with KV Prediction, by the pairs that come with the package"
	@echo "make kvp-pair     train the smaller of these anew, in build/kvp-trained (10 minutes on two cores)"
	@echo "make test         install the test extras into .venv, run the tests (make test ARGS='-k cache' for some)"
	@echo "make fuzz N=1000  each parser of files with N damaged ones (a million of them: N=100000)"
	@echo "make lint         check style and formatting; make format mends both"
	@echo "make wheel-check  build the wheel, install it in a clean environment, try it from several folders"
	@echo "make native-check run the C++ kernels under sanitizers"
	@echo "make arm-check    the C++ kernels on emulated 64-bit ARM, make old-cpu-check on emulated old x86-64 CPUs"
	@echo "                  (Debian: apt install g++-aarch64-linux-gnu qemu-user)"
	@echo "make clean        remove .venv, builds and caches (the models in the user's cache stay)"

demo: $(VENV)/.installed
	$(BIN)/python -m mlxeff generate "$(PROMPT)"

# With the pairs that come with the package. The answer stands among the prompt's 60 definitions; without keep=64 the smaller one misses it.
KVP_ASK = $(BIN)/python -m mlxeff generate --raw --file benchmarks/data/demo-prompt.txt --stop Definition: --max-tokens 16
demo-kvp: $(VENV)/.installed
	$(KVP_ASK)
	$(KVP_ASK) --kv-predict smollm2-135m-0-21
	$(KVP_ASK) --kv-predict smollm2-135m-0-18:keep=64

# How the smaller one was made.
KVP_TRAINED = build/kvp-trained
kvp-pair: $(KVP_TRAINED)/config.json

$(KVP_TRAINED)/config.json: | $(VENV)/.installed
	@mkdir -p build
	cd benchmarks && ../$(BIN)/python -m kvp.pairs "layers:0-18 distilled 8-bit" ../$(KVP_TRAINED)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

N = 1000
fuzz: $(VENV)/.installed-test
	MLXEFF_FUZZ=$(N) $(BIN)/python -m pytest tests/test_checkpoint_fuzz.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

wheel-check: $(VENV)/.installed-dev
	$(BIN)/python .ci/wheel_check.py

# The kernels under the address, undefined-behaviour and thread sanitizers, and the symbols of each instruction-set level.
# Level amx is emulated under the first two, so that its indices are checked on every machine with AVX-512.
CONFIGURE = PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S cpu -G Ninja -DMLXEFF_BUILD_DRIVER=ON
native-check: $(VENV)/.installed-dev $(VENV)/.installed-test
	$(CONFIGURE) -B build/address -DMLXEFF_SANITIZE=address,undefined -DMLXEFF_AMX_EMULATED=ON
	$(BIN)/ninja -C build/address --quiet mlxeff_driver
	build/address/mlxeff_driver
	$(CONFIGURE) -B build/thread -DMLXEFF_SANITIZE=thread -DMLXEFF_BLAS=reference
	$(BIN)/ninja -C build/thread --quiet mlxeff_driver
	build/thread/mlxeff_driver nofork
	$(CONFIGURE) -B build/plain
	$(BIN)/ninja -C build/plain --quiet
	MLXEFF_CPU_LIBRARY=build/plain/libmlxeff_cpu.so $(BIN)/python -m pytest tests/test_cpu_symbols.py

# Levels neon, dotprod and i8mm, each on a CPU that has no more. The emulator cannot fork a process with threads.
arm-check: $(VENV)/.installed-dev
	$(CONFIGURE) -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BIN)/ninja -C build/arm --quiet mlxeff_driver
	for cpu in cortex-a72 neoverse-n1 max; do \
	  qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu $$cpu build/arm/mlxeff_driver nofork quick || exit 1; \
	done

# No illegal instruction on x86-64 without AVX2 and without AVX-512.
old-cpu-check: $(VENV)/.installed-dev
	$(CONFIGURE) -B build/plain
	$(BIN)/ninja -C build/plain --quiet mlxeff_driver
	for cpu in Nehalem Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid; do \
	  qemu-x86_64 -cpu $$cpu build/plain/mlxeff_driver nofork quick || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Takes the first candidate that is new enough and has venv; python -m venv leaves half a folder behind when it fails.
$(BIN)/python:
	@found=; seen=; \
	for python in $(CANDIDATES); do \
	  if version=`$$python -c '$(PROBE)' 2>/dev/null`; then found=$$python; break; fi; \
	  if [ -n "$$version" ]; then seen="$$seen $$python is $$version;"; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: mlxeff needs Python 3.10 or newer (on a Mac: for Apple silicon);$${seen:- found none;}" \
	    "install one, or name it: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	if ! $$found -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "error: $$found ($$version) lacks the venv module; on Debian or Ubuntu: sudo apt install python3-venv" >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$found ($$version)"; \
	$$found -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(BIN)/python $(BUILT_FROM)
	@echo "installing mlxeff and its libraries into $(VENV) (the first time: some minutes)"
	@$(PIP) install -e .
	@touch $@

$(VENV)/.installed-test: $(BIN)/python $(BUILT_FROM)
	@echo "installing mlxeff and its test libraries into $(VENV)"
	@$(PIP) install -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(BIN)/python $(BUILT_FROM)
	@echo "installing mlxeff and its development tools into $(VENV)"
	@$(PIP) install -e '.[dev]'
	@touch $@ $(VENV)/.installed
