# Thin on purpose: the work is in scripts/.
PYTHON ?= python3
VENV ?= .venv
SETUP = $(PYTHON) scripts/setup_env.py --venv $(VENV)

.PHONY: help demo test test-all test-long test-device-code test-versions test-gpu bench-gpu test-doors docs lint sanitize wheel clean

help:
	@echo "make demo      set up $(VENV) and compare four processes with one on a real image,"
	@echo "               and show a sequence that one cannot hold in its memory, and four can"
	@echo "make test      set up $(VENV) and test what concerns this machine, in 5 minutes"
	@echo "               (ARGS='-k ring -x' goes to pytest)"
	@echo "make test-all  that, graphs of torch.compile on meshes, programs that measure, and what"
	@echo "               executes or compiles GPU code without a GPU"
	@echo "make test-versions  make test with each Python and torch that pyproject.toml names (gigabytes)"
	@echo "make test-doors  the doors into models of other libraries, and adapters to their attention"
	@echo "               kernels, with these libraries, which it installs"
	@echo "make test-gpu  the tests that need a GPU, and fail without one"
	@echo "make bench-gpu GPU kernels against others, under 8 minutes: JSON and plots in build/;"
	@echo "               again: goes on with what there was no time for"
	@echo "make docs      the documentation as a site in build/site; a warning is an error"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make sanitize  the extension's tests under AddressSanitizer and UBSan"
	@echo "make wheel     sdist and wheel for every Python and torch that usp supports, into dist/;"
	@echo "               ARGS=--test installs it into a bare environment and tests it there,"
	@echo "               USP_BUILD=cuda or hip has the kernels of these GPUs, too"
	@echo "make clean     remove what was built; keeps $(VENV)"
	@echo "PYTHON=$(PYTHON) and VENV=$(VENV) can be set."

demo:
	@$(SETUP) --extras demo
	@$(VENV)/bin/usp demo $(ARGS)

test:
	@$(SETUP) --extras dev,demo
	@scripts/test.sh $(VENV) $(ARGS)

test-all: test test-long test-device-code

test-long:
	@$(SETUP) --extras dev,demo
	@$(VENV)/bin/pytest -n 2 --dist worksteal -m "long and not gpu" --durations 10 $(ARGS)

test-device-code:
	@$(SETUP) --extras dev,demo
	@scripts/device_code_tests.sh $(VENV) $(ARGS)

test-doors:
	@$(SETUP) --extras dev,demo,doors
	@scripts/door_tests.sh $(VENV) $(ARGS)

test-versions:
	@$(PYTHON) scripts/versions.py test

test-gpu:
	@$(SETUP) --extras test
	@$(VENV)/bin/python -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'"
	@scripts/gpu_tests.sh $(VENV) $(ARGS)

bench-gpu:
	@$(SETUP) --extras test,demo
	@mkdir -p build
	@$(VENV)/bin/python benchmarks/gpu_attention.py --json build/gpu_attention.json $(ARGS)

docs:
	@$(SETUP) --extras docs
	@scripts/build_site.sh $(VENV)

lint:
	@$(SETUP) --extras dev,demo
	@scripts/lint.sh $(VENV)

sanitize:
	@$(SETUP) --extras dev,demo
	@PATH="$(abspath $(VENV))/bin:$$PATH" scripts/sanitize.sh

wheel:
	@$(SETUP) --extras dev,demo
	@$(VENV)/bin/python scripts/build_wheel.py --venv $(VENV) $(ARGS)

clean:
	rm -rf build dist *.egg-info usp/_build.json usp/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
