#!/usr/bin/env bash
# Build the documentation as a site in build/site, with MkDocs in an environment of its own, .venv-docs.
#
#   scripts/docs.sh          # build; a broken link or anchor is an error
#   scripts/docs.sh serve    # build, show on http://127.0.0.1:8000 and update after changes
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv-docs/bin/python
wanted=$(python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
if [ "$(cat .venv-docs/made-from 2>/dev/null)" != "$wanted" ]; then
    python3 -m venv --clear .venv-docs
    read -ra packages <<<"$wanted"
    "$python" -m pip install --quiet "${packages[@]}"
    echo "$wanted" >.venv-docs/made-from
fi
export NO_MKDOCS_2_WARNING=1 # an advertisement; Material for MkDocs is maintained until May 2027
if [ "${1:-}" = serve ]; then
    exec "$python" -m mkdocs serve
fi
"$python" -m mkdocs --quiet build --strict
echo "docs: build/site/index.html; \`scripts/docs.sh serve\` shows it with its search"
