# The everyday commands. Each sets up what it needs, given python3, g++ and make.
#
# TORCH=torch==X.Y.Z make ...   uses that torch, not the active environment's or the default
# VENV=DIR make ...             uses the environment in DIR
# CONVERT=... make convert      options of examples/does_it_pay.py

VENV ?= .venv
BIN := $(VENV)/bin
IN_VENV := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python# the build finds ninja on the PATH
PIP := $(IN_VENV) -m pip --disable-pip-version-check install -qq
CMAKE_BUILD := build/cmake
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo deploy convert test test-python test-cpp lint format docs report clean always

demo: $(VENV)/with-demo
	$(BIN)/python examples/packed_ensemble_digits.py

demo-output/packed_ensemble.pt:
	$(MAKE) demo

deploy: demo-output/packed_ensemble.pt test-cpp
	$(BIN)/python examples/deploy_packed_ensemble.py --server $(CMAKE_BUILD)/serve/serve

convert: $(VENV)/with-demo
	$(BIN)/python examples/does_it_pay.py $(CONVERT)

test: test-python test-cpp

test-python: $(VENV)/with-test
	$(BIN)/python -m pytest

test-cpp: $(VENV)/with-test
	$(BIN)/cmake -S . -B $(CMAKE_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DBLOCKDIAG_PYTHON=$(abspath $(BIN))/python \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')" $(CMAKE_ARGS)
	$(BIN)/cmake --build $(CMAKE_BUILD)
	$(BIN)/ctest --test-dir $(CMAKE_BUILD) --output-on-failure

lint: $(VENV)/with-lint $(VENV)/with-test # mypy needs what the package imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy blockdiag
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.h')

format: $(VENV)/with-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.cu' '*.h')

docs: $(VENV)/with-docs
	$(BIN)/sphinx-build -E -q -W --keep-going docs build/docs
	@echo "The site is in build/docs: open build/docs/index.html."

report: $(VENV)/built
	$(BIN)/python -m blockdiag

clean:
	rm -rf $(VENV) build demo-output *.egg-info blockdiag/*.so

# The first build is part of the installation. Later builds compile what changed, or everything after a change of torch,
# compiler or the like. A change of setup.py's own input installs again, so that the metadata agrees.
INSTALLED_FROM := pyproject.toml setup.py VERSION scripts/create_env.sh $(VENV)/torch-wanted
$(VENV)/built: $(INSTALLED_FROM) $(VENV)/fingerprint $(SOURCES)
	if [ -n "$(filter $(INSTALLED_FROM),$?)" ]; then \
	  TORCH="$$(cat $(VENV)/torch-wanted)" scripts/create_env.sh $(VENV); \
	elif [ -n "$(filter $(VENV)/fingerprint,$?)" ]; then \
	  $(PIP) --no-build-isolation --no-deps --editable .; \
	else \
	  $(IN_VENV) setup.py build_ext --inplace; \
	fi
	$(BIN)/python setup.py fingerprint >$(VENV)/fingerprint
	touch $@

# Updated only when their content changes. Without an environment yet, the first build writes the fingerprint.
$(VENV)/fingerprint: always
	@[ ! -e $(VENV)/built ] || $(BIN)/python setup.py fingerprint | cmp -s - $@ || touch $@

$(VENV)/torch-wanted: $(if $(TORCH),always)
	@mkdir -p $(VENV)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" >$@

# What a command needs beside the package: the extra of this name in pyproject.toml.
$(VENV)/with-%: pyproject.toml | $(VENV)/built
	$(PIP) 'torch-blockdiag[$*]'
	touch $@

# Tests use TorchUncertainty's layers. Its dependencies are left out: they would bring another torch.
$(VENV)/with-test: pyproject.toml | $(VENV)/built
	$(PIP) 'torch-blockdiag[test]'
	$(PIP) --no-deps torch-uncertainty==0.13.0 einops
	touch $@
