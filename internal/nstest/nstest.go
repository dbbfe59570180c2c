// Package nstest runs the tests of a package as root of a user namespace,
// whoever started them. It knows nothing about what is tested.
//
//	func TestMain(m *testing.M) { nstest.Main(m) }
package nstest

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/cooper-build/cooper/sandbox/userns"
)

// Main runs the tests inside a user and mount namespace and exits with their
// status. Outside one it starts the test binary again through userns.Enter,
// with the best map the caller can have, or with a single id when
// COOPER_TEST_USERNS is "single". The map is printed, so that a log shows which
// rung was tested. It never skips: no namespace is a failure.
func Main(m *testing.M) {
	if ids, ok := userns.Inside(); ok {
		fmt.Fprintf(os.Stderr, "nstest: id map %s %s\n", ids, ids.Why)
		os.Exit(m.Run())
	}
	var options userns.Options
	if os.Getenv("COOPER_TEST_USERNS") == "single" {
		options.Only = userns.Single
	}
	code, err := userns.Enter(context.Background(), os.Args, os.Environ(), options)
	if err != nil {
		fmt.Fprintln(os.Stderr, "nstest:", err)
		if h, ok := err.(interface{ Hint() string }); ok {
			fmt.Fprintln(os.Stderr, "nstest: hint:", h.Hint())
		}
		os.Exit(1)
	}
	os.Exit(code)
}

// Single reports whether the tests run under a single-id map, where the only
// owner a file can have is root.
func Single() bool {
	ids, ok := userns.Inside()
	return ok && ids.Kind == userns.Single
}
