#!/usr/bin/env bash
# Installs into .venv, then finetunes, merges and asks the embedded tiny model, offline: scripts/quickstart.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
make_venv .venv ""
exec .venv/bin/python scripts/quickstart.py "$@"
