package upper

import (
	"fmt"

	_ "example.com/house/state"
)

var counter int

func init() { fmt.Println("tests may") }
