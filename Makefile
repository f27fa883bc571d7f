# make demo: quantize the embedded model and show its pictures.  make test: everything a change must pass, with the time of
# each stage; the stages are targets of their own: style, imports, types, native-test (the C++ tests of the kernels),
# suite.  make native-test-sanitized: the C++ tests with address and undefined-behaviour sanitizers (nine minutes on two
# cores by GCC, Clang takes longer); -neon: cross-compiled for ARM and emulated.
# Before a release: scripts/check_long and scripts/check_oldest.
# demo and test set up .venv themselves, once. PYTHON and TORCH may be overridden: make test PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
READY := .venv/ready
export PATH := $(CURDIR)/.venv/bin:$(PATH) # of cmake and ctest

AARCH64 := aarch64-linux-gnu
NATIVE_TEST = cmake -S . -B $(1) -DLRQDIT_TESTS=ON $(2) && cmake --build $(1) --parallel && ctest --test-dir $(1) --output-on-failure

.PHONY: demo test style imports types suite native-test native-test-sanitized native-test-neon clean

demo: $(READY)
	.venv/bin/lrqdit demo --out demo-out

test:
	@scripts/stages $(READY) style imports types native-test suite

style: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

imports: $(READY)
	PYTHONPATH=src:. .venv/bin/lint-imports

types: $(READY)
	.venv/bin/pyright

suite: $(READY)
	.venv/bin/pytest -q -n $(WORKERS) --dist worksteal --cov --cov-report=term:skip-covered

native-test:
	$(call NATIVE_TEST,build/native-test)

native-test-sanitized:
	$(call NATIVE_TEST,build/native-test-sanitized,-DLRQDIT_SANITIZE=ON)

native-test-neon:
ifeq ($(and $(shell command -v $(AARCH64)-g++),$(shell command -v qemu-aarch64)),)
	@echo "native-test-neon skipped: it needs $(AARCH64)-g++ and qemu-aarch64 (Debian: g++-$(AARCH64) qemu-user)"
else
	$(call NATIVE_TEST,build/native-test-neon,-DCMAKE_TOOLCHAIN_FILE=csrc/tests/aarch64.cmake)
endif

$(READY): pyproject.toml demo/pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(TORCH)
	.venv/bin/pip install --quiet -e '.[dev]' -e ./demo
	touch $@

clean:
	rm -rf .venv demo-out build
