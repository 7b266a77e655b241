#!/usr/bin/env bash
# Build the image with the version and the commit as labels.
#
#     docker/build.sh [BASE] [IMAGE]
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' scop/__init__.py)
base=${1:-debian:bookworm-slim}
image=${2:-scop-python:$version}
revision=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
test -z "$(git status --porcelain -uno 2>/dev/null)" || revision+=+
# The build downloads packages, so it uses the host's network.
docker build --network host -q -f docker/Dockerfile -t "$image" \
  --build-arg BASE="$base" --build-arg VERSION="$version" --build-arg REVISION="$revision" .
echo "built $image from $base"
