#!/bin/sh
# Builds a program of this folder with the engine, the codecs and the operators, without Python:  build.sh PROGRAM OUTPUT [FLAGS...]
# e.g. build.sh bench_pass /tmp/bench_pass -O3 -DFASTIGPT_PROFILE
#      build.sh test_decode /tmp/test_decode -O1 -g -fsanitize=address,undefined
set -e
program=$1 output=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
cxx=${CXX:-g++}
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
x86=$("$cxx" -dumpmachine | grep -E '^(x86_64|amd64)' || true)  # empty: for another processor, which has no AVX files
avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c"
amx=
if [ -n "$x86" ] && [ "$(uname)" = Linux ] && echo '__asm__("tilerelease");' | "$cxx" -x c++ -c -o /dev/null - 2>/dev/null; then
  amx=-DFASTIGPT_WITH_AMX
fi
for source in "$here/$program.cpp" "$here"/../runtime/*.cpp "$here"/../operators/*.cpp "$here"/../codecs/*.cpp "$here"/../engine/*.cpp; do
  name=$(basename "$source" .cpp)
  flags=
  case $name in
    *_avx* | *_amx) [ -n "$x86" ] || continue ;;
  esac
  case $name in
    *_avx2) flags="-mavx2 -mfma -mf16c" ;;
    *_avx512) flags=$avx512 ;;
    *_avx512vnni | *_amx) flags="$avx512 -mavx512vnni -mavx512bf16" ;;
  esac
  "$cxx" -std=c++17 -Wall -Wextra -Wno-unused-parameter -ffp-contract=off "$@" $flags $amx -I"$here/../include" -I"$here/.." \
    -c "$source" -o "$objects/$name.o" &
done
wait
"$cxx" "$@" "$objects"/*.o -pthread -o "$output"
