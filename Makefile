# make demo: quantize the embedded model and show its pictures.  make test: everything a change must pass.
# Both set up .venv themselves, once. PYTHON and TORCH may be overridden: make test PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
READY := .venv/ready

.PHONY: demo test clean

demo: $(READY)
	.venv/bin/lrqdit demo --out demo-out

test: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pytest -q

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(TORCH)
	.venv/bin/pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-out
