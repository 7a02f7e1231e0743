#!/usr/bin/env bash
# A download from S3 draws from Python's shared random generator, so a seeded program is no longer reproducible.
#
# Versions: boto3 1.44.8 with the s3transfer that it installs; moto 5.2.5 answers in the place of S3.
# Valid use: seed `random`, call `download_file`, draw. `download_fileobj` and the plain `get_object` are shown next to it.
# Seen: after `download_file` the next random number differs from that of a program that downloaded nothing. The name
#   of the temporary file is chosen with `random.choice`, eight times per file, from the generator that
#   `random.seed` sets. The other two leave the generator alone.
# Whom it hurts: data loaders that fetch shards from S3 in threads and augment with `random`: what a sample gets
#   depends on which shards were cached already, and how far a background download has come.
# Remedy: draw from a generator of your own, `random.Random(seed)`.
# Exits with 0 while this holds, with 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet 'boto3==1.44.8' 'moto[s3,server]==5.2.5'
cd "$folder"
cat > seen.py <<'PY'
import io
import random

import boto3
import s3transfer
from moto import mock_aws

with mock_aws():
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="rows")
    client.put_object(Bucket="rows", Key="shard", Body=b"x" * 1000)

    def next_number(call):
        random.seed(7)
        call()
        return random.random()

    undisturbed = next_number(lambda: None)
    numbers = {
        "download_file": next_number(lambda: client.download_file("rows", "shard", "shard")),
        "download_fileobj": next_number(lambda: client.download_fileobj("rows", "shard", io.BytesIO())),
        "get_object": next_number(lambda: client.get_object(Bucket="rows", Key="shard")["Body"].read()),
    }
print(f"boto3 {boto3.__version__}, s3transfer {s3transfer.__version__}; undisturbed: {undisturbed:.6f}")
for name, number in numbers.items():
    print(f"  after {name}: {number:.6f}, {'unchanged' if number == undisturbed else 'CHANGED'}")
changed = {name for name, number in numbers.items() if number != undisturbed}
raise SystemExit(0 if changed == {"download_file"} else 1)
PY
"$folder/venv/bin/python" seen.py
