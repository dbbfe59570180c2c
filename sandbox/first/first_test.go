package first_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/sandbox/filter"
	"github.com/cooper-build/cooper/sandbox/first"
)

func call(what string, number uintptr, args ...first.Arg) first.Call {
	return first.Call{What: what, Number: number, Args: args}
}

func print(text string) first.Call {
	return call("print "+text, unix.SYS_WRITE, first.Int(1), first.Text(text), first.Int(len(text)))
}

func execute(file string, args ...string) first.Call {
	return call("execute "+file, unix.SYS_EXECVE, first.Text(file), first.List(append([]string{file}, args...)), first.List{"GREETING=hello"})
}

func open(file string, r *first.Result) first.Call {
	c := call("open "+file, unix.SYS_OPENAT, first.Int(unix.AT_FDCWD), first.Text(file), first.Int(unix.O_RDONLY|unix.O_CLOEXEC), first.Int(0))
	c.Keep = r
	return c
}

// start starts a process that makes calls. It returns what the process has printed when it has ended.
func start(t *testing.T, calls ...first.Call) (p *first.Process, printed func() string) {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err = first.Start(first.Command{Calls: calls, Dir: t.TempDir(), Stdout: write, Stderr: write})
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	return p, func() string {
		p.Wait()
		p.Channel.Close()
		b, err := io.ReadAll(read)
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
}

func nothing(fd int) error {
	unix.Close(fd)
	return errors.New("it sent a descriptor")
}

func TestTheCommandIsExecutedAfterTheCallsAndThePause(t *testing.T) {
	calls := append([]first.Call{print("before ")}, first.Pause()...)
	calls = append(calls, print("after "), execute("/bin/sh", "-c", `echo "$0 $GREETING $#"; ls /proc/self/fd | wc -l`, "a", "b"))
	p, printed := start(t, calls...)
	if err := p.Ready(); err != nil {
		t.Fatal(err)
	}
	if err := p.Proceed(nothing); err != nil {
		t.Fatal(err)
	}
	// ls has its own descriptor of the directory
	if got, want := strings.Join(strings.Fields(printed()), " "), "before after a hello 1 4"; got != want {
		t.Errorf("it printed %q, want %q: what a command holds open beside 0 to 2 is the builder's", got, want)
	}
}

func TestACallThatFailsIsNamed(t *testing.T) {
	p, printed := start(t, open("/none/such", nil), execute("/bin/echo", "ran"))
	err := p.Proceed(nothing)
	var failed *first.CallError
	if !errors.As(err, &failed) || failed.What != "open /none/such" || failed.Errno != unix.ENOENT {
		t.Errorf("the error is %v", err)
	}
	if got := printed(); got != "" {
		t.Errorf("it went on and printed %q", got)
	}
}

func TestErrorsThatAreTolerated(t *testing.T) {
	absent := execute("/none/sh")
	absent.Tolerate = []unix.Errno{unix.EACCES, unix.ENOENT}
	p, printed := start(t, absent, execute("/bin/sh", "-c", "echo ran"))
	if err := p.Proceed(nothing); err != nil {
		t.Error(err)
	}
	if got := printed(); got != "ran\n" {
		t.Errorf("it printed %q", got)
	}
	p, printed = start(t, absent, absent)
	if err := p.Proceed(nothing); !errors.Is(err, first.ErrNothingExecuted) {
		t.Errorf("where nothing could be executed, the error is %v", err)
	}
	printed()
}

func TestCallsAreSkippedAfterAToleratedError(t *testing.T) {
	look := func(file string) first.Call {
		c := call("look", unix.SYS_FACCESSAT, first.Int(unix.AT_FDCWD), first.Text(file), first.Int(unix.X_OK))
		c.Tolerate, c.Skip = []unix.Errno{unix.ENOENT}, 1
		return c
	}
	p, printed := start(t, look("/none/sh"), execute("/none/sh"), look("/bin/sh"), execute("/bin/sh", "-c", "echo ran"))
	if err := p.Proceed(nothing); err != nil {
		t.Error(err)
	}
	if got := printed(); got != "ran\n" {
		t.Errorf("it printed %q", got)
	}
}

// The image chooses how many directories there are in PATH, and how large the environment is.
func TestSharedArgumentsAreWrittenDownOnce(t *testing.T) {
	env := &first.Shared{Arg: first.List{"LARGE=" + strings.Repeat("x", 100<<10)}}
	var calls []first.Call
	for range 10_000 {
		c := call("execute", unix.SYS_EXECVE, first.Text("/none/sh"), first.List{"sh"}, env)
		c.Tolerate = []unix.Errno{unix.ENOENT}
		calls = append(calls, c)
	}
	p, printed := start(t, append(calls, call("execute", unix.SYS_EXECVE, first.Text("/bin/sh"), first.List{"sh", "-c", "echo ${#LARGE}"}, env))...)
	if err := p.Proceed(nothing); err != nil {
		t.Error(err)
	}
	if got := printed(); got != "102400\n" {
		t.Errorf("it printed %q", got)
	}
}

func TestResultsAreArgumentsOfLaterCallsAndAreSent(t *testing.T) {
	file := new(first.Result)
	made := call("make a file", unix.SYS_MEMFD_CREATE, first.Text("x"), first.Int(unix.MFD_CLOEXEC))
	made.Keep = file
	text := first.Bytes("from inside")
	p, printed := start(t, made,
		call("write", unix.SYS_WRITE, file, text, first.Int(len(text))),
		first.Send("send", file), execute("/bin/true"))
	var got []byte
	err := p.Proceed(func(fd int) error {
		f := os.NewFile(uintptr(fd), "sent")
		defer f.Close()
		got = make([]byte, len(text))
		_, err := f.ReadAt(got, 0)
		return err
	})
	if err != nil || !bytes.Equal(got, text) {
		t.Errorf("the builder got %q, %v", got, err)
	}
	printed()
}

func TestTooFewBytesAreAFailure(t *testing.T) {
	file := new(first.Result)
	short := call("read", unix.SYS_READ, file, first.Bytes("room"), first.Int(4))
	short.Least = 1
	p, printed := start(t, open("/dev/null", file), short, execute("/bin/true"))
	var failed *first.CallError
	if err := p.Proceed(nothing); !errors.As(err, &failed) || failed.What != "read" {
		t.Errorf("the error is %v", err)
	}
	printed()
}

func TestAProcessWhoseBuilderIsGoneExecutesNothing(t *testing.T) {
	p, printed := start(t, append(first.Pause(), execute("/bin/echo", "ran"))...)
	if err := p.Ready(); err != nil {
		t.Fatal(err)
	}
	p.Channel.Close()
	if got := printed(); got != "" {
		t.Errorf("it printed %q", got)
	}
}

func TestAStringWithAZeroIsRefused(t *testing.T) {
	_, err := first.Start(first.Command{Dir: t.TempDir(), Calls: []first.Call{execute("/bin/echo", "a\x00b")}})
	if err == nil || !strings.Contains(err.Error(), "zero") {
		t.Errorf("the error is %v: the command would get another argument than was written", err)
	}
}

// TestFilter has the kernel judge calls by a filter: what the rules allow, what they say nothing of, and what is newer than they are.
func TestFilter(t *testing.T) {
	names := []string{"write", "execve", "exit_group", "arch_prctl", "brk", "mmap", "mprotect", "munmap", "openat", "read", "close", "fstat", "newfstatat",
		"set_tid_address", "set_robust_list", "rseq", "prlimit64", "getrandom", "access", "pread64", "rt_sigaction", "ioctl", "getuid", "geteuid", "getgid", "getegid", "getpid"}
	var rules []filter.Rule
	for _, name := range names {
		rules = append(rules, filter.Rule{Name: name})
	}
	rules = append(rules,
		filter.Rule{Name: "no such call"},
		filter.Rule{Name: "socket", Args: []filter.Condition{{Index: 0, Value: unix.AF_UNIX}}},
		filter.Rule{Name: "socket", Action: filter.Refuse, Errno: unix.EAFNOSUPPORT, Args: []filter.Condition{{Index: 0, Is: filter.NotEqual, Value: unix.AF_UNIX}}},
		filter.Rule{Name: "dup3", Args: []filter.Condition{{Index: 2, Is: filter.Masked, Mask: unix.O_CLOEXEC, Value: unix.O_CLOEXEC}}},
		filter.Rule{Name: "statx"})
	program, err := filter.Compile(rules)
	if err != nil {
		t.Fatal(err)
	}
	const newer = 3000
	for _, c := range []struct {
		name   string
		number uintptr
		args   []first.Arg
		want   unix.Errno
	}{
		{"allowed", unix.SYS_GETPID, nil, 0},
		{"not spoken of", unix.SYS_SETHOSTNAME, []first.Arg{first.Int(0), first.Int(0)}, unix.EPERM},
		{"newer than all that is", newer, nil, unix.ENOSYS},
		{"allowed by its argument", unix.SYS_SOCKET, []first.Arg{first.Int(unix.AF_UNIX), first.Int(unix.SOCK_STREAM), first.Int(0)}, 0},
		{"refused by its argument", unix.SYS_SOCKET, []first.Arg{first.Int(unix.AF_INET), first.Int(unix.SOCK_STREAM), first.Int(0)}, unix.EAFNOSUPPORT},
		{"allowed by a bit", unix.SYS_DUP3, []first.Arg{first.Int(0), first.Int(9), first.Int(unix.O_CLOEXEC)}, 0},
		{"without the bit", unix.SYS_DUP3, []first.Arg{first.Int(0), first.Int(9), first.Int(0)}, unix.EPERM},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, printed := start(t,
				call("no new privileges", unix.SYS_PRCTL, first.Int(unix.PR_SET_NO_NEW_PRIVS), first.Int(1), first.Int(0), first.Int(0), first.Int(0)),
				call("filter", unix.SYS_SECCOMP, first.Int(unix.SECCOMP_SET_MODE_FILTER), first.Int(0), first.Filter(program)),
				call("judged", c.number, c.args...), execute("/bin/true"))
			err := p.Proceed(nothing)
			printed()
			var failed *first.CallError
			if c.want == 0 && err == nil || errors.As(err, &failed) && failed.What == "judged" && failed.Errno == c.want {
				return
			}
			t.Errorf("the error is %v, want %v", err, c.want)
		})
	}
}
