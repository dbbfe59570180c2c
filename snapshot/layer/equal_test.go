package layer

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWhatIsOlderStaysOlder(t *testing.T) {
	at := func(ms ...int) (times []pair) {
		for i := 0; i < len(ms); i += 2 {
			times = append(times, pair{time.UnixMilli(int64(ms[i])), time.UnixMilli(int64(ms[i+1]))})
		}
		return times
	}
	for _, c := range []struct {
		name  string
		times []pair
		want  bool
	}{
		{"nothing", nil, true},
		{"in order", at(1, 1001, 2, 1002, 9, 5009), true},
		{"the other way round", at(1, 1002, 2, 1001), false},
		{"the other way round, apart", at(1, 1003, 5, 1004, 9, 1002), false},
		{"at once, and soon after", at(1, 1001, 1, 1500), true},
		{"at once, and a second after", at(1, 1001, 1, 2001), false},
		{"at once, and a second after in all", at(1, 1001, 1, 1501, 1, 2001), false},
		{"a second after, and at once", at(1, 7, 1001, 7), false},
	} {
		for _, swap := range []bool{false, true} {
			times := slices.Clone(c.times)
			for i, t := range times {
				if swap {
					times[i] = pair{t.b, t.a}
				}
			}
			if got := inOrder(times); got != c.want {
				t.Errorf("%s, swapped %v: %v, want %v; make would build what it must not, or not what it must", c.name, swap, got, c.want)
			}
		}
	}
}

func TestEqualChangeSets(t *testing.T) {
	old := time.Unix(1_600_000_000, 0)
	write := func(t *testing.T, dir, name, content string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(file), 0o755))
		must(t, os.WriteFile(file, []byte(content), 0o644))
		return file
	}
	settled := func(t *testing.T, file string, when time.Time) {
		t.Helper()
		times := []unix.Timespec{{Sec: when.Unix()}, {Sec: when.Unix()}}
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, file, times, unix.AT_SYMLINK_NOFOLLOW))
	}
	for _, c := range []struct {
		name  string
		make  func(t *testing.T, dir string, second bool)
		equal bool
		epoch time.Time
	}{
		{"nothing", func(*testing.T, string, bool) {}, true, time.Time{}},
		{"everything there is, written twice", func(t *testing.T, dir string, second bool) {
			must(t, os.Link(write(t, dir, "d/f", "x"), filepath.Join(dir, "g")))
			must(t, os.Symlink("to", filepath.Join(dir, "l")))
			must(t, unix.Mkfifo(filepath.Join(dir, "p"), 0o600))
			must(t, unix.Mknod(filepath.Join(dir, "gone"), unix.S_IFCHR, 0))
			must(t, unix.Setxattr(write(t, dir, "a", "x"), "user.a", []byte("1"), 0))
			settled(t, write(t, dir, "unpacked", "x"), old)
		}, true, time.Time{}},
		{"a whiteout of another mode and time", func(t *testing.T, dir string, second bool) {
			must(t, unix.Mknod(filepath.Join(dir, "gone"), unix.S_IFCHR|map[bool]uint32{true: 0o600}[second], 0))
			settled(t, filepath.Join(dir, "gone"), map[bool]time.Time{true: old, false: time.Unix(0, 0)}[second])
		}, true, time.Time{}},
		{"a content of the same size", func(t *testing.T, dir string, second bool) {
			write(t, dir, "d/f", map[bool]string{true: "x", false: "y"}[second])
		}, false, time.Time{}},
		{"a name more", func(t *testing.T, dir string, second bool) {
			write(t, dir, "d/f", "x")
			if second {
				write(t, dir, "d/g", "")
			}
		}, false, time.Time{}},
		{"another name", func(t *testing.T, dir string, second bool) {
			write(t, dir, map[bool]string{true: "d/f", false: "d/g"}[second], "x")
		}, false, time.Time{}},
		{"a mode", func(t *testing.T, dir string, second bool) {
			must(t, os.Chmod(write(t, dir, "f", "x"), map[bool]os.FileMode{true: 0o755, false: os.ModeSetuid | 0o755}[second]))
		}, false, time.Time{}},
		{"the mode of the root", func(t *testing.T, dir string, second bool) {
			must(t, os.Chmod(dir, map[bool]os.FileMode{true: 0o755, false: 0o1777}[second]))
		}, false, time.Time{}},
		{"an attribute of a file", func(t *testing.T, dir string, second bool) {
			must(t, unix.Setxattr(write(t, dir, "f", "x"), "user.a", []byte(map[bool]string{true: "1", false: "2"}[second]), 0))
		}, false, time.Time{}},
		{"an attribute of a directory", func(t *testing.T, dir string, second bool) {
			write(t, dir, "d/f", "x")
			if second {
				must(t, unix.Setxattr(filepath.Join(dir, "d"), "user.a", []byte("1"), 0))
			}
		}, false, time.Time{}},
		{"an opaque directory", func(t *testing.T, dir string, second bool) {
			write(t, dir, "d/f", "x")
			if second {
				must(t, unix.Setxattr(filepath.Join(dir, "d"), xattrOpaque, []byte("y"), 0))
			}
		}, false, time.Time{}},
		{"the target of a link", func(t *testing.T, dir string, second bool) {
			must(t, os.Symlink(map[bool]string{true: "to", false: "of"}[second], filepath.Join(dir, "l")))
		}, false, time.Time{}},
		{"a whiteout instead of a file", func(t *testing.T, dir string, second bool) {
			if second {
				must(t, unix.Mknod(filepath.Join(dir, "f"), unix.S_IFCHR, 0))
			} else {
				write(t, dir, "f", "")
			}
		}, false, time.Time{}},
		{"two files instead of two names of one", func(t *testing.T, dir string, second bool) {
			f := write(t, dir, "f", "x")
			if second {
				must(t, os.Link(f, filepath.Join(dir, "g")))
			} else {
				write(t, dir, "g", "x")
			}
		}, false, time.Time{}},
		{"other names of one file", func(t *testing.T, dir string, second bool) {
			f, g := write(t, dir, "f", "x"), write(t, dir, "g", "x")
			must(t, os.Link(map[bool]string{true: f, false: g}[second], filepath.Join(dir, "h")))
		}, false, time.Time{}},
		{"a time that was set", func(t *testing.T, dir string, second bool) {
			settled(t, write(t, dir, "f", "x"), old.Add(map[bool]time.Duration{true: time.Second}[second]))
		}, false, time.Time{}},
		{"a time that was set, and that of the writing", func(t *testing.T, dir string, second bool) {
			f := write(t, dir, "f", "x")
			if second {
				settled(t, f, old)
			}
		}, false, time.Time{}},
		{"the time of the root", func(t *testing.T, dir string, second bool) {
			settled(t, dir, old.Add(map[bool]time.Duration{true: time.Second}[second]))
		}, false, time.Time{}},
		{"a time that was set, in the future", func(t *testing.T, dir string, second bool) {
			settled(t, write(t, dir, "f", "x"), time.Now().Add(map[bool]time.Duration{true: time.Hour, false: 2 * time.Hour}[second]))
		}, false, time.Time{}},
		{"which of two is older", func(t *testing.T, dir string, second bool) {
			for i, name := range []string{"f", "g"} {
				file := write(t, dir, map[bool]string{true: "f", false: "g"}[second == (i == 0)], name[:0])
				now := time.Now().Add(time.Duration(i-100) * time.Millisecond)
				must(t, os.Chtimes(file, now, now))
			}
		}, false, time.Time{}},
		{"a large file of nothing", func(t *testing.T, dir string, second bool) {
			must(t, os.Truncate(write(t, dir, "f", ""), 64<<20))
		}, false, time.Time{}},
		{"an attribute that a command gave an overlay", func(t *testing.T, dir string, second bool) {
			must(t, unix.Setxattr(write(t, dir, "f", "x"), escapedOverlay+"foo", []byte(map[bool]string{true: "1", false: "2"}[second]), 0))
		}, false, time.Time{}},
		{"a link instead of a file", func(t *testing.T, dir string, second bool) {
			if second {
				must(t, os.Symlink("to", filepath.Join(dir, "l")))
			} else {
				write(t, dir, "l", "to")
			}
		}, false, time.Time{}},
		{"with an epoch: written before it, at another time", func(t *testing.T, dir string, second bool) {
			settled(t, write(t, dir, "f", "x"), time.Now().Add(map[bool]time.Duration{true: time.Hour, false: 2 * time.Hour}[second]))
		}, false, time.Now().Add(9 * time.Hour)},
		{"with an epoch: written after it", func(t *testing.T, dir string, second bool) {
			write(t, dir, "f", "x")
		}, true, old},
		{"with an epoch: set before it to another time", func(t *testing.T, dir string, second bool) {
			settled(t, write(t, dir, "f", "x"), old.Add(map[bool]time.Duration{true: -time.Second}[second]))
		}, false, old},
	} {
		t.Run(c.name, func(t *testing.T) {
			sets := [2]Written{{Dir: t.TempDir()}, {Dir: t.TempDir()}}
			for i := range sets {
				sets[i].Begun = time.Now().Add(-time.Second) // clocks of file systems may be some ticks late
				c.make(t, sets[i].Dir, i == 1)
				sets[i].Ended = time.Now()
			}
			var epoch *time.Time
			if !c.epoch.IsZero() {
				epoch = &c.epoch
				for _, s := range sets {
					settled(t, s.Dir, old)
				}
			}
			same, err := Equal(t.Context(), sets[0], sets[1], epoch)
			must(t, err)
			if same != c.equal {
				t.Errorf("they are called equal: %v; a step that stands on the one would get the other", same)
			}
		})
	}
}
