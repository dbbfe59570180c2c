package lower

import (
	"os"

	_ "example.com/house/upper" // want "lower imports upper: imports only go down, and what lower may know is nothing of ours"
	_ "example.org/big"
)

// Child is a process of its own.
type Child struct{}

// Run is excepted by name; Down is not.
func (*Child) Run() { os.Exit(0) }

func Down() { os.Exit(0) } // want "lower uses os.Exit"
