# make demo: quantize the embedded model and show its pictures.  make test: everything a change must pass.
# make native-test: the C++ tests of the kernels; -sanitized: with address and undefined-behaviour sanitizers (nine minutes on
# two cores by GCC, Clang takes longer); -neon: cross-compiled for ARM and emulated.
# The first two set up .venv themselves, once. PYTHON and TORCH may be overridden: make test PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0
READY := .venv/ready

AARCH64 := aarch64-linux-gnu
NATIVE_TEST = cmake -S . -B $(1) -DLRQDIT_TESTS=ON $(2) && cmake --build $(1) --parallel && ctest --test-dir $(1) --output-on-failure

.PHONY: demo test native-test native-test-sanitized native-test-neon clean

demo: $(READY)
	.venv/bin/lrqdit demo --out demo-out

test: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pytest -q

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
