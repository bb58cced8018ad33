# Two commands: `make demo` draws a sheet of emoji from words, `make test` runs the tests. Both make what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPTS := "red heart" "a slice of pizza" "flag: Japan" "grinning face" "cat face" "sailboat" "woman firefighter" \
	"snowman" "green apple" "purple apple" "cat with sunglasses" "horse" "rocket" "locked" "hot beverage" "sunflower"

.PHONY: demo test check clean

demo: $(VENV)/.installed
	$(BIN)/latentkit generate $(PROMPTS) -m emoji --seed 7 -o out --grid

test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(TESTS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch -e '.[dev,bench]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache
