# The two that matter: `make demo` and `make test`. Everything installs itself into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Three for two cores: some wait, for a server or for a lock to expire.
TESTS := -p xdist -n 3

.PHONY: setup demo demo-captions up down deploy test test-slow test-kills test-long test-all check bench gpu-check docs lock clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
# Compiled once: where Python may not write bytecode, as in many containers, every process would compile what it imports.
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip sync --quiet --compile-bytecode requirements.lock
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet --no-deps -e .
	touch $@

demo: setup
	$(BIN)/python -m flows.demo --output demo-output

# What captions are worth: two more runs of the demo's model, on poor alt texts and on generated captions.
demo-captions: setup
	$(BIN)/python -m flows.demo_captions --output demo-output/captions

# One machine for months: PostgreSQL, Prefect's server, a worker for each pool; docs/operating.md says more.
# SDTRAIN_STATE (.sdtrain-box) and SDTRAIN_PORT (4200) say where.
up: setup
	@$(BIN)/python -m infra.box up

down:
	@$(BIN)/python -m infra.box down

# After a change of prefect.yaml or of a flow's parameters, while the box is up.
deploy:
	@$(BIN)/python -m infra.box deploy

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -m "not slow and not long" $(ARGS)

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) --dist loadfile --no-loadscope-reorder -m "slow and not long" $(ARGS)

# As CI runs them, but 20 times each.
test-kills: setup
	SDTRAIN_KILLS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) --dist loadfile -m "slow or long" -k kill $(ARGS)

# Minutes each, too much for every change: clusters, other numbers of ranks, full-size networks, overfitting.
test-long: setup
	$(BIN)/python -m pytest -m long $(ARGS)

test-all: test test-slow test-kills test-long

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	for name in $$(ls tests/benchmarks/*.py | xargs -n1 basename | grep -v '^_' | sed 's/\.py//'); do \
		$(BIN)/python -m tests.benchmarks.$$name --quick || exit 1; done

# For the few minutes in which a GPU is at hand; without one, the same at small size. ARGS="--budget 300 --only profile"
gpu-check: setup
	$(BIN)/python -m tests.gpu_check $(ARGS)

# docs/architecture.md from the code, then all pages as a site: python3 -m http.server --directory site
docs: setup
	$(BIN)/python -m tests.infra.architecture
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Without eight-bit: where bitsandbytes is installed, diffusers imports it in every process, which takes seconds.
lock: EXTRAS := remote ray dask wandb semantic credentials server dev
lock: setup
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 $(EXTRAS:%=--extra %) --no-annotate --no-header \
		pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) demo-output site
