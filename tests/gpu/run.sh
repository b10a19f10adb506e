#!/usr/bin/env bash
# Everything that needs a GPU: the conformance suite on its setups, the GPU tests, the unit tests of the CUDA backend, and all of
# these once more under each tool of compute-sanitizer.
#
#   tests/gpu/run.sh                                  # builds with cargo, then runs tests and sanitizers
#   tests/gpu/run.sh --build DIR                      # only builds, and copies the test binaries to DIR
#   tests/gpu/run.sh DIR/*                            # runs binaries that were built elsewhere: needs no cargo
#   tests/gpu/run.sh --tests DIR/*                    # only the tests
#   tests/gpu/run.sh --sanitizer DIR/gpu              # only the sanitizers, here over one binary
#   TOOLS=memcheck tests/gpu/run.sh --sanitizer DIR/gpu -- attention::     # one tool; what follows -- goes to the binaries
#   tests/gpu/run.sh --emulated                       # the tests without a GPU: see emulator/build.sh
#
# COMPUTE_SANITIZER names the tool if it is neither in PATH nor below /usr/local/cuda.
# Fails if a test or a tool does, or if there is no GPU or no sanitizer: then nothing would have been shown.
set -euo pipefail

tests=1 sanitizer=1 emulated="" build_only="" binaries=() arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --tests) sanitizer=0 ;;
        --sanitizer) tests=0 ;;
        --emulated) emulated=1 sanitizer=0 ;;
        --build) build_only="$2"; shift ;;
        --) shift; arguments=("$@"); break ;;
        *) binaries+=("$1") ;;
    esac
    shift
done

step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

# Copies the binaries to a folder under their plain names: kv_cache (the unit tests), conformance, gpu.
build() {
    mkdir -p "$1"
    (cd "$(dirname "$0")/../.." && cargo test --lib --test conformance --test gpu --no-run --message-format=json) |
        sed -n 's/.*"name":"\([a-z_-]*\)".*"executable":"\([^"]*\)".*/\1 \2/p' |
        while read -r name executable; do cp "$executable" "$1/${name//-/_}"; done
    # Names of functions stay, for backtraces and the sanitizers; most of the bytes go.
    strip --strip-debug "$1"/* 2>/dev/null || true
}

if [ -n "$build_only" ]; then
    build "$build_only"
    ls -l "$build_only"
    exit
fi
if [ ${#binaries[@]} -eq 0 ]; then
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
    build "$folder"
    binaries=("$folder"/*)
fi

if [ -n "$emulated" ]; then
    here="$(cd "$(dirname "$0")" && pwd)"
    "$here/emulator/build.sh" "$here/../../target/emulator"
    export LD_LIBRARY_PATH="$here/../../target/emulator${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
else
    command -v nvidia-smi >/dev/null || { echo "no GPU: nvidia-smi is missing" >&2; exit 1; }
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
fi

# Only what runs on a GPU: the setups of the conformance suite and the unit tests of the backend.
export KV_CACHE_TEST_SETUPS=cuda
filters() {
    case "$(basename "$1")" in
        kv_cache*) echo "cuda::" ;;
        conformance*)
            # These fill a cache faster than an emulated GPU seals and re-encodes, and count what had to go.
            if [ -n "$emulated" ]; then
                echo "--skip cached_blocks_are_re_encoded --skip mean_keys_stay --skip makes_way_for_a_reservation"
            fi
            ;;
    esac
}

failed=()
if [ "$tests" = 1 ]; then
    for binary in "${binaries[@]}"; do
        step "$(basename "$binary")"
        # shellcheck disable=SC2046
        "$binary" $(filters "$binary") ${arguments[@]+"${arguments[@]}"} || failed+=("$binary")
    done
fi

if [ "$sanitizer" = 1 ]; then
    tool_path="${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1 || true)}"
    [ -n "$tool_path" ] || { echo "compute-sanitizer was not found; set COMPUTE_SANITIZER" >&2; exit 1; }
    for tool in ${TOOLS:-memcheck racecheck synccheck initcheck}; do
        options=(--tool "$tool" --error-exitcode 99)
        # Calls that are refused are what some tests are about; bytes out of bounds are not.
        [ "$tool" = memcheck ] && options+=(--report-api-errors no)
        for binary in "${binaries[@]}"; do
            step "$tool, $(basename "$binary")"
            # Tests of lost devices would be reported as what they are.
            # shellcheck disable=SC2046
            "$tool_path" "${options[@]}" "$binary" $(filters "$binary") ${arguments[@]+"${arguments[@]}"} \
                --skip faults:: --test-threads=1 || failed+=("$tool $binary")
        done
    done
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s\n' "${failed[@]}"
    exit 1
fi
step "all of it passed"
