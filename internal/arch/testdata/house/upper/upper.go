package upper

import (
	"fmt"
	sys "os"

	"example.com/house/lower"
	"example.com/house/state" // want "upper imports state: imports only go down, and what upper may know is lower"
	_ "example.org/big"       // want "upper imports example.org/big: only lower may, because it is heavy"
	_ "example.org/big/door"  // want "only cmd/... may, because guests enter there"
	_ "example.org/bigger"
)

func init() { // want "upper has func init"
	lower.Down()
}

// Up uses every forbidden name once, and its namesakes that are not forbidden.
func Up() string {
	fmt.Printf("%v", state.Table) // want "upper uses fmt.Printf: it prints"
	defer sys.Exit(1)             // want "upper uses os.Exit: it ends the process"
	if state.Table == nil {
		panic("no table") // want "upper uses panic: it ends the process"
	}
	return fmt.Sprint(namesakes{}.Exit())
}

type namesakes struct{}

func (namesakes) Exit() int {
	var os namesakes
	panic := func(string) int { return os.Exit() }
	return panic("mine")
}
