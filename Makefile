# Shortcuts for users and developers; `make help` lists them. They need Python 3.10 or newer and install everything
# else into .venv. `make demo PYTHON=/path/to/python` chooses the Python. The checkout is installed in editable form, so
# changes of the Python sources take effect at once. It is installed again when pyproject.toml or the native kernels
# change.

VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -q
CANDIDATES = $(or $(PYTHON),python3 python3.13 python3.12 python3.14 python3.11 python3.10 python)
# Prints the version of a Python. Fails if it is too old, and on a Mac if it is for Intel (Rosetta): MLX is not built for
# that.
PROBE = import platform, sys; \
  intel = sys.platform == "darwin" and platform.machine() != "arm64"; \
  print("%d.%d%s" % (sys.version_info[0], sys.version_info[1], " for Intel" if intel else "")); \
  sys.exit(intel or sys.version_info < (3, 10))
BUILT_FROM = pyproject.toml $(wildcard cpu/*.h cpu/*/*.cpp cpu/*/*.h cpu/CMakeLists.txt)
CXX_SOURCES = $(wildcard cpu/*.h cpu/*/*.cpp cpu/*/*.h tests/native_driver/* tests/metal_on_cpu/*.h tests/metal_on_cpu/*.cpp)
PROMPT = Explain in two sentences why the sky is blue.

.NOTPARALLEL:
.PHONY: help demo demo-kvp demo-quantspec demo-dynamoe kvp-pair bench test fuzz mutants lint format wheel-check native-check arm-check old-cpu-check clean

help:
	@echo "make demo         install into .venv, fetch the built-in model, stream an answer with its timings"
	@echo "make demo-kvp     answer a long prompt without KV Prediction and with the pairs that come with the package"
	@echo "make demo-quantspec  one long prompt on KV caches of 32, 8 and 4 bits and with drafts: bytes and tokens a second"
	@echo "make demo-dynamoe fit the built-in model as DynaMoE (minutes) and run it at four sensitivities"
	@echo "make kvp-pair     train the smaller one of these pairs again, into build/kvp-trained (10 minutes on two cores)"
	@echo "make bench        write the tables of README.md and benchmarks/RESULTS.md again from committed results"
	@echo "make test         install the test extras into .venv, run the tests (make test ARGS='-k cache' for some)"
	@echo "make fuzz N=1000  each parser of files with N damaged ones (a million of them: N=100000)"
	@echo "make mutants      put small faults into a copy of the sources: do the tests notice? (ARGS='--only kvp')"
	@echo "make lint         check style and formatting; make format corrects what it can"
	@echo "make wheel-check  build the wheel, install it in a clean environment, try it from several folders"
	@echo "make native-check run the C++ kernels under sanitizers"
	@echo "make arm-check    run the C++ kernels on emulated 64-bit ARM; make old-cpu-check on emulated old x86-64 CPUs"
	@echo "                  (Debian: apt install g++-aarch64-linux-gnu qemu-user)"
	@echo "make clean        remove .venv, builds and caches (the models in the user's cache stay)"

demo: $(VENV)/.installed
	$(BIN)/python -m mlxeff generate "$(PROMPT)"

# The prompt is a list of 60 definitions and asks for one of them. The smaller pair finds the answer only with keep=64.
KVP_ASK = $(BIN)/python -m mlxeff generate --raw --file benchmarks/data/demo-prompt.txt --stop Definition: --max-tokens 16
demo-kvp: $(VENV)/.installed
	$(KVP_ASK)
	$(KVP_ASK) --kv-predict smollm2-135m-0-21
	$(KVP_ASK) --kv-predict smollm2-135m-0-18:keep=64

# The same prompt on caches of 32, 8 and 4 bits, and with drafts: the last line of each has the cache's bytes and speed.
demo-quantspec: $(VENV)/.installed
	$(BIN)/python benchmarks/demo_quantspec.py

# The built-in model as DynaMoE, which is fitted the first time, and one prompt at four sensitivities.
DYNAMOE = build/dynamoe
demo-dynamoe: $(DYNAMOE)/config.json
	for s in 1 0.9 0.8 0.65; do \
	  echo "sensitivity $$s:"; \
	  $(BIN)/python -m mlxeff generate --model $(DYNAMOE) --sensitivity $$s --max-tokens 64 "$(PROMPT)" || exit 1; \
	done

$(DYNAMOE)/config.json: | $(VENV)/.installed
	@mkdir -p build
	$(BIN)/python -m mlxeff fit dynamoe smollm2-135m --out $(DYNAMOE)

# How the smaller pair was made.
KVP_TRAINED = build/kvp-trained
kvp-pair: $(KVP_TRAINED)/config.json

$(KVP_TRAINED)/config.json: | $(VENV)/.installed
	@mkdir -p build
	cd benchmarks && ../$(BIN)/python -m kvp.pairs "layers:0-18 distilled 8-bit" ../$(KVP_TRAINED)

# Measures nothing: a user's measurements are `mlxeff bench`, ours are the scripts in benchmarks/.
bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/regenerate.py $(ARGS)

# One process of tests for each core. The kernels of each use one thread, but for tests of threads, which set their
# number: with more of them the processes would wait for each other.
test: $(VENV)/.installed-test
	MLXEFF_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

N = 1000
fuzz: $(VENV)/.installed-test
	MLXEFF_FUZZ=$(N) $(BIN)/python -m pytest tests/test_checkpoint_fuzz.py

# The test driver of the C++ kernels is built for some of the faults.
mutants: $(VENV)/.installed-dev $(VENV)/.installed-test
	cd tests && ../$(BIN)/python -m mutants.run $(ARGS)

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

# Runs the kernels under the address, undefined-behaviour and thread sanitizers, and checks the symbols of the library.
# AMX is emulated under the first two sanitizers, so that the indices of the AMX code are checked on every machine with
# AVX-512.
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

# Runs the levels neon, dotprod and i8mm, each on an emulated CPU that has no higher level. The emulator cannot fork a
# process with threads.
arm-check: $(VENV)/.installed-dev
	$(CONFIGURE) -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BIN)/ninja -C build/arm --quiet mlxeff_driver
	for cpu in cortex-a72 neoverse-n1 max; do \
	  qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu $$cpu build/arm/mlxeff_driver nofork quick || exit 1; \
	done

# Runs the kernels on emulated x86-64 CPUs without AVX2 and without AVX-512, where a newer instruction is illegal.
old-cpu-check: $(VENV)/.installed-dev
	$(CONFIGURE) -B build/plain
	$(BIN)/ninja -C build/plain --quiet mlxeff_driver
	for cpu in Nehalem Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid; do \
	  qemu-x86_64 -cpu $$cpu build/plain/mlxeff_driver nofork quick || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Uses the first candidate that is new enough, if it has the module venv. Where python -m venv fails, it leaves an
# unfinished folder behind, which is removed.
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
