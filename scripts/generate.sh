#!/usr/bin/env bash
# Makes the generated files anew: the plugin protocol's Go code, docs/reasons.md and docs/config.md. Each is checked by
# a test, which fails when the file is stale. With --check it changes nothing that stays: it fails, and shows what
# differs, where a file is stale.
set -euo pipefail
cd "$(dirname "$0")/.."

files=(plugins/signerpb/signer.pb.go plugins/signerpb/signer_grpc.pb.go docs/reasons.md docs/config.md)

generate() {
  go run -C tools ./genproto
  go test -count=1 ./verify -run '^TestReasonsDocument$' -update
  go test -count=1 ./internal/config -run '^TestDocumentation$' -update
}

if [[ ${1:-} != --check ]]; then
  generate
  exit
fi

before=$(mktemp -d)
restore() { for f in "${files[@]}"; do cp -p "$before/$f" "$f"; done; rm -rf "$before"; }
for f in "${files[@]}"; do
  mkdir -p "$before/$(dirname "$f")"
  cp -p "$f" "$before/$f"
done
trap restore EXIT
generate
stale=0
for f in "${files[@]}"; do
  diff -u --label "$f" --label "$f, made anew" "$before/$f" "$f" || stale=1
done
((stale == 0)) || { echo "generate: stale files; run make generate" >&2; exit 1; }
