# make demo                   a server and three clients, three rounds
# make demo DATASET=FOLDER    the same on your own images
# make demo TASK=FOLDER       the same with a model.py and data.py of your own, such as examples/tabular
# make compare                the demo, then the same training without federation, and pictures of both (DATASET= as above)
# make check                  what finds most mistakes within half a minute: format, lint, types, and the fast tests
# make test                   format, lint, types, and all tests
# make coverage               which lines the tests within one process run
# make lock                   requirements-lock.txt again, from requirements.txt
#
# ARGS="..." is passed on to the program or to pytest; PYTHON=python3.12 makes the environment; VENV=FOLDER is where it lies.
PYTHON ?= python3
VENV := .venv
DATASET_FLAG = $(if $(TASK),--task "$(TASK)") $(if $(DATASET),--dataset "$(DATASET)")
RIGHT_PYTHON = @$(PYTHON) -c 'import sys; sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}; this needs 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
# Where it is set, each of hundreds of programs would compile all of ours anew.
unexport PYTHONDONTWRITEBYTECODE
IN_PROCESS = -m "not processes"
FAST = -m "not processes and not slow"

# "broken" where the environment was made but its Python is gone, or has become one that does not see what was installed.
BROKEN := $(shell cd "$(VENV)" 2>/dev/null || exit 0; \
	if test -e installed; \
	then bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("flwr") is None)' 2>/dev/null; \
	else test -e bin/python || test ! -L bin/python; \
	fi || echo broken)

help:
	@sed -n '/^#/!q; s/^\# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/installed
	$(VENV)/bin/python demo.py $(DATASET_FLAG) $(ARGS)

compare: $(VENV)/installed
	$(VENV)/bin/python demo.py --compare $(DATASET_FLAG) $(ARGS)

check: static
	$(VENV)/bin/python -m pytest --numprocesses 2 $(FAST) $(ARGS)

test: static
	$(VENV)/bin/python -m pytest $(ARGS)

static: $(VENV)/installed-test
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

coverage: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest $(IN_PROCESS) --cov --cov-report=term-missing:skip-covered $(ARGS)

lock:
	$(RIGHT_PYTHON)
	$(PYTHON) -m venv --clear $(VENV)/lock
	$(VENV)/lock/bin/python -m pip install --quiet --requirement requirements.txt
	$(VENV)/lock/bin/python -c 'import platform; print("# Made by `make lock` with Python", platform.python_version(), "on", platform.system(), platform.machine())' > $(VENV)/lock.txt
	echo '# from requirements.txt; install it in its place where every machine shall have the same versions.' >> $(VENV)/lock.txt
	echo '# The packages with a condition behind them are left out where nothing needs them: CUDA, Triton, uvloop.' >> $(VENV)/lock.txt
	$(VENV)/lock/bin/python -m pip freeze --all --exclude pip | sed -E \
		-e '/^(cuda|nvidia|triton)/s/$$/ ; sys_platform == "linux"/' \
		-e '/^uvloop/s/$$/ ; sys_platform != "win32"/' >> $(VENV)/lock.txt
	mv $(VENV)/lock.txt requirements-lock.txt
	rm -r $(VENV)/lock

$(VENV)/installed: requirements.txt requirements-server.txt $(BROKEN)
	$(RIGHT_PYTHON)
	$(PYTHON) -m venv $(if $(BROKEN),--clear) $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt requirements-simulation.txt
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-test.txt
	touch $@

broken:
	@echo "$(VENV) does not work any more (its Python is gone or another one); making it again"

.PHONY: help demo compare check test static coverage lock broken
