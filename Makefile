PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Without the times of day that `jupyter execute` writes into every cell: they would be in every diff.
define RUN_LESSON
import sys, nbclient, nbformat
path = sys.argv[1]
lesson = nbformat.read(path, 4)
nbclient.NotebookClient(lesson, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": "nbs"}}).execute()
nbformat.write(lesson, path)
endef
export RUN_LESSON

.PHONY: help demo test lint nbs bench faults sets pairs properties mutants study clean

help:
	@echo 'make demo    train a small network on handwritten digits, write learning_curve.png'
	@echo 'make test    run the tests (ARGS="-k name" to choose)'
	@echo 'make lint    check style, format and types'
	@echo 'make nbs     run the lessons in nbs/ and keep their outputs'
	@echo 'make bench   measure the loop beside a hand-written one and its peers, into benchmarks/results/'
	@echo 'make faults  kill trainings, damage their checkpoints, fill their disk; see that they resume exactly'
	@echo 'make sets    train common sets of callbacks beside hand-written loops (some minutes)'
	@echo 'make study   ablate four techniques on Fashion-MNIST (ten minutes or more)'
	@echo 'make pairs   check every pair of callbacks: they work together, or are refused with a reason (some minutes)'
	@echo 'make properties   a thousand sets of callbacks by chance, 500 fits in one process (some minutes)'
	@echo 'make mutants   change the loop in one place at a time, list what the tests miss (half an hour; ARGS="--module spans")'
	@echo 'make clean   remove what the other targets made'

demo: $(VENV)/installed
	$(BIN)/python -m learnloop demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile -m 'not slow and not timing' $(ARGS)
	$(BIN)/python -m pytest -q -m timing tests/test_overhead.py tests/test_optimizer_speed.py

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

nbs: $(VENV)/installed-nbs
	@for lesson in nbs/*.ipynb; do echo $$lesson; $(BIN)/python -c "$$RUN_LESSON" $$lesson || exit 1; done

bench: $(VENV)/installed-fastai
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/trainings.py
	$(BIN)/python benchmarks/callbacks.py
	$(BIN)/python benchmarks/optimizers.py --out
	$(BIN)/python benchmarks/loaders.py
	$(BIN)/python benchmarks/checkpoints.py --out benchmarks/results
	$(BIN)/python benchmarks/import_time.py

faults: $(VENV)/installed
	$(BIN)/python benchmarks/faults.py

sets: $(VENV)/installed-test
	$(BIN)/python benchmarks/common_sets.py

study: $(VENV)/installed
	$(BIN)/python benchmarks/study.py

pairs: $(VENV)/installed-test
	$(BIN)/python benchmarks/pairs.py

properties: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -m slow tests/test_properties.py tests/test_many_fits.py tests/test_every_callback.py

mutants: $(VENV)/installed-mutants
	$(BIN)/python benchmarks/mutants.py --sample 450 $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find learnloop tests benchmarks nbs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# One empty file per set of extras: installed again only when what it depends on is newer.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/created
	@echo 'installing into $(VENV): the first time takes some minutes'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-%: pyproject.toml constraints.txt | $(VENV)/created
	@echo 'installing into $(VENV): the first time takes some minutes'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@

# What it requires excludes this torch; what the benchmarks use of it works. Where it does not install, they leave it out.
$(VENV)/installed-fastai: $(VENV)/installed-bench
	-$(BIN)/python -m pip install --quiet -c constraints.txt fasttransform fastdownload plum-dispatch cloudpickle scipy pillow pyyaml requests
	-$(BIN)/python -m pip install --quiet --no-deps fastai torchvision
	@touch $@

$(VENV)/created:  # not $(BIN)/python: that exists also where making the environment was broken off
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
