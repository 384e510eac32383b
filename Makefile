# The everyday commands. Each sets up what it needs: python3, g++ and make are enough to start from.
#
# TORCH=torch==X.Y.Z make ...   with that torch, rather than the active environment's or the default
# VENV=DIR make ...             with the environment there

VENV ?= .venv
BIN := $(VENV)/bin
IN_VENV := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python# finds ninja there
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
	$(BIN)/python examples/does_it_pay.py

test: test-python test-cpp

test-python: $(VENV)/with-test
	$(BIN)/python -m pytest

test-cpp: $(VENV)/with-test
	$(BIN)/cmake -S . -B $(CMAKE_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DBLOCKDIAG_PYTHON=$(abspath $(BIN))/python \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')" $(CMAKE_ARGS)
	$(BIN)/cmake --build $(CMAKE_BUILD)
	$(BIN)/ctest --test-dir $(CMAKE_BUILD) --output-on-failure

lint: $(VENV)/with-lint $(VENV)/with-test # mypy reads what the package imports
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

# A first build is part of the installation; after it, only what changed is compiled, or everything if that was for another
# torch, compiler or the like. What setup.py was given is installed again with it, so that the metadata agrees.
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

# These change only if what is in them does. No environment yet: the first build writes the fingerprint.
$(VENV)/fingerprint: always
	@[ ! -e $(VENV)/built ] || $(BIN)/python setup.py fingerprint | cmp -s - $@ || touch $@

$(VENV)/torch-wanted: $(if $(TORCH),always)
	@mkdir -p $(VENV)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" >$@

# What the commands need beside the package, by the name of the extra in pyproject.toml.
$(VENV)/with-%: pyproject.toml | $(VENV)/built
	$(PIP) 'torch-blockdiag[$*]'
	touch $@

# TorchUncertainty's layers are tested; without its dependencies, which would bring another torch.
$(VENV)/with-test: pyproject.toml | $(VENV)/built
	$(PIP) 'torch-blockdiag[test]'
	$(PIP) --no-deps torch-uncertainty==0.13.0 einops
	touch $@
