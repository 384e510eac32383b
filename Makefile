# The everyday commands. Each sets up what it needs: python3, g++ and make are enough to start from.
#
# TORCH=torch==X.Y.Z make ...   with that torch, rather than the active environment's or the default
# VENV=DIR make ...             with the environment there

VENV ?= .venv
BIN := $(VENV)/bin
CMAKE_BUILD := build/cmake
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo deploy convert test test-python test-cpp lint format report clean

demo: $(VENV)/built
	$(BIN)/python examples/packed_ensemble_digits.py

demo-output/packed_ensemble.pt:
	$(MAKE) demo

deploy: demo-output/packed_ensemble.pt test-cpp
	$(BIN)/python examples/deploy_packed_ensemble.py --server $(CMAKE_BUILD)/serve/serve

convert: $(VENV)/built
	$(BIN)/python examples/does_it_pay.py

test: test-python test-cpp

test-python: $(VENV)/built
	$(BIN)/python -m pytest

test-cpp: $(VENV)/built
	$(BIN)/cmake -S . -B $(CMAKE_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DBLOCKDIAG_PYTHON=$(abspath $(BIN))/python \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')" $(CMAKE_ARGS)
	$(BIN)/cmake --build $(CMAKE_BUILD)
	$(BIN)/ctest --test-dir $(CMAKE_BUILD) --output-on-failure

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy blockdiag
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.h')

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.cu' '*.h')

report: $(VENV)/built
	$(BIN)/python -m blockdiag

clean:
	rm -rf $(VENV) build demo-output *.egg-info blockdiag/*.so

# A first build is part of the installation; after it, only what changed is compiled.
INSTALLED_FROM := pyproject.toml setup.py VERSION scripts/create_env.sh
$(VENV)/built: $(INSTALLED_FROM) $(SOURCES)
	if [ -n "$(filter $(INSTALLED_FROM),$?)" ]; then \
	  scripts/create_env.sh $(VENV); \
	else \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py build_ext --inplace; \
	fi
	touch $@
