# Two commands do everything: `make book` runs the chapters and builds the HTML, `make test` checks the project.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: book test lint types unit smoke lock clean help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(STAMP)

book: $(STAMP)  ## run every chapter of the default profile and build the HTML
	$(BIN)/emosae run
	$(BIN)/emosae build

test: lint types unit smoke  ## lint, types, unit tests, every notebook on the smoke profile, the book without warnings

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/emosae fetch gemma-3-270m smollm2-135m
	$(BIN)/python -m pytest

smoke: $(STAMP)
	$(BIN)/emosae run --profile smoke
	$(BIN)/emosae build --profile smoke

lock: $(STAMP)  ## compile requirements.txt anew from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra test --python-version 3.11 --no-header --quiet --output-file .lock.tmp
	(sed -n '/^#/p;/^#/!q' requirements.txt; sed 's/+cpu//' .lock.tmp; echo '-e .') > .lock.new
	mv .lock.new requirements.txt && rm .lock.tmp

clean:  ## remove runs and builds; models stay in the cache
	rm -rf runs _build
