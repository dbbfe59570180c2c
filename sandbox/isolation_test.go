package sandbox_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/internal/nstest"
	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/sandbox/userns"
)

var updateIsolation = flag.Bool("update-isolation", false, "write what a command finds as what it is to find")

// gains say what an attacker has from a fact that is not as it is to be. The first that the fact's name begins with counts.
var gains = []struct{ fact, gain string }{
	{"ids", "a command owns files of the machine's users, or is root outside"},
	{"namespace", "a command has power over what it shares with the builder"},
	{"capabilities", "a command that is root inside can do more to the kernel, and each of these has been a way out"},
	{"seccomp", "a command reaches all of the kernel"},
	{"call", "a command reaches a part of the kernel with a history of root exploits, or one that undoes a wall"},
	{"sockets", "a command reaches a family of sockets with a history of root exploits"},
	{"32 bits", "a command calls the kernel by numbers that the filter does not know"},
	{"x32", "a command calls the kernel by numbers that the filter does not know"},
	{"descriptors", "a command holds a file of the builder open"},
	{"environment", "a command reads variables of the builder, which may be secrets"},
	{"file", "a command learns of the machine, or what it gets depends on the machine"},
	{"masked", "a command reads addresses of the kernel or what others type, or changes the machine"},
	{"dev", "a command reaches a device, and its driver"},
	{"sys", "a command learns of the machine and reaches its drivers"},
	{"mount", "a command can write to, or execute with privilege from, what is not its own; or sees a part of the machine"},
	{"canary", "a command reads the store, the context, the user's home or a key"},
	{"machine", "a command talks to services of this machine that trust its users, or tells this machine from others"},
	{"processes", "a command sees, stops or reads processes of the user"},
	{"layer", "the sandbox leaves something in the image"},
	{"process", "a command is in the builder's session, fills the disk with core dumps, or the kernel prefers the builder when memory is short"},
}

// A look is what the command found, and what is not to be found with it.
type look struct {
	Findings findings
	Builder  map[string]string // its namespaces
	Visible  bool              // /proc shows other processes
}

// TestACommandFindsNothingButWhatItIsToFind compares every rung with what is recorded in testdata/isolation. It is to be red
// whenever a wall moves; then think of what the message says, and record anew with -update-isolation.
func TestACommandFindsNothingButWhatItIsToFind(t *testing.T) {
	own := "many"
	if nstest.Single() {
		own = "single"
	}
	rungs := []string{own, "root", "covered"}
	if !nstest.Single() { // root that has one id is no root of a container
		rungs = append(rungs, "chroot")
	}
	for _, rung := range rungs {
		t.Run(rung, func(t *testing.T) {
			got := isolation(t, rung)
			golden := filepath.Join("testdata", "isolation", rung)
			if *updateIsolation {
				write(t, golden, strings.Join(got, "\n")+"\n", 0o644)
				return
			}
			b, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			want := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
			for _, line := range got {
				if !slices.Contains(want, line) {
					t.Errorf("new: %s\n\twhat this may mean: %s", line, gainOf(line))
				}
			}
			for _, line := range want {
				if !slices.Contains(got, line) {
					t.Errorf("gone: %s\n\twhat this may mean: %s", line, gainOf(line))
				}
			}
		})
	}
}

func gainOf(line string) string {
	for _, g := range gains {
		if strings.HasPrefix(line, g.fact) {
			return g.gain
		}
	}
	return "nobody has thought of it"
}

// isolation returns a line for each thing that a command finds on a rung.
func isolation(t *testing.T, rung string) []string {
	root, state, outside := busybox(t), stateDir(t), t.TempDir()
	probing(t, root)
	write(t, filepath.Join(root, "probe32"), program32, 0o755)
	if rung == "chroot" {
		libraries(t, root)
	}
	for _, dir := range []string{"/lib", "/lib64", "/usr/lib"} { // so that mount points of the test are no news
		if _, err := os.Stat(dir); err == nil {
			mkdir(t, filepath.Join(root, dir))
		}
	}
	old(t, root)
	before := listing(t, root)
	for _, name := range canaries {
		mkdir(t, filepath.Dir(filepath.Join(outside, name)))
		write(t, filepath.Join(outside, name), canary, 0o644)
	}
	builder := exec.Command("/proc/self/exe", "isolation", rung, root, state, outside)
	builder.Args[0] = os.Args[0]
	builder.Env = append(os.Environ(), "COOPER_CANARY="+canary)
	builder.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	var stderr bytes.Buffer
	builder.Stderr = &stderr
	out, err := builder.Output()
	var l look
	if err == nil {
		err = json.Unmarshal(out, &l)
	}
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, stderr.String())
	}
	lines := l.lines(rung)
	for name, was := range listing(t, root) {
		if before[name] != was {
			lines = append(lines, "layer: "+name)
		}
	}
	slices.Sort(lines)
	return lines
}

const canary = "canary-8c1f4e"

// canaries are what lies around a build, below one directory.
var canaries = []string{"home/.docker/config.json", "home/.ssh/id_ed25519", "home/key.pem", "store/content/blob", "store/snapshots/other/file", "context/.env"}

// playIsolation is the builder on a rung.
func playIsolation(rung, root, state, outside string) {
	fail := func(what string, err error) {
		fmt.Println(what, err)
		os.Exit(1)
	}
	if _, inside := userns.Inside(); !inside && (rung == "root" || rung == "covered") {
		if rung == "covered" {
			if err := unix.Mount("/dev/null", "/proc/keys", "", unix.MS_BIND, ""); err != nil {
				fail("cover", err)
			}
		}
		code, err := userns.Enter(context.Background(), os.Args, os.Environ(), userns.Options{})
		if err != nil {
			fail("enter", err)
		}
		os.Exit(code)
	}
	if err := os.Chdir(filepath.Join(outside, "context")); err != nil { // as a user does
		fail("chdir", err)
	}
	if _, err := unix.Open(filepath.Join(outside, "home/key.pem"), unix.O_RDONLY, 0); err != nil { // without close-on-exec
		fail("open", err)
	}
	abstract, err := net.Listen("unix", "@"+canary)
	if err != nil {
		fail("listen", err)
	}
	defer abstract.Close()
	loopback, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fail("listen", err)
	}
	defer loopback.Close()
	l := look{Builder: namespaces()}
	s := sandbox.Spec{
		Root: root, StateDir: state, Network: sandbox.Private,
		Args: []string{"/probe", "probe", "all", outside, strconv.Itoa(os.Getpid()), loopback.Addr().String()},
		Env:  []string{"PATH=/bin", "HOME=/root"},
		Note: func(note string) { l.Visible = l.Visible || strings.Contains(note, "/proc") },
	}
	if rung == "chroot" {
		s.Chroot, s.Network = true, sandbox.Host
	}
	for _, dir := range []string{"/lib", "/lib64", "/usr/lib"} {
		if _, err := os.Stat(dir); err == nil && !s.Chroot {
			s.Mounts = append(s.Mounts, sandbox.Mount{Source: dir, Target: dir, ReadOnly: true})
		}
	}
	var out, warnings bytes.Buffer // the race detector warns of a missing /proc
	s.Stdout, s.Stderr = &out, &warnings
	if err := sandbox.Run(context.Background(), s); err != nil {
		fail("run", fmt.Errorf("%w: %s%s", err, out.String(), warnings.String()))
	}
	if err := json.Unmarshal(out.Bytes(), &l.Findings); err != nil {
		fail("probe", fmt.Errorf("%w: %s", err, out.String()))
	}
	json.NewEncoder(os.Stdout).Encode(l)
	os.Exit(0)
}

// lines are the findings without what differs from machine to machine.
func (l look) lines(rung string) []string {
	f := l.Findings
	var lines []string
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	if rung == "many" || rung == "single" { // the others lie within one of these
		say("ids: several %v, root of the machine among them: %v", f.IDs > 1, f.MachineRoot)
	}
	for name, link := range f.Namespaces {
		if rung == "chroot" { // all are the builder's, and no /proc says so
			break
		}
		if link != l.Builder[name] {
			say("namespace %s: own", name)
		} else {
			say("namespace %s: the builder's", name)
		}
	}
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		say("capabilities %s: %s", set, f.Status[set])
	}
	say("seccomp: %s, no_new_privs: %s", f.Status["Seccomp"], f.Status["NoNewPrivs"])
	for call, answer := range f.Calls {
		say("call %s: %s", call, answer)
	}
	if !ipv6() { // what the machine has not, nobody gains
		at := slices.Index(f.Sockets, "16/3/0")
		f.Sockets = slices.Insert(f.Sockets, max(at, 0), "10/1/0", "10/2/0")
	}
	say("sockets: %s", strings.Join(f.Sockets, " "))
	say("sockets in pairs: %s", strings.Join(f.Pairs, " "))
	if runtime.GOARCH == "amd64" {
		say("x32: %s", f.OldABI)
		say("32 bits: %s", f.OldArch)
	}
	say("descriptors: %s", strings.Join(f.Descriptors, " "))
	for _, e := range f.Environment {
		say("environment: %s", e)
	}
	for name, content := range f.Files {
		if machine, _ := os.ReadFile("/etc/resolv.conf"); rung == "chroot" && name == "resolv.conf" {
			say("file resolv.conf: of the machine %v", content != "" && strings.Contains(string(machine), content))
			continue
		}
		say("file %s: %q", name, content)
	}
	say("masked, and readable: %s", strings.Join(f.Readable, " "))
	say("masked, and writable: %s", strings.Join(f.Writable, " "))
	say("sys: %s", strings.Join(f.Sys, " "))
	for _, d := range f.Devices {
		say("dev %s", d)
	}
	for _, m := range f.Mounts {
		say("mount %s", m)
	}
	say("canary: %s", strings.Join(f.Reached, " "))
	say("machine: abstract socket %s, loopback %s, time since it began visible: %v", f.Abstract, f.Loopback, f.Uptime > 30)
	number := fmt.Sprint(f.Pid)
	if rung == "chroot" {
		number = "by the machine"
	}
	say("processes: others visible: %v, signal to the builder: %s, numbered: %s", l.Visible, f.Signal, number)
	if rung == "chroot" { // there is no /proc to see it in; the builder has a test for it
		f.OOMScore = "500"
	}
	score, _ := strconv.Atoi(f.OOMScore)
	say("process: session of its own: %v, core %d, umask %03o, killed first: %v, stdin %s, terminal: %s, directory %s",
		f.Sid != 0, f.Core.Max, f.Umask, score >= 500, f.Stdin, f.Tty, f.Cwd)
	return lines
}

// lookAround fills in what the probe finds of the machine: args are the directory of the canaries, the builder's pid and an
// address of the machine's loopback interface.
func (f *findings) lookAround(args []string) {
	b, _ := os.ReadFile("/proc/self/uid_map")
	for line := range strings.Lines(string(b)) {
		var inside, outside, count int
		fmt.Sscan(line, &inside, &outside, &count)
		f.IDs += count
		f.MachineRoot = f.MachineRoot || outside == 0
	}
	f.Files = map[string]string{}
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		b, _ := os.ReadFile("/etc/" + name)
		content := string(b)
		if name == "resolv.conf" { // but for the machine's search domains and options
			content = ""
			for line := range strings.Lines(string(b)) {
				if strings.HasPrefix(line, "nameserver") {
					content += line
				}
			}
		}
		f.Files[name] = content
	}
	f.Devices, f.Mounts = devices("/dev"), mounts()
	f.Reached = reached(args[0])
	f.Abstract, f.Loopback = answer("unix", "@"+canary), answer("tcp", args[2])
	pid, _ := strconv.Atoi(args[1])
	f.Signal = fmt.Sprint(unix.Kill(pid, 0))
	f.OldArch = oldArch()
	uptime, _ := os.ReadFile("/proc/uptime")
	fmt.Sscan(string(uptime), &f.Uptime)
}

func answer(network, address string) string {
	c, err := net.DialTimeout(network, address, 5*time.Second)
	if err != nil {
		return "refuses"
	}
	c.Close()
	return "answers"
}

func devices(dir string) []string {
	var all []string
	for _, name := range names(dir) {
		if name == "core" { // only where the kernel has it
			continue
		}
		if st, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			all = append(all, name+" "+st.Mode().Type().String()) // permissions are the machine's
		}
	}
	return all
}

// mounts are those of the sandbox, with the flags that are ours to choose.
func mounts() []string {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	var all []string
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		_, after, _ := strings.Cut(line, " - ")
		kind, _, _ := strings.Cut(after, " ")
		at, flags := fields[4], strings.Split(fields[5], ",")
		if strings.HasPrefix(at, "/lib") || strings.HasPrefix(at, "/usr/lib") {
			continue // the test's
		}
		ours := []string{"ro", "nosuid", "nodev", "noexec"}
		if at == "/" || strings.HasPrefix(at, "/etc/") || strings.HasPrefix(at, "/dev/") && kind == "devtmpfs" {
			kind, ours = "of the machine", []string{"ro", "nodev"}
		}
		if strings.HasPrefix(at, "/proc/") {
			if at != "/proc/sys" { // which of the others there are, depends on the kernel; see Readable and Writable
				continue
			}
			kind = "cover"
		}
		var kept []string
		for _, flag := range ours {
			if slices.Contains(flags, flag) {
				kept = append(kept, flag)
			}
		}
		all = append(all, strings.TrimSpace(at+" "+kind+" "+strings.Join(kept, ",")))
	}
	return all
}

// reached lists the ways that lead to a canary.
func reached(outside string) []string {
	var ways []string
	try := func(path string) {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), canary) {
			ways = append(ways, path)
		}
	}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, name := range canaries {
		try(filepath.Join(outside, name))
		try(name)
		for _, p := range processes {
			try(filepath.Join(p, "root", outside, name))
			try(filepath.Join(p, "cwd", filepath.Base(name)))
		}
	}
	for _, p := range processes {
		try(p + "/environ")
		try(p + "/cmdline")
		fds, _ := filepath.Glob(p + "/fd/*")
		for fd := range 16 { // also where the directory cannot be listed
			fds = append(fds, p+"/fd/"+strconv.Itoa(fd))
		}
		for _, fd := range fds {
			if st, err := os.Stat(fd); err == nil && st.Mode().IsRegular() {
				try(fd)
			}
		}
	}
	return ways
}

// program32 is a program for 386 that ends with status 7.
const program32 = "\x7fELF\x01\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
	"\x02\x00\x03\x00\x01\x00\x00\x00\x54\x80\x04\x08\x34\x00\x00\x00" + // executable, 386, entry 0x8048054
	"\x00\x00\x00\x00\x00\x00\x00\x00\x34\x00\x20\x00\x01\x00\x00\x00\x00\x00\x00\x00" +
	"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x80\x04\x08\x00\x80\x04\x08" + // one segment
	"\x60\x00\x00\x00\x60\x00\x00\x00\x05\x00\x00\x00\x00\x10\x00\x00" +
	"\xb8\x01\x00\x00\x00\xbb\x07\x00\x00\x00\xcd\x80" // exit(7)

// oldArch executes it.
func oldArch() string {
	if err := exec.Command("/probe32").Run(); err != nil && err.Error() == "exit status 7" {
		return "answered"
	}
	return "not answered" // killed, or there is no such door
}

func TestProgramOf32BitsIsOneThatTheKernelTakes(t *testing.T) {
	at := filepath.Join(t.TempDir(), "32")
	write(t, at, program32, 0o755)
	err := exec.Command(at).Run()
	if runtime.GOARCH == "amd64" && err.Error() != "exit status 7" && !errors.Is(err, unix.ENOEXEC) {
		t.Errorf("it ends with %v: the isolation is not tested by it", err)
	}
}
