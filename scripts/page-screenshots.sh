#!/usr/bin/env bash
# Makes docs/page-*.webp: the page of `landmark serve`, as the browser test shows it. Needs chromium, chromedriver and cwebp (Debian: chromium-driver, webp).
set -euo pipefail
cd "$(dirname "$0")/.."
pictures=$(mktemp -d)
trap 'rm -r "$pictures"' EXIT
LANDMARK_SCREENSHOTS=$pictures cargo test --release -p landmark-cli --test page
for picture in "$pictures"/*.png; do
  cwebp -quiet -q 90 "$picture" -o "docs/$(basename "${picture%.png}").webp"
done
