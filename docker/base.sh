#!/usr/bin/env bash
# Build a slim Debian base image without a registry: import debootstrap's minimal system, and print the image's name.
# Requires root, the package debootstrap and a Docker engine.
#
#     docker/base.sh [IMAGE]
#
# The default name holds a hash of this script and of the host's CA certificates, so an image that exists is up to date.
set -euo pipefail
bundle=/etc/ssl/certs/ca-certificates.crt
content=$(cat "$0" "$bundle" | sha256sum | cut -c1-12)
image=${1:-scop-base:bookworm-$content}
if docker image inspect "$image" >/dev/null 2>&1; then
  echo "$image"
  exit
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase bookworm "$folder" >/dev/null
# Copy the host's CA certificates: behind an intercepting proxy the build needs them to reach package registries.
mkdir -p "$folder/etc/ssl/certs" "$folder/usr/local/share/ca-certificates"
cp -L "$bundle" "$folder$bundle"
# Also copy them one by one: Debian's package ca-certificates rebuilds the bundle from these files.
awk -v folder="$folder/usr/local/share/ca-certificates" \
  '/BEGIN CERTIFICATE/ { n++ } n { print > sprintf("%s/machine-%03d.crt", folder, n) }' "$bundle"
rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/* "$folder"/usr/share/{doc,man,locale}/*
tar -C "$folder" --numeric-owner -c . | docker import - "$image" >/dev/null
echo "$image"
