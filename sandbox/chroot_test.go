package sandbox_test

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox"
)

// inChroot is shell where no namespace is to be made. The tests run as root of a user namespace, where no device node can be made.
func inChroot(t *testing.T, root, script string) sandbox.Spec {
	t.Helper()
	needsRoot(t)
	s := shell(t, root, script)
	s.Chroot = true
	return s
}

// needsRoot is for tests of what only root of a container does.
func needsRoot(t *testing.T) {
	t.Helper()
	if nstest.Single() {
		t.Skip("needs subordinate ids: root with one id is no root of a container")
	}
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
		{"name of the machine", "hostname; uname -n", "buildkitsandbox\nbuildkitsandbox\n", sandbox.ExitError{}},
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

// libraries copies into a root what this program is linked with.
func libraries(t *testing.T, root string) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for line := range strings.Lines(string(maps)) {
		if fields := strings.Fields(line); len(fields) == 6 && strings.Contains(fields[5], ".so") {
			files = append(files, fields[5])
		}
	}
	program, err := elf.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	for _, p := range program.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(p.Open())
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, strings.TrimRight(string(b), "\x00"))
		}
	}
	slices.Sort(files)
	for _, name := range slices.Compact(files) {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		mkdir(t, filepath.Dir(filepath.Join(root, name)))
		write(t, filepath.Join(root, name), string(b), 0o755)
		library, err := elf.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		sonames, err := library.DynString(elf.DT_SONAME)
		library.Close()
		if err == nil && len(sonames) == 1 && sonames[0] != filepath.Base(name) {
			write(t, filepath.Join(root, filepath.Dir(name), sonames[0]), string(b), 0o755)
		}
	}
}

func TestChrootHasNoWayToTheBuilder(t *testing.T) {
	root, outside := busybox(t), t.TempDir()
	s := inChroot(t, root, "")
	probing(t, root)
	libraries(t, root)
	write(t, filepath.Join(outside, "null"), canary, 0o644)
	listener, err := net.Listen("unix", "@cooper-breakout")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	signalled := make(chan os.Signal, 1)
	signal.Notify(signalled, unix.SIGWINCH)
	defer signal.Stop(signalled)
	s.Args = []string{"/probe", "probe", "breakout", strconv.Itoa(os.Getpid()), outside}
	out, err := run(t, s)
	if got := strings.Count(out, "REACHED"); got > 0 || !strings.Contains(out, "tried\n") {
		t.Errorf("a command got hold of the builder, or did not try to the end (%v):\n%s", err, out)
	}
	if len(signalled) > 0 {
		t.Error("a signal to all processes reached the builder: kill -9 -1 would end it, and all that its user runs")
	}
}

// breakOut tries what would lead out of a chroot, or to a process that has the same user id.
func breakOut(builder, outside string) {
	pid, _ := strconv.Atoi(builder)
	tried := func(what string, err error) {
		if err == nil {
			fmt.Println("REACHED", what)
		}
	}
	call := func(what string, number uintptr, args ...uintptr) {
		args = append(args, 0, 0, 0, 0, 0, 0)
		_, _, errno := unix.RawSyscall6(number, args[0], args[1], args[2], args[3], args[4], args[5])
		if errno == 0 {
			tried(what, nil)
		}
	}
	os.Mkdir("/jail", 0o755)
	top, _ := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	tried("a second chroot", unix.Chroot("/jail"))
	unix.Fchdir(top)
	for range 64 {
		unix.Chdir("..")
	}
	for _, way := range []string{outside, "." + outside, strings.Repeat("../", 40) + outside, "/proc/self/root" + outside, "/proc/" + builder + "/root" + outside} {
		_, err := os.ReadFile(way + "/null")
		tried("a file outside by "+way, err)
	}
	os.Symlink(strings.Repeat("../", 40)+outside, "/jail/null")
	_, err := os.ReadFile("/jail/null/null")
	tried("a file outside by a link", err)
	for fd := range 1024 { // by number, and by the names that a supervisor answers for
		if fd > 2 {
			flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
			if err == nil && flags&unix.FD_CLOEXEC == 0 {
				tried("descriptor "+strconv.Itoa(fd), nil)
			}
		}
		if b, err := os.ReadFile("/dev/fd/" + strconv.Itoa(fd) + "/../../" + outside + "/null"); err == nil {
			tried("a file outside by a descriptor", fmt.Errorf("%s", b))
		}
	}
	tried("a mount", unix.Mount("none", "/jail", "tmpfs", 0, ""))
	tried("its own user namespace", unix.Unshare(unix.CLONE_NEWUSER))
	call("ptrace", unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid))
	var word [8]byte
	local, remote := unix.Iovec{Base: &word[0], Len: 8}, unix.RemoteIovec{Base: uintptr(unsafe.Pointer(&word)), Len: 8}
	call("its memory", unix.SYS_PROCESS_VM_READV, uintptr(pid), uintptr(unsafe.Pointer(&local)), 1, uintptr(unsafe.Pointer(&remote)), 1, 0)
	var limit unix.Rlimit
	tried("its limits", unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit))
	tried("its priority", unix.Setpriority(unix.PRIO_PROCESS, pid, 0))
	tried("the priority of all of its user", unix.Setpriority(unix.PRIO_USER, 0, 0))
	tried("its processors", unix.SchedSetaffinity(pid, &unix.CPUSet{1}))
	call("its scheduler", unix.SYS_SCHED_SETSCHEDULER, uintptr(pid), 0, uintptr(unsafe.Pointer(&word)))
	call("its disk priority", unix.SYS_IOPRIO_SET, 1, uintptr(pid), 2<<13|4)
	tried("it with a signal", unix.Kill(pid, 0))
	tried("its thread with a signal", unix.Tgkill(pid, pid, 0))
	call("it with a queued signal", unix.SYS_RT_SIGQUEUEINFO, uintptr(pid), 0, uintptr(unsafe.Pointer(&[128]byte{})))
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		tried("it with a signal by descriptor", unix.PidfdSendSignal(fd, 0, nil, 0))
		_, err := unix.PidfdGetfd(fd, 0, 0)
		tried("its descriptors", err)
	}
	tried("its process group with a signal", unix.Kill(-pid, 0))
	_, err = net.Dial("unix", "@cooper-breakout")
	tried("its abstract socket", err)
	session, _ := unix.Getsid(0)
	for n := range 1 << 15 { // the keeper is near, whatever its number
		if sid, err := unix.Getsid(n); err == nil && sid != session { // not our own threads
			tried("process "+strconv.Itoa(n)+" with a signal", unix.Kill(n, 0))
		}
	}
	unix.Kill(-1, unix.SIGWINCH) // all that it may. Whoever gets it and did not ask for it ignores it
	fmt.Println("tried")
	os.Exit(0)
}

func TestChrootLeavesNoProcess(t *testing.T) {
	for _, c := range []struct{ name, script string }{
		{"daemon", "(setsid sleep 1000 </dev/null >/dev/null 2>&1 &); exit 0"},
		{"one that ignores signals", "trap '' TERM HUP INT; (sleep 1000 & wait) & exit 0"},
		{"many", "i=0; while [ $i -lt 60 ]; do (sleep 1000 & sleep 1000) & i=$((i+1)); done; exit 0"},
		{"forks without an end", "f() { i=0; while [ $i -lt 100000 ]; do (true); i=$((i+1)); done; }; f & f & (f & f &); exit 0"},
		{"a chain, each of which forks and ends", "f() { [ $1 -gt 0 ] && f $(($1-1)) & }; f 20000; exit 0"},
		{"stopped", "sh -c 'kill -STOP $$' & exit 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := busybox(t)
			s := inChroot(t, root, c.script)
			mustRun(t, s)
			if left := processesIn(t, root); len(left) > 0 {
				t.Errorf("processes %v go on in the root of a command that has ended, and could change a layer that is being made", left)
			}
		})
	}
}

// processesIn lists the processes whose root directory this is.
func processesIn(t *testing.T, root string) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/root")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(links, func(l string) bool {
		to, err := os.Readlink(l)
		return err != nil || !strings.HasPrefix(to, root)
	})
}

func TestChrootMounts(t *testing.T) {
	root := busybox(t)
	source := filepath.Join(filepath.Dir(root), "source") // on one file system with the root, as in a store
	mkdir(t, filepath.Join(source, "dir"))
	write(t, filepath.Join(source, "dir/file"), "content", 0o640)
	write(t, filepath.Join(source, "secret"), "hunter2", 0o400)
	symlink(t, "/dir", filepath.Join(source, "inside"))
	cache := filepath.Join(filepath.Dir(root), "cache")
	mkdir(t, cache)
	bind := func(selected, target string, readOnly bool) sandbox.Mount {
		return sandbox.Mount{Source: source, Select: selected, Target: target, ReadOnly: readOnly}
	}
	for _, c := range []struct {
		name   string
		mounts []sandbox.Mount
		script string
		output string
		fails  string
	}{
		{"directory", []sandbox.Mount{bind("", "/m", true)}, "cat /m/dir/file; stat -c ' %a' /m/dir/file; echo lost > /m/dir/file", "content 640\n", ""},
		{"file", []sandbox.Mount{bind("dir/file", "/m/file", true)}, "cat /m/file; rm /m/file", "content", ""},
		{"link in the selection resolved inside", []sandbox.Mount{bind("inside", "/m", true)}, "cat /m/file", "content", ""},
		{"in order", []sandbox.Mount{{Kind: sandbox.Tmpfs, Target: "/m"}, bind("dir", "/m/in", true)}, "cat /m/in/file; echo lost > /m/x", "content", ""},
		{"in dev", []sandbox.Mount{bind("dir/file", "/dev/f", true)}, "cat /dev/f", "content", ""},
		{"over etc", []sandbox.Mount{bind("dir", "/etc", true)}, "ls /etc", "file\n", ""},
		{"mode of a tmpfs", []sandbox.Mount{{Kind: sandbox.Tmpfs, Target: "/m", Mode: 0o700}}, "stat -c %a /m", "700\n", ""},
		{"kept", []sandbox.Mount{{Source: cache, Target: "/c"}}, "echo kept > /c/x; echo done", "done\n", ""},
		{"still there", []sandbox.Mount{{Source: cache, Target: "/c"}}, "cat /c/x", "kept\n", ""},
		{"linked from a cache", []sandbox.Mount{{Source: cache, Target: "/c"}}, "echo kept > /c/y; ln /c/y /c/z; ln /c/y /kept; ln /bin/busybox /c/busybox", "", ""},
		{"size of a tmpfs", []sandbox.Mount{{Kind: sandbox.Tmpfs, Target: "/m", Size: 1 << 20}}, "true", "", "nothing limits its size"},
		{"secret moved", []sandbox.Mount{bind("secret", "/run/secret", true)}, "mv /run/secret /kept", "", "cannot be done to a mount"},
		{"secret linked", []sandbox.Mount{bind("secret", "/run/secret", true)}, "ln /run/secret /kept", "", "cannot be done to a mount"},
		{"secret replaced", []sandbox.Mount{bind("secret", "/run/secret", true)}, "cat /run/secret; echo x > /run/y; mv /run/y /run/secret", "hunter2", ""},
		{"cache moved", []sandbox.Mount{{Source: cache, Target: "/c"}}, "mv /c /d", "", "cannot be done to a mount"},
	} {
		t.Run(c.name, func(t *testing.T) {
			old(t, root)
			before := listing(t, root)
			s := inChroot(t, root, c.script)
			s.Mounts = c.mounts
			out, err := run(t, s)
			if c.fails == "" && (err != nil || out != c.output) {
				t.Errorf("run gave %q, %v; want %q", out, err, c.output)
			}
			if c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
				t.Errorf("error is %v, want it to say %q", err, c.fails)
			}
			for name, entry := range listing(t, root) {
				if before[name] != entry && c.fails == "" && c.name != "linked from a cache" {
					t.Errorf("%s is changed: %s, was %s", name, entry, before[name])
				}
			}
			if b, err := os.ReadFile(filepath.Join(root, "kept")); err == nil && string(b) == "hunter2" {
				t.Errorf("a secret is in the root that a layer is made of: %q", b)
			}
			if c.fails == "" {
				checkApart(t, root, cache)
			}
			os.Remove(filepath.Join(root, "kept"))
		})
	}
}

// checkApart fails the test if a cache, which other builds write to, has a file in common with a root.
func checkApart(t *testing.T, root, cache string) {
	t.Helper()
	names := map[uint64]string{}
	for _, dir := range []string{root, cache} {
		err := filepath.WalkDir(dir, func(name string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(name, &st); err != nil {
				return err
			}
			if other, ok := names[st.Ino]; ok && dir == cache && strings.HasPrefix(other, root) {
				t.Errorf("%s of the root is %s of the cache: another build can change what is in this layer", other, name)
			}
			names[st.Ino] = name
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestChrootRefusesWhatItCannotKeep(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*sandbox.Spec)
		says   string
	}{
		{"network none", func(s *sandbox.Spec) { s.Network = sandbox.None }, "that of the builder"},
		{"private network", func(s *sandbox.Spec) { s.Network = sandbox.Private }, "that of the builder"},
		{"insecure", func(s *sandbox.Spec) { s.Insecure = true }, "would be the builder itself"},
		{"control group", func(s *sandbox.Spec) { s.CgroupParent = "/x" }, "stays in the builder's"},
		{"memory", func(s *sandbox.Spec) { s.Limits.Memory = 1 << 30 }, "limit the container"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := inChroot(t, busybox(t), "echo ran")
			c.change(&s)
			out, err := run(t, s)
			var hint interface{ Hint() string }
			if out != "" || err == nil || !strings.Contains(err.Error(), c.says) || !errors.As(err, &hint) {
				t.Errorf("it gave %q and %v, want an error with a hint that says %q", out, err, c.says)
			}
		})
	}
}

func TestChrootSaysThatNothingLimitsSharedMemory(t *testing.T) {
	for size, want := range map[int64]int{0: 0, 64 << 20: 0, 1 << 20: 1, 1 << 30: 1} {
		s := inChroot(t, busybox(t), "true")
		var notes []string
		s.ShmSize, s.Note = size, func(note string) { notes = append(notes, note) }
		if _, err := run(t, s); err != nil {
			t.Fatal(err)
		}
		if said := strings.Count(strings.Join(notes, "\n"), "--shm-size"); said != want {
			t.Errorf("with %d bytes the user is told %d times, want %d: %q", size, said, want, notes)
		}
	}
}
