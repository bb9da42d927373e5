#!/usr/bin/env bash
# Runs every fuzz target of the tree for the given time each: fuzz.sh [TIME [TARGET]].
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-10s}
only=${2:-}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

run() { # folder, target
  echo "fuzz: $1 $2 $time"
  if go test -run '^$' -fuzz "^$2\$" -fuzztime "$time" -fuzzminimizetime 10x -timeout 30m "$1" >"$log" 2>&1; then
    tail -n 1 "$log"
    return
  fi
  # The fuzzing engine may report its own end as a failure. A finding is written to a file, and that is not.
  if grep -q '^    context deadline exceeded$' "$log" && ! grep -q 'Failing input written' "$log"; then
    echo "ok, ended by its time"
    return
  fi
  cat "$log"
  return 1
}

grep -rlE '^func Fuzz[A-Z]' --include='*_test.go' . | sort | while read -r file; do
  grep -oE '^func Fuzz[A-Za-z0-9]+' "$file" | cut -d' ' -f2 | while read -r target; do
    [[ -z $only || $target == "$only" ]] || continue
    run "$(dirname "$file")" "$target"
  done
done
