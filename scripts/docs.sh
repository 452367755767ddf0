#!/usr/bin/env bash
# Build the documentation into site/, in an environment of its own; any warning fails the build.
# Usage: scripts/docs.sh [serve]   (serve: on http://127.0.0.1:8001, rebuilt on change)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venvs/docs
if ! cmp -s requirements/docs.txt "$venv/.installed"; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/pip" install -qq --disable-pip-version-check --no-deps -r requirements/docs.txt
    cp requirements/docs.txt "$venv/.installed"
fi
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true  # the theme's announcement of another project
case "${1:-build}" in
    serve) exec "$venv/bin/mkdocs" serve --dev-addr 127.0.0.1:8001 ;;
    *) exec "$venv/bin/mkdocs" build --strict --clean ;;
esac
