package egress

import (
	"context"
	"fmt"
)

// The ways to catch connections, for tests of each.
const (
	AtPorts    = atPorts
	Redirected = redirected
	Held       = held
)

// OpenBy is Open on a machine whose kernel can do no more than a.
func OpenBy(ctx context.Context, o Options, a ability) (*Network, error) { return open(ctx, o, a) }

type Ability = ability

// Path names the network namespace.
func (n *Network) Path() string { return fmt.Sprintf("/proc/self/fd/%d", n.inside.namespace.Fd()) }
