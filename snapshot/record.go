package snapshot

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A record is a small file of the store: a line of JSON, for some kinds bytes that would be long in JSON, and a line with a checksum
// of both and of the record's name. So a record that was torn, hit by a flipped bit or moved to another name is none.

// errNoRecord says that a file is not the record that its name promises.
var errNoRecord = errors.New("it is damaged: its checksum does not fit")

// A carrier is a value with bytes that stand behind its JSON.
type carrier interface{ attached() *[]byte }

// sealed returns the file of a record. name is its kind and its name, such as "key/KEY".
func sealed(name string, v any) ([]byte, error) {
	payload, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	if c, ok := v.(carrier); ok && *c.attached() != nil {
		payload = append(append(payload, '\n'), *c.attached()...)
	}
	return fmt.Appendf(payload, "\n%s\n", checksum(name, payload)), nil
}

// unsealed fills v with what sealed was given.
func unsealed(name string, data []byte, v any) error {
	end := len(data) - len("\n\n") - hex.EncodedLen(sha256.Size)
	if end < 0 || string(data[end:]) != "\n"+checksum(name, data[:end])+"\n" {
		return errNoRecord
	}
	line, rest, _ := bytes.Cut(data[:end], []byte("\n"))
	if c, ok := v.(carrier); ok {
		*c.attached() = rest
	}
	return json.Unmarshal(line, v)
}

func checksum(name string, payload []byte) string {
	h := sha256.New()
	io.WriteString(h, name+"\n") // never fails
	h.Write(payload)
	return hex.EncodeToString(h.Sum(nil))
}

// lastUse is how exactly the last use of a record is known. Finer would cost a write at every look-up.
const lastUse = time.Minute

// readRecord reads a record and notes that it was used.
func readRecord(file, name string, v any) error {
	data, used, err := readSmall(file)
	if err != nil {
		return err
	}
	if err := unsealed(name, data, v); err != nil {
		return err
	}
	if now := time.Now(); now.Sub(used).Abs() > lastUse { // also when it lies in the future
		_ = os.Chtimes(file, now, now) // a store that cannot be written to is read all the same
	}
	return nil
}

// readSmall reads a regular file with half of the system calls that os.ReadFile makes, and returns when it was changed. A build reads several for
// each step.
func readSmall(file string) ([]byte, time.Time, error) {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for err == unix.EINTR {
		fd, err = unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, time.Time{}, &os.PathError{Op: "open", Path: file, Err: err}
	}
	f := os.NewFile(uintptr(fd), file)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, time.Time{}, &os.PathError{Op: "stat", Path: file, Err: err}
	}
	data := make([]byte, st.Size)
	n, err := io.ReadFull(f, data)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) { // shorter now: that is for its checksum to say
		return nil, time.Time{}, err
	}
	return data[:n], time.Unix(st.Mtim.Unix()), nil
}

// peekRecord reads a record without using it, and returns when it was used last.
func peekRecord(file, name string, v any) (time.Time, error) {
	info, err := os.Lstat(file)
	if err != nil {
		return time.Time{}, err
	}
	if !info.Mode().IsRegular() {
		return time.Time{}, errNoRecord
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return time.Time{}, err
	}
	return info.ModTime(), unsealed(name, data, v)
}

func lookAtRecord(file, name string, v any) error {
	_, err := peekRecord(file, name, v)
	return err
}
