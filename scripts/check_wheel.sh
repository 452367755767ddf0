#!/usr/bin/env bash
# Build the package, check its metadata, install the wheel alone into a fresh environment and run what needs no extra.
# Usage: scripts/check_wheel.sh [FOLDER]   (dist/ by default; it gets the sdist, the wheel and the SBOM)
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-dist}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH  # a checkout on it would pass for the installed package
python=${PYTHON:-python3}

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install -qq -r requirements/package.txt
rm -rf "$out"
"$work/tools/bin/python" -m build --outdir "$out" . >"$work/build.log" 2>&1 || { tail -20 "$work/build.log"; exit 1; }
"$work/tools/bin/python" -m twine check --strict "$out"/*.whl "$out"/*.tar.gz

"$python" -m venv "$work/clean"
"$work/clean/bin/pip" install -qq "$out"/*.whl
cd "$work"  # nothing of the repository in sight
export SLOS_SERVE_CACHE="$work/cache"
run() { echo "+ slos-serve $*"; "$work/clean/bin/slos-serve" "$@"; }
run --version
run simulate --scenario chat --requests 60 --rate 1 --json simulated.json
run capacity --scenario chat --requests 20 --seeds 1 --policy slos-serve --processes 1
printf 'classes:\n  chat: {ttft_ms: 500, tpot_ms: 50}\n' >classes.yaml
without_extra() {  # a command whose extra is missing says which one
  if "$work/clean/bin/slos-serve" "${@:2}" >said 2>&1 || ! grep -q "slos-serve\[$1\]" said; then
    echo "slos-serve $2 without its extra said:"; cat said; exit 1
  fi
  echo "+ slos-serve ${*:2}: $(tail -1 said)"
}
without_extra bench bench --base-url http://127.0.0.1:9 --classes classes.yaml
without_extra bench report simulated.json
"$work/tools/bin/cyclonedx-py" environment --output-reproducible --of JSON -o "$out/sbom.json" "$work/clean/bin/python"
echo "wheel checked: $(ls "$out" | tr '\n' ' ')"
