#!/usr/bin/env bash
# Sets everything up on a machine with Python alone and runs the tests. Idempotent. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh test
echo "== running the tests"
exec .venv/bin/python -m pytest "$@"
