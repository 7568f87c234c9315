# Each target sets itself up in .venv; the first run installs PyTorch and takes a few minutes, later ones start at once.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-for-tests

.DEFAULT_GOAL := help
.PHONY: help install demo app test test-all lint format clean

help:
	@echo "make demo      inspect drawn parts, write demo/montage.png and demo/results.csv"
	@echo "make app       start the app in the browser"
	@echo "make test      run the tests that fit in minutes"
	@echo "make test-all  run all tests, up to an hour"
	@echo "make lint      check style and formatting"
	@echo "make format    apply the formatting"
	@echo "make clean     remove .venv and caches"

install: $(STAMP)

# An environment whose interpreter no longer runs is made anew; otherwise pip completes what is there.
# $(RUN) rather than the installed scripts: those hold the absolute path of a folder that may have been moved.
define install
@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
@echo "Installing into $(VENV) ..."
@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[$(1)]"
endef

$(STAMP): pyproject.toml requirements.txt
	$(call install,app)
	@touch $@

# The tests also need what is optional: the trackers, the peers of the evaluation, its figures.
$(TEST_STAMP): pyproject.toml requirements.txt
	$(call install,test)
	@touch $(STAMP) $@

demo: $(STAMP)
	@$(RUN) -m anomalysd_pipeline demo

app: $(STAMP)
	@$(RUN) app.py

# A worker on each of up to four cores; the tests of one file share what they have made.
PYTEST := $(RUN) -m pytest -q -n logical --maxprocesses 4

test: $(TEST_STAMP)
	@$(PYTEST) --dist loadfile -m "not full or canary"

# The long tests too: every kill, process run, browser story, hostile request and training.
test-all: $(TEST_STAMP)
	@$(PYTEST) --dist loadfile --timeout 1800

lint: $(TEST_STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: $(TEST_STAMP)
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist *.egg-info
