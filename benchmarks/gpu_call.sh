#!/usr/bin/env bash
# One visit to a GPU host, most telling first; what is cut off leaves what came before it in OUT.
#
#   gpu_call.sh check OUT [SECONDS] [TEST...]   tests/gpu (or some of them), then the planner's choice on a few problems
#   gpu_call.sh sweep OUT [SECONDS] ARGUMENT... plan variants of benchmarks.sweep (--problems ... --plans ...)
#   gpu_call.sh core OUT [SECONDS]              every grid, without peers
#   gpu_call.sh peers OUT [SECONDS] [PART...]   unpacks the peers that lie in PART..., then the grids that need them
#   gpu_call.sh search OUT [SECONDS]            the planner's choice against a search
#   gpu_call.sh forward OUT [SECONDS] [PART...] unpacks the peers that lie in PART..., then every forward grid (GRIDS: which, a,b,...)
#   gpu_call.sh backward OUT [SECONDS] [PART...] the same for backward's grids
#   gpu_call.sh study OUT [SECONDS] ARGUMENT... flashtile study into OUT/study.json, gone on with where it is there
#   gpu_call.sh unpack OUT SECONDS PART...      unpacks peers alone, where they come in several calls
#   gpu_call.sh sanitize OUT [SECONDS]          memcheck and racecheck over variants of the kernels (OPERATION: which, else all)
#
# PYTHON names the interpreter (python3); COMMIT the commit measured; PEERS_DIR where peers are unpacked (/opt/peers).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
what=${1:?check, sweep, study, core, peers, search, forward, backward, unpack or sanitize}
out=$(mkdir -p "${2:?a folder for results}" && cd "$2" && pwd)
seconds=${3:-500}
shift $(($# < 3 ? $# : 3))
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
peers_dir=${PEERS_DIR:-/opt/peers}
commit=(--commit "${COMMIT:-}")
begin=$SECONDS

left() { echo $((seconds - (SECONDS - begin))); }

measured() { # module, tries, share of the time left in percent, then its arguments; resumed where the device was lost or a call hung
  local module=$1 tries=$2 budget=$(($(left) * $3 / 100)) status=0
  shift 3
  [ "$budget" -lt 10 ] && { echo "no time for: $*"; return; }
  local end=$((SECONDS + budget)) resume=()
  for _ in $(seq "$tries"); do
    timeout -k 10 $((end - SECONDS + 30)) "$python" -m "$module" --out "$out" --budget $((end - SECONDS)) \
      --peers-dir "$peers_dir" "${commit[@]}" "${resume[@]}" "$@"
    status=$?
    [ $status -eq 0 ] || [ $status -eq 2 ] || [ $((end - SECONDS)) -lt 20 ] && break
    echo "exit $status: once more from where it stopped"
    resume=(--resume)
  done
}

measure() { measured benchmarks.decode 3 "$@"; } # share of the time left in percent, then arguments of benchmarks.decode

unpacked() { # folders with peers
  for part in "$@"; do PEERS_DIR=$peers_dir bash "$part/unpack.sh" "$part" >/dev/null || echo "could not unpack $part"; done
}

sanitized() { # tool, seconds: its trials in several processes at once; the filter by kernel name as the version at hand spells it
  local tool=$1 limit=$2 only_ours=() parts=7 part name help
  help=$(compute-sanitizer --help 2>&1)
  for name in decode combine forward backward; do # backward's kernels for delta and sinks have it in their names too
    case $help in
    *--kernel-regex*) only_ours+=(--kernel-regex "kns=$name") ;;
    *--kernel-name*) only_ours+=(--kernel-name "kernel_substring=$name") ;;
    esac
  done
  compute-sanitizer --tool "$tool" "${only_ours[@]}" --log-file "$out/control_$tool.log" \
    timeout -k 10 60 "$python" -m benchmarks.sanitize control "$tool" >"$out/watch_control_$tool.txt" 2>&1 &
  for part in $(seq $parts); do
    timeout -k 10 $((limit + 30)) compute-sanitizer --tool "$tool" "${only_ours[@]}" --log-file "$out/${tool}_$part.log" \
      "$python" -m benchmarks.sanitize watch "$tool" --part "$part/$parts" --budget "$limit" --out "$out" \
      >"$out/watch_${tool}_$part.txt" 2>&1 &
  done
}

sweep() { # arguments of benchmarks.sweep; resumed where the device was lost
  local end=$((SECONDS + $(left) - 5)) resume=()
  for _ in 1 2 3; do
    timeout -k 10 $((end - SECONDS + 20)) "$python" -m benchmarks.sweep --out "$out" --budget $((end - SECONDS)) \
      --peers-dir "$peers_dir" "${commit[@]}" "${resume[@]}" "$@"
    status=$?
    [ $status -eq 0 ] || [ $status -eq 2 ] || [ $((end - SECONDS)) -lt 20 ] && break
    echo "exit $status: once more from where it stopped"
    resume=(--resume)
  done
}

case $what in
check)
  export OMP_NUM_THREADS=1
  [ $# -gt 0 ] || set -- tests/gpu
  timeout -k 10 $((seconds * 65 / 100)) "$python" -m pytest "$@" -q -n 15 --durations 8 -p no:cacheprovider -o addopts= \
    --import-mode=importlib --junitxml "$out/tests_gpu.xml" 2>&1 | tee "$out/tests_gpu.txt" | tail -n 60
  measure 100 --grid seqlen1 --no-peers --only 32/8
  ;;
sweep) sweep "$@" ;;
study)
  for _ in 1 2 3; do # a second try where the device was lost or a call hung: the task that was running is left out
    [ "$(left)" -lt 15 ] && break
    timeout -k 10 $(($(left) + 10)) "$python" -m flashtile study --out "$out/study.json" --budget $(($(left) - 5)) "${commit[@]}" "$@" && break
  done
  ;;
core) measure 100 --grid all --no-peers --compilers 12 ;;
peers)
  unpacked "$@"
  measure 100 --grid host,seqlen1,speculative,ragged,paged,floor # in one process: the peers load for tens of seconds
  ;;
forward | backward)
  # one file instead of many, for what comes back from a host may be limited
  trap 'tar -C "$out" -czf "$out/$what.tar.gz" $(cd "$out" && ls "$what"_*.json) && rm -f "$out/$what"_*.json' EXIT
  unpacked "$@"
  measured "benchmarks.$what" 5 100 --grid "${GRIDS:-all}"
  ;;
unpack) unpacked "$@" ;;
search) measure 100 --grid search --no-peers --compilers 12 ;;
sanitize)
  export OMP_NUM_THREADS=1 # so many processes compute references
  # the tools watch kernels that the unwatched run has compiled into Triton's cache; without torch's caching allocator, for
  # inside its large blocks nothing is out of bounds
  [ -f "$out/trials.json" ] || "$python" -m benchmarks.sanitize prepare --out "$out" --operation "${OPERATION:-}" --budget $((seconds / 2))
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitized memcheck $(($(left) - 60))
  sanitized racecheck $(($(left) - 60))
  wait
  cat "$out"/watch_*.txt | grep -v '^$' | tail -n 30
  "$python" -m benchmarks.sanitize collect --out "$out" "${commit[@]}"
  echo "collect: exit $?"
  # one file instead of many, for what comes back from a host may be limited
  tar -C "$out" -czf "$out/sanitize_logs.tar.gz" --exclude '*.tar.gz' . && find "$out" -name '*.log' -delete -o -name 'watch*' -delete
  ;;
*)
  echo "unknown: $what"
  exit 2
  ;;
esac
