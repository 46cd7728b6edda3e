# Each target sets up what it needs; a fresh clone needs Python 3.10 or newer and nothing else.
# TORCH_INDEX: package index for torch alone, e.g. PyTorch's CPU index on a machine without a GPU.
PY          ?= python3
VENV        ?= .venv
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
BIN         := $(VENV)/bin
STAMP       := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export SDL_VIDEODRIVER ?= dummy

.PHONY: setup meltingpot demo demo-quick test check bench fuzz tables wheelcheck clean

setup: $(STAMP)
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PY) -m venv $(VENV) || { echo "install the venv module (Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

# Only the substrates are used, so an empty archive stands in for Melting Pot's bots; BOTS=1 fetches
# them. No cache: a wheel built without bots must not pass for one with them later.
meltingpot: $(VENV)/.meltingpot   ## the real multi-player games (Python 3.11 or newer; 20 seconds)
$(VENV)/.meltingpot: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[meltingpot]"
	rm -rf $(VENV)/assets && mkdir -p $(VENV)/assets/src/assets && touch $(VENV)/assets/src/assets/.keep
	tar -C $(VENV)/assets/src -czf $(VENV)/assets/meltingpot-assets-2.3.0.tar.gz assets
	$(if $(BOTS),,TMPDIR=$(abspath $(VENV)/assets)) $(BIN)/python -m pip install -q --disable-pip-version-check --no-cache-dir --no-deps "dm-meltingpot==2.4.1"
	$(BIN)/python -c "from worldgym.envs.meltingpot import MeltingPotEnv as E; E('coins').reset()"
	@touch $@

demo: setup              ## train an agent in the dream, score it in the real game (about 12 minutes)
	$(BIN)/worldgym demo
demo-quick: setup        ## the same machinery in about a minute; proves nothing about the agent
	$(BIN)/worldgym demo --quick
test: setup
	$(BIN)/python -m pytest -q
bench: setup             ## results/take_cover_bench.json
	$(BIN)/worldgym bench --out results/take_cover_bench.json
	$(BIN)/python -m worldgym.agents.tables
fuzz: setup              ## results/state_fuzz.json
	PYTHONPATH=. $(BIN)/python tests/state_fuzz.py
	$(BIN)/python -m worldgym.agents.tables
tables: setup            ## README tables from results/*.json
	$(BIN)/python -m worldgym.agents.tables

check: setup             ## lint, types, spelling
	$(BIN)/ruff check .
	rm -rf .types && mkdir -p .types/worldgym
	for f in worldgym/* envs agents; do ln -sfn "../../$$f" .types/worldgym/; done
	cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml -p worldgym
	$(BIN)/codespell worldgym envs agents tests examples README.md Makefile

wheelcheck: setup        ## what is built installs, and holds every package
	rm -rf build dist $(VENV)/wheelcheck
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps -w dist .
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/wheelcheck dist/*.whl
	cd $(VENV) && PYTHONPATH=wheelcheck bin/python -c "import worldgym.envs, worldgym.agents.cli; assert 'wheelcheck' in worldgym.envs.__file__; from worldgym.agents.report import template; template()"

clean:
	rm -rf $(VENV) build dist *.egg-info .types
