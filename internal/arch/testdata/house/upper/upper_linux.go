//go:build linux && !linux

package upper

import _ "example.org/big/inner" // want "only lower may"
