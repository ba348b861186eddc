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

# The demo and the tests need the extension's CPU half alone: compiling the other for all GPUs
# takes minutes. tests/native_build/test_cuda_half.py compiles it for one.
VOVNET_FAST_CUDA ?= 0
export VOVNET_FAST_CUDA

# Images of containers often tell Python to keep no bytecode. Tests start hundreds of processes, and
# uv installs none: each import of torch would compile it again, 2 to 4 s of a core.
unexport PYTHONDONTWRITEBYTECODE

# What else the tests marked `versions` run with: the oldest torch of pyproject.toml, whose Triton
# is too old for the kernels, and whose NumPy is 1.26, and a pair that machines with a GPU come with.
# PyPI has builds for CUDA alone, 5 GB each once unpacked. uv, which keeps them in its cache, took
# 80 to 125 s for one on two busy cores, and 3 s from the cache; pip took 330 to 430 s.
# UV_TORCH_BACKEND=cpu takes small builds instead, where PyTorch's own index can be reached.
VERSIONS ?= .venv-versions
PAIRS := oldest pair
INSTALLED_oldest := torch==2.1.2 "numpy<2"
# timm and pytorchcv are what networks and weights are compared with; both want torchvision.
INSTALLED_pair := torch==2.11.0 triton==3.6.0 torchvision==0.26.0 timm pytorchcv

SPEC ?= V-19-slim-dw-eSE
DEVICE ?= cpu
GPU_PYTHON ?= python3
SECONDS ?= 540
ARCH ?= sm_90
# What `make gpu-carry` leaves, and `make gpu` takes where it is there.
CARRIED ?= build/carried
TAKEN = $(addprefix --cache ,$(wildcard $(CARRIED)/kernels.tar.xz)) \
	$(addprefix --wheel ,$(wildcard $(CARRIED)/*.whl))
demo: OUT ?= work_dirs/demo
gpu: OUT ?= benchmarks/results/{date}-{gpu}-{commit}

BIN := $(VENV)/bin
CXX_SOURCES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) \
	$(if $(wildcard $(WHEELS)),--find-links $(abspath $(WHEELS)))

.PHONY: help demo test versions test-versions $(PAIRS:%=test-%) test-aarch64 sanitize gpu gpu-carry \
	lint format clean

help:
	@echo "make demo    train a detector on scenes of digits, evaluate it, draw what it finds"
	@echo "             (SPEC=V-39-eSE DEVICE=cuda OUT=folder; see: python demo/run.py --help)"
	@echo "make test    run the tests"
	@echo "make versions  install what the next one needs, and run nothing"
	@echo "make test-versions  those that depend on versions, with two other torches (-j2)"
	@echo "make test-aarch64  the op tests of the extension's CPU half on emulated AArch64"
	@echo "             (Debian: apt install g++-aarch64-linux-gnu qemu-user)"
	@echo "make sanitize  the op tests of the extension's CPU half under ASan and UBSan"
	@echo "make gpu     proofs and measurements on a GPU, with GPU_PYTHON as it is"
	@echo "             (SECONDS=540 OUT=folder; see: python benchmarks/gpu.py --help)"
	@echo "make gpu-carry  compile beforehand, without a GPU, what that needs (ARCH=sm_90)"
	@echo "make lint    ruff, mypy and clang-format"
	@echo "make format  let ruff and clang-format rewrite the sources"
	@echo "make clean   remove the virtual environment and what the targets made"

# mmcv's compiled operators need torch at build time, which pip's isolated build hides;
# without them it would install and detectors would fail.
$(VENV)/mmdet: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -U pip "setuptools>=80" wheel packaging ninja
	$(PIP) "$(TORCH)"
	@echo "Installing mmcv: seconds from a wheel, 15 to 30 minutes where it compiles."
	$(PIP) --no-build-isolation "onedl-mmcv==2.3.6"
	VOVNET_FAST_EXTENSION=0 $(PIP) -e ".[demo,onedl]" "$(TORCH)"
	$(BIN)/python -c "import mmcv.ops, mmdet"
	touch $@

# Only what has changed is compiled, into build/ and from there into the package's folder.
$(VENV)/extension: $(VENV)/mmdet setup.py $(wildcard native_build/*.py csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	VOVNET_FAST_EXTENSION=1 $(PIP) --no-deps -e .
	touch $@

# What the extension's target has built stays where it is.
$(VENV)/dev: $(VENV)/mmdet
	VOVNET_FAST_EXTENSION=0 $(PIP) -e ".[dev]" "$(TORCH)" "$(TRITON)"
	touch $@

demo: $(VENV)/extension
	$(BIN)/python demo/run.py --spec $(SPEC) --device $(DEVICE) --out $(OUT)

# Without reordering, the files that take longest come first.
test: $(VENV)/dev $(VENV)/extension
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

$(VERSIONS)/bin/uv:
	$(PYTHON) -m venv $(VERSIONS)
	$(VERSIONS)/bin/python -m pip install --disable-pip-version-check -q uv

$(PAIRS:%=$(VERSIONS)/%/made): $(VERSIONS)/%/made: pyproject.toml $(VERSIONS)/bin/uv
	$(VERSIONS)/bin/uv venv -q --clear --no-python-downloads --python "$$(command -v $(PYTHON))" $(@D)
	$(VERSIONS)/bin/uv pip install -q --python $(@D)/bin/python -r pyproject.toml \
		pytest $(INSTALLED_$*)
	touch $@

versions: $(PAIRS:%=$(VERSIONS)/%/made)

$(PAIRS:%=test-%): test-%: $(VERSIONS)/%/made
	$(VERSIONS)/$*/bin/python -m pytest -p no:cacheprovider -m versions

# In the tree, with the extension where `make test` has built it for the same Python.
test-versions: $(PAIRS:%=test-%)

test-aarch64: $(VENV)/dev
	$(BIN)/python -m pytest -m "slow or not slow" tests/csrc/test_cpu_driver.py \
		tests/native_build/test_machines.py

sanitize: $(VENV)/dev
	$(BIN)/python -m tests.sanitize

# Installs nothing: GPU_PYTHON has torch, Triton, pytest and pytest-benchmark already.
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --out "$(OUT)" --seconds $(SECONDS) $(TAKEN)

# GPU_PYTHON is the Python, and has the Triton, of the machine with the GPU.
gpu-carry:
	$(GPU_PYTHON) benchmarks/carry.py --out $(CARRIED) --arch $(ARCH)

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) $(VERSIONS) work_dirs build *.egg-info vovnet_fast/_C.*.so .pytest_cache .mypy_cache .ruff_cache
