package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// indexCopyFile lies beside the index.json of a store and holds a seal, a line with the seal's digest, and all that index.json
// said when it was written. It is written after index.json, so a process that was killed between the two
// leaves an index that the copy does not know. That one is another file, and is believed. The file that the copy
// knows is not, when it says something else.
const indexCopyFile = ".index"

// A seal tells a file that was changed in place from one that was replaced.
type seal struct {
	Digest digest.Digest `json:"digest"`
	Inode  uint64        `json:"inode"`
	Born   int64         `json:"born,omitempty"` // in nanoseconds; inodes are used again
}

func (s seal) sameFile(o seal) bool { return s.Inode == o.Inode && s.Born == o.Born }

// A storedIndex is what the index.json of a layout says, and what is wrong with it.
type storedIndex struct {
	raw        []byte
	damage     string // of the file; raw is from the copy then
	copyDamage string
	copyStale  bool // the copy is missing, damaged, or of another file
}

// readIndex reads index.json. In a store the copy stands in for it where it is damaged. Elsewhere nothing is known of it.
func (l *Layout) readIndex() (storedIndex, error) {
	raw, is, err := l.readSealed(ocispec.ImageIndexFile)
	if !l.own {
		return storedIndex{raw: raw}, err
	}
	was, kept, copyErr := l.readIndexCopy()
	s := storedIndex{raw: raw, copyStale: copyErr != nil || was != is}
	if copyErr != nil {
		if !errors.Is(copyErr, fs.ErrNotExist) {
			s.copyDamage = copyErr.Error()
		}
		return s, err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.damage = "it is gone"
	case err != nil:
		s.damage = err.Error()
	case is.Digest == was.Digest:
		return s, nil
	case is.sameFile(was):
		s.damage = fmt.Sprintf("its bytes have digest %s, it was written with %s", is.Digest, was.Digest)
	default:
		_, parseErr := parseIndex(raw)
		if parseErr == nil {
			return s, nil
		}
		s.damage = parseErr.Error()
	}
	s.raw = kept
	return s, nil
}

// readSealed reads a file and says which it is.
func (l *Layout) readSealed(name string) ([]byte, seal, error) {
	f, _, err := l.openFile(name)
	if err != nil {
		return nil, seal{}, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxIndex+1))
	if err == nil && len(raw) > maxIndex {
		err = fmt.Errorf("%s has more than %d bytes", name, maxIndex)
	}
	if err != nil {
		return nil, seal{}, err
	}
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME, &st); err != nil {
		return nil, seal{}, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	is := seal{Digest: digest.FromBytes(raw), Inode: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		is.Born = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
	}
	return raw, is, nil
}

var errCopyDamaged = errors.New("it is damaged: its checksum does not fit")

func (l *Layout) readIndexCopy() (was seal, kept []byte, err error) {
	b, err := l.readSmall(indexCopyFile, maxIndex+4096)
	if err != nil {
		return was, nil, err
	}
	line, rest, _ := bytes.Cut(b, []byte("\n"))
	sum, kept, ok := bytes.Cut(rest, []byte("\n"))
	if !ok || string(sum) != digest.FromBytes(line).String() {
		return was, nil, errCopyDamaged
	}
	if err := json.Unmarshal(line, &was); err != nil {
		return was, nil, err
	}
	if digest.FromBytes(kept) != was.Digest {
		return was, nil, errCopyDamaged
	}
	return was, kept, nil
}

// copyIndex writes the copy of the present index.json, when that can be read. The caller has the lock.
func (l *Layout) copyIndex() error {
	raw, is, err := l.readSealed(ocispec.ImageIndexFile)
	if err != nil {
		return err
	}
	if _, err := parseIndex(raw); err != nil {
		return err
	}
	line, err := json.Marshal(is)
	if err != nil {
		return err
	}
	b := fmt.Appendf(nil, "%s\n%s\n%s", line, digest.FromBytes(line), raw)
	if err := l.replace(indexCopyFile, b); err != nil {
		return fmt.Errorf("write %s: %w", indexCopyFile, err)
	}
	return nil
}

// mendIndex sets right what readIndex found, and says what it did. The caller has the lock.
func (l *Layout) mendIndex(s storedIndex) (done string, err error) {
	if s.damage != "" {
		done, err = l.setAside(ocispec.ImageIndexFile)
		if errors.Is(err, fs.ErrNotExist) {
			done, err = "written again", nil
		}
		if err == nil {
			done += "; what it said is restored from its copy"
			err = l.replace(ocispec.ImageIndexFile, s.raw)
		}
		if err != nil {
			return done, err
		}
	}
	return done, l.copyIndex()
}
