#!/bin/sh
# Puts weightfs and its units where they belong, and takes them away again. `make install` and `make uninstall` call it.
#
#   install.sh install     a virtual environment from .lock/ (every download checked against a hash) in
#                          PREFIX/lib/weightfs, `weightfs` in PREFIX/bin, its manual pages and shell completions
#                          in PREFIX/share, and the units
#   install.sh units       the units alone, for a weightfs that was installed by other means: WEIGHTFS names it
#   install.sh uninstall   removes what the two have put there, and nothing else
#
# Environment: PREFIX (/usr/local); DESTDIR (empty: this machine, else a tree to be packed); PYTHON (/usr/bin/python3);
# UNITDIR, USERUNITDIR, SYSUSERSDIR, SBINDIR, CONFDIR: see below.
#
# Rule: a file is replaced or removed only if the list PREFIX/lib/weightfs/installed names it, which `place` alone writes.
set -eu
umask 022
cd "$(dirname "$0")/.."

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
PYTHON=${PYTHON:-/usr/bin/python3}
UNITDIR=${UNITDIR:-/lib/systemd/system}
USERUNITDIR=${USERUNITDIR:-/usr/lib/systemd/user}
SYSUSERSDIR=${SYSUSERSDIR:-/usr/lib/sysusers.d}
SBINDIR=${SBINDIR:-/sbin} # mount(8) looks for its helpers there, and nowhere else
CONFDIR=${CONFDIR:-/etc/weightfs}
WEIGHTFS=${WEIGHTFS:-$PREFIX/bin/weightfs}
LIBDIR=$PREFIX/lib/weightfs
LIST=$LIBDIR/installed
DOCDIR=$PREFIX/share/doc/weightfs
UNITS="weightfs.service weightfs@.service weightfs-clean-up.service weightfs-verify.service weightfs-verify.timer"

say() {
  printf 'install: %s\n' "$1"
}

fail() {
  printf 'install: %s\n' "$1" >&2
  exit 1
}

on_this_machine() {
  [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]
}

is_listed() {
  [ -f "$DESTDIR$LIST" ] && grep -qxF -- "$1" "$DESTDIR$LIST"
}

remember() {
  is_listed "$1" || printf '%s\n' "$1" >>"$DESTDIR$LIST"
}

# place SOURCE PATH MODE: what somebody else has put at PATH is not touched.
place() {
  if [ -e "$DESTDIR$2" ] && ! is_listed "$2"; then
    fail "$DESTDIR$2 is there already, and not from here: move it away, or choose another PREFIX"
  fi
  mkdir -p "$DESTDIR${2%/*}"
  remember "$2" # first: what an interruption leaves half done is still ours
  install -m "$3" "$1" "$DESTDIR$2.new"
  mv -f "$DESTDIR$2.new" "$DESTDIR$2"
}

# The same, with this installation's paths instead of those that the file was written for.
place_with_paths() {
  sed -e "s|/usr/local/bin/weightfs|$WEIGHTFS|g" -e "s|/usr/local/|$PREFIX/|g" "$1" >"$work/text"
  place "$work/text" "$2" "$3"
}

install_package() {
  [ -x "$PYTHON" ] || PYTHON=$(command -v "$PYTHON") || fail "$PYTHON is not there: set PYTHON to Python 3.11 or newer"
  "$PYTHON" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    || fail "$PYTHON is older than 3.11 or has no venv module: set PYTHON, or apt-get install python3-venv"
  say "building weightfs and what it needs (about a minute)"
  "$PYTHON" -m venv "$work/build" || fail "$PYTHON cannot make a virtual environment: apt-get install python3-venv"
  pip="$work/build/bin/python -m pip --disable-pip-version-check --quiet --no-input"
  $pip install --require-hashes --only-binary :all: -r .lock/build.txt || fail "the build tools did not install (above)"
  $pip wheel --require-hashes --no-build-isolation --wheel-dir "$work/wheels" -r .lock/run.txt \
    || fail "the locked packages did not build (above); they need: apt-get install gcc pkg-config libfuse3-dev python3-dev"
  $pip wheel --no-build-isolation --no-deps --wheel-dir "$work/wheels" . || fail "weightfs did not build (above)"
  remember "$LIBDIR/venv"
  rm -rf "$DESTDIR$LIBDIR/venv.new" "$DESTDIR$LIBDIR/venv.old"
  "$PYTHON" -m venv --without-pip "$DESTDIR$LIBDIR/venv.new"
  $pip --python "$DESTDIR$LIBDIR/venv.new/bin/python" install --no-index --no-deps --no-compile "$work"/wheels/*.whl
  # Scripts that would name the place where they were made; `weightfs` is run by the launcher.
  find "$DESTDIR$LIBDIR/venv.new/bin" -type f -delete
  "$DESTDIR$LIBDIR/venv.new/bin/python" -m compileall -q -s "$DESTDIR" "$DESTDIR$LIBDIR/venv.new/lib" || :
  [ ! -e "$DESTDIR$LIBDIR/venv" ] || mv "$DESTDIR$LIBDIR/venv" "$DESTDIR$LIBDIR/venv.old"
  mv "$DESTDIR$LIBDIR/venv.new" "$DESTDIR$LIBDIR/venv"
  rm -rf "$DESTDIR$LIBDIR/venv.old"
  # PYTHONSAFEPATH: a trio.py in the directory where somebody types `weightfs` is not ours.
  printf '#!/bin/sh\nexport PYTHONSAFEPATH=1\nexec %s/venv/bin/python -m weightfs "$@"\n' "$LIBDIR" >"$work/launcher"
  place "$work/launcher" "$PREFIX/bin/weightfs" 0755
  $pip install --no-index --no-deps "$work"/wheels/click-*.whl
  PYTHONPATH=src "$work/build/bin/python" systemd/manpages.py "$work/share" || fail "the manual was not written (above)"
  (cd "$work/share" && find . -type f) >"$work/manual"
  while read -r file; do
    place "$work/share/$file" "$PREFIX/share/${file#./}" 0644
  done <"$work/manual"
  check_reachable
}

# A Python below /root, for example, works for root alone.
check_reachable() {
  [ -z "$DESTDIR" ] && [ "$(id -u)" = 0 ] || return 0
  setpriv --reuid 65534 --regid 65534 --clear-groups "$PREFIX/bin/weightfs" --version >/dev/null \
    || fail "other users cannot run $PREFIX/bin/weightfs (above), so the service could not: choose another PYTHON or PREFIX"
}

install_units() {
  place systemd/weightfs-mountpoint "$LIBDIR/weightfs-mountpoint" 0755
  for unit in $UNITS; do
    place_with_paths "systemd/$unit" "$UNITDIR/$unit" 0644
  done
  place_with_paths systemd/weightfs-user.service "$USERUNITDIR/weightfs.service" 0644
  place_with_paths systemd/weightfs-clean-up.service "$USERUNITDIR/weightfs-clean-up.service" 0644
  place_with_paths systemd/mount.weightfs "$SBINDIR/mount.weightfs" 0755
  place systemd/sysusers.conf "$SYSUSERSDIR/weightfs.conf" 0644
  place systemd/ollama.service.d/weightfs.conf "$DOCDIR/ollama.service.d/weightfs.conf" 0644
  for page in systemd configuration semantics troubleshooting design reliability security; do # and those they lead to
    place "docs/$page.md" "$DOCDIR/$page.md" 0644
  done
  for page in README.md alerts.yaml dashboard.json; do
    place "docs/monitoring/$page" "$DOCDIR/monitoring/$page" 0644
  done
  # Settings are the operator's from the first moment on: `uninstall` compares before it removes them.
  if [ ! -e "$DESTDIR$CONFDIR/config.toml" ]; then
    place systemd/config.toml "$CONFDIR/config.toml" 0644
  fi
  if on_this_machine; then
    systemd-sysusers "$SYSUSERSDIR/weightfs.conf"
    systemctl daemon-reload
    say "done; start it with: systemctl enable --now weightfs (or restart it, if it runs: it is still the old one)"
  else
    say "done"
  fi
}

uninstall() {
  [ -f "$DESTDIR$LIST" ] || fail "there is nothing to remove: $DESTDIR$LIST is missing (is it another PREFIX?)"
  if on_this_machine; then
    # Not --now on a pattern: `disable` knows files, `stop` knows what runs.
    systemctl stop 'weightfs.service' 'weightfs@*.service' weightfs-verify.timer weightfs-verify.service || :
    systemctl disable --quiet weightfs.service weightfs-verify.timer || :
  fi
  while read -r path; do
    case $path in
      *..* | [!/]* | "") continue ;; # no line that `place` has written
      "$CONFDIR/config.toml") cmp -s systemd/config.toml "$DESTDIR$path" || { say "$path was changed, and stays"; continue; } ;;
    esac
    rm -rf -- "$DESTDIR$path" "$DESTDIR$path.new"
    # Directories that are empty now, up to those of the system.
    directory=${path%/*}
    while case $directory in *weightfs*|*ollama.service.d) true ;; *) false ;; esac; do
      rmdir -- "$DESTDIR$directory" 2>/dev/null || break
      directory=${directory%/*}
    done
  done <"$DESTDIR$LIST"
  rm -rf -- "$DESTDIR$LIBDIR/venv.new" "$DESTDIR$LIBDIR/venv.old" "$DESTDIR$LIST"
  rmdir -- "$DESTDIR$LIBDIR" 2>/dev/null || :
  on_this_machine && systemctl daemon-reload
  say "done; the user weightfs and the cache (/var/cache/weightfs) stay: remove them by hand if nobody wants them"
}

case $PREFIX$DESTDIR$WEIGHTFS in
  *[!A-Za-z0-9_./@+-]*) fail "PREFIX, DESTDIR and WEIGHTFS may hold letters, digits and _ . / @ + - only" ;;
esac
case $PREFIX in /*) ;; *) fail "PREFIX is not an absolute path" ;; esac
case ${1:-} in
  install | units)
    mkdir -p "$DESTDIR$LIBDIR" || fail "there is no permission to install below $DESTDIR$PREFIX: run it as root"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    [ "$1" = units ] || install_package
    install_units
    ;;
  uninstall) uninstall ;;
  *) fail "say install, units or uninstall" ;;
esac
