// Tool may do what only commands may.
package main

import (
	"fmt"
	"os"

	"example.com/house/upper"
	_ "example.org/big/door"
)

func main() {
	fmt.Println(upper.Up())
	os.Exit(0)
}
