#!/usr/bin/env bash
# Everything a change must pass: the linter, then the tests, a file at a time on two processes of one thread each.
# Arguments go to pytest: -m slow runs the long ones, -n 0 takes one process.
source "$(dirname "$0")/setup.sh"
ruff check .
OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile "$@"
