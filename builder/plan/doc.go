// Package plan turns a Dockerfile into a graph of few, closed kinds of steps
// and refuses, with the line, what the rest of the program cannot do.
//
// The Dockerfile language is BuildKit's own frontend, run in this process
// against a gateway client which answers from the context directory and from a
// Resolver. What it emits is decoded here and nowhere else: no type of BuildKit
// and no protobuf leaves this package. It knows nothing of snapshots, sandboxes
// or registries, runs nothing, writes nothing, and reads from the context only
// the Dockerfile and the ignore files.
//
// A Graph is made once by Make and is a value from then on.
package plan
