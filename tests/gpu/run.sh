#!/usr/bin/env bash
# Measure the recipe on the GPU of this machine in at most 8 minutes: tests/gpu/run.sh [OPTION ...]
# Options: measure.py --help.
#
# It uses $PYTHON, else python3. Packages that it lacks come from bench/gpu/wheels, which `tests/gpu/wheels.sh` has
# filled; no package index is asked.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
started=$SECONDS
if ! "$python" -c 'import composer, streaming, omegaconf' 2>/dev/null; then
    wheels=$root/bench/gpu/wheels
    [ -d "$wheels" ] || { echo "error: $python lacks Composer: run tests/gpu/wheels.sh on a machine with pip first" >&2; exit 1; }
    # Not a virtual environment: made from another one, it would not see that one's torch.
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-index --no-deps --no-compile \
        --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    echo "installed $(find "$wheels" -name '*.whl' | wc -l) wheels in $((SECONDS - started)) s"
fi
"$python" "$root/tests/gpu/measure.py" --spent $((SECONDS - started)) "$@"
