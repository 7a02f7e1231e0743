#!/usr/bin/env bash
# Collect what `tests/gpu/run.sh` needs on a machine without a package index, in an ignored folder of this repository:
#
#   tests/gpu/wheels.sh [--data FOLDER] [--out bench/gpu] [--images 16] [REQUIREMENT ...]
#
# OUT/wheels gets the wheels of tests/gpu/wheels.txt for CPython 3.12 on x86-64 Linux, and those of each REQUIREMENT,
# such as bitsandbytes==0.50.2. OUT/tokenizer and OUT/images get the tokenizer and images of FOLDER, if they are there.
# Without them the measurements make their own. It refuses a sum above 64 MiB.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
data=$root/../shared/data out=$root/bench/gpu images=16 requirements=()
while [ $# -gt 0 ]; do
    case $1 in
        --data | --out | --images)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        -*) echo "error: unknown option $1: give --data, --out, --images or a requirement" >&2; exit 2 ;;
        *) requirements+=("$1"); shift ;;
    esac
done
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}

rm -rf "$out/wheels" "$out/tokenizer" "$out/images"
mkdir -p "$out/wheels"
platforms=()
for name in manylinux_2_34 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --dest "$out/wheels" --requirement "$root/tests/gpu/wheels.txt" "${requirements[@]}"
[ ! -d "$data/tokenizer" ] || cp -R "$data/tokenizer" "$out/tokenizer"
if [ -f "$data/chess_train/instances.json" ]; then
    PYTHONPATH=$root "$python" "$root/tests/gpu/some_images.py" "$data/chess_train" "$out/images" "$images"
fi
chmod -R u+w "$out"

# The repository's own files travel too.
bytes=$({
    find "$out" -type f -printf '%s\n'
    git -C "$root" ls-files -z 2>/dev/null | (cd "$root" && xargs -0 -r stat --format %s 2>/dev/null)
} | awk '{ sum += $1 } END { printf "%d", sum }' || true)
limit=$((64 * 1024 * 1024))
printf '%s: %d wheels, %.1f MiB in all, with the repository\n' "$out" "$(find "$out/wheels" -name '*.whl' | wc -l)" \
    "$(awk "BEGIN { print $bytes / 1048576 }")"
if [ "$bytes" -gt "$limit" ]; then
    echo "error: more than 64 MiB: leave out a requirement, or lower --images" >&2
    exit 1
fi
