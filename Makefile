# Everything runs in .venv, which `setup` creates from the pins in requirements/ and reuses while they don't change.
.PHONY: help setup demo test test-long check bench clean

help:
	@echo "make demo       set up, then run stock verl beside the elastic arm; results in out/demo"
	@echo "make test       set up, then all checks and tests"
	@echo "make test-long  set up, then the real runs that take several minutes each"
	@echo "make check      set up, then format, lint and type checks, unit and property tests"
	@echo "make bench      set up, then the benchmarks that need nothing but this host; results in benchmarks/results"
	@echo "make setup      create or reuse .venv"
	@echo "make clean      remove build output, caches and out/ (keeps .venv)"

setup:
	@scripts/setup

demo: setup
	@.venv/bin/rlhfless demo --out out/demo

test: setup
	@scripts/check tests

test-long: setup
	@.venv/bin/python -m pytest tests/e2e -m long

check: setup
	@scripts/check

bench: setup
	@.venv/bin/python -m benchmarks.run

clean:
	rm -rf build dist out outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
