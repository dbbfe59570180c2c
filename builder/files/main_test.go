package files

func singleID() bool { return false }
