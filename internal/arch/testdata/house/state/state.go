package state

import (
	_ "embed"
	"errors"
	"io"
	"net/http"
	"regexp"
	"sync"
)

// What may stand at package level: it says all it will ever say.
var (
	ErrGone = errors.New("gone")
	Table   = map[string]int{"a": 1}
	digits  = regexp.MustCompile(`\d+`)
	order   = []string{"b", "a"}
	lazy    = sync.OnceValue(compute)

	_ io.Reader = (*reader)(nil)
)

//go:embed state.go
var source string

var (
	counter int                        // want "package variable state.counter starts empty"
	mu      = sync.Mutex{}             // want "package variable state.mu is a sync.Mutex"
	once    = sync.OnceFunc(func() {}) // want "package variable state.once is a sync.OnceFunc"
	memory  = make(map[string]int)     // want "package variable state.memory is made to be filled"
	root    = "/"
	deep    = struct{ list []int }{[]int{1}}
)

type reader struct{}

func (*reader) Read([]byte) (int, error) { return len(source), ErrGone }

func compute() int { return len(digits.String()) + lazy() }

func change(table map[string]int) {
	root = "/tmp"               // want "state changes package variable root"
	Table["b"] = 2              // want "state changes package variable Table"
	deep.list[0]++              // want "state changes package variable deep.list"
	delete(Table, "a")          // want "state changes package variable Table"
	fill(&order)                // want "state changes package variable order"
	http.DefaultTransport = nil // want "state changes package variable http.DefaultTransport"
	for root = range memory {   // want "state changes package variable root"
	}
	counter, other := 1, &http.DefaultClient
	counter++
	_ = other
	order := append([]string(nil), order...)
	order[0] = "c"
	table["x"] = 1
	mu.Lock()
}

func fill(*[]string) {}
