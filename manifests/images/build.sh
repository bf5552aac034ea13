#!/usr/bin/env bash
# Builds the images with whichever OCI builder is there: podman, docker or buildah.
#   REGISTRY=registry.example.com/mesh TAG=0.1.0 manifests/images/build.sh
# Needs the binaries of `make dist` in target/dist (or in $BINARIES). Pushes nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
registry=${REGISTRY:-ghcr.io/weft-mesh}
tag=${TAG:-$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)}
binaries=${BINARIES:-${CARGO_TARGET_DIR:-target}/dist}

builder=${BUILDER:-}
for candidate in podman docker buildah; do
  [ -n "$builder" ] || ! command -v "$candidate" >/dev/null || builder=$candidate
done
[ -n "$builder" ] || { echo "no OCI builder found: install podman, docker or buildah" >&2; exit 1; }

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
for image in weft-proxy weft-control weft-sample; do
  file=manifests/images/$image.Containerfile
  for binary in $(sed -n 's/^COPY \(.*\) [^ ]*$/\1/p' "$file"); do
    [ -x "$binaries/$binary" ] || { echo "$binaries/$binary is missing: run \`make dist\` first" >&2; exit 1; }
    cp "$binaries/$binary" "$context/"
  done
  "$builder" build -f "$file" -t "$registry/$image:$tag" "$context"
  echo "built $registry/$image:$tag"
done
