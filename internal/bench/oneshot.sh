# Starts a BuildKit daemon, runs one client against it, and stops it: oneshot DAEMON... -- CLIENT...
set -u
daemon=
while [ "$1" != -- ]; do
  daemon="$daemon '$1'"
  shift
done
shift
eval "exec $daemon" >"$HOME/daemon.log" 2>&1 &
pid=$!
tries=0
until "$1" "$2" "$3" debug workers >/dev/null 2>&1; do
  tries=$((tries + 1))
  [ "$tries" -lt 1000 ] || { tail -n 5 "$HOME/daemon.log"; kill "$pid"; exit 1; }
  sleep 0.01
done
"$@"
status=$?
kill "$pid"
wait "$pid"
exit "$status"
