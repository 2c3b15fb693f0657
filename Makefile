# make train   sets up .venv and distils on the embedded pictures
# make test    sets up .venv and runs the test suite
# make table   repeats the table of the README
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train fast test system table lint docs clean
# One thread: the networks are small (docs/performance.md).
train: $(VENV)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc_per_node=1 main.py --distillation-type hard

# One thread and one test process for each of two cores, whatever the machine has.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --ignore=tests/system
WORKERS ?= 2

fast: $(VENV)/.installed-dev
	$(PYTEST) -n $(WORKERS) -m "not slow"

# Tests mean the CPU, except those with the marker gpu.
test: $(VENV)/.installed-dev
	$(PYTEST) -n $(WORKERS)
	if command -v nvidia-smi >/dev/null; then $(PYTEST) -m gpu; fi

system: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/system

# none, soft, hard and the teacher, five seeds each (some 20 minutes on two cores)
table: $(VENV)/.installed
	$(BIN)/python experiments/compare.py --seeds 0 1 2 3 4 --runs runs/table \
	  --row "teacher: --model resnet_pico --epochs 80 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --drop-path 0.1" \
	  --row "none: --distillation-type none" --row "soft: --distillation-type soft" \
	  --row "hard: --distillation-type hard"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

# the documentation site, in build/site; a broken link is an error
docs: $(VENV)/.installed-docs
	rm -rf build/pages && mkdir -p build/pages
	cp -r docs results examples README.md CONTRIBUTING.md CHANGELOG.md LICENSE build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.installed-docs: requirements-docs.txt $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV)
