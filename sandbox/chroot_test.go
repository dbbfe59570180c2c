package sandbox_test

import (
	"errors"
	"testing"

	"github.com/cooper-build/cooper/sandbox"
)

// inChroot is shell where no namespace is to be made. The tests run as root of a user namespace, where no device node can be made.
func inChroot(t *testing.T, root, script string) sandbox.Spec {
	t.Helper()
	s := shell(t, root, script)
	s.Chroot = true
	return s
}

func TestChrootRunsCommands(t *testing.T) {
	root := busybox(t)
	for _, c := range []struct {
		name, script, output string
		want                 sandbox.ExitError
	}{
		{"success", "echo out; echo err >&2; echo out", "out\nerr\nout\n", sandbox.ExitError{}},
		{"failure", "echo before; exit 42", "before\n", sandbox.ExitError{Code: 42}},
		{"signal", "kill -9 $$", "", sandbox.ExitError{Code: 137, Signal: "SIGKILL"}},
		{"status of sh for a missing command", "nonsense 2>/dev/null", "", sandbox.ExitError{Code: 127}},
		{"null", "echo lost > /dev/null; cat /dev/null; dd if=/dev/zero bs=4 count=1 2>/dev/null | grep -c .", "1\n", sandbox.ExitError{}},
		{"directory of devices", "cd /dev && echo lost > null && cat null && stat -c %F null", "character special file\n", sandbox.ExitError{}},
		{"own descriptors", "echo out > /dev/stdout; echo err > /dev/stderr; echo in | cat /dev/stdin; exec 7</etc/passwd; head -c4 /dev/fd/7", "out\nerr\nin\nroot", sandbox.ExitError{}},
		{"no terminal", "echo x > /dev/tty || echo none", "/bin/sh: can't create /dev/tty: No such device or address\nnone\n", sandbox.ExitError{}},
		{"pid", "echo $$ > /dev/null; echo $HOME; pwd; stat -c %a /tmp; umask", "/root\n/\n755\n0022\n", sandbox.ExitError{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := run(t, inChroot(t, root, c.script))
			var got sandbox.ExitError
			var exit *sandbox.ExitError
			if errors.As(err, &exit) {
				got = *exit
			} else if err != nil {
				t.Fatalf("run: %v", err)
			}
			if got != c.want {
				t.Errorf("end is %+v, want %+v", got, c.want)
			}
			if out != c.output {
				t.Errorf("output is %q, want %q", out, c.output)
			}
		})
	}
}
