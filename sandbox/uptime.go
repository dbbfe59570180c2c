package sandbox

import (
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hideUptime gives the process clocks that began with it: since when the
// machine runs is not its business. The time of day stays. Where the kernel has
// no such namespace, or this process is itself in one that moves its clocks,
// they are the builder's.
func hideUptime(config *configs.Config) error {
	offsets, err := os.ReadFile("/proc/self/timens_offsets")
	if err != nil {
		return nil
	}
	for field := range strings.FieldsSeq(string(offsets)) {
		if n, err := strconv.ParseInt(field, 10, 64); err == nil && n != 0 {
			return nil
		}
	}
	config.TimeOffsets = map[string]specs.LinuxTimeOffset{}
	for name, clock := range map[string]int32{"monotonic": unix.CLOCK_MONOTONIC, "boottime": unix.CLOCK_BOOTTIME} {
		var now unix.Timespec
		if err := unix.ClockGettime(clock, &now); err != nil {
			return os.NewSyscallError("clock_gettime", err)
		}
		config.TimeOffsets[name] = specs.LinuxTimeOffset{Secs: -now.Sec}
	}
	config.Namespaces = append(config.Namespaces, configs.Namespace{Type: configs.NEWTIME})
	return nil
}
