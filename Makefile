# Two commands: `make demo` shows the method, `make test` checks the project. Both make .venv by themselves.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed

.PHONY: demo test lint clean

demo: $(STAMP)
	$(VENV)/bin/mlalign demo

test: $(STAMP) lint
	$(VENV)/bin/python -m pytest -q

lint: $(STAMP)
	$(VENV)/bin/ruff check .

# torch first: a CPU-only machine should not be sent a CUDA build by another package's wider range.
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[eval,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
