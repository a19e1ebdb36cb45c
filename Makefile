# Everything a user or a CI job runs. Each target sets up .venv by itself when that is missing or out of date.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# PROFILE: how large the plan is, a section of settings.ini: smoke, quick, standard, paper
PROFILE ?= quick
# RESULTS: the folder for records, executed notebooks and figures
RESULTS ?= results
# ARGS: handed on to kimi-nb, pytest, jupyter or sphinx-build, e.g. ARGS="--only norm"
ARGS ?=
# THREADS: threads of each process of test-kernels
THREADS ?= 2
# PYTHON: the interpreter .venv is made with; found by itself when empty
PYTHON ?=
# HASHES: install the files whose hashes are in requirements.lock: prefer (by version where the index has others), require, off
HASHES ?= prefer

VENV := .venv
BIN  := $(VENV)/bin
PY   := $(BIN)/python
NBS  := $(sort $(wildcard nbs/*.ipynb nbs/*/*.ipynb))
# nbdev-test starts a worker per core; with more threads each, they fight for the cores
ONE  := env -u VIRTUAL_ENV OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# one timed part of a test run: $(call part,NAME,COMMAND); a failure is noted in $$bad and the next part still runs
part = start=$$SECONDS; echo "== $(1)"; if $(2); then end=passed; else end=FAILED; bad="$$bad $(1)"; fi; \
	echo "== $(1): $$end in $$((SECONDS - start)) s";

# A stamp holds the folder it was made for: a moved or copied checkout would otherwise run the old one's code.
ifneq ($(shell cat $(VENV)/.installed 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/.installed
endif

.PHONY: help setup plan test test-slow test-kernels check lint lab docs release bench export readme lock audit clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo '  variables: PROFILE=$(PROFILE) RESULTS=$(RESULTS) ARGS="…" PYTHON=/path/to/python3.11'

setup: $(VENV)/.installed ## build .venv (every target does it when needed)

# .installing marks a set-up that did not end: such an environment is thrown away. A lock lets two makes start at once.
$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard requirements.lock)
	@set -e; start=$$SECONDS; \
	if command -v flock >/dev/null; then exec 9<Makefile; flock 9; fi; \
	if [ "$$(cat $@ 2>/dev/null)" = '$(CURDIR)' ] && [ $@ -nt pyproject.toml ] && [ $@ -nt constraints.txt ] && [ ! requirements.lock -nt $@ ]; then exit 0; fi; \
	new_enough() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	python='$(PYTHON)'; \
	if [ -z "$$python" ]; then \
		for p in python3.11 python3.12 python3.13 python3 python; do if new_enough $$p; then python=$$p; break; fi; done; fi; \
	if [ -z "$$python" ] || ! new_enough "$$python"; then \
		echo "kimi_nb needs Python 3.11 or newer, found $$($${python:-python3} --version 2>&1 | head -n 1): install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	if [ -e $(VENV)/.installing ] || ! { $(PY) -m pip --version && new_enough $(PY); } >/dev/null 2>&1; then rm -rf $(VENV); "$$python" -m venv $(VENV); fi; \
	case '$(HASHES)' in prefer|require|off) ;; *) echo "HASHES=$(HASHES) is unknown: one of prefer, require, off" >&2; exit 1;; esac; \
	touch $(VENV)/.installing; rm -f $@; \
	echo "== set-up: installing into $(VENV) (a few minutes the first time)"; \
	pip="$(PY) -m pip install -qq --disable-pip-version-check"; \
	if [ '$(HASHES)' != off ] && $$pip --require-hashes --no-deps -r requirements.lock 2>$(VENV)/.hashes; then \
		$$pip -c constraints.txt torch; $$pip --no-deps -e .; \
	elif [ '$(HASHES)' = require ]; then cat $(VENV)/.hashes >&2; exit 1; \
	else \
		[ '$(HASHES)' = off ] || echo "== set-up: note: installed by version, not by hash: $$(grep -m 1 ERROR $(VENV)/.hashes | cut -c 1-160)"; \
		$$pip -c constraints.txt -e '.[dev]'; fi; \
	rm $(VENV)/.installing; echo '$(CURDIR)' > $@; echo "== set-up: done in $$((SECONDS - start)) s"

plan: $(VENV)/.installed ## run the plan and write records, executed notebooks and figures to RESULTS
	$(BIN)/kimi-nb plan --profile $(PROFILE) --results $(RESULTS) $(ARGS)

test: $(VENV)/.installed ## all quick checks: tree is current, notebooks, tests
	@bad=; $(call part,check,$(MAKE) --no-print-directory check) \
	$(call part,notebooks,$(ONE) $(BIN)/nbdev-test) \
	[ -z "$$bad" ] || echo "FAILED before the tests:$$bad" >&2; \
	$(ONE) $(PY) -m pytest -q -n auto --dist worksteal -m 'not slow' $(ARGS) || bad="$$bad pytest"; [ -z "$$bad" ]

test-slow: $(VENV)/.installed ## the slow checks: notebooks with `#| slow` cells, and the tests marked slow
	@bad=; slow=$$(grep -lE '"#\| *slow' $(NBS) /dev/null | sed 's,.*/,,; s,\.,[.],' | paste -sd '|' -); \
	if [ -n "$$slow" ]; then $(call part,slow notebooks,$(ONE) $(BIN)/nbdev-test --flags slow --file-re "^($$slow)\$$") fi; \
	[ -z "$$bad" ] || echo "FAILED before the tests:$$bad" >&2; \
	$(ONE) $(PY) -m pytest -q -n auto --dist worksteal -m slow $(ARGS); code=$$?; \
	[ $$code = 0 ] || [ $$code = 5 ] || bad="$$bad pytest"; [ -z "$$bad" ]

# Results must not hang on the instruction set: what every x86 processor has, and two threads instead of one.
test-kernels: $(VENV)/.installed ## the quick checks with the kernels that every processor has, and with THREADS (2) threads
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell $(MAKE) --no-print-directory test 'ONE=$(subst THREADS=1,THREADS=$(THREADS),$(ONE))'

# Done in a copy, so that a check never changes the tree; modules whose notebook is gone are missing from the copy.
check: $(VENV)/.installed ## modules match the notebooks, notebooks are clean, ruff passes
	@bad=; copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	cp -R nbs pyproject.toml "$$copy"; \
	for f in $$(find kimi_nb -type f \( -name __init__.py -o ! -name '*.py' ! -name '*.pyc' \)); do mkdir -p "$$copy/$$(dirname $$f)"; cp $$f "$$copy/$$f"; done; \
	(unset IN_TEST; cd "$$copy" && '$(CURDIR)'/$(BIN)/nbdev-export && '$(CURDIR)'/$(PY) '$(CURDIR)'/docs/faces.py . && '$(CURDIR)'/$(BIN)/nbdev-clean) || bad=1; \
	for d in nbs kimi_nb; do diff -rq -x __pycache__ -x '.ipynb_checkpoints' -x '.last_checked' $$d "$$copy"/$$d || bad=1; done; \
	[ -z "$$bad" ] || echo 'notebooks and kimi_nb/ disagree, or a notebook is not clean: edit in nbs/, then run make export' >&2; \
	$(MAKE) --no-print-directory lint || bad=1; [ -z "$$bad" ]

# LINTED: what ruff checks
LINTED := kimi_nb nbs tests docs setup.py
lint: $(VENV)/.installed ## ruff: rules and format; then how the code reads, beside others', for orientation
	@$(PY) docs/measure.py
	@$(BIN)/ruff check --quiet $(LINTED) && $(BIN)/ruff format --check --quiet nbs tests docs setup.py

lab: $(VENV)/.installed ## open the workbench and the notebooks in JupyterLab
	$(BIN)/kimi-nb lab $(ARGS)

docs: $(VENV)/.installed ## build the site into _docs/
	$(BIN)/sphinx-build -W --keep-going -q -j auto -c docs nbs _docs $(ARGS)

release: $(VENV)/.installed ## the wheel, and paper and slides of the published run, into dist/
	rm -rf dist build
	$(PY) -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir dist .
	$(BIN)/kimi-nb report --published $(PROFILE) --out dist/report
	for f in paper.pdf slides.pdf slides.html slides.pptx; do [ ! -f dist/report/$$f ] || cp dist/report/$$f dist/kimi_nb-$(PROFILE)-$$f; done
	rm -rf dist/report

bench: $(VENV)/.installed ## the measurements that the site shows
	$(BIN)/kimi-nb bench $(ARGS)

export: $(VENV)/.installed ## write kimi_nb/ and README.md from the notebooks, and clean them
	$(BIN)/jupyter nbconvert --log-level WARN --clear-output --inplace $(NBS)
	$(BIN)/nbdev-clean
	find kimi_nb -name '*.py' ! -name __init__.py -delete
	$(BIN)/nbdev-export
	$(PY) docs/faces.py
	@$(MAKE) --no-print-directory readme

readme: $(VENV)/.installed ## write README.md from nbs/index.ipynb
	$(PY) docs/readme.py

lock: $(VENV)/.installed ## write requirements.lock: what constraints.txt pins, with hashes
	$(PY) docs/lock.py write

audit: $(VENV)/.installed ## known vulnerabilities of what constraints.txt pins; offline it only warns
	@$(PY) docs/lock.py audit $(ARGS)

clean: ## remove caches and built pages; records in RESULTS and .venv stay
	rm -rf _docs jupyter_execute _proc docs/_build build dist .pytest_cache .ruff_cache .hypothesis .jupyter_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and the downloaded MathJax as well
	rm -rf $(VENV) docs/_static/vendor
