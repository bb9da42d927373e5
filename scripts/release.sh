#!/usr/bin/env bash
# Builds the release twice in two folders, demands that both are the same to the byte, and writes binaries,
# checksums and an SBOM to dist/.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-dev}
go=$(command -v go)

build() { # source folder, output folder
  mkdir -p "$2"
  local ldflags="-s -w -buildid= -X main.version=$version"
  (cd "$1" &&
    CGO_ENABLED=0 "$go" build -trimpath -buildvcs=false -ldflags "$ldflags" -o "$2/trustd" ./cmd/trustd &&
    CGO_ENABLED=1 "$go" build -trimpath -buildvcs=false -ldflags "$ldflags -extldflags=-Wl,--build-id=none" -o "$2/trustd-pkcs11" ./plugins/pkcs11)
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The second build comes from another path and an empty build cache, so that neither can hide a difference.
mkdir "$work/copy"
tar --exclude=./.git --exclude=./bin --exclude=./dist --exclude=./.cache -cf - . | tar -xf - -C "$work/copy"
build "$PWD" "$work/first"
GOCACHE=$work/cache build "$work/copy" "$work/second"
for f in trustd trustd-pkcs11; do
  cmp "$work/first/$f" "$work/second/$f" || { echo "release: $f is not reproducible" >&2; exit 1; }
done

rm -rf dist
mkdir dist
cp "$work/first/"* dist/
"$go" run ./packaging/sbom -version "$version" dist/trustd dist/trustd-pkcs11 >dist/sbom.cdx.json
(cd dist && sha256sum trustd trustd-pkcs11 sbom.cdx.json >SHA256SUMS && sha256sum --check --quiet SHA256SUMS)
echo "release: two builds agree"
ls -l dist
