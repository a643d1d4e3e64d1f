# Sourced by demo.sh and test.sh with the extras to install: makes .venv and installs cloq from this folder with the tested versions.
# Does nothing when the same extras are installed from the same pyproject.toml and constraints.txt.
extras="$1"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "cloq needs Python 3.10 or newer; '$python' is not. Set PYTHON to one that is." >&2
  exit 2
fi
stamp=".venv/.cloq-$(cat pyproject.toml constraints.txt | cksum | tr -d ' ')-$extras"
if [ ! -e "$stamp" ]; then
  echo "== making .venv and installing cloq[$extras] (the first time takes a few minutes)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  touch "$stamp"
else
  echo "== .venv is up to date"
fi
