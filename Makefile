# make search                      set up .venv and run the default experiment
# make search EXPERIMENT=my.yaml   another one, by name or path; ARGS='--trials 200' goes to the command
# make test                        set up .venv with the test extra and run the tests; ARGS='-k front'
# make check                       lint, formatting and types
# make clean                       remove .venv and caches; runs/ stays

PYTHON ?= python3
VENV ?= .venv
EXPERIMENT ?= autoencoder
ARGS ?=

pip = $(VENV)/bin/python -m pip --disable-pip-version-check
name = $(basename $(notdir $(EXPERIMENT)))

.PHONY: search test check clean

# A run directory is never written twice: the second run of an experiment gets the time in its name.
search: $(VENV)/installed
	@name='$(name)'; \
	if [ -e "runs/$$name" ]; then name="$$name-$$(date +%Y%m%d-%H%M%S)"; fi; \
	exec $(VENV)/bin/prunefront search '$(EXPERIMENT)' --name "$$name" $(ARGS)

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest $(ARGS)

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find agents components search tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'prunefront needs Python 3.11 or newer; name one with: make PYTHON=python3.12 …' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are renewed when a dependency changes, not when Python itself does.
# torch comes first and alone, at the version constraints.txt names: a range would take a much larger build.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(pip) install --quiet --constraint constraints.txt torch
	$(pip) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(pip) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(pip) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
