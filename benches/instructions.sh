#!/bin/sh
# Prints instructions and heap allocations per request, for every case and variant. valgrind counts
# them, so a noisy machine does not change the figures. The script takes some minutes. A pattern as
# the argument chooses cases: benches/instructions.sh 'First, 200 B'
#
# Every figure is the difference between a run with N requests and a run with 2N, divided by N.
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Read the path of the binary from the messages of cargo.
binary=$(cargo build --profile bench --features axum --bench instructions --message-format json |
    sed -n 's/.*"name":"instructions".*"executable":"\([^"]*\)".*/\1/p')

# instructions CASE VARIANT SEND BUILD
instructions() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null "$binary" "$@" 2>&1 |
        sed -n 's/.*Collected : \([0-9]*\).*/\1/p'
}

# allocations CASE VARIANT SEND BUILD: bytes and blocks
allocations() {
    valgrind --tool=dhat --dhat-out-file=/dev/null "$binary" "$@" 2>&1 |
        sed -n 's/.*Total: *\([0-9,]*\) bytes in \([0-9,]*\) blocks.*/\1 \2/p' | tr -d ,
}

# per_request N CASE VARIANT: sets ins, bytes and blocks
per_request() {
    n=$1
    one=$(instructions "$2" "$3" "$n" $((2 * n)))
    two=$(instructions "$2" "$3" $((2 * n)) $((2 * n)))
    ins=$(((two - one) / n))
    case $3 in sha-256 | blake3) return ;; esac
    one=$(allocations "$2" "$3" "$n" $((2 * n)))
    two=$(allocations "$2" "$3" $((2 * n)) $((2 * n)))
    bytes=$(((${two% *} - ${one% *}) / n))
    blocks=$(echo "${two#* } ${one#* } $n" | awk '{ printf "%.1f", ($1 - $2) / $3 }')
}

echo "| case | variant | instructions | added | added without the hash | allocations | bytes |"
echo "|---|---|--:|--:|--:|--:|--:|"
"$binary" list | grep -e "${1-}" >"$scratch/cases"
while read -r case; do
    n=1000
    hashed=1
    case $case in
    *MiB*) n=5 ;;
    NoKey*) hashed=0 ;;
    esac
    sha=0 blake=0
    if [ $hashed = 1 ]; then
        per_request $n "$case" sha-256 && sha=$ins
        per_request $n "$case" blake3 && blake=$ins
    fi
    bare=
    for variant in bare identity no-op hand-written layer; do
        per_request $n "$case" $variant
        bare=${bare:-$ins}
        hash=0
        case $variant in
        hand-written) hash=$sha ;;
        layer) hash=$blake ;;
        esac
        added=$((ins - bare))
        echo "| $case | $variant | $ins | $added | $((added - hash)) | $blocks | $bytes |"
        [ $variant = hand-written ] && hand=$added hand_unhashed=$((added - hash))
    done
    awk -v c="$case" -v a="$added" -v h="$hand" -v au=$((added - blake)) -v hu="$hand_unhashed" \
        'BEGIN { printf "| %s | layer / hand-written | | %.2f | %.2f | | |\n", c, a / h, au / hu }'
done <"$scratch/cases"
