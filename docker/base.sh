#!/usr/bin/env bash
# Make a slim Debian base image without a registry: debootstrap's minimal system, imported as IMAGE.
# Needs root, the package debootstrap and a docker engine.
#
#     docker/base.sh [IMAGE]
set -euo pipefail
image=${1:-scop-base:bookworm}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase bookworm "$folder" >/dev/null
# Behind a proxy that answers for the registries, the build must trust what the machine trusts.
bundle=/etc/ssl/certs/ca-certificates.crt
mkdir -p "$folder/etc/ssl/certs" "$folder/usr/local/share/ca-certificates"
cp -L "$bundle" "$folder$bundle"
# One by one too, from which Debian's package ca-certificates makes the bundle anew when it is installed.
awk -v folder="$folder/usr/local/share/ca-certificates" \
  '/BEGIN CERTIFICATE/ { n++ } n { print > sprintf("%s/machine-%03d.crt", folder, n) }' "$bundle"
rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/* "$folder"/usr/share/{doc,man,locale}/*
tar -C "$folder" --numeric-owner -c . | docker import - "$image" >/dev/null
echo "made $image"
