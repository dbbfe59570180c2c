package files

import (
	"context"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// batchSize is how many files of a directory are copied one after the other in a goroutine.
	batchSize = 128
	// maxCopiers bounds those goroutines: beyond that they wait for each other in the file system.
	maxCopiers = 4
)

// A batch are files of one directory in which nothing is but what this copy makes: they can be made beside others, in any order.
type batch struct {
	from  int // the directory that they lie in, a descriptor of its own
	files []*entry
}

// batches are copied while the walk goes on.
type batches struct {
	free    chan struct{}
	running sync.WaitGroup
	begun   int

	mu     sync.Mutex
	err    error // of the earliest job that failed
	number int   // of that job
}

func newBatches() *batches {
	return &batches{free: make(chan struct{}, min(maxCopiers, runtime.GOMAXPROCS(0)))}
}

// run does a job in a goroutine of its own, as soon as there may be one more. The jobs before have all begun by then, so the one
// whose error comes out does not depend on which is faster.
func (b *batches) run(job func() error) {
	b.free <- struct{}{}
	number := b.begun
	b.begun++
	b.running.Go(func() {
		defer func() { <-b.free }()
		if err := job(); err != nil {
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.err == nil || number < b.number {
				b.err, b.number = err, number
			}
		}
	})
}

func (b *batches) failed() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// wait waits for all jobs, and returns what went wrong.
func (b *batches) wait() error {
	b.running.Wait()
	return b.failed()
}

// later notes a file to be copied with others of its directory.
func (c *copier) later(e *entry, into *copiedDir) error {
	if into.batch == nil {
		from, err := unix.FcntlInt(uintptr(e.dir), unix.F_DUPFD_CLOEXEC, 0) // the walk closes its own
		if err != nil {
			return failed("read", parent(e.path), err)
		}
		into.batch = &batch{from: from}
	}
	e.dir = into.batch.from
	into.batch.files = append(into.batch.files, e)
	if len(into.batch.files) == batchSize {
		c.begin(into)
	}
	return nil
}

// begin copies what was noted of a directory.
func (c *copier) begin(into *copiedDir) {
	b := into.batch
	if b == nil {
		return
	}
	into.batch = nil
	into.copying.Add(1)
	c.batches.run(func() error {
		defer into.copying.Done()
		return c.copyBatch(b, into)
	})
}

func (c *copier) copyBatch(b *batch, into *copiedDir) error {
	defer unix.Close(b.from)
	for _, e := range b.files {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		if err := c.create(e, into); err != nil {
			return err
		}
	}
	return nil
}

// settle waits until all that the walk has met is copied.
func (c *copier) settle() error {
	for _, d := range c.dirs {
		c.begin(d)
	}
	return c.batches.wait()
}

// end closes a directory after a last thing was done to it, which waits for all that is copied into it.
func (c *copier) end(d *copiedDir, last func() error) {
	c.batches.run(func() error {
		defer d.close()
		var err error
		if d.batch != nil {
			err = c.copyBatch(d.batch, d)
		}
		d.copying.Wait()
		if err != nil {
			return err
		}
		return last()
	})
}
