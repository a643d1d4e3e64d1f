#!/usr/bin/env bash
# Sets everything up on a machine with Python alone and runs the tests, a process for each of up to four cores. Idempotent. Arguments go to
# pytest (-n 0: in one process).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh test
echo "== running the tests"
exec .venv/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile "$@"
