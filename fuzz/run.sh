#!/usr/bin/env bash
# What `make fuzz` runs: each target for some seconds (60, or $SECONDS_EACH), from the corpus in the repository. Arguments name targets.
# Stable Rust is enough: the flags are those of cargo-fuzz. New inputs stay in fuzz/target/corpus; what crashes is left in fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")"

targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(detect path jwt policy csr)
host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address -Ccodegen-units=16 --cfg fuzzing"
bins=()
for target in "${targets[@]}"; do
  bins+=(--bin "$target")
  if [ "$target" = csr ]; then bins+=(--features control); fi
done
cargo build --release --target "$host" "${bins[@]}"

status=0
for target in "${targets[@]}"; do
  grown=target/corpus/$target
  mkdir -p "$grown" artifacts "corpus/$target"
  echo "== $target, ${SECONDS_EACH:-60} s"
  # Leaks are not looked for: the programs end without tidying up.
  "${CARGO_TARGET_DIR:-target}/$host/release/$target" -max_total_time="${SECONDS_EACH:-60}" -max_len=4096 -timeout=10 -rss_limit_mb=2048 \
    -detect_leaks=0 -print_final_stats=1 -verbosity=0 -artifact_prefix="artifacts/$target-" "$grown" "corpus/$target" || status=1
done
exit $status
