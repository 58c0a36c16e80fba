# Two commands: `make demo` shows the method, `make test` checks the project. Both make .venv by themselves.
# `make study DATA=PATH` measures on real data whether alignment makes a task carry over, in half an hour on two cores.

PYTHON ?= python3
DATA ?= ../shared/data
VENV := .venv
STAMP := $(VENV)/installed

.PHONY: demo test study lint clean

demo: $(STAMP)
	$(VENV)/bin/mlalign demo

study: $(STAMP)
	$(VENV)/bin/python benchmarks/transfer/study.py main merged --budget-minutes 30 --data $(DATA)

test: $(STAMP) lint
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(VENV)/bin/ruff check .

# torch first and alone: whatever build the machine's index offers for this version is the one the rest is put around.
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs/demo build dist *.egg-info
