# guardlens: make demo, make test; `make` alone lists the targets.
# Needs Python >= 3.11 and nothing else; everything is installed into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
CORE := $(VENV)/core.stamp
TEST := $(VENV)/test.stamp
LINT := $(VENV)/lint.stamp
DOCS := $(VENV)/docs.stamp
PEERS := $(VENV)/peers.stamp

# What `make real` tries: the checkpoint that it fetches into CACHE, or the MODEL that the user names.
CACHE ?= .cache/real
CHECKPOINT := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL ?= $(CHECKPOINT)

# The figures of the demo that README and docs show; `make figures` copies them to docs/figures.
FIGURES := out/demo/*.png out/demo/*.svg

# A PYTHON that the user names is taken or refused; the default may give way to a newer one.
PYTHONS := $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3.13 python3.12 python3.11)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test peers real shapes check docs site figures

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-14s%s\n", $$1, $$2}'

setup: $(CORE) $(TEST) $(LINT) $(DOCS) ## install everything: the package and the tools for tests, checks and docs

demo: $(CORE) ## install the package, then run `guardlens demo` on the embedded model
	@echo "... running guardlens demo"
	@HF_HUB_OFFLINE=1 $(BIN)/guardlens demo

test: $(TEST) ## run the test suite (more options for pytest: make test ARGS="-k gates")
	@echo "... running the tests"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

peers: $(TEST) $(PEERS) ## compare with TransformerLens, which it installs beside the rest
	@echo "... running the comparison with other libraries"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m peers tests/peers $(ARGS)

shapes: $(TEST) ## try everything on the sizes of published models, with random weights (minutes; up to 13 GB of memory)
	@echo "... trying everything on the sizes of published models"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m shapes -s tests/shapes $(ARGS)

real: $(TEST) $(filter $(CHECKPOINT),$(MODEL)) ## try everything on a real checkpoint, which it fetches (or on yours: make real MODEL=DIR)
	@echo "... trying everything on $(MODEL)"
	@GUARDLENS_REAL="$(MODEL)" HF_HUB_OFFLINE=$(if $(filter $(CHECKPOINT),$(MODEL))$(wildcard $(MODEL)),1,0) $(BIN)/python -m pytest -m real tests/real $(ARGS)

$(CHECKPOINT): | $(CORE)
	@echo "... fetching SmolLM2-135M-Instruct into $(CACHE)"
	@$(BIN)/python -m tests.real.fetch $@

check: $(LINT) $(DOCS) ## lint, formatting, types, and which module may import which; all of them, also if one fails
	@failed=0; for step in "ruff check ." "ruff format --check ." pyright "lint-imports --no-logo"; do $(BIN)/$$step || failed=1; done; exit $$failed

docs: $(DOCS) ## execute the tutorials that changed, then build the documentation into site/
	@echo "... executing the tutorials, into docs/tutorials"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m analyses.tutorials --out docs/tutorials
	@echo "... building the documentation into site/"
	@$(BIN)/python -m zensical build --clean --strict
	@echo "... checking that Material for MkDocs builds it too"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir $(VENV)/material

site: docs $(TEST) ## build the documentation, then test it: links, figures, formulae, an entry for every public name
	@echo "... testing the documentation"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m site tests/docs/test_built_site.py $(ARGS)

figures: $(CORE) ## run the demo and copy its figures to docs/figures
	@echo "... running guardlens demo, then copying its figures to docs/figures"
	@HF_HUB_OFFLINE=1 $(BIN)/guardlens demo --out out/demo
	@mkdir -p docs/figures
	@for f in $(FIGURES); do if [ -e "$$f" ]; then cp "$$f" docs/figures; fi; done

# $(call install,NAME,ARGUMENTS): pip's own words go to the log, and its end is shown if pip fails.
define install
	@echo "... installing $(1)"
	@$(BIN)/python -m pip install --no-input -c constraints.txt $(2) >>$(LOG) 2>&1 || { tail -n 15 $(LOG); \
	  echo "guardlens: installing $(1) failed; the end of pip's log is above, all of it is in $(LOG)."; exit 1; } >&2
endef

$(BIN)/python:
	@found=; for p in $(PYTHONS); do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$p; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "guardlens: needs Python 3.11 or newer, and found none (tried $(strip $(PYTHONS))); install one or name it with make PYTHON=/path/to/python." >&2; exit 1; fi; \
	echo "... making $(VENV) with $$("$$found" --version); what it needs is installed once, which can take minutes"; \
	"$$found" -m venv --clear $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  echo "guardlens: $$found cannot make a virtual environment; install its venv module (python3-venv on Debian and Ubuntu)." >&2; exit 1; }

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,pip,--upgrade "pip>=25.1")
	$(call install,torch,torch)
	$(call install,guardlens,--editable .)
	@touch $@

$(TEST) $(LINT) $(DOCS) $(PEERS): $(VENV)/%.stamp: $(CORE)
	$(call install,the $* tools,--group $*)
	@touch $@
