# Every target makes the virtual environment it needs. The first one takes minutes.

PYTHON ?= python3
VENV ?= .venv
# The newest torch that everything here was tested with. For a machine without a GPU,
# `make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"` and
# TORCH=torch==2.13.0+cpu save gigabytes.
TORCH ?= torch==2.13.0
# The Triton of that torch: CPU builds of torch come without one.
TRITON ?= triton==3.7.1
PIP_ARGS ?=
# A folder of prebuilt wheels, mmcv's above all, is used where there is one.
WHEELS ?= ../shared/wheels

SPEC ?= V-19-slim-dw-eSE
DEVICE ?= cpu
GPU_PYTHON ?= python3
OUT ?= work_dirs/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) \
	$(if $(wildcard $(WHEELS)),--find-links $(abspath $(WHEELS)))

.PHONY: help demo test gpu lint format clean

help:
	@echo "make demo    train a detector on scenes of digits, evaluate it, draw what it finds"
	@echo "             (SPEC=V-39-eSE DEVICE=cuda OUT=folder; see: python demo/run.py --help)"
	@echo "make test    run the tests"
	@echo "make gpu     tests and measurements on a GPU, in 10 minutes, with GPU_PYTHON as it is"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove the virtual environment and what the targets made"

# mmcv's compiled operators need torch at build time, which pip's isolated build hides;
# without them it would install and detectors would fail.
$(VENV)/mmdet: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -U pip "setuptools>=80" wheel packaging ninja
	$(PIP) "$(TORCH)"
	@echo "Installing mmcv: seconds from a wheel, 15 to 30 minutes where it compiles."
	$(PIP) --no-build-isolation "onedl-mmcv==2.3.6"
	$(PIP) -e ".[demo]" "$(TORCH)"
	$(BIN)/python -c "import mmcv.ops, mmdet"
	touch $@

$(VENV)/dev: $(VENV)/mmdet
	$(PIP) -e ".[dev]" "$(TORCH)" "$(TRITON)"
	touch $@

demo: $(VENV)/mmdet
	$(BIN)/python demo/run.py --spec $(SPEC) --device $(DEVICE) --out $(OUT)

test: $(VENV)/dev
	$(BIN)/python -m pytest -n auto --dist loadfile

# Installs nothing: GPU_PYTHON has torch, Triton, pytest and pytest-benchmark already.
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --out "benchmarks/results/{date}-{gpu}-{commit}"

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) work_dirs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
