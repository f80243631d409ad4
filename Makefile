# make quickstart   set up, prepare data and weights, train, evaluate, write the report
# make quickstart-pnoc   the same with every stage of P-NOC
# make quickstart-aepsl  the same with every stage of AE-PSL
# make test         set up, run the tests; where nvidia-smi finds a GPU, those that need one in a second session
# make lint         set up, check the style
# make bench        set up, time the operators (make bench OP=par ARGS='--plot par.png': one of them, with a plot)
# make setup        only the virtual environment with everything installed
#
# Everything is installed into .venv, or into the virtual environment that is active.

PYTHON ?= python3
VENV ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
CORES := $(shell nproc 2>/dev/null || echo 2)
# Tests work on tiny tensors and start processes of their own: more threads only get in each other's way. Two processes
# share the test files.
TEST_THREADS ?= 2
TEST_PROCESSES ?= 2
# Not empty where there is a GPU; `make test HAS_GPU=` leaves out the tests that need one.
HAS_GPU ?= $(shell if nvidia-smi -L >/dev/null 2>&1; then echo 1; fi)
# One process on a GPU; on a CPU one per core up to two, which is faster than threads. Both train on the same samples.
RANKS ?= $(if $(HAS_GPU),1,$(shell if [ $(CORES) -lt 2 ]; then echo 1; else echo 2; fi))

DEPENDENCIES := $(VENV)/.wsss-dependencies
INSTALLED := $(VENV)/.wsss-installed
NATIVE := setup.py $(shell find csrc -type f 2>/dev/null)

# Prints the requirements of pyproject.toml whose name starts like the argument, so that ranges are written down once.
RANGES = $(PY) -c 'import sys, tomllib; \
	want = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
	print(" ".join(r for r in want if r.startswith(sys.argv[1])))'

.PHONY: setup quickstart quickstart-pnoc quickstart-aepsl test bench lint
.NOTPARALLEL:

setup: $(INSTALLED)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed, $(PYTHON) is older; use make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV) \
		|| { rm -f $(PY); echo "error: no virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }

# DeepSpeed asks torch what it can build, so torch comes first; DS_BUILD_OPS=0: it compiles nothing now.
$(DEPENDENCIES): pyproject.toml | $(PY)
	$(PY) -m pip install --upgrade pip "setuptools>=77" wheel packaging ninja pybind11
	$(PY) -m pip install $$($(RANGES) torch)
	DS_BUILD_OPS=0 $(PY) -m pip install --no-build-isolation $$($(RANGES) deepspeed)
	@touch $@

$(INSTALLED): $(DEPENDENCIES) $(NATIVE)
	$(PY) -m pip install --no-build-isolation -e '.[test,quickstart]'
	@touch $@

quickstart: CONFIG = quickstart.yaml
quickstart: AFTER = python launch/report.py --run runs/quickstart
quickstart-pnoc: CONFIG = quickstart_pnoc.yaml
quickstart-aepsl: CONFIG = quickstart_aepsl.yaml
quickstart-pnoc quickstart-aepsl: AFTER = true

quickstart quickstart-pnoc quickstart-aepsl: setup
	@set -e; start=$$(date +%s); \
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( $(CORES) / $(RANKS) ))} PATH="$(abspath $(VENV))/bin:$$PATH"; \
	python launch/prepare_data.py quickstart; \
	prepared=$$(date +%s); \
	deepspeed --num_gpus $(RANKS) launch/train.py --config $(CONFIG); \
	$(AFTER); \
	end=$$(date +%s); \
	echo "data and weights: $$((prepared - start)) s; training, evaluation and report: $$((end - prepared)) s"

test: setup
	@OMP_NUM_THREADS=$(TEST_THREADS) OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile
ifneq ($(HAS_GPU),)
	@WSSS_TEST_GPU=1 OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest -m gpu
endif

bench: setup
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} $(PY) -m kernels.bench $(OP) $(ARGS)

lint: setup
	@$(PY) -m ruff check .
