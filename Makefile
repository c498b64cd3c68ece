# Needs python3 >= 3.11 and nothing else: `make demo` and `make test` create .venv and install.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/digits
BIN := $(VENV)/bin
DEMO := $(BIN)/python main.py --workdir=$(RUN)

.PHONY: help demo test docs tutorial proofs tpu lint clean

help:
	@echo "make demo    train on scikit-learn's digits, sample, evaluate and analyze (minutes on a CPU)"
	@echo "make test    run the tests (minutes)"
	@echo "make docs    build the site into site/ (seconds, offline)"
	@echo "make tpu     install TPU's compiler (0.7 GB) and compile for TPUs that are not here (minutes)"
	@echo "make proofs  the tests that take minutes to hours each: kills, damage, a soak (docs/reliability.md)"
	@echo "make tutorial  run docs/tutorial.py and keep it, with its figures, as docs/tutorial.ipynb (a minute)"
	@echo "make lint    check the style"
	@echo "make clean   remove the environment, the site and $(RUN)"

$(VENV)/installed: pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 >= 3.11 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(DEMO) --config=configs/digits.py
	$(DEMO) --mode=sample --seeds=0-99
	$(DEMO) --mode=eval
	$(DEMO) --mode=analyze
	@echo
	@echo "training   $(RUN)/metrics.jsonl, TensorBoard events, $(RUN)/samples/ (grids while training)"
	@echo "samples    $(RUN)/generated/: one PNG per seed, and a grid"
	@echo "evaluation $(RUN)/eval/"
	@echo "analysis   $(RUN)/analysis/spectrum.png, forward.png"

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	! grep -rlE '<(script|img|link rel="(stylesheet|preconnect|icon)")[^>]*(src|href)="(https?:)?//' site --include='*.html'

proofs: $(VENV)/installed
	$(BIN)/python -m pytest -m long -s

tpu: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,tpu]'
	$(BIN)/python -m pytest tests/test_benchmarks.py -k tpu

tutorial: $(VENV)/installed
	$(BIN)/jupytext --to ipynb --execute docs/tutorial.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

clean:
	rm -rf $(VENV) $(RUN) site
