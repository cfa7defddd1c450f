# Two commands do all the set-up: `make demo` and `make test`. Needs Python 3.11-3.13 with venv, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Where Python may not write bytecode at the first import, each process would compile torch and transformers again: 10 s.
BYTECODE = $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
# A number, or auto: a worker more than there are processors, since these tests mostly wait. 0: all in one process.
APISERVER_WORKERS ?= auto
UV_VERSION = 0.13.9

.DEFAULT_GOAL := help
.PHONY: help setup demo study paper test test-apiserver test-gpu check format docs lock bench bench-kill bench-gateway bench-flip bench-gate bench-feedback bench-dpo soak-gateway bench-spool torture-spool torture-gateway bench-operator bench-kill-operator e2e e2e-faults rbac clean \
  images image-operator image-serving image-serving-ray image-training image-sizes lock-images helm-docs

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## install the locked dependencies into .venv
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $(BYTECODE) requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup  ## the whole loop on one machine, from one manifest; writes demo/report.html
	$(BIN)/python crds/examples/freight/demo.py --out demo

study: setup  ## the long comparison of methods and stand-ins; writes docs/study.md
	$(BIN)/python tests/benchmarks/study.py --out docs/study.md

TABLE ?= main
paper: setup  ## one of the paper's tables (TABLE=main|drafts|pairs|models) on MANIFEST; OPTIONS=--plan: what it may cost at most
	$(BIN)/python -m tests.benchmarks.paper $(TABLE) -f $(MANIFEST) $(OPTIONS)

test: setup  ## unit, contract, embedded-loop and API-server tests
	$(BIN)/python -m pytest tests --ignore tests/apiserver -m "not e2e and not gpu and not faults" -ra
	$(MAKE) --no-print-directory test-apiserver

test-apiserver: setup  ## of these the API-server tests: workers side by side, each with an API server of its own
	$(BIN)/python -m pytest tests/apiserver -m "not faults" -n $(APISERVER_WORKERS) --dist worksteal -ra

test-gpu: setup  ## weak model and tuning on the GPU of this machine
	$(BIN)/python -m pytest tests/loop/test_gpu.py -m gpu -ra

check: setup  ## format, lint, types, import rules, generated docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m cowest_operator.docs --check
	$(BIN)/python -m cowest_cli.docs --check
	$(BIN)/python charts/docs.py --check

format: setup  ## put the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup  ## write docs/api.md and docs/cli.md anew
	$(BIN)/python -m cowest_operator.docs
	$(BIN)/python -m cowest_cli.docs

bench: bench-kill bench-operator bench-gate bench-feedback bench-dpo bench-gateway bench-flip bench-spool  ## all benchmarks; hours

bench-kill: setup  ## kill -9 the run at 20 random moments, then with an endpoint that ignores Idempotency-Key; half an hour
	$(BIN)/python tests/benchmarks/kill.py --kills 20
	$(BIN)/python tests/benchmarks/kill.py --kills 20 --ignore-idempotency

bench-operator: setup  ## writes, reconcile time and memory of the operator with 1,000 jobs on a real API server; 40 minutes
	$(BIN)/python tests/benchmarks/operator_bench.py

bench-gate: setup  ## 20,000 simulated canaries looked at as they come: who promotes what does not gain; 3 minutes
	$(BIN)/python tests/benchmarks/gate_bench.py $(OPTIONS)

bench-feedback: setup  ## strong calls a usable pair beside the full protocol, and 10,000 calls under 429s and a crash beside distilabel; 10 minutes
	$(BIN)/python -m tests.benchmarks.feedback_bench $(OPTIONS)

bench-dpo: setup  ## pairs a second and memory of DPO with shared prompts beside TRL's own; hours with all pairs, OPTIONS="--pairs 48" minutes
	$(BIN)/python tests/benchmarks/dpo_bench.py --workload demo $(OPTIONS)
	$(BIN)/python tests/benchmarks/dpo_bench.py --workload wide $(OPTIONS)

bench-gateway: setup  ## CPU, latency, streams and records of the gateway beside LiteLLM, Portkey, a Rust router and nginx; 15 minutes
	$(BIN)/python -m tests.benchmarks.gateway.bench $(OPTIONS)

bench-flip: setup  ## flip the weights 50 times under load; no call fails, none goes to the wrong arm
	$(BIN)/python -m tests.benchmarks.gateway.flip $(OPTIONS)

MINUTES ?= 30
soak-gateway: setup  ## half of what the gateway can do, for MINUTES; memory, sockets and tasks at the end
	$(BIN)/python -m tests.benchmarks.gateway.soak --minutes $(MINUTES) $(OPTIONS)

bench-spool: setup  ## what a durable record costs: CPU of its path and the disk's time
	$(BIN)/python tests/benchmarks/spool_bench.py

torture-spool: setup  ## kill -9 writers of durable records 200 times; nothing acknowledged lost, nothing twice
	$(BIN)/python tests/benchmarks/torture_spool.py --kills 200

torture-gateway: setup  ## kill -9 the gateway under load 200 times, with the store gone and disks that fail, then LiteLLM's; 20 minutes
	$(BIN)/python -m tests.benchmarks.torture_gateway --kills 200

e2e: setup  ## the cluster tests against the current kubeconfig
	$(BIN)/python -m pytest tests/e2e -m "e2e and not faults" -ra -s

bench-kill-operator: setup  ## kill the operator after each single write of a job's life, one life a kill; half an hour
	COWEST_KILL_SWEEP=100 $(BIN)/python -m pytest tests/apiserver/test_kills.py -m "not faults" -ra -s

e2e-faults: setup  ## break parts of the current kubeconfig's cluster on purpose; goes on where it was interrupted, or ANEW=1
	$(if $(ANEW),COWEST_E2E_ANEW=1) $(BIN)/python -m pytest tests/e2e tests/apiserver -m faults -ra -s

AUDIT_LOGS ?= $(wildcard build/audit/*.log)
rbac: setup  ## is each right of the operator's chart used, and none missing? AUDIT_LOGS: also of real clusters, as e2e leaves one
	COWEST_AUDIT_LOGS="$(shell echo $(AUDIT_LOGS) | tr ' ' ':')" $(BIN)/python -m pytest tests/apiserver/test_rbac.py -ra

lock: setup  ## resolve requirements.lock anew
	$(BIN)/uv pip compile pyproject.toml --extra operator --extra embedded --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header --quiet --output-file requirements.lock

IMAGE_REGISTRY ?= docker.io
IMAGE_TAG ?= $(or $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml),dev)
IMAGE_OPTIONS ?= $(foreach name,PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST PIP_FIND_LINKS,--build-arg $(name))
# Called with DOCKERFILE CONTEXT TAG, and more of the builder's options.
IMAGE_BUILD ?= sh -c 'file=$$0 context=$$1 tag=$$2; shift 2; docker build $(IMAGE_OPTIONS) --file "$$file" --tag "$$tag" "$$@" "$$context"'
# serving-ray is needed for gateway.engine RayServe only.
IMAGES ?= operator serving serving-ray training
IMAGE_BASE ?= $(shell sed -n 's/^ARG BASE=//p' operator/Dockerfile)
# Called with TAG: its size in MB.
IMAGE_SIZE ?= .ci/image-size

images: $(IMAGES:%=image-%)  ## build the images $(IMAGE_REGISTRY)/cowest/{operator,serving,training}:$(IMAGE_TAG)
image-operator image-serving image-training: image-%:
	$(IMAGE_BUILD) $*/Dockerfile . $(IMAGE_REGISTRY)/cowest/$*:$(IMAGE_TAG)
image-serving-ray:
	$(IMAGE_BUILD) serving/Dockerfile . $(IMAGE_REGISTRY)/cowest/serving:$(IMAGE_TAG)-ray --build-arg EXTRAS=ray

image-sizes:  ## how large the images are, and what each adds to its base
	@base=$$($(IMAGE_SIZE) $(IMAGE_BASE)) && for image in $(IMAGES); do \
	  tag=$(IMAGE_REGISTRY)/cowest/$${image%-ray}:$(IMAGE_TAG)$${image#$${image%-ray}}; \
	  size=$$($(IMAGE_SIZE) $$tag) || exit 1; \
	  echo "$$tag: $$size MB, $$((size - base)) MB on top of $(IMAGE_BASE)"; \
	done

lock-images: setup  ## the part of requirements.lock that each image installs
	for image in operator serving training; do \
	  $(BIN)/uv pip compile pyproject.toml --extra $$image --constraint requirements.lock --universal \
	    --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet \
	    --output-file $$image/requirements.lock || exit 1; \
	done
	$(BIN)/uv pip compile pyproject.toml --extra serving --extra ray --constraint requirements.lock --universal \
	  --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet --output-file serving/requirements-ray.lock

helm-docs: setup  ## write the charts' READMEs, the CRD's copy and the values schema anew
	$(BIN)/python charts/docs.py

clean:  ## remove what was made here, the environment too
	rm -rf demo $(VENV) .mypy_cache .ruff_cache .pytest_cache
