# Everything is set up on first use; the program itself needs only Python 3.10 to 3.13.
# All paths are relative, and the environment's tools are run as `python -m`: a checkout path may hold spaces.

PYTHON ?= python3
ARGS ?=

VENV_PYTHON := .venv/bin/python
STAMP := .venv/requirements.stamp
TEST_STAMP := .venv/requirements-test.stamp
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check
TYPED := $(wildcard app.py grpo_engine ui benchmarks)
comma := ,
# A new .venv makes old stamps worthless, but its python is a link to an older file, which make would not see.
REINSTALL := $(shell test -x $(VENV_PYTHON) || echo reinstall)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help app test check format browser clean reinstall

help:
	@echo 'make app      set up .venv and start the program      ARGS="..." is passed on to it'
	@echo 'make test     the checks below and all tests          ARGS="..." is passed on to pytest'
	@echo 'make check    ruff (rules and format) and mypy'
	@echo 'make format   let ruff format and fix the source'
	@echo 'make clean    remove caches; runs, .venv and half-built models stay'
	@echo 'PYTHON=python3.12 before the first of them chooses another Python than python3.'

app: $(STAMP)
	@if [ -e app.py ]; then exec $(VENV_PYTHON) app.py $(ARGS); \
	else exec $(VENV_PYTHON) -m grpo_engine train $(ARGS); fi

test: $(TEST_STAMP) browser check
	$(VENV_PYTHON) -m pytest $(ARGS)

check: $(TEST_STAMP)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy $(TYPED)

format: $(TEST_STAMP)
	$(VENV_PYTHON) -m ruff check --fix-only .
	$(VENV_PYTHON) -m ruff format .

# Half-built embedded models (grpo_engine/tiny/.build) took hours to train: they are no cache to be swept away.
clean:
	find . \( -path ./.git -o -path ./.venv -o -path ./runs \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info

# $(call require_supported,PYTHON,WHAT TO DO): stops unless PYTHON is one of the supported versions.
define require_supported
"$(1)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	echo "$(1) is $$("$(1)" --version 2>&1), but this program needs Python 3.10 to 3.13: $(2)." >&2; exit 1; }
endef

$(VENV_PYTHON):
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "$(PYTHON) was not found: install Python 3.10 to 3.13, or name one, as in 'make app PYTHON=python3.11'." >&2; \
		exit 1; }
	@$(call require_supported,$(PYTHON),name another one$(comma) as in 'make app PYTHON=python3.11')
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot create virtual environments: on Debian, run 'apt-get install python3-venv' as root, then make again." >&2; \
		exit 1; }
	"$(PYTHON)" -m venv --clear .venv || { rm -rf .venv; exit 1; }

$(STAMP): requirements.txt $(VENV_PYTHON) $(REINSTALL)
	@$(call require_supported,$(VENV_PYTHON),delete .venv and run make again with a PYTHON=... of those)
	@echo 'Installing the requirements into .venv (the first time about 6 GB, a few minutes).'
	$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(TEST_STAMP): requirements-test.txt requirements.txt $(VENV_PYTHON) $(REINSTALL)
	@$(call require_supported,$(VENV_PYTHON),delete .venv and run make again with a PYTHON=... of those)
	@echo 'Installing the test requirements into .venv (the first time about 6 GB, a few minutes).'
	$(PIP_INSTALL) -r requirements-test.txt
	@touch $(STAMP) $@

# The browser tests drive the system's Chromium or Chrome; nothing is fetched by playwright itself.
browser:
	@if [ ! -d tests/browser ]; then exit 0; fi; \
	for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		if command -v $$name >/dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo 'No browser found: installing chromium for the browser tests.'; \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
			apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core; \
	else \
		echo "The browser tests need Chromium or Chrome: install one (on Debian, as root, 'apt-get install chromium') and run 'make test' again." >&2; \
		exit 1; \
	fi
