# Everything runs in .venv, built from requirements.lock; only Python 3.11 and make are needed beforehand.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FUZZ := .venv-fuzz

CORE := measure measurements_file units spec gate policy policy_sections finding resolution verdict verdicts_file statistics

.PHONY: setup demo test test-slow fuzz coverage lint gates ui clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(STAMP)

# The main job on the embedded demo model. A gate that fails is a result, not a broken demo: exit codes 1 and 4 are explained, others are errors.
demo: setup
	@$(BIN)/quantgate release gates/policies/demo.cpu.yaml; code=$$?; \
	case $$code in \
	  0) ;; \
	  1) echo; echo "The demo ran to its end. At least one gate failed (exit code 1): see the table above for which, and by how much.";; \
	  4) echo; echo "The demo ran to its end. No gate failed, at least one could not be decided (exit code 4).";; \
	  *) exit $$code;; \
	esac

# Two workers, shared out as tests/conftest.py says; any single file runs without them, as `python -m pytest FILE`.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

test-slow: setup
	$(BIN)/python -m pytest -m slow tests

# Thousands of requests made from the server's own OpenAPI description. schemathesis wants other versions of what the tests use.
fuzz: setup
	test -x $(FUZZ)/bin/schemathesis || { $(PYTHON) -m venv $(FUZZ) && $(FUZZ)/bin/python -m pip install --quiet --disable-pip-version-check schemathesis==4.32.5; }
	$(BIN)/python -m pytest -m slow -s tests/serve/http/test_openapi_cases.py

# The pure core decides what ships: every branch of it is tested.
coverage: setup
	$(BIN)/python -m pytest -q tests/harness/statistics $(sort $(wildcard $(CORE:%=tests/harness/test_%*.py))) \
	  $(CORE:%=--cov=quantgate.%) --cov-branch --cov-fail-under=100 --cov-report=term-missing:skip-covered

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gates: setup
	$(BIN)/python -m pytest gates --quantgate-run $$(ls -dt runs/*/verdicts.json | head -1 | xargs dirname)

ui: setup
	$(BIN)/quantgate ui

clean:
	rm -rf $(VENV) $(FUZZ) .mypy_cache .ruff_cache .pytest_cache
