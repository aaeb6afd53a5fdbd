# Every command a person types. `make` alone lists them.
PYTHON ?= python3.11
STUDY ?= smollm2-135m
INSTANCE ?= g5.xlarge
BUILDER ?= $(HOME)/docker_ec2_builder/build_and_run.py
RESULTS ?= results
TENSORS ?= tensors
VENV := .venv
PY := $(VENV)/bin/python
STAGES := 01_generate 02_filter 03_extract 04_sae 05_probe 06_converge 07_specificity 08_causality 09_bandwidth 10_report

comma := ,
space := $(subst ,, )

.PHONY: help run quick report test faults lab pairs sae gpu-check remote pack unpack lint clean browser $(STAGES)
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z$$()A-Z_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/\$$\(STAGES\)/NN_stage/; s/:.*## /\t/' | expand -t 14

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r requirements.lock
	@# Some platforms' torch wheel needs libraries of its own; let pip add them only where the import fails.
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet torch==$$(sed -n 's/^torch==//p' requirements.lock)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(PY) -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (empathy)" >/dev/null
	@touch $@

$(VENV)/.cluster: $(VENV)/.installed requirements-cluster.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r requirements-cluster.lock
	@touch $@

run: $(VENV)/.installed  ## the whole study: STUDY=smollm2-135m by default, its random-weight twin beside it
	@$(PY) -m lib.run $(if $(filter smollm2-135m,$(STUDY)),--study smollm2-135m-random) --study $(STUDY)

quick: $(VENV)/.installed  ## a small honest subset of the default study, for development
	@$(PY) -m lib.run --quick --study $(STUDY)

$(STAGES): $(VENV)/.installed  ## one stage and what it reads: make 05_probe STUDY=smollm2-135m
	@$(PY) -m lib.run $@ --study $(STUDY)

report: $(VENV)/.installed  ## the report again, on STUDIES="a b" or on all that have results
	@$(PY) -m lib.run 10_report --study $(firstword $(STUDIES) $(STUDY)) --set '10_report.studies=[$(subst $(space),$(comma) ,$(strip $(STUDIES)))]'

test: $(VENV)/.cluster browser  ## the whole test suite
	@$(PY) -m ruff check . && OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

faults: $(VENV)/.installed  ## 20,000 made-up inputs and every other fault, at length; writes tests/faults/README.md
	@FAULT_TRIES=20000 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile tests/faults tests/test_fuzz.py && $(PY) -m tests.faults.table

lab: $(VENV)/.installed  ## JupyterLab on this machine, with the project's kernel
	@$(VENV)/bin/jupyter lab --ip=127.0.0.1 notebooks

pairs: $(VENV)/.installed  ## write each notebook's .ipynb half from its .py half
	@$(VENV)/bin/jupytext --quiet --update --to ipynb notebooks/*.py

sae: $(VENV)/.installed  ## retrain the study's sparse autoencoders from nothing (under an hour on two CPU cores)
	@$(PY) -m lib.model.train_sae --study $(STUDY)

gpu-check: $(VENV)/.installed  ## on a machine with a GPU: models of the real sizes with random weights, no download
	@$(PY) -m lib.model.gpu_check

remote:  ## STUDY on a GPU machine by BUILDER, packed into RESULTS and TENSORS there; again goes on where it stopped
	$(BUILDER) --dockerfile Dockerfile.gpu --context . --instance-type $(INSTANCE) --cmd "python -m lib.run $(STAGE) --study $(STUDY) && python -m lib.handoff pack $(STUDY) --results $(RESULTS) --tensors $(TENSORS)"

pack: $(VENV)/.installed  ## a study's results for another machine: RESULTS (small, for git), TENSORS (large, any mount)
	@$(PY) -m lib.handoff pack $(STUDY) --results $(RESULTS) --tensors $(TENSORS)

unpack: $(VENV)/.installed  ## results that came back: into outputs/, every file checked first
	@$(PY) -m lib.handoff unpack $(STUDY) --results $(RESULTS) --tensors $(TENSORS)

lint: $(VENV)/.installed  ## ruff over everything
	@$(PY) -m ruff check .

browser:
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }

clean:  ## remove outputs; labels and paid replies stay
	@find outputs -mindepth 1 ! -name .gitkeep ! -name '*.journal.jsonl' ! -type d -delete; find outputs -mindepth 1 -type d -empty -delete
