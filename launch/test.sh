#!/usr/bin/env bash
# Everything a change must pass: the linter, then the tests. Arguments go to pytest: -m slow runs the long ones.
source "$(dirname "$0")/setup.sh"
ruff check .
python -m pytest -q "$@"
