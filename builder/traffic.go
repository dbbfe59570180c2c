package builder

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/docker/go-units"

	"github.com/cooper-build/cooper/sandbox"
	"github.com/cooper-build/cooper/sandbox/egress"
)

// A destination is where a RUN connected to, or wanted to.
type destination struct {
	Host    string
	Addr    netip.Addr
	Port    uint16
	Refused string
	Failed  string
}

// traffic adds up the connections of one RUN. A hostile one may make any number, to any number of destinations.
type traffic struct {
	mu   sync.Mutex
	seen map[destination]*sum
	more int // connections to destinations that there was no room for
}

type sum struct {
	connections    int
	sent, received int64
}

// maxDestinations bounds what is remembered and shown of one RUN.
const maxDestinations = 100

func (t *traffic) add(c egress.Conn) {
	d := destination{Host: c.Host, Addr: c.Addr, Port: c.Port, Refused: c.Refused}
	if c.Err != nil {
		d.Failed = c.Err.Error()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s, ok := t.seen[d]
	if !ok {
		if len(t.seen) == maxDestinations {
			t.more++
			return
		}
		if t.seen == nil {
			t.seen = map[destination]*sum{}
		}
		s = &sum{}
		t.seen[d] = s
	}
	s.connections++
	s.sent += c.Sent
	s.received += c.Received
}

// report shows the destinations at the end of the step's output.
func (t *traffic) report(w *watch) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var text strings.Builder
	for _, d := range slices.SortedFunc(maps.Keys(t.seen), compareDestinations) {
		fmt.Fprintf(&text, "network: %s: %s\n", d, t.seen[d].outcome(d))
	}
	if t.more > 0 {
		fmt.Fprintf(&text, "network: and %d connections to other destinations\n", t.more)
	}
	if text.Len() > 0 {
		w.send(Event{Kind: Log, Stderr: true, Data: []byte(text.String())})
	}
}

func compareDestinations(a, b destination) int {
	return cmp.Or(cmp.Compare(a.Host, b.Host), a.Addr.Compare(b.Addr), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Refused, b.Refused), cmp.Compare(a.Failed, b.Failed))
}

func (d destination) String() string {
	name := d.Host
	switch {
	case name == "":
		name = d.Addr.String()
	case d.Addr.IsValid() && name != d.Addr.String():
		name += " (" + d.Addr.String() + ")"
	}
	if d.Port == 0 {
		return name
	}
	return fmt.Sprintf("%s port %d", name, d.Port)
}

func (s *sum) outcome(d destination) string {
	switch {
	case d.Refused != "":
		return "refused: " + d.Refused
	case d.Failed != "":
		return "not reached: " + d.Failed
	case s.connections == 1:
		return fmt.Sprintf("1 connection, %s sent, %s received", units.BytesSize(float64(s.sent)), units.BytesSize(float64(s.received)))
	}
	return fmt.Sprintf("%d connections, %s sent, %s received", s.connections, units.BytesSize(float64(s.sent)), units.BytesSize(float64(s.received)))
}

// explain adds to a RUN's failure that a connection was refused, as this is the likely reason.
func (t *traffic) explain(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, exit := err.(*sandbox.ExitError); !exit {
		return err
	}
	for _, d := range slices.SortedFunc(maps.Keys(t.seen), compareDestinations) {
		if d.Refused != "" {
			return hinted{err, fmt.Sprintf("the sandbox refused a connection to %s: %s", d, d.Refused)}
		}
	}
	return err
}
