# make install   an environment in .venv (CPU builds) and all that is needed
# make install GPU=1   CUDA builds: an environment for each framework (.venv-torch, .venv-tensorflow, .venv-paddle), which
#                the harness in .venv finds. What cannot be installed is said in one line, and the others go on
# make bench     the benchmark; make bench ARGS="--preset tiny --stages 1,2" passes options to bench_all.py;
#                make bench TORCH_PYTHON=/opt/envs/torch takes PyTorch from there (also TENSORFLOW_PYTHON, PADDLE_PYTHON)
# make test      lint, types, tests; make test ARGS="-k parity" passes options to pytest
# make test-cuda PyTorch's engine on GPUs that are not there; needs gcc, and installs PyTorch's CUDA build into .venv-cuda
# make gpu-day   all that is worth running on a machine with GPUs, ten minutes a framework; make gpu-day PYTHON=... names the Python that
#                has the frameworks, ARGS=FOLDER where the results go
# make drift     the drift zoo in all frameworks, a quarter of an hour; makes docs/drift.md
# make margins   how much of every parity limit is used, a quarter of an hour; makes docs/margins.md
# make docs      the documentation as a site in site/, which opens without a network
# make clean     removes the environment and all caches; results stay

# Where the package index has PyTorch with CUDA only (Linux on PyPI), this takes the CPU build instead:
#   make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# Where the CUDA builds are. PyTorch and TensorFlow: on PyPI, or as above for another CUDA
# (TORCH_CUDA_INDEX=https://download.pytorch.org/whl/cu126). Paddle: on its own index only.
TORCH_CUDA_INDEX ?=
TENSORFLOW_CUDA_INDEX ?=
PADDLE_CUDA_INDEX ?= https://www.paddlepaddle.org.cn/packages/stable/cu126/

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
comma := ,
INSTALLED := .venv/installed

# Without frameworks, where each has an environment of its own: PyTorch's and TensorFlow's CUDA wheels both own
# nvidia/nccl/lib/libnccl.so.2 and cuDNN's folder, for different CUDA versions.
HARNESS := $(if $(wildcard $(INSTALLED)),$(INSTALLED),.venv/installed-harness)
PYTHONS = $(if $(TORCH_PYTHON),--python torch=$(TORCH_PYTHON)) $(if $(TENSORFLOW_PYTHON),--python \
	tensorflow=$(TENSORFLOW_PYTHON)) $(if $(PADDLE_PYTHON),--python paddle=$(PADDLE_PYTHON))
INDEX_torch = $(TORCH_CUDA_INDEX)
INDEX_tensorflow = $(TENSORFLOW_CUDA_INDEX)
INDEX_paddle = $(PADDLE_CUDA_INDEX)

# For make test-cuda: a PyTorch that the package index has with CUDA.
CUDA_TORCH ?= torch==2.14.*
CUDA_BIN := .venv-cuda/bin
CUDA_INSTALLED := .venv-cuda/installed

.PHONY: install gpu-environments bench test test-cuda gpu-day docs drift margins clean

install: $(if $(GPU),gpu-environments,$(INSTALLED))

gpu-environments: $(HARNESS)
	@for framework in torch tensorflow paddle; do \
		$(MAKE) --no-print-directory .venv-$$framework/installed 2>/dev/null || true; done
	@$(BIN)/triptych doctor --rounds 0

.venv-%/installed: pyproject.toml
	@rm -f $@
	@.venv-$*/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-$*
	@echo "installing $*'s CUDA build into .venv-$*: some minutes, some GB"
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check --retries 2 --timeout 60 \
		$(if $(INDEX_$*),--extra-index-url $(INDEX_$*)) --editable ".[$*-gpu]" 2>.venv-$*/install.log \
		|| { echo "not installed: $*: $$(grep -q 'connection broken' .venv-$*/install.log && echo '$(or \
		$(INDEX_$*),an index) cannot be reached; ')$$(grep ERROR .venv-$*/install.log | tail -n 1) (.venv-$*/install.log)"; exit 1; }
	@.venv-$*/bin/python common/runtime/installed.py $* | grep -q '"cuda": "[0-9]' \
		|| { echo "not installed: $*: a CPU build came; expected an index with CUDA builds"; exit 1; }
	@touch $@

.venv/installed .venv/installed-harness: pyproject.toml
	@test -n "$(PYTHON)" || { echo "missing: Python 3.11, 3.12 or 3.13 (name one with make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "wrong Python: $(PYTHON) is not 3.11, 3.12 or 3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "missing: the venv module of $(PYTHON) (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing into .venv with $(PYTHON): $(if $(findstring harness,$@),the harness,three frameworks, some minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable ".[$(if $(findstring harness,$@),,cpu$(comma))dev]"
	@touch $@

bench: install
	@$(BIN)/python bench_all.py $(PYTHONS) $(ARGS)

# A third worker computes while the others wait: for processes that start, for a host that is gone.
# Types are a test (tests/test_types.py), so that mypy, which has one thread, leaves no core idle.
# Hundreds of processes import the same modules, so these are kept compiled whatever the shell says.
test: export PYTHONDONTWRITEBYTECODE =
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 3 $(ARGS)

docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test-cuda: $(CUDA_INSTALLED)
	@$(CUDA_BIN)/python -m tests.campaigns.fake_gpu $(ARGS)

$(CUDA_INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "missing: Python 3.11, 3.12 or 3.13 (name one with make PYTHON=...)" >&2; exit 1; }
	@$(CUDA_BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-cuda
	@echo "installing PyTorch's CUDA build into .venv-cuda: some minutes, 6 GB"
	@$(CUDA_BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[dev]" "$(CUDA_TORCH)"
	@touch $@

gpu-day:
	@test -n "$(PYTHON)" || { echo "missing: Python 3.11, 3.12 or 3.13 (name one with make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -m tests.campaigns.gpu_day $(ARGS)

drift: install
	$(BIN)/triptych drift --out docs $(PYTHONS) $(ARGS)

margins: install
	$(BIN)/python -m tests.campaigns margins --out docs/margins.md $(ARGS)

clean:
	rm -rf .venv .venv-* build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
