package stray // want "package stray has no place in the house"
