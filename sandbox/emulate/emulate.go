// Package emulate lets the processes of this user namespace execute programs
// of other architectures, through a static qemu of the machine.
//
// The kernel (6.7 and later) keeps the table of foreign binary formats,
// binfmt_misc, per user namespace. An Emulator mounts the one of its own
// namespace where no path leads to it, registers qemu there, and holds both
// until Close. The machine's table stays as it is, nothing needs to be in the
// image, and all is gone with the namespace at the latest. What is executed,
// and in which root, is not known here.
package emulate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Emulator gives this user namespace architectures that the machine is not.
type Emulator struct {
	dirs []string

	mu    sync.Mutex
	table *os.File // our binfmt_misc, mounted nowhere; nil until it is needed
}

// New returns an Emulator that looks for qemu in dirs, which are the absolute
// paths of a PATH. The caller is root of a user namespace and closes it.
func New(dirs []string) *Emulator { return &Emulator{dirs: dirs} }

// Error says why an architecture cannot be emulated, with one next step.
type Error struct {
	Arch    string
	Problem string
	Advice  string
	Err     error // what the kernel said, if it was asked
}

func (e *Error) Error() string {
	if e.Err == nil {
		return "emulate " + e.Arch + ": " + e.Problem
	}
	return "emulate " + e.Arch + ": " + e.Problem + ": " + e.Err.Error()
}

// Unwrap returns what the kernel said.
func (e *Error) Unwrap() error { return e.Err }

// Hint returns the next step.
func (e *Error) Hint() string { return e.Advice }

// Enable makes programs of an architecture executable in this user namespace
// and all below it. arch is a GOARCH; variants (arm v5, v6, v7) do not differ in
// how they are emulated. A nil error means that the machine is of that
// architecture itself, that qemu is registered, or that the machine's own table
// has an emulator that needs nothing in the image. Enable may be called
// often and at the same time.
func (e *Emulator) Enable(arch string) error {
	if arch == runtime.GOARCH {
		return nil
	}
	f, ok := formats[arch]
	if !ok {
		return &Error{Arch: arch, Problem: "no emulator is known for this architecture",
			Advice: "build for one of " + known() + ", or on a machine of that architecture"}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	err := e.register(arch, f)
	// Only without a table of our own: it hides the machine's.
	if err != nil && e.table == nil && registered(machineTable, f) {
		return nil
	}
	return err
}

// Close takes the registrations back. Processes that run already go on.
func (e *Emulator) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.table == nil {
		return nil
	}
	err := e.table.Close()
	e.table = nil
	return err
}

// machineTable is where administrators find the table that holds for a
// namespace without its own.
const machineTable = "/proc/sys/fs/binfmt_misc"

func (e *Emulator) register(arch string, f format) error {
	qemu, err := findQemu(e.dirs, arch, f)
	if err != nil {
		return err
	}
	table := e.table
	if table == nil {
		if table, err = mountTable(); err != nil {
			return unavailable(arch, err)
		}
	}
	if err := add(table, "cooper-"+arch, f.line("cooper-"+arch, qemu)); err != nil {
		if e.table == nil {
			table.Close()
		}
		return &Error{Arch: arch, Problem: "register " + qemu, Err: err,
			Advice: "the kernel must be able to open and execute " + qemu + "; try to run it"}
	}
	e.table = table
	return nil
}

func unavailable(arch string, err error) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return &Error{Arch: arch, Problem: "this kernel has no binfmt_misc", Err: err,
			Advice: "have an administrator load it (modprobe binfmt_misc), or build on a machine of that architecture"}
	case errors.Is(err, unix.EPERM):
		return &Error{Arch: arch, Problem: "this kernel has no binfmt_misc for users, which Linux 6.7 brought, or forbids it", Err: err,
			Advice: "have an administrator register qemu for the whole machine (apt-get install qemu-user-static binfmt-support), or use a newer kernel"}
	}
	return &Error{Arch: arch, Problem: "mount binfmt_misc", Err: err,
		Advice: "build on a machine of that architecture, or have an administrator register qemu for the whole machine"}
}

// mountTable returns the root of this user namespace's own binfmt_misc. The mount is attached
// nowhere: what could open its files could take over every program that is
// executed in the namespace. The kernel keeps one table per namespace, so a second
// mount shows the first's entries.
func mountTable() (*os.File, error) {
	config, err := unix.Fsopen("binfmt_misc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(config)
	if err := unix.FsconfigCreate(config); err != nil {
		return nil, os.NewSyscallError("fsconfig", err)
	}
	fd, err := unix.Fsmount(config, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsmount", err)
	}
	return os.NewFile(uintptr(fd), "binfmt_misc"), nil
}

// add registers a format unless one of that name is there.
func add(table *os.File, name, line string) error {
	if err := unix.Faccessat(int(table.Fd()), name, unix.F_OK, 0); err == nil {
		return nil
	}
	fd, err := unix.Openat(int(table.Fd()), "register", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "register", Err: err}
	}
	f := os.NewFile(uintptr(fd), "register")
	_, err = f.WriteString(line)
	if errors.Is(err, unix.EEXIST) { // another Emulator of this namespace was quicker
		err = nil
	}
	return errors.Join(err, f.Close())
}

// registered reports whether the table in dir has an emulator for the format
// that the kernel has opened already, so that it need not be in the image.
func registered(dir string, f format) bool {
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil || strings.TrimSpace(string(status)) != "enabled" {
		return false
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, entry := range entries {
		if entry.Name() == "status" || entry.Name() == "register" {
			continue
		}
		if text, err := os.ReadFile(filepath.Join(dir, entry.Name())); err == nil && f.servedBy(string(text)) {
			return true
		}
	}
	return false
}

// findQemu returns the path of a static qemu for the architecture.
func findQemu(dirs []string, arch string, f format) (string, error) {
	var dynamic string
	for _, name := range []string{"qemu-" + f.qemu + "-static", "qemu-" + f.qemu} {
		for _, dir := range dirs {
			if !filepath.IsAbs(dir) {
				continue // it would mean another program in every directory
			}
			file := filepath.Join(dir, name)
			static, err := isStatic(file)
			switch {
			case errors.Is(err, fs.ErrNotExist):
			case err != nil:
				return "", &Error{Arch: arch, Problem: "read " + file, Err: err, Advice: "repair or remove it"}
			case static:
				return file, nil
			default:
				dynamic = file
			}
		}
	}
	const advice = "install a static one; on Debian and Ubuntu: apt-get install qemu-user-static"
	if dynamic != "" {
		return "", &Error{Arch: arch, Advice: advice,
			Problem: dynamic + " needs shared libraries, which are not in the image"}
	}
	return "", &Error{Arch: arch, Advice: advice,
		Problem: fmt.Sprintf("the machine is %s, and no qemu-%s-static is in %s", runtime.GOARCH, f.qemu, strings.Join(dirs, ":"))}
}

// isStatic reports whether an ELF program runs without an interpreter of its own.
func isStatic(file string) (bool, error) {
	r, err := os.Open(file)
	if err != nil {
		return false, err
	}
	defer r.Close()
	if st, err := r.Stat(); err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return false, errors.Join(err, errors.New("it is no program"))
	}
	return hasNoInterpreter(r)
}
