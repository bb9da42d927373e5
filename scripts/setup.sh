#!/usr/bin/env bash
# Installs what building and testing trustd needs from Debian, and the Python peer into .cache/peer.
# Does nothing when all is there. Run by make; needs root or sudo only if something is missing.
#   setup.sh devices   the C compiler, SoftHSM, swtpm and their tools
#   setup.sh peer      also the Python peer TrustHandoff, in a virtual environment of its own
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
need() { # command or file, package
  if [[ $1 == /* ]]; then [[ -e $1 ]] || missing+=("$2"); else command -v "$1" >/dev/null || missing+=("$2"); fi
}
need gcc gcc
need /usr/include/stdlib.h libc6-dev
need softhsm2-util softhsm2
need swtpm swtpm
need swtpm_setup swtpm-tools
need pkcs11-tool opensc
need tpm2_verifysignature tpm2-tools
need openssl openssl
need curl curl
need jq jq
need setpriv util-linux
need python3 python3
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)

if ((${#missing[@]})); then
  echo "setup: installing ${missing[*]}"
  sudo=()
  if [[ $(id -u) != 0 ]]; then
    command -v sudo >/dev/null || { echo "setup: run this as root once, or install: ${missing[*]}" >&2; exit 1; }
    sudo=(sudo)
  fi
  "${sudo[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if [[ ${1:-} == peer ]]; then
  want=packet/testdata/interop/requirements.txt
  venv=.cache/peer
  if ! cmp -s "$want" "$venv/installed.txt"; then
    echo "setup: installing the Python peer into $venv"
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$want"
    cp "$want" "$venv/installed.txt"
  fi
fi
