#!/usr/bin/env bash
# Sets everything up on a machine with Python alone and runs the main job on the embedded default model.
# Idempotent: a second call uses what the first one installed and continues or repeats the run. Arguments go to `cloq demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh gptq,demo
echo "== quantizing the default model to 2 bits, with adapters (a few minutes on two cores)"
exec .venv/bin/cloq demo "$@"
