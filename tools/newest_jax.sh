#!/usr/bin/env bash
# Runs the tests with the newest releases of JAX and of the libraries around it.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/newest_jax.sh [--python PYTHON] [--venv DIR] [--system-torch] [-- OPTIONS OF pytest]
       tools/newest_jax.sh --debian DIR [-- OPTIONS OF pytest]

Installs the package with its test tools into a virtual environment, upgrades jax, jaxlib, flax, optax,
orbax-checkpoint and grain to their newest releases, and runs the tests that are not marked slow. Warnings, those of
deprecation among them, are errors. To be run before every release; CONTRIBUTING.md holds the latest result. What is
installed already is kept and brought up to date.

The newest releases are installed even if setup.cfg does not allow them yet. pip then reports a conflict, and the tests
show whether the ranges in setup.cfg can be widened.

options:
  --python PYTHON  Python 3.12 or newer (default: the newest of python3.14, python3.13, python3.12 and python3 that is)
  --venv DIR       the virtual environment (default: .venv-newest)
  --system-torch   use the torch that PYTHON has already, in place of the release that setup.cfg names
  --debian DIR     run in a Debian trixie in the folder DIR, with its Python 3.13 and its torch, a build for CPUs; it is
                   set up there first if need be, which takes root, the package debootstrap and about 4 GB
  --help           show this

examples:
  tools/newest_jax.sh
  tools/newest_jax.sh --python /usr/bin/python3.14 -- -n 4
  sudo tools/newest_jax.sh --debian /var/tmp/trixie
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

UPGRADED=(jax jaxlib flax optax orbax-checkpoint grain)
python="" venv=.venv-newest system_torch="" debian=""
while (($#)); do
    case $1 in
        --help | -h) usage && exit ;;
        --) shift && break ;;
        --system-torch) system_torch=1 && shift ;;
        --python | --venv | --debian)
            (($# > 1)) || fail "$1 needs a value; see --help."
            case $1 in
                --python) python=$2 ;;
                --venv) venv=$2 ;;
                *) debian=$2 ;;
            esac
            shift 2
            ;;
        *) fail "the option $1 is not known; see --help. Options of pytest come after --." ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_new_enough() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

choose_python() {
    local candidate
    for candidate in python3.14 python3.13 python3.12 python3; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# The mirror that this machine's own Debian uses; empty elsewhere, where debootstrap knows one.
find_mirror() {
    apt-get indextargets --format "\$(REPO_URI)" "Created-By: Packages" "Origin: Debian" 2>/dev/null |
        grep -v security | head -n 1 || true
}

set_up_debian() {
    local mirror packages=python3,python3-venv,make,git,ca-certificates,procps
    if [[ ! -e $debian/usr/bin/python3 ]]; then
        command -v debootstrap >/dev/null || fail "the package debootstrap is missing (apt-get install debootstrap)."
        mirror=$(find_mirror)
        debootstrap --variant=minbase --include="$packages" trixie "$debian" ${mirror:+"$mirror"}
    fi
    if [[ ! -e $debian/usr/lib/python3/dist-packages/torch ]]; then
        chroot "$debian" apt-get update
        DEBIAN_FRONTEND=noninteractive chroot "$debian" apt-get install --yes --no-install-recommends python3-torch
    fi
    # The machine's own certificates, and where pip finds packages.
    if compgen -G "/usr/local/share/ca-certificates/*.crt" >/dev/null; then
        cp /usr/local/share/ca-certificates/*.crt "$debian/usr/local/share/ca-certificates/"
        chroot "$debian" update-ca-certificates >/dev/null 2>&1
    fi
    cp -L /etc/resolv.conf /etc/hosts "$debian/etc/"
    mkdir -p "$debian/repository"
}

# Everything is mounted in a namespace of its own: when this ends nothing is left mounted, so DIR can just be removed.
run_in_debian() {
    local index
    index=${PIP_INDEX_URL:-$(python3 -m pip config get global.index-url 2>/dev/null || true)}
    export HOME=/root PIP_CONFIG_FILE=/dev/null ${index:+PIP_INDEX_URL="$index"}
    # shellcheck disable=SC2016
    unshare --mount --propagation private bash -c '
        set -euo pipefail
        debian=$1 && shift
        mount --bind . "$debian/repository"
        mount --rbind /dev "$debian/dev"
        mount --bind /proc "$debian/proc"
        exec chroot "$debian" /repository/tools/newest_jax.sh \
            --python /usr/bin/python3 --system-torch --venv /opt/newest "$@"
    ' bash "$debian" -- "$@"
}

if [[ -n $debian ]]; then
    [[ $(id -u) == 0 ]] || fail "--debian has to be run as root."
    set_up_debian
    run_in_debian "$@"
    exit
fi

if [[ -n $python ]]; then
    is_new_enough "$python" || fail "$python is no Python 3.12 or newer with its venv module."
else
    python=$(choose_python) || fail "no Python 3.12 or newer is on the PATH with its venv module; see --help."
fi
if [[ ! -e $venv/bin/pip ]]; then
    "$python" -m venv ${system_torch:+--system-site-packages} "$venv"
fi
bin=$venv/bin
pip() {
    "$bin/python" -m pip --disable-pip-version-check --quiet "$@"
}

# The requirements of the extra `test`, but for torch where the system has one: pip would replace it.
requirements=$("$bin/python" - "$system_torch" <<'TEXT'
import configparser
import sys

settings = configparser.ConfigParser()
settings.read("setup.cfg")
skipped = ("#", "datencoder_jax", *["torch"] * bool(sys.argv[1]))
for line in settings["options.extras_require"]["test"].split("\n"):
    if line and not line.startswith(skipped):
        print(line)
TEXT
)
constraint=/dev/null
if [[ -n $system_torch ]]; then
    version=$("$bin/python" -c 'import torch; print(torch.__version__)' 2>/dev/null) ||
        fail "$python has no torch; leave --system-torch out."
    constraint=$(mktemp)
    trap 'rm -f "$constraint"' EXIT
    echo "torch == $version" >"$constraint"
fi
echo "installing into $venv; the first time takes several minutes"
pip install --upgrade --upgrade-strategy eager --constraint "$constraint" \
    --editable '.[pretrain,report]' --requirement <(echo "$requirements")
pip install --no-deps "$(grep -o "open_clip_torch == [0-9.*]*" Makefile)"
pip install --upgrade "${UPGRADED[@]}"

"$bin/python" --version
"$bin/python" -m pip list --disable-pip-version-check --format freeze |
    grep -E "^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|numpy|transformers|diffusers|torch)=="
"$bin/python" -m pytest -n 2 --dist worksteal -m "not slow" "$@"
