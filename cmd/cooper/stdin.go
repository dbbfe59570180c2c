package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cooper-build/cooper/builder"
	"github.com/cooper-build/cooper/builder/plan"
)

// longestDockerfile is as much as the planner reads of a file.
const longestDockerfile = 8 << 20

// tarBlock is the size of a tar header.
const tarBlock = 512

// An input is standard input that holds the Dockerfile or the context. It can be read once, and a build may need it in
// two processes.
type input struct {
	rest   io.Reader // what is not used yet, or all of it again
	isOnce bool      // it is too long to be held here: only one process can use it
}

// readInput puts what is on standard input into the request.
func readInput(from io.Reader, s source, r *builder.Request) (*input, error) {
	if s.stdin == stdinUnused {
		return nil, nil
	}
	buffered := bufio.NewReaderSize(from, 64<<10)
	head, err := buffered.Peek(tarBlock)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read standard input: %w", err)
	}
	if len(head) == 0 {
		return nil, usageError{errors.New("standard input is empty: a Dockerfile, or an archive with the context, is expected")}
	}
	if isArchive(head) {
		if s.stdin == stdinDockerfile {
			return nil, usageError{hinted{errors.New("-f -: standard input is an archive, not a Dockerfile"), "send it as the context: cooper build -"}}
		}
		r.Plan.Context, r.Upload = plan.Uploaded, buffered
		r.Plan.Dockerfile = strings.TrimLeft(r.Plan.Dockerfile, "/") // it is in the archive, as in buildx
		return &input{rest: buffered, isOnce: true}, nil
	}
	if s.file != "" {
		return nil, usageError{hinted{errors.New("there are two Dockerfiles: one on standard input and that of --file"), "leave one out, or send an archive with the context"}}
	}
	text, err := io.ReadAll(io.LimitReader(buffered, longestDockerfile+1))
	if err != nil {
		return nil, fmt.Errorf("read standard input: %w", err)
	}
	if len(text) > longestDockerfile {
		return nil, usageError{fmt.Errorf("standard input is no archive, and longer than a Dockerfile may be (%d bytes)", longestDockerfile)}
	}
	r.Plan.Text = text
	return &input{rest: bytes.NewReader(text)}, nil
}

// handOver makes standard input whole again, for the process that goes on with the build. What feeds it ends with this
// process.
func (in *input) handOver() error {
	if in == nil {
		return nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pass standard input on: %w", err)
	}
	defer r.Close()
	if err := unix.Dup3(int(r.Fd()), 0, 0); err != nil {
		return fmt.Errorf("pass standard input on: %w", err)
	}
	go func() {
		_, err := io.Copy(w, in.rest)
		if err != nil && !errors.Is(err, unix.EPIPE) {
			fmt.Fprintf(os.Stderr, "cooper: read standard input: %v\n", err)
		}
		w.Close()
	}()
	return nil
}

// standardInput is a second descriptor of it, which handOver does not touch.
func standardInput() (*os.File, error) {
	fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("standard input: %w", err)
	}
	return os.NewFile(uintptr(fd), "standard input"), nil
}

// isArchive tells a tar, plain or compressed, from a Dockerfile.
func isArchive(head []byte) bool {
	for _, magic := range []string{"\x1f\x8b\x08", "BZh", "\xfd7zXZ\x00", "\x28\xb5\x2f\xfd"} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return true
		}
	}
	return isTarHeader(head)
}

// isTarHeader looks at the checksum, which every kind of tar has and no text hits by chance. An empty tar is zeros.
func isTarHeader(head []byte) bool {
	if len(head) < tarBlock {
		return false
	}
	const at, n = 148, 8
	sum := int64(n * ' ')
	for i, c := range head[:tarBlock] {
		if i < at || i >= at+n {
			sum += int64(c)
		}
	}
	if sum == n*' ' {
		return true
	}
	want, err := strconv.ParseInt(strings.Trim(string(head[at:at+n]), " \x00"), 8, 64)
	return err == nil && want == sum
}
