#!/usr/bin/env bash
# Fuzzes each target (fuzz/src/lib.rs) for SECONDS, JOBS processes at a time; docs/fuzzing.md tells more.
#   scripts/fuzz.sh [SECONDS] [JOBS] [OUT] [TARGET...]
# In OUT: `corpus/TARGET` what was found, `minimized/TARGET` what of it is not the same, `findings/TARGET` inputs that ended it, `TARGET-N.log`.
# FUZZ_BINARY names the program if it was built before; else cargo-fuzz builds it, with the nightly compiler.
set -euo pipefail
seconds=${1:-600} jobs=${2:-$(nproc)}
mkdir -p "${3:-fuzz-out}"
out=$(cd "${3:-fuzz-out}" && pwd)
shift $(($# < 3 ? $# : 3))
cd "$(dirname "$0")/../fuzz"
binary=${FUZZ_BINARY:-}
if [ -z "$binary" ]; then
  cargo +nightly fuzz build --features libfuzzer --target-dir ../target/fuzz fuzz
  binary=$PWD/../target/fuzz/x86_64-unknown-linux-gnu/release/fuzz
fi
binary=$(realpath "$binary")
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(request template session model gguf tokens tokenizer prepare)
scratch=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)" landmark-fuzz.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch RAYON_NUM_THREADS=2 RUST_BACKTRACE=0
export ASAN_OPTIONS=allocator_may_return_null=1:quarantine_size_mb=64:malloc_context_size=3:detect_leaks=0:symbolize=0

# One process; when an input ends it, the next goes on until the time is up.
one() {
  local target=$1 log=$out/$1-$2.log dictionary=()
  [ -e "dictionaries/$target" ] && dictionary=(-dict="dictionaries/$target")
  local end=$((SECONDS + seconds)) tries=0
  while [ $SECONDS -lt $end ] && [ $((tries++)) -lt 30 ]; do
    # Not the shell's own copy of stderr: what it says of a process that was ended is in the log.
    if LANDMARK_FUZZ_TARGET=$target "$binary" -max_total_time=$((end - SECONDS)) -timeout=20 -rss_limit_mb=3000 -print_final_stats=1 -print_funcs=0 \
      "${dictionary[@]}" -artifact_prefix="$out/findings/$target/" "$out/corpus/$target" "corpus/$target" >>"$log" 2>&1; then
      break
    fi
  done
}
export -f one
export out seconds binary

for target in "${targets[@]}"; do
  mkdir -p "$out/corpus/$target" "$out/minimized/$target" "$out/findings/$target" "corpus/$target"
  LANDMARK_FUZZ_TARGET=$target LANDMARK_FUZZ_SEEDS=$out/corpus/$target "$binary"
done
# Processes of one target share a corpus.
each=$(((jobs + ${#targets[@]} - 1) / ${#targets[@]}))
for i in $(seq "$each"); do printf "%s $i\n" "${targets[@]}"; done | xargs -P "$jobs" -L 1 bash -c 'one "$0" "$1"'
printf '%s\n' "${targets[@]}" | xargs -P "$jobs" -I {} bash -c \
  'LANDMARK_FUZZ_TARGET={} "$binary" -merge=1 -timeout=20 -rss_limit_mb=3000 -artifact_prefix="$out/findings/{}/" "$out/minimized/{}" "corpus/{}" "$out/corpus/{}" >"$out/{}-merge.log" 2>&1 || true'
for target in "${targets[@]}"; do
  runs=$(cat "$out/$target"-[0-9]*.log | sed -n 's/^stat::number_of_executed_units: *//p' | paste -sd+ | sed 's/^$/0/')
  echo "$target: $((runs)) runs that came to their end, $(find "$out/findings/$target" -type f | wc -l) findings, minimized $(find "$out/minimized/$target" -type f | wc -l)"
done
