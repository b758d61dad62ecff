# make demo            a server and three clients, three rounds
# make demo DATASET=FOLDER    the same on your own images
# make compare         the demo, then the same training without federation, and pictures of both (DATASET= as above)
# make test            the tests
PYTHON ?= python3
VENV := .venv

demo: $(VENV)/installed
	$(VENV)/bin/python demo.py $(if $(DATASET),--dataset "$(DATASET)") $(ARGS)

compare: $(VENV)/installed
	$(VENV)/bin/python demo.py --compare $(if $(DATASET),--dataset "$(DATASET)") $(ARGS)

test: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest $(ARGS)

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}; this needs 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt requirements-simulation.txt
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-test.txt
	touch $@

.PHONY: demo compare test
